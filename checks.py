"""Checks that a run makes on itself: documents of a row are kept apart, and the first step trains every tensor."""

import torch
import transformers

from conversations import UserError


@torch.no_grad()
def documents_are_isolated(model, collator, length=16):
    """Whether a document in a packed row is computed as if it were alone, with this model and attention kernel.

    The same document is computed alone, beside a neighbour, and beside another neighbour (poisoned, so to say). Logits
    must not change with the neighbour; alone they may differ by rounding, as other shapes use other kernels.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (3, length), generator=generator).tolist()
    document, *neighbours = ([{"input_ids": part, "labels": part}] for part in ids)
    training = model.training
    model.eval()
    logits = []
    for row in ([document], *([neighbour, document] for neighbour in neighbours)):
        batch = collator(row)
        tokens = batch["input_ids"].shape[1]
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "document_lengths")}
        inputs["logits_to_keep"] = torch.arange(tokens - length, tokens)
        moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        logits.append(model(**moved, use_cache=False).logits.float())
    model.train(training)
    alone, beside, poisoned = logits
    scale = alone.abs().max()
    return bool((beside - poisoned).abs().max() < 1e-3 * scale and (beside - alone).abs().max() < 5e-2 * scale)


class FirstStepCheck(transformers.TrainerCallback):
    """Stops a run whose first optimizer step would leave some trained tensor as it is, or spoil it.

    Without this, an adapter cut off from the loss (frozen embeddings under gradient checkpointing, a wrong target)
    trains for hours and ends as it began.
    """

    def __init__(self):
        self.done = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.done or args.deepspeed:  # DeepSpeed keeps gradients in buffers of its own
            return
        self.done = True
        faults = {name: fault for name, fault in map(_fault, model.named_parameters()) if fault}
        if args.fp16:  # the loss scale starts high and finds its level in the first steps
            faults = {name: fault for name, fault in faults.items() if fault != "no finite gradient"}
        if faults:
            name, fault = next(iter(faults.items()))
            raise UserError(
                f"the first optimizer step: {len(faults)} trained tensors are not reached by the loss, the first is "
                f"{name} ({fault}); training is stopped. Check the target modules and --gradient_checkpointing."
            )


def _fault(named):
    name, parameter = named
    if not parameter.requires_grad or ".experts." in name:  # an expert that no token chose has no gradient
        return name, None
    if parameter.grad is None:
        return name, "no gradient"
    if not parameter.grad.isfinite().all():
        return name, "no finite gradient"
    return name, "a gradient of zero" if "lora_B" in name and not parameter.grad.any() else None
