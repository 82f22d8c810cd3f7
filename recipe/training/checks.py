"""Checks that a run makes on itself: documents are kept apart, saving works, the first step trains all tensors."""

import functools

import torch
import transformers

from recipe.console import UserError, say
from recipe.distributed import engines, weights

NONE, INFINITE, ZERO = "no gradient", "no finite gradient", "a gradient of zero"


@torch.no_grad()
def documents_are_isolated(model, collator, length=16):
    """Whether a document in a packed row is computed as if it were alone, with this model and attention kernel.

    The same document is computed alone, beside a neighbour, and beside another neighbour (poisoned, so to say). Logits
    must not change with the neighbour; alone they may differ by rounding, as other shapes use other kernels. Every rank
    must call it: an engine's forward gathers weights.
    """
    generator = torch.Generator().manual_seed(0)
    config = getattr(model, "module", model).config
    ids = torch.randint(config.get_text_config().vocab_size, (3, length), generator=generator).tolist()
    document, *neighbours = ([{"input_ids": part, "labels": part}] for part in ids)
    training = model.training
    model.eval()
    logits = []
    for row in ([document], *([neighbour, document] for neighbour in neighbours)):
        batch = collator(row)
        tokens = batch["input_ids"].shape[1]
        inputs = {name: value for name, value in batch.items() if "labels" not in name}
        inputs["logits_to_keep"] = torch.arange(tokens - length, tokens)
        moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        logits.append(model(**moved, use_cache=False).logits.float())
    model.train(training)
    alone, beside, poisoned = logits
    scale = alone.abs().max()
    return bool((beside - poisoned).abs().max() < 1e-3 * scale and (beside - alone).abs().max() < 5e-2 * scale)


class SelfChecks(transformers.TrainerCallback):
    """What a run tries before and at its first optimizer step, when the engine holds the model.

    Before: documents of a row are computed apart (else rows are padded), and saving works. At the step: the loss
    reaches every trained tensor. Without that, an adapter cut off from the loss (frozen embeddings under gradient
    checkpointing, a wrong target) trains for hours and ends as it began.
    """

    def __init__(self, trainer):
        self.trainer, self.done = trainer, False

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.done = False
        engines.assert_engine_runs(trainer)
        collator = trainer.data_collator
        if collator.padding_free:
            with trainer.accelerator.autocast():  # as in training
                collator.padding_free = documents_are_isolated(trainer.model_wrapped, collator)
            if not collator.padding_free:
                say("this model mixes neighbouring documents of a row: training with padded batches.")
        trainer.rehearse()
        self.keeps_gradients = engines.engine_of(args).keeps_gradients
        if not self.keeps_gradients:
            trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
            self.arrived = torch.zeros(len(trained), 3, device=args.device)
            self.hooks = [p.register_hook(functools.partial(self._arrives, n)) for n, p in enumerate(trained)]

    def _arrives(self, number, gradient):
        self.arrived[number] += torch.stack([~gradient.isfinite().all(), gradient.any(), gradient.new_ones(()).bool()])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.done and self.keeps_gradients:
            self._stop_at({name: _fault(p.grad) for name, p in model.named_parameters() if p.requires_grad}, args)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self.done and not self.keeps_gradients:
            for hook in self.hooks:
                hook.remove()
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            counts = self.trainer.accelerator.reduce(self.arrived).tolist()
            self._stop_at({name: _fault_of(*row) for name, row in zip(names, counts, strict=True)}, args)

    def _stop_at(self, faults, args):
        self.done = True
        faults = {name: fault for name, fault in faults.items() if fault}
        faults = {name: fault for name, fault in faults.items() if ".experts." not in name}  # none may have chosen it
        faults = {name: fault for name, fault in faults.items() if fault != ZERO or "lora_B" in name}
        if args.fp16:  # the loss scale starts high and finds its level in the first steps
            faults = {name: fault for name, fault in faults.items() if fault != INFINITE}
        if faults:
            name, fault = next(iter(faults.items()))
            raise UserError(
                f"the first optimizer step: {len(faults)} trained tensors are not reached by the loss, the first is "
                f"{name} ({fault}); training is stopped. Check the target modules and --gradient_checkpointing."
            )


def _fault(gradient):
    if gradient is None:
        return NONE
    gradient = weights.gather_full(gradient)
    return _fault_of(not gradient.isfinite().all(), gradient.any(), 1)


def _fault_of(infinite, any_value, arrived):
    """What is wrong with a gradient, from counts of arrivals: those not finite, those with a value, all; or None."""
    return NONE if not arrived else INFINITE if infinite else None if any_value else ZERO
