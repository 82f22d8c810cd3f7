"""The saved generation settings: generation stops where training taught it to, and the file can be written."""

from recipe.console import say

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def mend(generation):
    """Drop sampling settings that contradict do_sample=False: transformers refuses to save such a configuration."""
    try:
        generation.validate(strict=True)
    except ValueError:
        say("the model's generation config has sampling settings without do_sample; they are left out.")
        for name in SAMPLING:
            setattr(generation, name, None)


def stop_at(model, tokenizer, encoder):
    """Make the supervised stop token the one at which generation stops, in the generation config and the tokenizer.

    A base model ends texts with another token, and would go on after its answer.
    """
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if encoder.stop_id not in stops:
        model.generation_config.eos_token_id = [encoder.stop_id, *stops]
        say(f"generation will stop at {encoder.stop_token}, which ends an assistant turn; the model had not set it.")
    tokenizer.eos_token, model.config.eos_token_id = encoder.stop_token, encoder.stop_id
    if looks_untrained(model, tokenizer, encoder.stop_id):
        say(
            f"the model looks as if it had never seen {encoder.stop_token}: it may not learn to stop. Add "
            f"--trainable_token_indices {encoder.stop_id}, or start from the chat model."
        )


def looks_untrained(model, tokenizer, token_id):
    """Whether the output head's row of a token is about that of the ids beyond the vocabulary, which nothing trains."""
    head = model.get_output_embeddings().weight.detach()
    if head.ndim != 2 or head.shape[0] <= len(tokenizer) or not head.is_floating_point():
        return False
    unused = head[len(tokenizer) :].float().mean(0)
    usual = head[: len(tokenizer) : 100].float().norm(dim=1).median()
    return bool((head[token_id].float() - unused).norm() < 0.1 * usual)
