"""Fine-tune a chat model on a file of conversations: full, LoRA or 4-bit QLoRA, on a CPU, a GPU or many.

    python finetune.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --data_path data/train.jsonl --use_lora
    torchrun --nproc_per_node 2 finetune.py run.yaml --learning_rate 1e-4

Reads top to bottom in the order the data flows: arguments, datasets, model and adapter, saving, train(). The loss,
evaluation and what a save does are in trainer.py.
"""

import collections
import inspect
import itertools
import os
import re
import sys
from array import array
from dataclasses import dataclass, field
from typing import Literal

from recipe import command_line, console
from recipe.dataset import collator, files, packing

console.quiet()  # before the libraries are imported
import torch
import transformers
from torch.utils.data import Dataset
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from recipe.console import UserError, say
from recipe.dataset import conversations, encoding, report, tokenised
from recipe.dataset.collator import Collator
from recipe.dataset.conversations import Conversations, hold_out
from recipe.dataset.encoding import ChatEncoder
from recipe.distributed import engines, nodes, weights
from recipe.model import generation, linear_attention, rope
from recipe.model.precision import best_dtype, choose_float32, dtype_name, has_bf16
from recipe.training import checkpoints, curves, start_report

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def flag(default, help, **more):
    """A field of an argument class with the text that --help shows."""
    return field(default=default, metadata={"help": help, **more})


# fmt: off
@dataclass
class ModelArguments:
    model_name_or_path: str = flag(None, "Folder or hub name of the model to start from. Required.")
    attn_implementation: str = flag("auto",
        "Attention kernel: auto, packed, sdpa, eager, flash_attention_2 ... Default auto: packed, which never "
        "computes one conversation against another; for models with a sliding window flash_attention_2 where it is "
        "installed, else sdpa. Change it for a kernel that is faster on your GPU."
    )
    chat_template: str = flag(None,
        "Jinja file of a chat template to use and save instead of the model's own. Default none: for a base model "
        "that has none, or a format of your own."
    )
    rope_scaling: str = flag(None,
        "yarn, linear or dynamic: stretch the positions when --model_max_length exceeds the model's window. Default "
        "none: a longer --model_max_length is refused."
    )
    trust_remote_code: bool = flag(False,
        "Run code that comes with the model. Default False; Qwen1.5 and later need none."
    )


@dataclass
class DataArguments:
    data_path: list[str] = flag(None,
        "One or more training files (JSON, JSON Lines, .gz of these, Parquet, CSV) or a hub dataset. Required."
    )
    eval_data_path: list[str] = flag(None,
        "One or more files to evaluate on, each reported apart, once an epoch unless --eval_strategy is given. "
        "Default none; with one, over-fitting shows and the best model is kept in `best`."
    )
    eval_ratio: float = flag(0.0,
        "Share of the training rows, 0 to 1, held out for evaluation, drawn with --seed. Default 0. Use it when "
        "there is no --eval_data_path."
    )
    lazy_preprocess: bool = flag(False,
        "Tokenise rows when they are needed instead of all before the first step. Default False. For files of more "
        "than some 100,000 rows."
    )
    pack_tokens: int = flag(None,
        "Fill each row with conversations up to so many tokens, computed apart as ever. Default none: a row holds "
        "--per_device_train_batch_size conversations, however long. 8192 to 32768 keep a large GPU busy; each step "
        "then learns from more conversations, as the start block says."
    )
    overlong: Literal["drop", "truncate", "error"] = flag("drop",
        "What becomes of conversations longer than --model_max_length: drop (default), truncate (after the last "
        "assistant turn that fits whole) or error. Change it when long ones must not be lost."
    )
    thinking: Literal[encoding.THINKING] = flag("auto",
        "Thoughts (reasoning_content, <think>): auto (default) trains those in the data and puts turns without one "
        "after the prompt of enable_thinking=False; keep trains them and puts the others after the default prompt; "
        "strip removes them; empty removes them and uses the prompt of enable_thinking=False throughout. Change it "
        "when the data and the use differ in thinking."
    )
    preview: int = flag(0,
        "Print so many conversations with their supervised tokens marked, and end. Default 0: train. For a first "
        "look at a new file."
    )
    validate_only: bool = flag(False,
        "Read, render and check all data without loading weights, and end. Default False. For use before a long run."
    )
    dump_tokens: str = flag(None,
        "File to write what would be trained to, as JSON Lines of ids and labels, and end. Default none. For "
        "comparison with another program."
    )
    eval_generate: int = flag(0,
        "Answer so many held-out prompts at each evaluation and log exact_match and valid_json. Default 0; some "
        "dozens tell more than the loss does."
    )
    metric: str = flag(None,
        "file.py:function, a measure for --eval_generate: function(answer, reference, messages) -> number. Default "
        "none."
    )
    train_on: Literal["all_turns", "last_turn"] = flag("all_turns",
        "Which assistant turns are learnt: all_turns (default) or last_turn, when only the last answer is good. A "
        'message with "train": false is never learnt.'
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = flag("output", "Folder for the trained model, `best` and checkpoints. Default output.")
    cache_dir: str = flag(None, "Folder for downloaded models. Default: the hub's own; another when that disk is full.")
    model_max_length: int = flag(None,
        "Longest conversation in tokens. Default 8192 or --pack_tokens, or the model's window if that is shorter. "
        "Lower it to save memory, raise it when the start block reports dropped rows; see --overlong."
    )
    use_lora: bool = flag(False,
        "Train a LoRA adapter instead of all weights. Default False; it needs far less memory."
    )
    padding_free: bool = flag(True,
        "Lay the conversations of a micro-batch side by side in one row instead of padding them. Default True. Set "
        "False for models that cannot keep them apart."
    )
    bf16: bool = flag(None,
        "Compute in bfloat16. Default: where the hardware is fast in it. False computes in float32."
    )
    fp16: bool = flag(None, "Compute in float16. Default: on GPUs without bfloat16, which need it.")
    optim: OptimizerNames = flag("adamw_torch",
        "Optimizer, by its transformers name. Default adamw_torch; adamw_8bit or adafactor save memory in full "
        "training.",
    metavar="NAME")
    lr_scheduler_type: SchedulerType = flag("cosine",
        "Learning-rate schedule, by its transformers name. Default cosine; constant_with_warmup when you do not know "
        "how long you will train.",
    metavar="NAME")
    save_total_limit: int = flag(2,
        "Checkpoints kept on disk, the newest ones. Default 2; more when disk allows, 0 for all."
    )
    logging_steps: float = flag(10, "Optimizer steps between two lines of the log. Default 10; below 1, a share.")
    logging_nan_inf_filter: bool = flag(False,
        "Hide non-finite losses in the log. Default False: they stop the run, as they should."
    )
    remove_unused_columns: bool = flag(False, "Has no use here: batches hold only what the model needs. Default False.")
    prediction_loss_only: bool = flag(True, "Evaluation keeps losses, never logits, in memory. Default True.")

    def __post_init__(self):
        if self.fp16 and self.bf16:
            raise ValueError("--fp16 and --bf16 exclude each other; give one of them.")
        if self.use_cpu or not torch.cuda.is_available():
            self.use_cpu = True
            if self.tf32:
                say("--tf32 is for GPUs and is left out on this CPU.")
                self.tf32 = None
            choose_float32()
        if self.bf16 is None and self.fp16 is None:
            resumed = checkpoints.recorded_precision(self.resume_from_checkpoint, self.output_dir)
            if resumed:  # what is fast here may be another precision today
                self.bf16, self.fp16 = resumed == "bfloat16", resumed == "float16"
        best = best_dtype(self.use_cpu)
        if self.bf16 is None and self.fp16 is None:
            self.bf16, self.fp16 = best == torch.bfloat16, best == torch.float16
        elif self.fp16 and self.use_cpu or self.bf16 and not has_bf16(self.use_cpu):
            asked = "fp16" if self.fp16 else "bf16"
            say(f"--{asked}: this hardware does not compute in it; {dtype_name(best)} is used instead.")
            self.bf16, self.fp16 = best == torch.bfloat16, best == torch.float16
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        self.label_names = ["labels"]
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight has its part in every loss
        engines.set_up(self)
        super().__post_init__()
        if self.n_gpu > 1:
            say(f"one of {self.n_gpu} GPUs is used; for all: torchrun --nproc_per_node {self.n_gpu} finetune.py ...")
            self._n_gpu = 1  # DataParallel would cut the packed row apart


@dataclass
class LoraArguments:
    lora_r: int = flag(64, "Rank of the adapter. Default 64; 8 to 16 is often enough.")
    lora_alpha: int = flag(16,
        "Scale: the adapter counts alpha / r times. Default 16; change it in step with --lora_r."
    )
    lora_dropout: float = flag(0.05, "Dropout before the adapter, 0 to 1. Default 0.05; more for few data, 0 for many.")
    lora_target_modules: list[str] = flag(None,
        "Names of the linear layers to adapt. Default: every one except the output head; fewer, such as q_proj "
        "v_proj, save memory."
    )
    lora_weight_path: str = flag("", "Folder of an adapter to continue from, with its own rank. Default: a new one.")
    lora_bias: Literal["none", "all", "lora_only"] = flag("none",
        "Biases to train with the adapter. Default none; with others the base model is no longer itself when the "
        "adapter is switched off."
    )
    q_lora: bool = flag(False,
        "Hold the base model in 4 bits (NF4): a quarter of the memory, somewhat slower. Default False."
    )
    use_rslora: bool = flag(False, "Scale by alpha / sqrt(r) instead of alpha / r. Default False; for high ranks.")
    use_dora: bool = flag(False,
        "Weight-decomposed LoRA (DoRA): slower, at times better. Default False; for low ranks."
    )
    modules_to_save: list[str] = flag(None,
        "Layers trained and saved whole beside the adapter, such as lm_head. Default none: some servers refuse such "
        "adapters."
    )
    init_lora_weights: str = flag("true",
        "How the adapter starts: true (default: as no change), gaussian, pissa, olora, orthogonal. pissa at times "
        "learns faster, and changes the base model."
    )
    trainable_token_indices: list[int] = flag(None,
        "Ids of tokens whose embeddings are trained too. Default none; for a base model that has never seen the chat "
        "template's control tokens."
    )
# fmt: on


ARGUMENTS = (ModelArguments, DataArguments, TrainingArguments, LoraArguments)

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    command_line.parse(["--help"], ARGUMENTS)  # prints and exits here: what follows takes seconds to import

from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402

from recipe import flag_rules  # noqa: E402
from recipe.model import attention  # noqa: E402
from recipe.training import answers  # noqa: E402
from recipe.training.trainer import RecipeTrainer  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# Datasets: conversations -> documents of ids and labels


class SupervisedDataset(Dataset):
    """Conversations tokenised ahead, in batches, into a memory-mapped file that a second run opens at once.

    An item is the list of documents of one conversation (see `encoding.Encoded`).

    Args:
        conversations: a `Conversations`.
        encoder: a `ChatEncoder`.
        max_length: longest document, in tokens.
        overlong: "drop", "truncate" or "error", for conversations with a longer one.
    Attributes:
        kept: numbers of the conversations in use; dropped: reason -> numbers of those that are not.
        notes: Counter of what the encoder noted; lengths: tokens of the longest document of every conversation, as it
        was read; sizes: tokens of all its documents in use; tokens, supervised: sums over the kept ones; examined: how
        many conversations these figures are of.
    Raises:
        UserError: a conversation cannot be read or rendered, or none is left.
    """

    batch = 1000

    def __init__(self, conversations, encoder, max_length, overlong="drop"):
        self.conversations, self.encoder = conversations, encoder
        self.max_length, self.overlong = max_length, overlong
        # A million rows are 20 MB so, and would be 100 MB in lists.
        self.kept, self.lengths, self.sizes, self.dropped = array("q"), array("i"), array("q"), {}
        self.notes, self.tokens, self.supervised = collections.Counter(), 0, 0
        self._prepare()
        self.examined = len(self.lengths)
        if not len(self):
            reasons = "; ".join(f"{len(numbers)} {reason}" for reason, numbers in self.dropped.items())
            raise UserError(f"no row is left to use: {reasons}. Raise --model_max_length or mend the data.")

    def _prepare(self):
        self.rows = tokenised.rows(self._generate, self._fingerprint())
        for number, figures in enumerate(tokenised.figures(self.rows)):
            self._count(number, *figures)

    def _generate(self):
        from tqdm import tqdm

        total = len(self.conversations)
        with tqdm(
            total=total, desc="tokenising", unit=" rows", disable=total < self.batch or console.rank() > 0
        ) as bar:
            for start in range(0, total, self.batch):
                rows = self.encode(range(start, min(start + self.batch, total)))
                yield from rows
                bar.update(len(rows))

    def _fingerprint(self):
        code = [
            inspect.getsource(part) for part in (encoding, conversations, files, collator, tokenised, SupervisedDataset)
        ]
        return [*code, self.conversations.fingerprint(), self.encoder.fingerprint(), self.max_length, self.overlong]

    def _count(self, number, dropped, notes, length, tokens, supervised):
        self.lengths.append(length)
        self.sizes.append(tokens)
        self.notes.update(notes)
        if dropped:
            self.dropped.setdefault(dropped, []).append(number)
        else:
            self.kept.append(number)
            self.tokens += tokens
            self.supervised += supervised

    def encode(self, numbers):
        """Tokenise the conversations with these numbers; a dict for each, with `documents` and why it was `dropped`."""
        return [self._fitted(number, row) for number, row in zip(numbers, self._encoded(numbers), strict=True)]

    def _encoded(self, numbers):
        from jinja2 import TemplateError

        batch = [self.conversations[number] for number in numbers]
        try:
            return self.encoder.encode_batch(batch)
        except (TemplateError, ValueError) as error:
            if len(batch) == 1:
                raise UserError(f"{self.conversations.where(numbers[0])}: {str(error).rstrip('.')}.") from None
            return [self._encoded([number])[0] for number in numbers]  # finds the one that it was

    def _fitted(self, number, encoded):
        documents, notes = encoded.documents, list(encoded.notes)
        length = max((len(document["input_ids"]) for document in documents), default=0)
        dropped = "" if documents else "without a turn to learn"
        if length > self.max_length:
            if self.overlong == "error":
                raise UserError(
                    f"{self.conversations.where(number)}: {length} tokens, expected at most {self.max_length}; raise "
                    "--model_max_length or set --overlong drop."
                )
            documents = tokenised.truncated(documents, self.max_length) if self.overlong == "truncate" else []
            dropped = "" if documents else f"longer than {self.max_length} tokens"
            notes += ["cut after the last turn that fits"] * bool(documents)
        count = [sum(label != encoding.IGNORE_INDEX for label in document["labels"]) for document in documents]
        return dict(documents=documents, dropped=dropped, notes=notes, length=length, supervised=sum(count),
                    tokens=sum(len(document["input_ids"]) for document in documents))  # fmt: skip

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        return self.rows[self.kept[index]]["documents"]


class LazySupervisedDataset(SupervisedDataset):
    """Conversations tokenised when they are asked for; neither the file nor any tokens stay in memory.

    The first `scan` conversations are tokenised once at the start, to report figures and to leave out what must be
    dropped. One that must be dropped further on gives its place to the next that is kept.
    """

    scan = 10_000

    def _prepare(self):
        self.scanned = min(self.scan, len(self.conversations))
        for start in range(0, self.scanned, self.batch):
            numbers = range(start, min(start + self.batch, self.scanned))
            for number, row in zip(numbers, self.encode(numbers), strict=True):
                self._count(number, *(row[name] for name in tokenised.FIGURES))

    def __len__(self):
        return len(self.kept) + len(self.conversations) - self.scanned

    def __getitem__(self, index):
        number = self.kept[index] if index < len(self.kept) else self.scanned + index - len(self.kept)
        for candidate in itertools.chain(range(number, len(self.conversations)), range(number)):
            (row,) = self.encode([candidate])
            if not row["dropped"]:
                return row["documents"]


def make_datasets(data_args, training_args, encoder):
    """The training dataset, and those to evaluate on by the name of their file (None where there is nothing)."""
    paths, options = data_args.data_path, (encoder, training_args.model_max_length, data_args.overlong)
    chosen, held_out = Conversations(paths), {}
    if data_args.eval_data_path:
        names = [os.path.basename(path).split(".")[0] for path in data_args.eval_data_path]
        if len(set(names)) < len(names):
            names = [re.sub(r"\W+", "_", path).strip("_") for path in data_args.eval_data_path]
        held_out = {name: Conversations([path]) for name, path in zip(names, data_args.eval_data_path, strict=True)}
    elif data_args.eval_ratio:
        chosen, held_out["held_out"] = hold_out(paths, data_args.eval_ratio, training_args.seed)
    kind = LazySupervisedDataset if data_args.lazy_preprocess else SupervisedDataset
    # Evaluation rows are tokenised ahead in any case: no row may stand in for another there.
    return kind(chosen, *options), {name: SupervisedDataset(part, *options) for name, part in held_out.items()} or None


# ----------------------------------------------------------------------------------------------------------------------
# Model and adapter


def load_tokenizer(model_args, training_args):
    """The model's tokenizer, with --chat_template if given."""
    tokenizer = _pretrained(transformers.AutoTokenizer, model_args, training_args)
    if model_args.chat_template:
        try:
            with open(model_args.chat_template, encoding="utf-8") as file:
                tokenizer.chat_template = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat_template {model_args.chat_template}: cannot be read: {error}.") from None
    return tokenizer


def _pretrained(kind, model_args, training_args, **options):
    try:
        return kind.from_pretrained(
            model_args.model_name_or_path,
            trust_remote_code=model_args.trust_remote_code,
            cache_dir=training_args.cache_dir,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--model_name_or_path {model_args.model_name_or_path}: cannot be loaded: {reason:.300} Name a folder "
            "with a model or a model of the hub."
        ) from None


def load_config(model_args, training_args, pack_tokens=None):
    """The model's configuration, its window stretched to --model_max_length where --rope_scaling says how."""
    config = _pretrained(transformers.AutoConfig, model_args, training_args)
    window = getattr(config.get_text_config(), "max_position_embeddings", 8192)
    if training_args.model_max_length is None:
        training_args.model_max_length = min(pack_tokens or 8192, window)
    rope.scale(config.get_text_config(), model_args.rope_scaling, training_args.model_max_length)
    return config


def load_model(config, model_args, training_args, lora_args, compute_dtype):
    """Load the base model: 4-bit for QLoRA, the computing precision for LoRA, float32 masters for full training.

    Raises:
        UserError: it cannot be loaded, or its files lack some of its weights.
    """
    options = {"config": config, "dtype": compute_dtype if training_args.use_lora else torch.float32}
    chosen = model_args.attn_implementation
    if chosen == "auto" and training_args.padding_free:
        chosen = attention.choose(config.get_text_config())
    if chosen == attention.PACKED:
        attention.register()
    if chosen != "auto":
        options["attn_implementation"] = chosen
    if lora_args.q_lora:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            # Engines that shard can do so with numbers of the precision that they compute in, and with no bytes.
            bnb_4bit_quant_storage=compute_dtype if engines.engine_of(training_args).shards_weights else torch.uint8,
        )
    if not engines.engine_of(training_args).shards_weights and (lora_args.q_lora or training_args.device.type != "cpu"):
        options["device_map"] = {"": training_args.device}
    model, report = _pretrained(
        transformers.AutoModelForCausalLM, model_args, training_args, output_loading_info=True, **options
    )
    if report["missing_keys"]:
        raise UserError(
            f"--model_name_or_path {model_args.model_name_or_path}: its files lack {len(report['missing_keys'])} "
            f"weights, the first is {sorted(report['missing_keys'])[0]}; download it again."
        )
    for module in model.modules():
        # bitsandbytes would turn 4-bit weights into a layout for CPU inference at the first evaluation: rounded once
        # more, and without a gradient when training goes on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    linear_attention.keep_documents_apart(model)
    generation.mend(model.generation_config)
    engines.adapt_model(model, training_args)
    return model


def add_adapter(model, training_args, lora_args):
    """Wrap the model with a new LoRA adapter, or with the one to continue from. Adapter weights are float32."""
    import peft

    if lora_args.q_lora:
        for parameter in model.parameters():  # peft's own preparation would copy the embeddings to float32
            parameter.requires_grad_(False)
    try:
        if lora_args.lora_weight_path:
            adapted = peft.PeftModel.from_pretrained(model, lora_args.lora_weight_path, is_trainable=True)
            return _without_copies(_float32(adapted), training_args)
        start = lora_args.init_lora_weights
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=lora_args.lora_r,
                lora_alpha=lora_args.lora_alpha,
                lora_dropout=lora_args.lora_dropout,
                target_modules=lora_args.lora_target_modules or "all-linear",
                bias=lora_args.lora_bias,
                use_rslora=lora_args.use_rslora,
                use_dora=lora_args.use_dora,
                modules_to_save=lora_args.modules_to_save,
                init_lora_weights={"true": True, "false": False}.get(start.lower(), start),
                trainable_token_indices=lora_args.trainable_token_indices,
            ),
        )
        return _without_copies(_float32(adapted), training_args)
    except (ValueError, TypeError, OSError) as error:
        linear = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        raise UserError(
            f"no adapter: {' '.join(str(error).split()):.300} Linear layers are {sorted(linear)}."
        ) from None


def _without_copies(model, training_args):
    """Under autocast let adapters take their input as it is: peft would first copy all of it to float32."""
    autocast = (training_args.bf16 or training_args.fp16) and not training_args.deepspeed
    for module in model.modules():
        if autocast and hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return model


def _float32(model):
    """Also biases and whole layers that are trained: half-precision weights lose small updates."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def compile_layers(model, training_args):
    """For --torch_compile: each layer by itself, so that all share one graph and weights keep their names."""
    backend, training_args.torch_compile_backend = training_args.torch_compile_backend, None
    for module in model.modules():  # accelerate, told of no backend, leaves the whole as it is
        if isinstance(module, GradientCheckpointingLayer):  # what transformers calls a layer
            module.compile(backend=backend, mode=training_args.torch_compile_mode)


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
    if engines.engine_of(args).deepspeed_stage == 3:
        trainer.model_wrapped.empty_partition_cache()  # generation may have left weights gathered
    # ZeRO-3 and FSDP2: each rank holds a part of each tensor, and all take part in putting it together.
    state = weights.gather_state_dict(model, keep=args.should_save, rows=rows)
    problem = None
    if args.should_save:
        try:
            weights.refuse_infinite(state)  # before anything good is written over
            trainer._save(output_dir, state_dict=state)
            names = set() if args.use_lora else checkpoints.names_in_base(model, args.cache_dir)
            checkpoints.verify_saved(output_dir, state, trainer.weights_have_moved(), names)
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            problem = f"{output_dir}: cannot be saved: {kind}{' '.join(str(error).split())}"
    weights.raise_on_all_ranks(problem)  # the others would wait for rank 0 in the next collective


# ----------------------------------------------------------------------------------------------------------------------


def parse(argv):
    """The four argument instances of a command line; raises UserError for what cannot be meant."""
    named = command_line.given(argv)
    if named & {"eval_data_path", "eval_ratio"} and not named & {"eval_strategy", "evaluation_strategy"}:
        argv = [*argv, "--eval_strategy=epoch"]
    arguments = command_line.parse(argv, ARGUMENTS, notice=say)
    flag_rules.settle(*arguments, named)
    return arguments


def train(argv=None):
    """Parse the command line, train, save; returns the Trainer's metrics."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    with nodes.watch():  # of several machines, each ends when another one is gone
        return run(*arguments)


def run(model_args, data_args, training_args, lora_args):
    """The whole training of these arguments."""
    transformers.set_seed(training_args.seed)
    tokenizer = load_tokenizer(model_args, training_args)
    try:
        encoder = ChatEncoder(tokenizer, data_args.train_on, data_args.thinking)
    except ValueError as error:
        raise UserError(f"{model_args.model_name_or_path}: {error}.") from None
    config = load_config(model_args, training_args, data_args.pack_tokens)
    train_dataset, eval_dataset = make_datasets(data_args, training_args, encoder)
    record = checkpoints.describe_run(model_args, data_args, training_args, lora_args, train_dataset)
    if training_args.resume_from_checkpoint:
        checkpoints.refuse_changed_run(
            training_args.resume_from_checkpoint, record, ARGUMENTS, training_args.ignore_data_skip
        )

    if data_args.preview or data_args.validate_only or data_args.dump_tokens:
        report.look(data_args, tokenizer, {"training": train_dataset, **(eval_dataset or {})})
        return {}

    if data_args.pack_tokens:
        seed = None if training_args.train_sampling_strategy == "sequential" else training_args.seed
        train_dataset = packing.Packed(train_dataset, data_args.pack_tokens, seed, training_args.torch_compile)
    compute_dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    model = load_model(config, model_args, training_args, lora_args, compute_dtype)
    generation.stop_at(model, tokenizer, encoder)
    if training_args.use_lora:
        model = add_adapter(model, training_args, lora_args)
    if training_args.torch_compile:
        compile_layers(model, training_args)
    questions, metric = [], None
    if data_args.eval_generate:
        held_out = (dataset.conversations[number] for dataset in eval_dataset.values() for number in dataset.kept)
        chosen = list(itertools.islice(held_out, data_args.eval_generate))
        questions = answers.questions(chosen, encoder, training_args.model_max_length)
        metric = answers.load_metric(data_args.metric) if data_args.metric else None
    trainer = RecipeTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=Collator(training_args.padding_free),
        save=safe_save_model_for_hf_trainer,
        record=record,
        questions=questions,
        metric=metric,
        stop_id=encoder.stop_id,
    )
    if training_args.gradient_checkpointing is None:
        start_report.choose_checkpointing(trainer, compute_dtype, lora_args)
    engines.settle_checkpointing(model, training_args, lora_args.q_lora)
    say(start_report.describe(trainer, compute_dtype, lora_args))
    metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
    safe_save_model_for_hf_trainer(trainer, training_args.output_dir)
    trainer.save_state()
    if eval_dataset is not None:
        now = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
        evaluated = {key: value for entry in now for key, value in entry.items() if key.startswith("eval_")}
        if "eval_loss" not in evaluated:
            evaluated = trainer.evaluate()
            trainer.keep_best(evaluated)
        metrics.update(evaluated)
        trainer.save_state()
    if trainer.args.should_save:
        curves.draw(trainer.state.log_history, training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def main():
    try:
        train()
    except UserError as error:
        console.fail(error)


if __name__ == "__main__":
    main()
    console.leave()
