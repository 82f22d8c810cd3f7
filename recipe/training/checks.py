"""Checks that a run makes on itself: documents are kept apart, saving works, the first step trains all tensors."""

import functools
import re
from enum import StrEnum
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from recipe.console import UserError, say
from recipe.dataset.collator import Collator
from recipe.dataset.rendering import IGNORE_INDEX
from recipe.distributed import engines, weights
from recipe.model import attention
from recipe.model.precision import computing_dtype
from recipe.training.out_of_memory import is_out_of_memory


class Fault(StrEnum):
    """What can be wrong with the gradient of a trained tensor."""

    NONE = "no gradient"
    INFINITE = "no finite gradient"
    ZERO = "a gradient of zero"


def packing_fault(model: nn.Module, collator: Collator, length: int = 16) -> str | None:
    """Return the reason why packed rows of this model are wrong; None if each document is computed as if it were alone.

    One document is computed alone, after other documents, and after others that are equally long. Its logits must not
    change with these; alone they may differ by rounding, as other shapes use other kernels. Layers that look further
    than this short row, in a way that is not known here, count as wrong. Every rank must call this: an engine's forward
    gathers weights.

    Args:
        model: as the engine wraps it.
        collator: a padding-free one.
        length: of the document, in tokens.
    """
    config = getattr(model, "module", model).config.get_text_config()
    unknown = attention.layer_kinds(config) - attention.WHOLE - attention.WINDOWED
    if unknown:
        return f"layers of the kind {', '.join(sorted(unknown))} are not known to keep the documents of a row apart"
    generator = torch.Generator().manual_seed(0)
    # The document after one of a single token: a convolution over more than two would reach the first one.
    lengths = (length, 1, length)
    rows = [torch.randint(config.vocab_size, (sum(lengths),), generator=generator).split(lengths) for _ in range(2)]
    documents = [[[{"input_ids": part.tolist(), "labels": part.tolist()}] for part in row] for row in rows]
    (*before, document), (*others, _) = documents
    training = model.training
    try:
        alone, beside, changed = (_logits(model, collator([*row, document]), length) for row in ([], before, others))
    except Exception as error:  # whatever the kernels of a model raise
        if is_out_of_memory(error):
            raise
        return f"its kernels cannot compute such rows ({type(error).__name__}: {' '.join(str(error).split()):.200})"
    finally:
        model.train(training)
    rounding = min(1e-3, 100 * torch.finfo(computing_dtype(alone)).eps)
    alone, beside, changed = (logits.float() / alone.float().abs().max() for logits in (alone, beside, changed))
    if (beside - changed).abs().max() < rounding and (beside - alone).abs().max() < 5e-2:
        return None
    return "this model mixes the documents of a row"


def can_share_prefixes(model: nn.Module, length: int = 16) -> bool:
    """Return True if documents that share the tokens they begin with are computed as without; every rank must call this.

    The logits of the model must be the same, and attention and its gradients those of torch with a mask.

    Args:
        model: as the engine wraps it.
        length: of what two documents have in common, in tokens.
    """
    config = getattr(model, "module", model).config.get_text_config()
    if not attention.can_share_prefixes(config):
        return False
    generator = torch.Generator().manual_seed(0)
    alike, *rest = torch.randint(config.vocab_size, (2 * length,), generator=generator).split([length, 5, length - 5])
    rows = [torch.cat([alike, part]).tolist() for part in rest]
    documents = [[{"input_ids": ids, "labels": [IGNORE_INDEX] * (length + 1) + ids[length + 1 :]}] for ids in rows]
    batches = [Collator(share_prefixes=on)(documents) for on in (False, True)]
    training = model.training
    try:
        plain, shared = (_logits(model, batch, length - 5) for batch in batches)
        found, expected = _attention_with_gradients(batches[1], config, plain.device, computing_dtype(plain))
    except Exception as error:  # whatever the kernels of a model raise
        if is_out_of_memory(error):
            raise
        say(
            f"documents that begin alike are computed whole: {type(error).__name__}: {' '.join(str(error).split()):.200}"
        )
        return False
    finally:
        model.train(training)
    rounding = min(5e-2, 1e4 * torch.finfo(computing_dtype(plain)).eps)
    pairs = zip([shared, *found], [plain, *expected], strict=True)
    same = all(bool((one - other).float().norm() < rounding * other.float().norm()) for one, other in pairs)
    if not same:
        say("documents that begin alike are computed whole: this model computes what they share differently.")
    return same


def _attention_with_gradients(batch, config, device, dtype):
    """Attention over a row, and the gradients of its inputs: by `packed_attention`, and by torch's own in float32."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, batch["input_ids"].shape[1], width) for count in (heads, groups, groups, heads)]
    *states, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    row = {name: batch[name] for name in ("max_length_q", "max_length_k")}
    row |= {name: batch[name].to(device) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "key_places")}

    def packed(*inputs):
        return attention.packed_attention(None, *inputs, None, **row)[0].transpose(1, 2)

    @torch.autocast(device.type, enabled=False)
    def plain(*inputs):
        """Compute every document whole, and keep the last tokens, which are its own."""
        documents = row["key_places"].split(row["cu_seq_lens_k"].diff().tolist())
        outputs = []
        for places, own in zip(documents, row["cu_seq_lens_q"].diff().tolist(), strict=True):
            document = (states[:, :, places] for states in inputs)
            outputs.append(scaled_dot_product_attention(*document, is_causal=True, enable_gqa=True)[:, :, -own:])
        return torch.cat(outputs, dim=2)

    def computed(function, kind):
        inputs = [part.to(kind, copy=True).requires_grad_() for part in states]
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), inputs)]

    with torch.enable_grad():
        return computed(packed, dtype), computed(plain, torch.float32)


@torch.no_grad()
def _logits(model, batch, length):
    """Logits of the last `length` tokens of a packed row."""
    model.eval()
    tokens = batch["input_ids"].shape[1]
    inputs = {name: value for name, value in batch.items() if "label" not in name and name != "shared_tokens"}
    inputs["logits_to_keep"] = torch.arange(tokens - length, tokens)
    moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    return model(**moved, use_cache=False).logits[:, -length:]  # some models ignore `logits_to_keep`


class SelfChecks(transformers.TrainerCallback):
    """Check the run before and at its first optimizer step, when the engine holds the model.

    Before: the engine that was chosen runs, the documents of a row are computed apart (else rows are padded), saving
    works. At the step: the loss reaches every trained tensor. An adapter that is cut off from the loss (frozen
    embeddings under gradient checkpointing, a wrong target) would train for hours and end as it began.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.done = trainer, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from accelerate.utils import gather_object

        trainer = self.trainer
        self.done = False
        engines.assert_engine_runs(trainer)
        collator = trainer.data_collator
        if collator.padding_free:
            with trainer.accelerator.autocast():  # as in training
                fault = packing_fault(trainer.model_wrapped, Collator())
            if fault and args.sequence_parallel > 1:
                raise UserError(f"--sequence_parallel {args.sequence_parallel}: {fault}; leave it out.")
            if fault:
                collator.padding_free = False
                say(
                    f"{fault}: training with padded batches, a row for each document, which takes time and memory for "
                    "the padding."
                )
            # Noise and the experts' balance are of each document; compiled layers want rows of one length.
            elif not (trainer.noise or trainer.balancing or args.torch_compile):
                with trainer.accelerator.autocast():
                    found = gather_object([can_share_prefixes(trainer.model_wrapped)])
                collator.share_prefixes = all(found)
        trainer.rehearse()
        self.keeps_gradients = engines.engine_of(args).keeps_gradients
        if not self.keeps_gradients:
            trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
            self.arrived = torch.zeros(len(trained), 3, device=args.device)
            self.hooks = [p.register_hook(functools.partial(self._arrives, n)) for n, p in enumerate(trained)]

    def _arrives(self, number, gradient):
        self.arrived[number] += torch.stack([~gradient.isfinite().all(), gradient.any(), gradient.new_ones(()).bool()])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.done and self.keeps_gradients:
            self._refuse({name: _fault(p.grad) for name, p in model.named_parameters() if p.requires_grad}, args)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.done and not self.keeps_gradients:
            for hook in self.hooks:
                hook.remove()
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            counts = self.trainer.accelerator.reduce(self.arrived).tolist()
            self._refuse({name: _fault_of(*row) for name, row in zip(names, counts, strict=True)}, args)

    def _refuse(self, faults, args):
        """Stop the run at a fault in {name: Fault or None} that is one."""
        self.done = True
        self.trainer.losses.look()  # of a loss that is not finite, the rows say more than the tensors
        config = getattr(self.trainer.accelerator.unwrap_model(self.trainer.model), "peft_config", {}).get("default")
        lora = config is not None and config.peft_type == "LORA"  # its B starts at zero, so A alone has a zero gradient
        faults = {
            name: fault
            for name, fault in faults.items()
            if fault
            and not re.search(r"\.experts\.\d+\.", name)  # an expert that is not in a stack may have had no token
            and (fault != Fault.ZERO or lora and "lora_B" in name)
            and (fault != Fault.INFINITE or not args.fp16)  # whose loss scale starts high and finds its level
        }
        if faults:
            name, fault = next(iter(faults.items()))
            raise UserError(
                f"the first optimizer step: {len(faults)} trained tensors are not reached by the loss, the first is "
                f"{name} ({fault}); training is stopped. Check the target modules and --gradient_checkpointing."
            )


def _fault(gradient):
    if gradient is None:
        return Fault.NONE
    gradient = weights.gather_full(gradient)
    return _fault_of(not gradient.isfinite().all(), gradient.any(), 1)


def _fault_of(infinite, any_value, arrived):
    """Return the Fault of a gradient or None, from counts: of values not finite, of other values than 0, of arrivals."""
    return Fault.NONE if not arrived else Fault.INFINITE if infinite else None if any_value else Fault.ZERO
