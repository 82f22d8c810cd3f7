"""Output head and cross entropy in one, a block of positions at a time, with the gradient formed on the way forward.

The logits of a whole micro-batch never exist: V numbers for each position, in several copies, are what runs out of
memory first with a vocabulary of 152,000. Forming the gradient at once saves the head's third matrix product as well.
`attach` puts this into the head's own module, so that engines which gather its weight when it is called do so here,
once for all blocks, and with the same calls on every rank.
"""

import types

import torch

from tokens import IGNORE_INDEX

BLOCK = {"cpu": 256, "cuda": 2048}  # positions at a time: enough for full speed, logits of 0.3 GB and 2.5 GB at most


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
        for start in range(0, len(hidden), BLOCK.get(kind, 2048)):
            part = slice(start, start + BLOCK.get(kind, 2048))
            states, wanted = hidden[part].to(dtype), targets[part]
            kept = (wanted != IGNORE_INDEX).float()
            index = wanted.clamp(min=0)[:, None]
            logits = torch.nn.functional.linear(states, head, None if bias is None else bias.to(dtype)).float()
            scale = logits.logsumexp(1)
            loss = scale - (1 - smoothing) * logits.gather(1, index)[:, 0]
            if smoothing:
                loss = loss - smoothing * logits.mean(1)
            total += (loss * kept).sum()
            if wanted_hidden or wanted_weight:
                grad = logits.sub_(scale[:, None]).exp_()  # the probabilities, in the logits' place
                grad.scatter_add_(1, index, grad.new_full(index.shape, smoothing - 1))
                if smoothing:
                    grad -= smoothing / grad.shape[1]
                grad = grad.mul_(kept[:, None]).to(dtype)
                if wanted_hidden:
                    grad_hidden[part] = grad @ head
                if wanted_weight:
                    grad_weight += grad.T @ states
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        hidden = None if hidden is None else hidden * grad.to(hidden.dtype)
        weight = None if weight is None else (weight * grad).to(ctx.dtype)
        return hidden, weight, None, None, None


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
