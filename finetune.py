# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "deepspeed==0.19.8",
#   "bitsandbytes==0.50.2", "datasets==5.2.0", "gguf==0.19.0", "matplotlib==3.11.2", "rich==15.0.0",
# ]
# ///
"""Fine-tune a chat model on a file of conversations: full, LoRA or 4-bit QLoRA, on a CPU, a GPU or many.

    python finetune.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --data_path data/train.jsonl --use_lora
    torchrun --nproc_per_node 2 finetune.py run.yaml --learning_rate 1e-4

Reads top to bottom in the order the data flows: arguments, datasets, model and adapter, saving, run().
"""

import gc
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from recipe import command_line, console, signals

if __name__ == "__main__":
    signals.watch()
    console.configure_libraries()  # before the libraries are imported
    gc.disable()  # until main(): imports free hardly any memory, and looking for it takes a fifth of their time
if "peft" not in sys.modules:
    console.import_bitsandbytes()
import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from recipe import flag_rules, flag_trials
from recipe.command_line import flag
from recipe.console import UserError, say
from recipe.dataset import encoding, packing, report, tokenised
from recipe.dataset.collator import Collator
from recipe.dataset.conversations import Conversations, hold_out, named_sources
from recipe.dataset.encoding import ChatEncoder
from recipe.dataset.sources import parse_sources
from recipe.distributed import engines, nodes, weights
from recipe.model import adapter, attention, experts, generation, loading, precision, quantised, rope, sequence
from recipe.model.base_files import BaseFiles
from recipe.training import answers, checkpoints, interruption, out_of_memory, plan, start_report
from recipe.training.run_record import RunRecord
from recipe.training.trainer import RecipeTrainer

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


# fmt: off
@dataclass
class ModelArguments:
    """The model to start from."""

    model_name_or_path: str | None = flag(None, "Folder or hub name of the model to start from. Required.")
    attn_implementation: str = flag("auto",
        "Attention kernel: auto, packed, sdpa, eager, flash_attention_2 ... auto takes what suits the model's layers.")
    chat_template: str | None = flag(None,
        "Jinja file of a chat template to use, and to save, in place of the model's.")
    rope_scaling: str | None = flag(None,
        "yarn, linear or dynamic: extend the model's window to --model_max_length, which is refused otherwise.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model; Qwen1.5 and later need none.")


@dataclass
class DataArguments:
    """The conversations: which files, what is learnt from them, and how they are laid out in rows."""

    data_path: list[str] | None = flag(None,
        "Files, folders or patterns (JSON, JSON Lines, Parquet, Arrow, CSV, also compressed), or hub datasets; "
        "docs/data.md has all forms. Required.")
    eval_data_path: list[str] | None = flag(None,
        "Files to evaluate on once an epoch, each reported by itself; the best model is kept in `best`.")
    eval_ratio: float = flag(0.0,
        "Share of the training rows to evaluate on instead of a file, drawn with --seed.", at_least=0, below=1)
    columns: list[str] | None = flag(None,
        "Fields of your records, as prompt=question completion=reply, where no shape of docs/data.md fits.")
    lazy_preprocess: bool = flag(False,
        "Tokenise rows when they are needed, not before the first step; for more than 100,000 rows.")
    pack_tokens: int | None = flag(None,
        "Fill each row with whole conversations up to this number of tokens; 8192 to 32768 keep a large GPU busy. "
        "If not set, a row holds --per_device_train_batch_size conversations.", at_least=1)
    overlong: Literal["drop", "truncate", "error"] = flag("drop",
        "What to do with conversations longer than --model_max_length: drop, truncate (after the last assistant "
        "turn that fits) or error.")
    on_bad_row: Literal["error", "skip"] = flag("error",
        "What to do with a record that cannot be read: error, or skip, which counts and lists them.")
    thinking: Literal[encoding.THINKING] = flag("auto",
        "Thoughts (reasoning_content, <think>): auto and keep train them, strip and empty remove them. A turn "
        "without one follows the prompt of enable_thinking=False (auto, empty) or the template's own (keep, strip).")
    preview: int = flag(0, "Print this number of conversations, supervised tokens marked, and stop.", at_least=0)
    validate_only: bool = flag(False, "Check all flags, files and conversations without loading the weights, and stop.")
    dump_tokens: str | None = flag(None, "File to write ids and labels to, as JSON Lines, and stop.")
    eval_generate: int = flag(0,
        "Held-out prompts to answer at each evaluation; logs exact_match and valid_json.", at_least=0)
    metric: str | None = flag(None,
        "file.py:function, a metric for --eval_generate: function(answer, reference, messages) -> number.")
    train_on: Literal["all_turns", "last_turn"] = flag("all_turns",
        'Assistant turns to learn: all_turns or last_turn. A message with "train": false is never learnt.')
    train_empty_answers: bool = flag(True,
        "Learn answers without any text, which teaches the model to stop at once; False uses them as context.")
    chat_template_kwargs: dict | None = flag(None,
        "Variables for the chat template, as JSON; those of a record (chat_template_kwargs) win.")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How to train; adds to transformers.TrainingArguments, and resolves what depends on the hardware."""

    output_dir: str = flag("output", "Folder for the trained model, `best` and checkpoints.")
    cache_dir: str | None = flag(None, "Folder for downloaded models, in place of the hub's own.")
    model_max_length: int | None = flag(None,
        "Longest conversation in tokens; see --overlong. If not set, 8192 or --pack_tokens, at most the model's "
        "window.", at_least=1)
    use_lora: bool = flag(False, "Train a LoRA adapter instead of all weights; it needs far less memory.")
    padding_free: bool = flag(True,
        "Put the conversations of a micro-batch side by side in one row; False pads them to one length.")
    activation_offloading: bool | None = flag(None,
        "Layers' inputs wait in main memory (CPU: files). If not set, where it would not fit.", nargs="?", const=True)
    tiled_mlp: bool | None = flag(None,
        "Feed-forward layers take long rows in pieces. If not set, where it would not fit.", nargs="?", const=True)
    sequence_parallel: int = flag(1,
        "Ranks that share each row, for rows too long for one; models with full attention only.", at_least=1)
    bf16: bool | None = flag(None,
        "Compute in bfloat16. If not set, where the hardware is fast in it.", nargs="?", const=True)
    fp16: bool | None = flag(None, "Compute in float16. If not set, on GPUs without bfloat16.", nargs="?", const=True)
    optim: OptimizerNames = flag("adamw_torch",
        "Optimizer, by its transformers name; adamw_8bit and adafactor save memory in full training.", metavar="NAME")
    lr_scheduler_type: SchedulerType = flag("cosine",
        "Learning-rate schedule of transformers; constant_with_warmup for an unknown length.", metavar="NAME")
    save_total_limit: int | None = flag(2, "Newest checkpoints to keep; 0 keeps all.", at_least=0)
    save_on_signal: bool = flag(True,
        "Save a checkpoint when a signal (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP) ends the run; a second Ctrl-C ends at once.")
    stall_minutes: float = flag(30,
        "Minutes without progress after which a rank prints where it stands and ends the run; 0: never.", at_least=0)
    logging_steps: float = flag(10, "Optimizer steps between two lines of the log; below 1, a share of all steps.")
    early_stopping_patience: int | None = flag(None,
        "Stop after this number of evaluations without a better eval_loss (or --metric_for_best_model).", at_least=1)
    logging_nan_inf_filter: bool = flag(False, "Hide non-finite losses in the log instead of stopping at them.")

    def __post_init__(self):
        if self.fp16 and self.bf16:
            raise ValueError("--fp16 and --bf16 exclude each other; give one of them.")
        self.remove_unused_columns, self.label_names = False, ["labels"]  # batches hold what the loss needs
        self.prediction_loss_only = True  # evaluation keeps no logits in memory
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        precision.choose_precision(self, checkpoints.recorded_precision(self.resume_from_checkpoint, self.output_dir))
        self.ddp_find_unused_parameters = bool(self.ddp_find_unused_parameters)  # each weight has its part in a loss
        engines.set_up(self)
        super().__post_init__()
        if self.n_gpu > 1:
            say(f"one of {self.n_gpu} GPUs is used; for all: torchrun --nproc_per_node {self.n_gpu} finetune.py ...")
            self._n_gpu = 1  # DataParallel would cut the packed row apart


@dataclass
class LoraArguments:
    """The adapter of --use_lora; naming any of these flags switches that on."""

    lora_r: int = flag(64, "Rank of the adapter; 8 to 16 is often enough.", at_least=1)
    lora_alpha: int = flag(16, "Scale of the adapter: its output counts alpha / r times.", at_least=1)
    lora_dropout: float = flag(0.05, "Dropout before the adapter; more for few data, 0 for many.", at_least=0, below=1)
    lora_target_modules: list[str] | None = flag(None,
        "Layers to adapt (q_proj v_proj ...), or a regular expression. If not set, all linear ones but head and gates.")
    lora_experts: bool = flag(False,
        "Adapt routed experts, too, at rank lora_r / experts per token, without dropout; several times larger.")
    lora_weight_path: str = flag("", "Folder of an adapter to continue from; its rank and layers are kept.")
    lora_bias: Literal["none", "all", "lora_only"] = flag("none",
        "Biases to train with the adapter; unless none, the base model changes even without the adapter.")
    q_lora: bool = flag(False, "Hold the base model in 4 bits (NF4): a quarter of the memory, somewhat slower.")
    use_rslora: bool = flag(False, "Scale the adapter by alpha / sqrt(r) instead of alpha / r; for high ranks.")
    use_dora: bool = flag(False, "Weight-decomposed LoRA (DoRA): slower, at times better at low ranks.")
    modules_to_save: list[str] | None = flag(None,
        "Layers to train and save whole beside the adapter, such as lm_head; some servers refuse such adapters.")
    init_lora_weights: str = flag("true",
        "Initial adapter: true (changes nothing), gaussian, pissa (at times faster; changes the base), olora, orthogonal.")
    trainable_token_indices: list[int] | None = flag(None,
        "Ids of tokens whose embeddings are trained; for a base model new to the template's control tokens.")

# fmt: on
ARGUMENTS = (ModelArguments, DataArguments, TrainingArguments, LoraArguments)

# ----------------------------------------------------------------------------------------------------------------------
# Datasets: conversations -> documents of ids and labels


class SupervisedDataset(Dataset):
    """Conversations tokenised in advance, into a memory-mapped file; an item is the documents of one conversation.

    Args:
        conversations: where they are read from.
        encoder: how they become ids and labels.
        max_length: longest document, in tokens.
        overlong: "drop", "truncate" or "error", for conversations with a longer one.
        on_bad_row: "error" or "skip", for records that cannot be read or rendered.
    Attributes:
        kept, dropped, lengths, sizes, notes, unused, problems, tokens, supervised: see `tokenised.Figures`.
        examined: number of conversations that these figures count.
        mixture: how the rows of an epoch are drawn from several sources (see `mixing.Mixture`); None: each row once.
    Raises:
        UserError: a conversation cannot be read or rendered, or none is left.
    """

    mixture = None

    def __init__(
        self, conversations: Conversations, encoder: ChatEncoder, max_length: int, overlong="drop", on_bad_row="error"
    ):
        self.conversations, self.max_length = conversations, max_length
        self.tokeniser = tokenised.Tokeniser(conversations, encoder, max_length, overlong, on_bad_row)
        figures = self._prepare()
        self.kept, self.lengths, self.sizes = figures.kept, figures.lengths, figures.sizes
        self.dropped, self.problems, self.notes = figures.dropped, figures.problems, figures.notes
        self.unused, self.tokens, self.supervised = figures.unused, figures.tokens, figures.supervised
        self.examined = len(self.lengths)
        if not len(self):
            raise UserError(f"no row is left to use: {figures.reasons(max_length)}")

    def _prepare(self) -> tokenised.Figures:
        self.rows = tokenised.cached_rows(self.tokeniser)
        return tokenised.figures_of_table(self.rows)

    def numbers(self) -> Sequence[int]:
        """Return the number of the conversation of each row, as far as it is known beforehand."""
        return self.kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> list[encoding.Document]:
        return self.rows[self.kept[index]]["documents"]


class LazySupervisedDataset(SupervisedDataset):
    """Conversations tokenised when they are needed; neither the file nor any tokens stay in memory.

    The first ones (tokenised.SCAN) are tokenised once at the start, for the figures and to leave out those that must be
    dropped. A later one that must be dropped is replaced by the next that is kept.
    """

    def _prepare(self) -> tokenised.Figures:
        self.scanned = min(tokenised.SCAN, len(self.conversations))
        return tokenised.figures_of(self.tokeniser, self.scanned)

    def numbers(self) -> Sequence[int]:
        return np.r_[self.kept, self.scanned : len(self.conversations)]

    def __len__(self) -> int:
        return len(self.kept) + len(self.conversations) - self.scanned

    def __getitem__(self, index: int) -> list[encoding.Document]:
        number = self.kept[index] if index < len(self.kept) else self.scanned + index - len(self.kept)
        for candidate in itertools.chain(range(number, len(self.conversations)), range(number)):
            (row,) = self.tokeniser.rows([candidate])
            if not row["dropped"]:
                return row["documents"]
        raise UserError("no row is left to use; raise --model_max_length or mend the data.")


def make_datasets(
    data_args: DataArguments, training_args: TrainingArguments, encoder: ChatEncoder
) -> tuple[SupervisedDataset, dict[str, SupervisedDataset] | None]:
    """Return the training dataset, and those to evaluate on by the name of their file (None if there is none)."""
    sources, held_out = parse_sources(data_args.data_path, data_args.columns), {}
    if data_args.eval_ratio:
        chosen, held_out["held_out"] = hold_out(sources, data_args.eval_ratio, training_args.seed)
    else:
        chosen, eval_sources = Conversations(sources), parse_sources(data_args.eval_data_path or [], data_args.columns)
        held_out = {name: Conversations([source]) for name, source in named_sources(eval_sources).items()}
    options = {"max_length": training_args.model_max_length, "overlong": data_args.overlong}
    options |= {"encoder": encoder, "on_bad_row": data_args.on_bad_row}
    train_dataset = (LazySupervisedDataset if data_args.lazy_preprocess else SupervisedDataset)(chosen, **options)
    train_dataset.mixture = chosen.mixture(train_dataset.numbers())
    # Evaluation rows are always tokenised in advance: no row may replace another there.
    return train_dataset, {name: SupervisedDataset(part, **options) for name, part in held_out.items()} or None


# ----------------------------------------------------------------------------------------------------------------------
# Model and adapter


def pretrained(model_args: ModelArguments, training_args: TrainingArguments) -> loading.Pretrained:
    """Return the model to start from, and how its files are read."""
    return loading.Pretrained(
        model_args.model_name_or_path, model_args.trust_remote_code, training_args.cache_dir, model_args.chat_template
    )


def load_config(
    model_args: ModelArguments, training_args: TrainingArguments, pack_tokens: int | None = None
) -> transformers.PreTrainedConfig:
    """Load the model's configuration, its window extended by --rope_scaling; sets training_args.model_max_length if None."""
    config = pretrained(model_args, training_args).config()
    window = getattr(config.get_text_config(), "max_position_embeddings", 8192)
    if training_args.model_max_length is None:
        training_args.model_max_length = min(pack_tokens or 8192, window)
    rope.extend_window(config.get_text_config(), model_args.rope_scaling, training_args.model_max_length)
    return config


def nf4(compute_dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> transformers.BitsAndBytesConfig:
    """Hold weights as 4-bit NormalFloat with double quantisation, as in QLoRA (arXiv 2305.14314, section 3)."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype, bnb_4bit_quant_storage=storage,
    )  # fmt: skip


def load_model(
    config: transformers.PreTrainedConfig, model_args: ModelArguments, training_args: TrainingArguments,
    lora_args: LoraArguments, compute_dtype: torch.dtype,
) -> transformers.PreTrainedModel:  # fmt: skip
    """Load the base model: 4-bit for QLoRA, the computing precision for LoRA, float32 masters for full training."""
    kernel, options = model_args.attn_implementation, {}
    sharded = engines.engine_of(training_args).shards_weights
    if kernel == "auto" and training_args.padding_free:
        kernel = attention.choose(config.get_text_config(), training_args.sequence_parallel)
    if lora_args.q_lora and not quantised.quantisation(config.name_or_path, config.to_dict()):
        # Engines that shard can do so with numbers of the precision that they compute in, and not with bytes.
        storage = compute_dtype if sharded else torch.uint8
        options["quantization_config"] = nf4(compute_dtype, storage)
    if not sharded and (lora_args.q_lora or training_args.device.type != "cpu"):
        options["device_map"] = {"": training_args.device}
    dtype = compute_dtype if training_args.use_lora else torch.float32
    model = pretrained(model_args, training_args).model(config, dtype, kernel, **options)
    engines.adapt_model(model, training_args)
    return model


def add_adapter(
    model: transformers.PreTrainedModel, training_args: TrainingArguments, lora_args: LoraArguments
) -> torch.nn.Module:
    """Put a new LoRA adapter on the model, or the one to continue from. All that is trained becomes float32."""
    import peft

    if lora_args.lora_weight_path:
        adapted = loading.load_adapter(model, lora_args.lora_weight_path, is_trainable=True)
    else:
        r, alpha, start = lora_args.lora_r, lora_args.lora_alpha, lora_args.init_lora_weights
        experts.check(model.config, lora_args.lora_experts, lora_args.lora_target_modules)
        adapter.refuse_unknown_tokens(model, lora_args.trainable_token_indices)
        whole = adapter.hit(model, lora_args.modules_to_save or [], "modules_to_save")
        routed = experts.lora_options(model, r, alpha, lora_args.use_rslora) if lora_args.lora_experts else {}
        with adapter.errors(model), experts.whole_shapes(model):
            adapted = peft.get_peft_model(model, peft.LoraConfig(
                task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=lora_args.lora_dropout, bias=lora_args.lora_bias,
                target_modules=adapter.targets(model, lora_args.lora_target_modules), modules_to_save=whole or None,
                use_rslora=lora_args.use_rslora, use_dora=lora_args.use_dora,
                # Else a head that shares its weight with the embeddings would be trained apart from them.
                ensure_weight_tying=adapter.have_shared_weight(model, whole),
                init_lora_weights={"true": True, "false": False}.get(start.lower(), start),
                trainable_token_indices=lora_args.trainable_token_indices, **routed,
            ))  # fmt: skip
        experts.hand_over_factors(adapted)
    precision.trainable_to_float32(adapted)
    if (training_args.bf16 or training_args.fp16) and not training_args.deepspeed:  # these compute under autocast
        precision.keep_input_dtype(adapted)
    return adapted


def rehearse_loading(
    config: transformers.PreTrainedConfig, model_args: ModelArguments, training_args: TrainingArguments,
    lora_args: LoraArguments,
) -> None:  # fmt: skip
    """Load the model and its adapter without their numbers: a UserError if files are damaged or flags do not fit."""
    sharded = engines.engine_of(training_args).shards_weights
    lora_args.q_lora = quantised.prepare(config, training_args, lora_args.q_lora, sharded)
    if model_args.trust_remote_code and hasattr(config, "auto_map") and not sharded:
        return  # code that comes with a model may not bear it
    with engines.whole_models(training_args):
        model = pretrained(model_args, training_args).skeleton(config)
        engines.settle_loading(training_args, model, loading.buffers_in_files(model))
        start = replace(lora_args, init_lora_weights="true")  # others need the numbers
        plan.refuse_flags(training_args, add_adapter(model, training_args, start) if training_args.use_lora else model)


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def safe_save_model_for_hf_trainer(trainer: RecipeTrainer, output_dir: str, rows: int | None = None) -> None:
    """Write the adapter (or the whole model), tokenizer, chat template and generation config to `output_dir`.

    The Trainer calls this function, too, for every checkpoint and for `best`. Every rank must call it.

    Args:
        rows: How many rows of every tensor of a whole model to write (None: all), for a rehearsal.
    Raises:
        UserError: The files cannot be written, or do not hold what was trained; on all ranks.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    problem, names, adapter = None, None, hasattr(model, "peft_config")
    if engines.engine_of(args).deepspeed_stage == 3:
        trainer.model_wrapped.empty_partition_cache()  # generation may have left weights gathered
    layers = weights.gather(model, args.should_save, rows)  # ZeRO-3 and FSDP2: each rank holds a part of each tensor
    if args.should_save:
        try:
            checked = map(weights.refuse_infinite, layers)  # before anything good is written over
            if adapter or rows:
                trainer._save(output_dir, state_dict=(state := next(checked)))
                state = weights.adapter_state_dict(model, state) if adapter else state
            else:
                base = BaseFiles(model, args.cache_dir)
                names = base.names()
                with base.written(output_dir, checked) as state:
                    trainer._save(output_dir, state_dict={})
            checkpoints.verify_saved(output_dir, state, trainer.weights_have_moved(), names)
        except Exception as error:
            if hasattr(error, "in_collective"):
                raise
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            problem = f"{output_dir}: cannot be saved: {kind}{' '.join(str(error).split())}"
    weights.raise_on_all_ranks(problem, layers)  # the others would wait for rank 0 in the next collective


def train(argv: list[str] | None = None) -> dict[str, float]:
    """Train as a command line says, that of this process if None; return the Trainer's metrics."""
    named = command_line.read(sys.argv[1:] if argv is None else argv, ARGUMENTS, notice=say)
    arguments = flag_rules.arguments_of(named, ARGUMENTS)
    with nodes.watch(), out_of_memory.explained():  # of several machines, each ends when another one is gone
        return run(*arguments, list(named))


def run(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, lora_args: LoraArguments,
    named: Sequence[str] = (),  # flags that the user set
) -> dict[str, float]:  # fmt: skip
    """Train and save; return the Trainer's metrics. A mistake is a UserError, if possible before the weights load."""
    if training_args.device.type == "cpu":
        precision.choose_float32()
    flag_trials.try_flags(model_args, data_args, training_args, lora_args)
    transformers.set_seed(training_args.seed)
    tokenizer = pretrained(model_args, training_args).tokenizer()
    config = load_config(model_args, training_args, data_args.pack_tokens)  # settles model_max_length for the rows
    try:
        encoder = ChatEncoder(tokenizer, data_args.train_on, data_args.thinking, data_args.train_empty_answers,
                              data_args.chat_template_kwargs or {}, getattr(config.get_text_config(), "vocab_size", None))  # fmt: skip
    except ValueError as error:
        raise UserError(f"{model_args.model_name_or_path}: {error}.") from None
    rehearse_loading(config, model_args, training_args, lora_args)  # before the rows, which may take long
    train_dataset, eval_dataset = make_datasets(data_args, training_args, encoder)
    record = checkpoints.describe_run(model_args, data_args, training_args, lora_args, train_dataset)
    about = RunRecord((model_args, data_args, training_args, lora_args), named, train_dataset, eval_dataset)
    if checkpoint := training_args.resume_from_checkpoint:
        checkpoints.refuse_changed_run(checkpoint, record, ARGUMENTS, training_args.ignore_data_skip)
    if report.inspect(data_args, tokenizer, {"training": train_dataset, **(eval_dataset or {})}):
        return {}
    if data_args.pack_tokens:
        train_dataset = packing.packed(train_dataset, data_args.pack_tokens, training_args)
    start_report.refuse_no_batch(train_dataset, training_args)
    compute_dtype = precision.compute_dtype(training_args)
    model = load_model(config, model_args, training_args, lora_args, compute_dtype)
    generation.stop_at(model, tokenizer, encoder)  # reads the head's weights, before an adapter wraps them
    if training_args.use_lora:
        transformers.set_seed(training_args.seed)  # loading draws random numbers under some engines
        model = add_adapter(model, training_args, lora_args)
    if training_args.torch_compile:
        loading.compile_layers(model, training_args)  # with the adapter in the layers
    trainer = RecipeTrainer(
        model=model, args=training_args, train_dataset=train_dataset, eval_dataset=eval_dataset,
        data_collator=Collator(training_args.padding_free, sequence.piece(training_args.sequence_parallel)),
        save=safe_save_model_for_hf_trainer, processing_class=tokenizer, record=record, run_record=about,
        questions=answers.held_out_questions(eval_dataset or {}, data_args.eval_generate, encoder),
        metric=answers.load_metric(data_args.metric) if data_args.metric else None, stop_ids=encoder.stop_ids,
    )  # fmt: skip
    planned = plan.Plan(trainer, compute_dtype, lora_args)
    planned.choose()
    engines.settle_checkpointing(model, training_args, lora_args.q_lora)
    start_report.refuse_full_disk(planned)
    say(start_report.describe(planned))
    with about.reporting(trainer), trainer.stalls, out_of_memory.explained(planned):
        with interruption.deferred(training_args):
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
            safe_save_model_for_hf_trainer(trainer, training_args.output_dir)
            trainer.save_state()
        if eval_dataset is not None:  # after the save: a failing evaluation costs no weights
            metrics.update(trainer.evaluate_at_end())
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def main() -> None:
    """Train as the command line says; a user's mistake is one sentence and exit code 2."""
    gc.freeze()  # what was imported lives as long as the process
    gc.enable()
    console.run(train)


if __name__ == "__main__":
    main()
    console.leave()
