"""The Hugging Face Trainer with this recipe's loss, order of rows, evaluation and checkpoints.

Reads in the order of a run: the loss of a micro-batch, the rows of an epoch, evaluation, the log, saving.
"""

import contextlib
import copy
import glob
import json
import math
import os
import shutil
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from recipe import signals
from recipe.console import UserError
from recipe.dataset import mixing, packing
from recipe.distributed import engines, weights
from recipe.model import adapter as adapters
from recipe.model import experts, loading, rope, sequence
from recipe.model.loss import fuse_loss_into_head, supervised_loss
from recipe.model.noise import EmbeddingNoise
from recipe.training import answers, checkpoints, checks, staging
from recipe.training.checkpoints import BEST
from recipe.training.interruption import Interruption
from recipe.training.losses import LossWatch
from recipe.training.run_record import RunRecord
from recipe.training.stalls import StallWatch
from recipe.training.throughput import Throughput

BEST_METRICS = "metrics.json"


class RecipeTrainer(transformers.Trainer):
    """The Trainer with a token-weighted loss on supervised positions only, exact evaluation and a `best` folder.

    Args:
        save: Function of (trainer, folder, rows) that writes and checks the weights on behalf of all ranks, or the
            first `rows` rows of each tensor; finetune.py's `safe_save_model_for_hf_trainer`.
        record: What checkpoints remember of the run, see `checkpoints.describe_run`.
        run_record: What is written about the run beside its weights.
        questions: Held-out prompts to answer at each evaluation; `metric` scores an answer besides the built-in scores,
            `stop_ids` are the token ids that end one.
        kwargs: Arguments of the Trainer. `eval_dataset` is {name: dataset}, or None.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the supervised tokens of the whole optimizer step

    def __init__(
        self,
        model: Any,
        *,
        save: Callable[["RecipeTrainer", str, int | None], None],
        record: dict[str, Any] | None = None,
        run_record: RunRecord | None = None,
        questions: list[answers.Question] | None = None,
        metric: Callable[[str, str, list], float] | None = None,
        stop_ids: Sequence[int] = (),
        **kwargs: Any,
    ):
        config = model.config.get_text_config()
        use_cache = config.use_cache
        sequence.set_up(kwargs["args"].sequence_parallel)
        adapters.remember_start(model)
        # Of the settings that transformers sets while it trains, those that the configuration has not. That of a vision
        # checkpoint has them in its part for text.
        self._absent = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"} - vars(model.config).keys()
        super().__init__(model, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count those tokens, over all ranks
        # The Trainer has switched the cache off in the config that gets saved; `supervised_loss` does so in each call.
        config.use_cache = use_cache
        # transformers before 5.23 clears it when training starts, as Qwen's tokenizers name no such token.
        self._bos = config.bos_token_id, self.model.generation_config.bos_token_id
        self.base = loading.found_from_anywhere(model.config._name_or_path, self.args.cache_dir)
        self.save, self.record, self.run_record = save, record or {}, run_record
        self.questions, self.metric, self.stop_ids = questions or [], metric, stop_ids
        self.head = fuse_loss_into_head(self.model)
        alpha, self.neftune_noise_alpha = self.neftune_noise_alpha, None  # instead of the Trainer's own
        self.noise = EmbeddingNoise(self.model, alpha) if alpha else None
        self.balancing = experts.balancing_of(model)
        self.best_loss = self._recorded_best()
        self._eval_sums = self._file_sums = self._evaluated = None
        self._run_dir: str | None = None  # where a checkpoint is being written
        patience = self.args.early_stopping_patience
        self.early_stopping = transformers.EarlyStoppingCallback(patience) if patience else None
        self.throughput, self.losses = Throughput(self), LossWatch(self)
        self.add_callback(checks.SelfChecks(self))
        self.add_callback(self.throughput)
        self.interruption = Interruption(self)
        self.add_callback(self.interruption)
        self.stalls = StallWatch(self.args.stall_minutes)
        self.add_callback(self.stalls)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """Summed cross entropy of the supervised tokens / their number in the optimizer step (None: in the batch)."""
        evaluating = self._file_sums is not None
        smoothing = 0.0 if evaluating else self.args.label_smoothing_factor
        balancing = 0.0 if evaluating else self.balancing
        self.losses.rows = inputs.get("rows", [])
        self.losses.dataset = self._evaluated if evaluating else self.train_dataset
        if self.noise and not evaluating:
            self.noise.set_batch(inputs)
        total, supervised = supervised_loss(model, inputs, smoothing, self.head, balancing)
        if not evaluating:
            self.throughput.add(inputs, supervised)
            self.losses.add(total.detach() / supervised.clamp(min=1))
        else:
            self._file_sums += torch.stack([total.detach().double(), supervised.double()])
        count = num_items_in_batch if num_items_in_batch is not None else supervised.clamp(min=1)
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks, the count is their sum
        return (loss, {}) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.losses.add_norm(norm)
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer would walk through all parameters for each micro-batch; see throughput.py

    # Rows

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return no batch after the last step, where the Trainer would take one more if it resumes from there."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        """Fill the last batches with empty conversations; the Trainer would take some rows twice."""
        sharing = self.args.sequence_parallel
        if not (is_training and self.args.dataloader_drop_last):
            dataset = packing.PaddedToBatch(dataset, batch_size * self.args.world_size // sharing)
        if sharing > 1:
            order = kwargs.pop("sampler_fn")
            kwargs["sampler_fn"] = lambda rows: packing.SharedRows(order(rows) or range(len(rows)), batch_size, sharing)
        return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        strategy = self.args.train_sampling_strategy
        if strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        dataset = train_dataset.dataset if isinstance(train_dataset, packing.PaddedToBatch) else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed

        def order():  # the same on every rank, and after a resume
            epoch = int(self.state.epoch or 0)
            if strategy == "random":
                return mixing.epoch_order(dataset, epoch, seed)
            generator = torch.Generator().manual_seed(seed + epoch)
            lengths = [dataset.lengths[number] for number in dataset.kept]
            rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return torch.tensor(list(LengthGroupedSampler(rows, lengths=lengths, generator=generator)))

        return packing.EpochSampler(order, len(dataset), len(train_dataset))

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self._file_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self._evaluated = getattr(dataloader.dataset, "dataset", None)
        try:
            output = super().evaluation_loop(dataloader, description, metric_key_prefix=metric_key_prefix, **kwargs)
            sums = self.accelerator.reduce(self._file_sums)
        finally:
            self._file_sums = None
        output.metrics[f"{metric_key_prefix}_loss"] = (sums[0] / sums[1]).item()
        self._eval_sums = self._eval_sums + sums if self._eval_sums is not None else sums
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the token-weighted loss over all evaluation files, `eval_loss`, and of each, `eval_NAME_loss`."""
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # the Trainer does so for each file
        self._eval_sums = None
        several = len(self.eval_dataset) > 1
        metrics = super().evaluate(None if several else next(iter(self.eval_dataset)), ignore_keys, metric_key_prefix)
        if several:
            total = {f"{metric_key_prefix}_loss": (self._eval_sums[0] / self._eval_sums[1]).item()}
            self.log(total)
            metrics.update(total)
        if self.questions:
            scores = self._answer_questions(metric_key_prefix)
            self.log(scores)
            metrics.update(scores)
        return metrics

    def _evaluate(self, *args, **kwargs):
        """Evaluate in the course of training, where the best weights are kept and training may be stopped."""
        before = [entry[name] for entry in self.state.log_history if (name := self._judged_by()) in entry]
        random_state = torch.get_rng_state()  # of which each loader of rows draws a number
        try:
            metrics = super()._evaluate(*args, **kwargs)
        except signals.Interrupted:
            torch.set_rng_state(random_state)
            self.interruption.save_unevaluated()
        self.keep_best(metrics)
        if self.early_stopping:
            # Called here and not by the Trainer, which calls for each evaluation file by itself. Counted from the log, so
            # that a resumed run stops where an unbroken one does.
            best = max(before, default=None) if self.args.greater_is_better else min(before, default=None)
            since = len(before) - 1 - before.index(best) if before else 0
            self.early_stopping.early_stopping_patience_counter = since
            self.early_stopping.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _judged_by(self):
        """Name in the log of the figure that early stopping looks at."""
        return f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"

    def _load_rng_state(self, checkpoint):
        """Restore the random state of the checkpoint's step, which comes before that step's evaluation."""
        super()._load_rng_state(checkpoint)
        self.interruption.evaluate_if_due()

    def _answer_questions(self, prefix):
        """Answer the held-out prompts greedily, shared out among the ranks; return the mean of every score."""
        from accelerate.utils import gather_object

        # Where every forward gathers weights from all ranks, all ranks must generate equally long: each answers all.
        together = engines.engine_of(self.args).shards_weights
        mine = self.questions[0 if together else self.args.process_index :: 1 if together else self.args.world_size]
        longest = max(len(question.reference_ids) for question in self.questions)
        model = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            texts = answers.answer(
                model, self.processing_class, mine, self.stop_ids, 2 * longest + 16, on_batch=self.stalls.progress
            )
        scores = gather_object([answers.scores(*pair, self.metric) for pair in zip(texts, mine, strict=True)])
        return {f"{prefix}_{name}": value for name, value in answers.mean_scores(scores).items()}

    def evaluate_at_end(self) -> dict[str, float]:
        """Return the evaluation of the trained weights: that of the last step, or a new one. Every rank must call it."""
        log = [entry for entry in self.state.log_history if entry["step"] == self.state.global_step]
        metrics = {key: value for entry in log for key, value in entry.items() if key.startswith("eval_")}
        if "eval_loss" not in metrics:
            metrics = self.evaluate()
            self.keep_best(metrics)
            self.save_state()
        return metrics

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Save the weights to `best` if their `eval_loss` in `metrics` is the lowest so far. Every rank must call it."""
        if not metrics["eval_loss"] < self.best_loss:
            return
        self.best_loss = metrics["eval_loss"]
        folder = os.path.join(staging.unfinished(self.args.output_dir), BEST)
        self.save_model(folder, _internal_call=True)
        if self.args.should_save:
            with open(os.path.join(folder, BEST_METRICS), "w", encoding="utf-8") as file:
                json.dump({"eval_loss": self.best_loss, "step": self.state.global_step}, file)
        self._publish(self.args.output_dir, BEST)

    def _recorded_best(self) -> float:
        """Return the lowest loss of the run that is resumed, so that `best` is replaced by something better only."""
        path = os.path.join(self.args.output_dir, BEST, BEST_METRICS)
        if not self.args.resume_from_checkpoint or not os.path.exists(path):
            return math.inf
        with open(path, encoding="utf-8") as file:
            return json.load(file)["eval_loss"]

    # The log

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.is_in_train and "loss" in logs:
            self.losses.look()
        self._refuse_infinite(logs)
        if "loss" in logs:
            logs |= self.throughput.entry()
        super().log(logs, *args, **kwargs)

    def _refuse_infinite(self, logs):
        """Stop the run at a loss or gradient norm that is not finite."""
        loss = logs.get("loss", logs.get("train_loss"))
        norm = None if self.args.fp16 else logs.get("grad_norm")  # in fp16 an overflow skips its step and is normal
        if not all(math.isfinite(value or 0.0) for value in (loss, norm)):
            raise UserError(
                f"step {self.state.global_step}: the loss is {loss} and the gradient norm {norm}; training is stopped, "
                "earlier checkpoints are untouched. Lower --learning_rate, or use --bf16 in place of --fp16."
            )

    # Saving and loading

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.save(self, output_dir or self.args.output_dir, None)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._load_own(resume_from_checkpoint):
            with _reading_version_only():
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_own(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_own(self, folder):
        """Load the weights of a checkpoint if the Trainer would load others; return whether that was so.

        * A whole model is loaded by the names in its files. The Trainer would leave out tensors that have others in the
          model, as routed experts and vision checkpoints do, and training would go on from the base model's.
        * An adapter that was converted when it was saved has twice the rank of the one that is trained.
        """
        from peft import PeftConfig, set_peft_model_state_dict
        from peft.utils import load_peft_weights

        model = self.accelerator.unwrap_model(self.model)
        if engines.engine_of(self.args).checkpoint_format != "whole":  # the engine reads its own files
            return False
        if not hasattr(model, "peft_config"):
            options = {"config": copy.deepcopy(model.config), "dtype": model.dtype, "output_loading_info": True}
            saved, report = type(model).from_pretrained(folder, **options)
            if report["missing_keys"]:
                raise UserError(f"{folder}: lacks {sorted(report['missing_keys'])[0]}; resume another checkpoint.")
            model.load_state_dict(saved.state_dict())
            return True
        if not hasattr(model, "first_factors") or loading.changes_base(PeftConfig.from_pretrained(folder)):
            return False
        set_peft_model_state_dict(model, adapters.trained_half(load_peft_weights(folder, device="cpu")))
        return True

    def rehearse(self) -> None:
        """Write and check a small copy through the path of all saves, so that no run fails at its last line."""
        folder = os.path.join(self.args.output_dir, ".rehearsal")
        if self.args.should_save:
            staging.recover(self.args.output_dir)
            newest = checkpoints.newest(self.args.output_dir)
            if newest and newest == self.args.resume_from_checkpoint:  # a kill may have come before an older one went
                best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
                checkpoints.rotate(self.args.output_dir, limit, os.path.basename(newest), best)
        self.save(self, folder, 1)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(folder)

    def weights_have_moved(self) -> bool:
        """Whether training must have changed the weights by now.

        The first step may have a learning rate of 0, and in fp16 the first ones may be skipped.
        """
        return self.state.global_step > (20 if self.args.fp16 else 1) and self.args.learning_rate > 0

    def _save(self, output_dir, state_dict):
        """Write weights, tokenizer, generation config; delete model files of an earlier run of another mode."""
        model = self.accelerator.unwrap_model(self.model)
        model.config.get_text_config().bos_token_id, model.generation_config.bos_token_id = self._bos
        for name in self._absent & vars(model.config).keys():
            delattr(model.config, name)
        adapter = hasattr(model, "peft_config")
        if os.path.exists(os.path.join(output_dir, TRAINING_ARGS_NAME)):  # an earlier run's folder
            stale = ("model*.safetensors*", *[CONFIG_NAME] * adapter, *["adapter_*"] * (not adapter))
            for path in (path for pattern in stale for path in glob.glob(os.path.join(output_dir, pattern))):
                os.remove(path)  # else whoever loads the folder would find both and take one
        with adapters.as_saved(model, self.base):
            super()._save(output_dir, state_dict)
        model.generation_config.save_pretrained(output_dir)
        if self.run_record:
            self.run_record.write_about(self, output_dir)
        for path in glob.glob(os.path.join(glob.escape(output_dir), "*.safetensors")):
            shutil.copymode(os.path.join(output_dir, GENERATION_CONFIG_NAME), path)  # safetensors lets nobody else read
        if adapter and rope.is_extended(model.config.get_text_config()):
            model.config.save_pretrained(output_dir)  # the base's own file has the window before --rope_scaling
        rope.write_old_names(model.config, output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keep the card of `run_record`, which the Trainer would replace by a form when it pushes to the hub."""

    def _get_output_dir(self, trial):
        return self._run_dir or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._run_dir:  # else its folder will move while it is pushed
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint beside its place, which it takes when every rank has written its part."""
        self.losses.look()  # no checkpoint of weights that are lost takes the place of a good one
        output_dir, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._run_dir = staging.unfinished(output_dir)
        folder, place = os.path.join(self._run_dir, name), os.path.join(output_dir, name)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        if self.state.best_model_checkpoint == folder:
            self.state.best_model_checkpoint = place
        if self.args.should_save:
            self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
            checkpoints.write_record(folder, self.record)
        self._publish(output_dir, name)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(place)

    def _publish(self, output_dir, name):
        """Let a folder take its place when all ranks have written their parts; every rank learns if it cannot."""
        self.accelerator.wait_for_everyone()
        problem = None
        if self.args.should_save:
            try:
                staging.publish(output_dir, name)
                if name != BEST:
                    checkpoints.rotate(output_dir, self.args.save_total_limit, name, self.state.best_model_checkpoint)
            except OSError as error:
                problem = f"{os.path.join(output_dir, name)}: cannot be saved: {error}"
        weights.raise_on_all_ranks(problem)


@contextlib.contextmanager
def _reading_version_only():
    """Within the context, the Trainer reads nothing of a checkpoint's config.json but the version that it compares.

    transformers 5.23 reads the file as no model's in particular, and fails at a scaled rotary embedding (yarn, llama3).
    """

    class Saved:
        def from_json_file(path):
            with open(path, encoding="utf-8") as file:
                return types.SimpleNamespace(transformers_version=json.load(file).get("transformers_version"))

    whole = transformers.trainer.PreTrainedConfig
    transformers.trainer.PreTrainedConfig = Saved
    try:
        yield
    finally:
        transformers.trainer.PreTrainedConfig = whole
