"""The Hugging Face Trainer with this recipe's loss, order of rows, evaluation and saving.

Reads in the order of a run: the loss of a micro-batch, the rows of an epoch, evaluation, the log, saving.
"""

import glob
import json
import math
import os
import shutil

import torch
import transformers
from transformers.trainer_pt_utils import LengthGroupedSampler

from recipe.console import UserError
from recipe.dataset import packing
from recipe.distributed import engines, weights
from recipe.model import rope
from recipe.model.base_files import BaseFiles
from recipe.model.loss import fuse_loss_into_head, supervised_loss
from recipe.training import answers, checkpoints, checks
from recipe.training.throughput import Throughput


class RecipeTrainer(transformers.Trainer):
    """The Trainer with a token-weighted loss on supervised positions only, exact evaluation and a `best` folder."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the supervised tokens of the whole optimizer step

    def __init__(self, model, **kwargs):
        config = model.config.get_text_config()
        use_cache = config.use_cache
        # Of the settings that transformers sets while it trains, those that the configuration has not. That of a vision
        # checkpoint has them in its part for text.
        self._absent = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"} - vars(model.config).keys()
        super().__init__(model, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count those tokens, over all ranks
        # The Trainer has switched the cache off in the config that gets saved; `supervised_loss` does so in each call.
        config.use_cache = use_cache
        # transformers before 5.23 clears it when training starts, as Qwen's tokenizers name no such token.
        self._bos = config.bos_token_id, self.model.generation_config.bos_token_id
        self.head = fuse_loss_into_head(self.model)
        self.best_loss = math.inf
        self._eval_sums = self._file_sums = None
        self.questions, self.metric, self.stop_id = [], None, None  # set for --eval_generate
        self.record = {}  # what checkpoints remember of the run, see resume.py
        self.throughput = Throughput(self)
        self.add_callback(checks.SelfChecks(self))
        self.add_callback(self.throughput)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Summed cross entropy of the supervised tokens / their number in the optimizer step (None: in the batch)."""
        evaluating = self._file_sums is not None
        smoothing = 0.0 if evaluating else self.args.label_smoothing_factor
        total, supervised = supervised_loss(model, inputs, smoothing, self.head)
        if not evaluating:
            self.throughput.add(inputs, supervised)
        else:
            self._file_sums += torch.stack([total.detach().double(), supervised.double()])
        count = num_items_in_batch if num_items_in_batch is not None else supervised.clamp(min=1)
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks, the count is their sum
        return (loss, {}) if return_outputs else loss

    def floating_point_ops(self, inputs):
        return 0  # the Trainer would walk through all parameters for each micro-batch; see throughput.py

    def get_train_dataloader(self):
        """Fills the last batch of an epoch with empty conversations, where the default would train some rows twice."""
        dataset = self.train_dataset
        if not self.args.dataloader_drop_last:
            self.train_dataset = packing.PaddedToBatch(dataset, self.args.train_batch_size * self.args.world_size)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _get_train_sampler(self, train_dataset=None):
        strategy, dataset = self.args.train_sampling_strategy, getattr(train_dataset, "dataset", train_dataset)
        if strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed

        def order():  # the same on every rank, and after a resume
            generator = torch.Generator().manual_seed(seed + int(self.state.epoch or 0))
            if strategy == "random":
                return torch.randperm(len(dataset), generator=generator)
            lengths = [dataset.lengths[number] for number in dataset.kept]
            rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return torch.tensor(list(LengthGroupedSampler(rows, lengths=lengths, generator=generator)))

        return packing.EpochSampler(order, len(dataset), len(train_dataset))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def get_eval_dataloader(self, eval_dataset=None):
        """Fills the last batches with empty conversations, where the default would count some rows twice."""
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        getattr(self, "_eval_dataloaders", {}).clear()  # kept for persistent workers, under one name for all files
        return super().get_eval_dataloader(
            packing.PaddedToBatch(dataset, self.args.eval_batch_size * self.args.world_size)
        )

    def evaluation_loop(self, dataloader, description, metric_key_prefix="eval", **kwargs):
        self._file_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(dataloader, description, metric_key_prefix=metric_key_prefix, **kwargs)
            sums = self.accelerator.reduce(self._file_sums)
        finally:
            self._file_sums = None
        output.metrics[f"{metric_key_prefix}_loss"] = (sums[0] / sums[1]).item()
        self._eval_sums = self._eval_sums + sums if self._eval_sums is not None else sums
        return output

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Token-weighted loss over all evaluation files, `eval_loss`, and over each of several, `eval_NAME_loss`."""
        if eval_dataset is not None:  # one of the files; the Trainer calls this method for each
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._eval_sums = None
        several = len(self.eval_dataset) > 1
        metrics = super().evaluate(None if several else next(iter(self.eval_dataset)), ignore_keys, metric_key_prefix)
        if several:
            metrics["eval_loss"] = (self._eval_sums[0] / self._eval_sums[1]).item()
            self.log({"eval_loss": metrics["eval_loss"]})
        if self.questions:
            scores = self._generate_answers()
            self.log(scores)
            metrics.update(scores)
        if metrics["eval_loss"] < self.best_loss:
            self.best_loss = metrics["eval_loss"]
            folder = os.path.join(self.args.output_dir, "best")
            self.save_model(folder, _internal_call=True)
            if self.args.should_save:
                with open(os.path.join(folder, "metrics.json"), "w", encoding="utf-8") as file:
                    json.dump({"eval_loss": self.best_loss, "step": self.state.global_step}, file)
        return metrics

    def _generate_answers(self):
        """Greedy answers to the held-out prompts, shared out among the ranks; `eval_exact_match` and so on."""
        from accelerate.utils import gather_object

        # Where every forward gathers weights from all ranks, all ranks must generate equally long: each answers all.
        together = engines.engine_of(self.args).shards_weights
        mine = self.questions[0 if together else self.args.process_index :: 1 if together else self.args.world_size]
        longest = max(len(question.reference_ids) for question in self.questions)
        model = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            texts = answers.answer(model, self.processing_class, mine, self.stop_id, 2 * longest + 16)
        scores = gather_object([answers.scores(*pair, self.metric) for pair in zip(texts, mine, strict=True)])
        return {f"eval_{name}": value for name, value in answers.mean_scores(scores).items()}

    def remember_best(self):
        """Take up the best loss of the run that is resumed, so that `best` is replaced by something better only."""
        path = os.path.join(self.args.output_dir, "best", "metrics.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.best_loss = json.load(file)["eval_loss"]

    def log(self, logs, *args, **kwargs):
        norm = None if self.args.fp16 else logs.get("grad_norm")  # in fp16 an overflow skips its step and is normal
        bad = [value for value in (logs.get("loss"), logs.get("train_loss"), norm) if not math.isfinite(value or 0.0)]
        if bad:
            self._stop(f"the loss is {logs.get('loss', logs.get('train_loss'))} and the gradient norm {norm}")
        if "loss" in logs:
            logs |= self.throughput.entry()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False, rows=None):
        """Every rank gathers, rank 0 writes and reads back, and every rank learns of what went wrong."""
        output_dir = output_dir or self.args.output_dir
        if engines.engine_of(self.args).deepspeed_stage == 3:
            self.model_wrapped.empty_partition_cache()  # generation may have left weights on their way
        model = self.accelerator.unwrap_model(self.model)
        state = weights.gather_state_dict(model, self.args.should_save, rows)
        problem = names = None
        if self.args.should_save:
            try:
                weights.refuse_infinite(state)  # before anything good is written over
                if not hasattr(model, "peft_config"):
                    base = BaseFiles(model, self.args.cache_dir)
                    names = base.names()
                    state |= base.unchanged() if rows is None else {}
                self._save(output_dir, state)
                if names is not None:
                    base.copy_processor(output_dir)
                # The first step may have a learning rate of 0, and in fp16 the first ones may be skipped.
                moved = self.state.global_step > (20 if self.args.fp16 else 1) and self.args.learning_rate > 0
                checkpoints.verify_saved(output_dir, state, moved, names=names if rows is None else None)
            except Exception as error:  # told on every rank, see weights.raise_on_all_ranks
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                problem = f"{output_dir}: cannot be saved: {kind}{' '.join(str(error).split())}"
        weights.raise_on_all_ranks(problem)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def rehearse(self):
        """Write and check a small copy through the path of all saves, so that no run fails at its last line."""
        folder = os.path.join(self.args.output_dir, ".rehearsal")
        self.save_model(folder, _internal_call=True, rows=1)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(folder)

    def _save(self, output_dir, weights):
        """Weights, tokenizer and generation config, for checkpoints, too; files of another kind of training go."""
        model = self.accelerator.unwrap_model(self.model)
        model.config.get_text_config().bos_token_id, model.generation_config.bos_token_id = self._bos
        for name in self._absent & vars(model.config).keys():
            delattr(model.config, name)
        adapter = hasattr(model, "peft_config")
        if os.path.exists(os.path.join(output_dir, "training_args.bin")):  # an earlier run's folder
            stale = ("model*.safetensors*", *["config.json"] * adapter, *["adapter_*"] * (not adapter))
            for path in (path for pattern in stale for path in glob.glob(os.path.join(output_dir, pattern))):
                os.remove(path)  # else whoever loads the folder would find both and take one
        super()._save(output_dir, weights)
        model.generation_config.save_pretrained(output_dir)
        if adapter and rope.is_extended(model.config.get_text_config()):
            model.config.save_pretrained(output_dir)  # the base's own file has the window before --rope_scaling

    def _save_checkpoint(self, model, trial):
        """A checkpoint, marked as complete when every rank has written its part."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            with open(os.path.join(folder, checkpoints.COMPLETE), "w", encoding="utf-8") as file:
                json.dump(self.record, file)

    def _stop(self, reason):
        raise UserError(
            f"step {self.state.global_step}: {reason}; training is stopped, earlier checkpoints are untouched. Lower "
            "--learning_rate, or use --bf16 in place of --fp16."
        )
