"""The training loss: cross entropy summed over the supervised tokens of a micro-batch, without its logits in memory.

The output head and the cross entropy are computed together, a block of positions at a time, and the gradient is formed
in the forward pass (as in Liger Kernel, arXiv 2410.10989). The logits of a whole micro-batch never exist: V numbers for
each position, in several copies, are what exhausts memory first with a vocabulary of 152,000. It also saves one of the
head's three matrix products.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) computes the same and is as fast, but returns the loss in
bfloat16, three digits (benchmarks/RESULTS.md); here it is summed in float32.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recipe.console import UserError, say
from recipe.dataset.collator import Batch
from recipe.dataset.encoding import IGNORE_INDEX
from recipe.model.precision import computing_dtype

# Positions whose logits exist at a time: enough for full speed; with a vocabulary of 152,000 they and their copies take
# at most 0.3 GB on a CPU and 2.5 GB on a GPU.
BLOCK = {"cpu": 256, "cuda": 2048}
# Of these, the positions whose softmax is computed at a time: 32 x 152,000 numbers nearly fit into a CPU's cache.
ROWS = {"cpu": 32}


class HeadLoss(torch.autograd.Function):
    """Summed cross entropy of a linear head.

    Args:
        hidden: [N, H].
        weight: [V, H].
        bias: [V], not trained, or None.
        targets: int64 [N], IGNORE_INDEX where nothing is learned.
        smoothing: share of each target that is spread over the whole vocabulary.

    Returns:
        float32 scalar. Matrix products run in the precision of autocast, or else of `hidden`; all else in float32.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float) -> Tensor:
        """Compute the loss, and keep its gradients for `backward`."""
        kind = hidden.device.type
        dtype = computing_dtype(hidden)
        head = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted_hidden, wanted_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wanted_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted_weight else None
        block = max(1, min(len(hidden), BLOCK.get(kind, BLOCK["cuda"])))
        memory = hidden.new_empty((block, len(head)), dtype=dtype)  # allocating it for each block would take longer
        for start in range(0, len(hidden), block):
            states, block_targets = hidden[start : start + block].to(dtype), targets[start : start + block]
            logits = torch.mm(states, head.T, out=memory[: len(states)])
            if bias is not None:
                logits += bias.to(dtype)
            rows = ROWS.get(kind, block)
            for part, part_targets in zip(logits.split(rows), block_targets.split(rows), strict=True):
                total += _replace_by_gradient(part, part_targets, smoothing)
            if wanted_hidden:
                grad_hidden[start : start + block] = logits @ head
            if wanted_weight:
                grad_weight += logits.T @ states
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of `hidden` and `weight` by that of the loss."""
        hidden, weight = ctx.saved_tensors
        hidden = None if hidden is None else hidden * grad.to(hidden.dtype)
        weight = None if weight is None else (weight * grad).to(ctx.dtype)
        return hidden, weight, None, None, None


def _replace_by_gradient(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the summed loss of `logits` [N, V], and overwrite them with its gradient."""
    kept = (targets != IGNORE_INDEX).float()
    index = targets.clamp(min=0)[:, None]
    exact = logits.float()  # the logits themselves if they are float32
    of_targets = exact.gather(1, index)[:, 0]
    mean = exact.mean(1) if smoothing else 0.0
    largest = exact.amax(1)
    powers = exact.sub_(largest[:, None]).exp_()
    sums = powers.sum(1)
    loss = largest + sums.log() - (1 - smoothing) * of_targets - smoothing * mean
    powers.scatter_add_(1, index, (smoothing - 1) * sums[:, None])
    if smoothing:
        powers -= smoothing / powers.shape[1] * sums[:, None]
    logits.copy_(powers.mul_((kept / sums)[:, None]))
    return (loss * kept).sum()


class FusedHead:
    """The output head of a model, which computes the loss in its own forward while `computes_loss` is open.

    The loss is computed inside the head's module because engines that hold weights in parts gather the head's weight
    when its module is called: once for all blocks, and equally often on every rank.
    """

    def __init__(self, head: nn.Linear):
        self.head, self.targets, self.smoothing = head, None, 0.0
        self.is_last: bool | None = None  # whether the head's output leaves the model unchanged; not yet known
        head.forward = self._forward

    @contextlib.contextmanager
    def computes_loss(self, targets: Tensor, smoothing: float) -> Iterator[None]:
        """Let the head return, in place of logits, the summed loss of `targets`, int64 [N], and the number 1.

        Both are one tensor [1, 1, 2], with which the model does what it does with logits.
        """
        self.targets, self.smoothing = targets, smoothing
        try:
            yield
        finally:
            self.targets = None

    def _forward(self, hidden: Tensor) -> Tensor:
        if self.targets is None:
            return nn.functional.linear(hidden, self.head.weight, self.head.bias)
        loss = HeadLoss.apply(hidden.flatten(0, -2), self.head.weight, self.head.bias, self.targets, self.smoothing)
        return torch.stack([loss, torch.ones_like(loss)])[None, None]


def obstacle_to_fusing(model: PreTrainedModel) -> str | None:
    """Return why the loss cannot be computed in the model's output head, or None if it can."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(head) is not nn.Linear:
        return f"its output head is of the type {type(head).__name__}"
    if head.bias is not None and head.bias.requires_grad:
        return "the bias of its output head is trained"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            return f"it changes its logits ({name})"
    return None


def fuse_loss_into_head(model: PreTrainedModel) -> FusedHead | None:
    """Let the model's output head compute the loss; None if there is an obstacle (see `obstacle_to_fusing`)."""
    return FusedHead(model.get_output_embeddings()) if obstacle_to_fusing(model) is None else None


def supervised_loss(
    model: nn.Module,
    batch: Batch,
    label_smoothing: float = 0.0,
    head: FusedHead | None = None,
    balancing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the cross entropy of one micro-batch from `Collator`.

    Position t predicts the token at t + 1: `shift_labels` holds it at t. The output head computes only the positions
    `logits_to_keep`. The loss is float32.

    Args:
        model: the model, wrapped by its engine or not.
        batch: what `Collator` returns.
        label_smoothing: share of each target that is spread over the whole vocabulary, 0 to 1.
        head: the model's output head from `fuse_loss_into_head`; None computes whole logits.
        balancing: weight of the load-balancing loss of a mixture of experts. It is added once for each supervised
            token, so that the mean over the supervised tokens of an optimizer step has it once.

    Returns:
        (sum over the supervised tokens, a float32 scalar with a gradient; their number, an int64 scalar).

    Raises:
        UserError: the load-balancing loss has no gradient.
    """
    about = ("labels", "padding_tokens", "shared_tokens", "rows")  # what the model does not take
    batch = {name: value for name, value in batch.items() if name not in about}
    targets = batch.pop("shift_labels")[:, batch["logits_to_keep"]].flatten()
    count = (targets != IGNORE_INDEX).sum()
    # With a cache transformers would treat the row as one document.
    options = {"use_cache": False} | ({"output_router_logits": True} if balancing else {})
    if head is not None and head.is_last is not False:
        with head.computes_loss(targets, label_smoothing):
            output = model(**batch, **options)
        loss, one = output.logits.flatten()
        if head.is_last is None:
            head.is_last = bool(one == 1)
            if not head.is_last:
                say("this model changes its logits after the output head: the loss is computed from whole logits.")
        if head.is_last:
            return loss + _balancing_loss(output, balancing) * count, count
    output = model(**batch, **options)
    logits = output.logits.flatten(0, 1).float()
    loss = nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    return loss + _balancing_loss(output, balancing) * count, count


def _balancing_loss(output, weight: float) -> Tensor | float:
    if not weight:
        return 0.0
    if torch.is_grad_enabled() and not output.aux_loss.requires_grad:
        raise UserError(
            "the load-balancing loss of the experts (output_router_logits in the model's config) has no gradient under "
            "reentrant gradient checkpointing; leave out use_reentrant, or set output_router_logits to false there."
        )
    return weight * output.aux_loss
