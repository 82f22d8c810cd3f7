"""Repair the generation settings of a model: generation stops where training ends an answer, and the file is valid."""

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipe.console import say
from recipe.dataset.encoding import ChatEncoder

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Distance of a row from the mean of the unused rows, over the usual norm of a row. All unused rows receive the same
# gradients, so theirs is near 0; that of a trained row, as of a random one, is near 1.
UNTRAINED = 0.1


def drop_sampling_settings(generation: GenerationConfig) -> None:
    """Remove sampling settings that contradict do_sample=False, which transformers refuses to save."""
    try:
        generation.validate(strict=True)
    except ValueError:
        say("the model's generation config has sampling settings without do_sample; they are left out.")
        for name in SAMPLING:
            setattr(generation, name, None)


def stop_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder) -> None:
    """Make generation stop at the token that ends an assistant turn, in the generation config and the tokenizer.

    A base model ends texts with another token and would continue after its answer. Prints what it changes, and a
    warning if the model was probably never trained on that token.
    """
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    missing = {token: i for token, i in zip(encoder.stop_tokens, encoder.stop_ids, strict=True) if i not in stops}
    if missing:
        model.generation_config.eos_token_id = [*missing.values(), *stops]
        tokens = " and ".join(missing)
        say(f"generation will stop at {tokens}, which ends an assistant turn; the model had not set it.")
    stop_token, stop_id = encoder.stop_tokens[0], encoder.stop_ids[0]
    tokenizer.eos_token = stop_token
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "eos_token_id"):  # the configuration of a vision checkpoint may have none
            config.eos_token_id = stop_id
    if looks_untrained(model, tokenizer, stop_id):
        say(
            f"the model has probably never seen {stop_token}: it may not learn to stop. Add "
            f"--trainable_token_indices {stop_id}, or start from the chat model."
        )


def looks_untrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Return True if the output head's row of a token is near the mean row of the unused ids beyond the vocabulary.

    Nothing trains the unused ids. False if there are none, or if the weights are in parts or in 4 bits.
    """
    head = model.get_output_embeddings().weight.detach()
    if head.ndim != 2 or head.shape[0] <= len(tokenizer) or not head.is_floating_point():
        return False
    unused = head[len(tokenizer) :].float().mean(0)
    usual = head[: len(tokenizer) : 100].float().norm(dim=1).median()
    return bool((head[token_id].float() - unused).norm() < UNTRAINED * usual)
