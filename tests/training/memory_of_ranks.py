"""What every rank of test_memory.py runs: short trainings under one engine, and the bytes that the rank holds in them.

torchrun --nproc_per_node 2 tests/training/memory_of_ranks.py jobs.json results.json

A job is a command line; its result is {kept: bytes of all tensors before the second optimizer step, buckets: bytes that
DDP reduces in a backward pass, zero: DeepSpeed's own numbers, saving: most bytes that saving a whole model took}.
"""

import gc
import json
import pathlib
import sys

import torch
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import FakeTensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import finetune  # noqa: E402
from recipe import console  # noqa: E402
from recipe.model.weight_files import ShardWriter  # noqa: E402


def storages():
    """{(address, bytes)} of all memory under tensors; of a bucket, which may be larger than its use, what views see."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    found = {}
    for tensor in tensors:
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if tensor.device.type != "meta" and not isinstance(tensor, FakeTensor):  # torch.compile keeps some
            storage = tensor.untyped_storage()
            seen = storage if storage.nbytes() < 1e9 else tensor
            found[seen.data_ptr()] = seen.nbytes() if seen is storage else tensor.nbytes
    return set(found.items())


class Watch(finetune.transformers.TrainerCallback):
    """Counts before the second optimizer step, when the optimizer has its averages; once, in the first call."""

    def __init__(self):
        self.trainer, self.before, self.result = None, storages(), {"buckets": 0}

    def count(self, steps):
        if steps == 1 and "kept" not in self.result:
            self.result["kept"] = sum(size for _, size in storages() - self.before)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.count(state.global_step)

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.model_wrapped
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model.register_comm_hook(None, self.reduce)
        if self.trainer.is_deepspeed_enabled:
            self.result["zero"] = {
                "bucket": model.zero_reduce_bucket_size(), "live": model.zero_max_live_parameters(),
                "group": model.zero_sub_group_size(), "overlap": model.zero_overlap_comm(),
            }  # fmt: skip

    def reduce(self, state, bucket):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        if self.trainer.state.global_step == 0:  # no accumulation: one backward pass
            self.result["buckets"] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)


class Watched(finetune.RecipeTrainer):
    before_saving = frozenset()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        watch.trainer = self
        self.add_callback(watch)

    def save_state(self):
        super().save_state()
        self.before_saving = storages()
        finetune.safe_save_model_for_hf_trainer(self, self.args.output_dir)


if __name__ == "__main__":
    jobs, results = json.loads(pathlib.Path(sys.argv[1]).read_text()), {}
    if "--deepspeed" in str(jobs):  # its engine steps before the callback is called
        from deepspeed.runtime.engine import DeepSpeedEngine

        step = DeepSpeedEngine.step

        def counted(engine, *args, **kwargs):
            watch.count(engine.global_steps)
            return step(engine, *args, **kwargs)

        DeepSpeedEngine.step = counted
    finetune.RecipeTrainer = Watched
    write, ShardWriter.LARGEST = ShardWriter.flush, 200_000

    def counted_writing(writer):
        """What is there while a file is written, and was not when it began: see `Watch.result`."""
        if watch.trainer.before_saving:
            held = sum(size for _, size in storages() - watch.trainer.before_saving)
            watch.result["saving"] = max(watch.result.get("saving", 0), held)
        write(writer)

    ShardWriter.flush = counted_writing
    for name, words in jobs.items():
        AcceleratorState._reset_state()
        watch = Watch()
        finetune.train(words)
        results[name], watch = watch.result, None
    if console.rank() == 0:
        pathlib.Path(sys.argv[2]).write_text(json.dumps(results))
    console.leave()
