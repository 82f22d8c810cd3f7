"""Output head and cross entropy in one, a block of positions at a time, with the gradient formed on the way forward.

The logits of a whole micro-batch never exist: V numbers for each position, in several copies, are what runs out of
memory first with a vocabulary of 152,000. Forming the gradient at once saves the head's third matrix product as well.
`attach` puts this into the head's own module, so that engines which gather its weight when it is called do so here,
once for all blocks, and with the same calls on every rank.
"""

import types

import torch

from recipe.dataset.encoding import IGNORE_INDEX

BLOCK = {"cpu": 256, "cuda": 2048}  # positions at a time: enough for full speed, logits of 0.3 GB and 2.5 GB at most
ROWS = {"cpu": 32}  # of them whose logits are looked at in float32 at a time, near enough to a CPU's cache


class HeadLoss(torch.autograd.Function):
    """Summed cross entropy of a linear head.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V] or None, not trained.
        targets: int64 [N], IGNORE_INDEX where there is nothing to learn.
        smoothing: share of each target that is spread over the whole vocabulary.
    Returns:
        float32 scalar. Matrix products run in the precision of autocast, or of `hidden`; all else in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, smoothing):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        head = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted_hidden, wanted_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wanted_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted_weight else None
        block = max(1, min(len(hidden), BLOCK.get(kind, 2048)))
        memory = hidden.new_empty((block, len(head)), dtype=dtype)  # fresh pages for each block would take longer
        for start in range(0, len(hidden), block):
            states, wanted = hidden[start : start + block].to(dtype), targets[start : start + block]
            logits = torch.mm(states, head.T, out=memory[: len(states)])
            if bias is not None:
                logits += bias.to(dtype)
            rows = ROWS.get(kind, block)
            for part, its_targets in zip(logits.split(rows), wanted.split(rows), strict=True):
                total += _loss_and_gradient(part, its_targets, smoothing)
            if wanted_hidden:
                grad_hidden[start : start + block] = logits @ head
            if wanted_weight:
                grad_weight += logits.T @ states
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        hidden = None if hidden is None else hidden * grad.to(hidden.dtype)
        weight = None if weight is None else (weight * grad).to(ctx.dtype)
        return hidden, weight, None, None, None


def _loss_and_gradient(logits, targets, smoothing):
    """Summed loss of logits [N, V], which turn into its gradient."""
    kept = (targets != IGNORE_INDEX).float()
    index = targets.clamp(min=0)[:, None]
    exact = logits.float()  # the logits themselves, where they are float32
    wanted = exact.gather(1, index)[:, 0]
    mean = exact.mean(1) if smoothing else 0.0
    largest = exact.amax(1)
    powers = exact.sub_(largest[:, None]).exp_()
    sums = powers.sum(1)
    loss = largest + sums.log() - (1 - smoothing) * wanted - smoothing * mean
    powers.scatter_add_(1, index, (smoothing - 1) * sums[:, None])
    if smoothing:
        powers -= smoothing / powers.shape[1] * sums[:, None]
    logits.copy_(powers.mul_((kept / sums)[:, None]))
    return (loss * kept).sum()


def attach(model):
    """Teach the model's head to return the loss of the targets that it is given, in place of logits.

    Returns:
        The head, or None where it is no plain linear layer or the model changes its logits afterwards.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    changes = [getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    if type(head) is not torch.nn.Linear or any(value not in (None, 1.0) for value in changes):
        return None
    if head.bias is not None and head.bias.requires_grad:
        return None
    head.targets, head.smoothing = None, 0.0
    head.forward = types.MethodType(_forward, head)
    return head


def _forward(head, hidden):
    if head.targets is None:
        return torch.nn.functional.linear(hidden, head.weight, head.bias)
    targets = head.targets.flatten()
    states = hidden.flatten(0, -2)
    return HeadLoss.apply(states, head.weight, head.bias, targets, head.smoothing)[None, None, None]


def supervised_loss(model, batch, label_smoothing=0.0, head=None):
    """Cross entropy of one micro-batch from `Collator`.

    The output head sees only `logits_to_keep`, and the loss is computed in float32.
    Args:
        label_smoothing: share of each target that is spread over the whole vocabulary, 0 to 1.
        head: the model's, when `head_loss.attach` has taught it the loss; the logits then never exist.
    Returns:
        (sum over supervised tokens: float32 scalar with a gradient, their number: int64 scalar).
    """
    batch = {name: value for name, value in batch.items() if name not in ("labels", "padding_tokens")}
    targets = batch.pop("shift_labels")[:, batch["logits_to_keep"]].flatten()
    # A cache would make transformers treat the row as one document.
    if head is not None:
        head.targets, head.smoothing = targets, label_smoothing
        try:
            return model(**batch, use_cache=False).logits.squeeze(), (targets != IGNORE_INDEX).sum()
        finally:
            head.targets = None
    logits = model(**batch, use_cache=False).logits.flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    return total, (targets != IGNORE_INDEX).sum()
