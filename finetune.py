"""Fine-tune a chat model on a file of conversations: full, LoRA or 4-bit QLoRA, on a CPU, a GPU or many.

    python finetune.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --data_path data/train.jsonl --use_lora
    torchrun --nproc_per_node 2 finetune.py run.yaml --learning_rate 1e-4

Reads top to bottom in the order the data flows: arguments, datasets, model and adapter, trainer, saving, train().
"""

import json
import math
import os
import sys
from dataclasses import dataclass, field
from functools import partial

if {"-h", "--help"} & set(sys.argv[1:]):
    sys.modules["bitsandbytes"] = None  # peft would import it, and a compiler with it: a second that --help can save

import torch
import transformers
from torch.utils.data import Dataset

import cli
import curves
from batches import Collator, supervised_loss
from cli import say
from conversations import UserError, open_records, shape_of, to_conversation
from tokens import ChatEncoder

# ----------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default=None, metadata={"help": "Folder or hub name of the model to start from. Required."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Computing precision: auto, bfloat16, float16 or float32. Default auto: bfloat16 where the hardware "
            "has it, float16 on older GPUs, float32 otherwise. --bf16 and --fp16 say the same."
        },
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "Attention kernel: auto, sdpa, eager, flash_attention_2 ... Default auto: the model's own choice. "
            "Change it when a kernel is installed that auto does not pick."
        },
    )
    rope_scaling: str = field(
        default=None,
        metadata={
            "help": "yarn, linear or dynamic: stretch the positions when --model_max_length exceeds the model's window. "
            "Default none: a longer --model_max_length is refused."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with the model. Default False; Qwen1.5 and later need none."},
    )


@dataclass
class DataArguments:
    data_path: list[str] = field(
        default=None,
        metadata={
            "help": "One or more training files (JSON, JSON Lines, .gz of these, Parquet, CSV) or a hub dataset. Required."
        },
    )
    eval_data_path: list[str] = field(
        default=None,
        metadata={"help": "One or more files to evaluate on. Default none."},
    )
    eval_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training rows, 0 to 1, held out for evaluation, drawn with --seed. Default 0. Use it "
            "when there is no --eval_data_path."
        },
    )
    lazy_preprocess: bool = field(
        default=False,
        metadata={
            "help": "Tokenise rows when they are needed instead of all before the first step. Default False. For files "
            "of more than some 100,000 rows."
        },
    )
    train_on: str = field(
        default="all_turns",
        metadata={
            "help": "Which assistant turns are learnt: all_turns (default) or last_turn. A message with "
            '"train": false is never learnt.'
        },
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: str = field(default=None, metadata={"help": "Folder for downloaded models. Default: the hub's own."})
    model_max_length: int = field(
        default=None,
        metadata={
            "help": "Longest conversation in tokens. Default 8192, or the model's window if that is shorter. Longer ones are dropped and counted; lower it to "
            "save memory, raise it when the start block reports dropped rows."
        },
    )
    use_lora: bool = field(
        default=False, metadata={"help": "Train a LoRA adapter instead of all weights. Default False."}
    )
    padding_free: bool = field(
        default=True,
        metadata={
            "help": "Lay the conversations of a micro-batch side by side in one row instead of padding them. Default "
            "True. Set False for models that cannot keep them apart."
        },
    )
    bf16: bool = field(default=None, metadata={"help": "bfloat16 computing. Default: by hardware, see --dtype."})
    fp16: bool = field(default=None, metadata={"help": "float16 computing. Default: by hardware, see --dtype."})
    optim: str = field(
        default="adamw_torch", metadata={"help": "Optimizer, by its transformers name. Default adamw_torch."}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning-rate schedule, by its transformers name. Default cosine."}
    )
    save_total_limit: int = field(
        default=2, metadata={"help": "Checkpoints kept on disk, the newest ones. Default 2; more when disk allows."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide non-finite losses in the log. Default False: they stop the run."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Has no use here: batches hold only what the model needs. Default False."}
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Evaluation keeps losses, never logits, in memory. Default True."}
    )

    def __post_init__(self):
        if not torch.cuda.is_available() and not self.use_cpu:
            self.use_cpu = True
            if self.tf32:
                say("--tf32 is for GPUs and is left out on this CPU.")
                self.tf32 = None
            if self.deepspeed:
                say("no GPU: DeepSpeed is left out and one process trains on the CPU.")
                self.deepspeed = None
        best = best_dtype(self.use_cpu)
        if self.bf16 is None and self.fp16 is None:
            self.bf16, self.fp16 = best == torch.bfloat16, best == torch.float16
        elif self.fp16 and self.use_cpu or self.bf16 and best != torch.bfloat16:
            asked = "fp16" if self.fp16 else "bf16"
            say(f"--{asked}: this hardware computes better in {_name(best)}, which is used instead.")
            self.bf16, self.fp16 = best == torch.bfloat16, best == torch.float16
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        self.label_names = ["labels"]
        super().__post_init__()


@dataclass
class LoraArguments:
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapter. Default 64; 8 to 16 is often enough."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale: the adapter counts alpha / r times. Default 16."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter, 0 to 1. Default 0.05."})
    lora_target_modules: list[str] = field(
        default=None,
        metadata={"help": "Names of the linear layers to adapt. Default: every one except the output head."},
    )
    lora_weight_path: str = field(
        default="", metadata={"help": "Folder of an adapter to continue from, with its own rank. Default: a new one."}
    )
    lora_bias: str = field(
        default="none", metadata={"help": "Biases to train with the adapter: none (default), all, lora_only."}
    )
    q_lora: bool = field(
        default=False,
        metadata={"help": "Hold the base model in 4 bits (NF4): a quarter of the memory, somewhat slower. Default False."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by alpha / sqrt(r) instead of alpha / r. Default False; for high ranks."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Weight-decomposed LoRA (DoRA): slower, at times better. Default False."}
    )
    modules_to_save: list[str] = field(
        default=None,
        metadata={"help": "Layers trained and saved whole beside the adapter, such as lm_head. Default none: some "
        "servers refuse such adapters."},
    )  # fmt: skip
    init_lora_weights: str = field(
        default="true", metadata={"help": "How the adapter starts: true (default), gaussian, pissa, olora, eva, loftq."}
    )


def best_dtype(cpu):
    """Fastest precision that trains well here: bfloat16, float16 (GPUs before Ampere) or float32."""
    if cpu:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _name(dtype):
    return str(dtype).removeprefix("torch.")


# ----------------------------------------------------------------------------------------------------------------------
# Datasets: files -> conversations -> documents of ids and labels


class Conversations:
    """The records of several files as one sequence of conversations.

    Args:
        paths: files or hub datasets.
        indices: which records, in the order of the files (None: all).
    """

    def __init__(self, paths, indices=None):
        self.sources = [open_records(path) for path in paths]
        self._ends = torch.tensor([len(source) for source in self.sources]).cumsum(0)
        self.indices = indices

    def __len__(self):
        return int(self._ends[-1]) if self.indices is None else len(self.indices)

    def _locate(self, index):
        index = int(index if self.indices is None else self.indices[index])
        file = int(torch.searchsorted(self._ends, index, right=True))
        return self.sources[file], index - (int(self._ends[file - 1]) if file else 0)

    def where(self, index):
        source, record = self._locate(index)
        return source.where(record)

    def __getitem__(self, index):
        source, record = self._locate(index)
        return to_conversation(source[record], source.where(record))

    def shapes(self):
        """File name and the shape of its first record, for the log."""
        return {source.name: shape_of(source[0], source.where(0)) for source in self.sources}


def split(paths, ratio, seed):
    """Two disjoint views of the same files: the rows to train on and the share `ratio` held out."""
    total = len(Conversations(paths))
    held_out = round(total * ratio)
    if not 0 < held_out < total:
        raise UserError(f"--eval_ratio {ratio} of {total} rows leaves {held_out} to evaluate; change it or add rows.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return (
        Conversations(paths, order[held_out:].sort().values),
        Conversations(paths, order[:held_out].sort().values),
    )


class SupervisedDataset(Dataset):
    """Conversations tokenised ahead.

    An item is a list of documents (dicts of `input_ids` and `labels`); `dropped` maps a reason to the records dropped
    for it. Rows are the same as those of LazySupervisedDataset.
    """

    batch = 1000

    def __init__(self, conversations, encoder, max_length):
        self.conversations, self.encoder, self.max_length = conversations, encoder, max_length
        self.dropped, self.rows, self.kept = {}, [], []
        self._scan()

    def _scan(self):
        from tqdm import tqdm

        total = len(self.conversations)
        with tqdm(total=total, desc="tokenising", unit="row", disable=total < self.batch or _rank() > 0) as bar:
            for start in range(0, total, self.batch):
                numbers = range(start, min(start + self.batch, total))
                for number, documents in zip(numbers, encode_records(self.conversations, numbers, self.encoder)):
                    reason = self.why_dropped(documents)
                    if reason:
                        self.dropped.setdefault(reason, []).append(number)
                    else:
                        self._keep(number, documents)
                bar.update(len(numbers))

    def _keep(self, number, documents):
        self.kept.append(number)
        self.rows.append(documents)

    def why_dropped(self, documents):
        """Reason not to train on a conversation, or None."""
        if not documents:
            return "no turn to learn"
        if max(len(document["input_ids"]) for document in documents) > self.max_length:
            return f"longer than {self.max_length} tokens"
        return None

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        return self.rows[index]


class LazySupervisedDataset(SupervisedDataset):
    """Conversations tokenised on demand: only the position of each kept row is in memory.

    The first `scan` records are tokenised once at the start, to find out what is dropped and why, and forgotten again;
    a later record that must be dropped gives its place to the next one that is kept.
    """

    scan = 10_000

    def _scan(self):
        self.tokens = []
        super()._scan()

    def _keep(self, number, documents):
        self.kept.append(number)

    def __getitem__(self, index):
        number = self.kept[index]
        return encode_records(self.conversations, [number], self.encoder)[0]


def encode_records(conversations, numbers, encoder):
    """Documents of the conversations with these numbers; a template's refusal names the record."""
    from jinja2 import TemplateError

    batch = [conversations[number] for number in numbers]
    try:
        return encoder.encode_batch(batch)
    except (TemplateError, ValueError) as error:
        if len(batch) == 1:
            raise UserError(f"{conversations.where(numbers[0])}: the chat template refuses it: {error}") from None
        return [encode_records(conversations, [number], encoder)[0] for number in numbers]


def make_dataset(conversations, encoder, data_args, max_length):
    """The eager or the lazy dataset; raises UserError if no row is left."""
    kind = LazySupervisedDataset if data_args.lazy_preprocess else SupervisedDataset
    dataset = kind(conversations, encoder, max_length)
    if not len(dataset):
        reasons = "; ".join(f"{len(rows)} {reason}" for reason, rows in dataset.dropped.items())
        raise UserError(f"no row is left to use: {reasons}. Raise --model_max_length or mend the data.")
    return dataset


def _rank():
    return int(os.environ.get("RANK", 0))


# ----------------------------------------------------------------------------------------------------------------------
# Model and adapter


def load_config(model_args, training_args):
    """The model's configuration, its window stretched to --model_max_length where --rope_scaling says how."""
    config = transformers.AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        trust_remote_code=model_args.trust_remote_code,
        cache_dir=training_args.cache_dir,
    )
    if training_args.model_max_length is None:
        training_args.model_max_length = min(8192, config.max_position_embeddings)
    _scale_rope(config, model_args.rope_scaling, training_args.model_max_length)
    return config


def load_model(config, model_args, training_args, lora_args, compute_dtype):
    """Load the base model: 4-bit for QLoRA, the computing precision for LoRA, float32 masters for full training."""
    options = {"trust_remote_code": model_args.trust_remote_code, "cache_dir": training_args.cache_dir}
    options["dtype"] = compute_dtype if training_args.use_lora else torch.float32
    if model_args.attn_implementation != "auto":
        options["attn_implementation"] = model_args.attn_implementation
    if lora_args.q_lora:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    if lora_args.q_lora or not training_args.use_cpu:
        options["device_map"] = {"": training_args.device}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path, config=config, **options
    )
    model.config.use_cache = False  # no cache in training; `safe_save_model_for_hf_trainer` restores it
    return model


def _scale_rope(config, kind, length):
    window = config.max_position_embeddings
    if length <= window:
        return
    if kind is None:
        raise UserError(
            f"--model_max_length {length} exceeds the model's window of {window} positions; lower it or set "
            "--rope_scaling yarn."
        )
    if kind not in ("yarn", "linear", "dynamic"):
        raise UserError(f"--rope_scaling {kind!r}: expected yarn, linear or dynamic.")
    factor = math.ceil(length / window * 100) / 100
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": window,
    }
    if kind != "dynamic":
        config.max_position_embeddings = length
    say(f"rope scaling: {kind}, factor {factor}, window {window} -> {length}")


def add_adapter(model, training_args, lora_args):
    """Wrap the model with a new LoRA adapter, or with the one to continue from. Adapter weights are float32."""
    import peft

    if lora_args.q_lora:
        for parameter in model.parameters():  # peft's own preparation would copy the embeddings to float32
            parameter.requires_grad_(False)
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()
    if lora_args.lora_weight_path:
        return peft.PeftModel.from_pretrained(model, lora_args.lora_weight_path, is_trainable=True)
    start = lora_args.init_lora_weights
    return peft.get_peft_model(
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
        ),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Trainer


class RecipeTrainer(transformers.Trainer):
    """The Trainer with a token-weighted loss on supervised positions only, exact evaluation and a `best` folder."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the supervised tokens of the whole optimizer step

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count those tokens, over all ranks
        self.best_loss = math.inf
        self._eval_sums = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the cross entropy over supervised tokens / their number in the optimizer step (in the batch, if None)."""
        total, supervised = supervised_loss(model, inputs)
        if self._eval_sums is not None:
            self._eval_sums += torch.stack([total.detach().double(), supervised.double()])
        count = num_items_in_batch if num_items_in_batch is not None else supervised.clamp(min=1)
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks, the count is their sum
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def get_eval_dataloader(self, eval_dataset=None):
        """Fills the last batches with empty conversations, where the default would count some rows twice."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        return super().get_eval_dataloader(_Filled(dataset, self.args.eval_batch_size * self.args.world_size))

    def evaluation_loop(self, dataloader, description, metric_key_prefix="eval", **kwargs):
        self._eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(dataloader, description, metric_key_prefix=metric_key_prefix, **kwargs)
            sums = self.accelerator.reduce(self._eval_sums)
        finally:
            self._eval_sums = None
        output.metrics[f"{metric_key_prefix}_loss"] = (sums[0] / sums[1]).item()
        return output

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        if metrics["eval_loss"] < self.best_loss:
            self.best_loss = metrics["eval_loss"]
            folder = os.path.join(self.args.output_dir, "best")
            safe_save_model_for_hf_trainer(self, folder)
            if self.args.should_save:
                with open(os.path.join(folder, "metrics.json"), "w", encoding="utf-8") as file:
                    json.dump({"eval_loss": self.best_loss, "step": self.state.global_step}, file)
        return metrics

    def log(self, logs, *args, **kwargs):
        loss = logs.get("loss", 0.0)
        if not math.isfinite(loss) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise UserError(
                f"step {self.state.global_step}: the loss is {loss} and the gradient norm {logs.get('grad_norm')}; "
                "training is stopped, the last checkpoint is untouched. Lower --learning_rate or use --bf16."
            )
        super().log(logs, *args, **kwargs)


class _Filled(Dataset):
    """A dataset followed by empty conversations up to a multiple of `batch`."""

    def __init__(self, dataset, batch):
        self.dataset, self.length = dataset, math.ceil(len(dataset) / batch) * batch

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.dataset[index] if index < len(self.dataset) else []


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def safe_save_model_for_hf_trainer(trainer, output_dir):
    """Write the adapter (or the whole model), tokenizer, chat template and generation config to `output_dir`.

    Every rank must call it: the engines gather weights collectively. Rank 0 writes.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True
    trainer.save_model(output_dir, _internal_call=True)
    if trainer.args.should_save:
        model.generation_config.save_pretrained(output_dir)
    model.config.use_cache = False


# ----------------------------------------------------------------------------------------------------------------------


def train(argv=None):
    """Parse the command line, train, save; returns the Trainer's metrics."""
    argv = sys.argv[1:] if argv is None else argv
    classes = (ModelArguments, DataArguments, TrainingArguments, LoraArguments)
    model_args, data_args, training_args, lora_args = cli.parse(argv, classes, notice=say)
    for name, value in (("model_name_or_path", model_args.model_name_or_path), ("data_path", data_args.data_path)):
        if not value:
            raise UserError(f"--{name} is required; see --help.")
    named = cli.given(argv)
    if not training_args.use_lora and (lora_args.q_lora or any(name.startswith("lora_") for name in named)):
        if "use_lora" in named:
            raise UserError("--use_lora False contradicts the LoRA flags; remove one of them.")
        training_args.use_lora = True
        say("LoRA flags are given: training a LoRA adapter (--use_lora).")

    transformers.set_seed(training_args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        trust_remote_code=model_args.trust_remote_code,
        cache_dir=training_args.cache_dir,
    )
    try:
        encoder = ChatEncoder(tokenizer, data_args.train_on)
    except ValueError as error:
        raise UserError(f"{model_args.model_name_or_path}: {error}.") from None
    config = load_config(model_args, training_args)
    make = partial(make_dataset, encoder=encoder, data_args=data_args, max_length=training_args.model_max_length)
    conversations, held_out = Conversations(data_args.data_path), None
    if data_args.eval_data_path:
        held_out = Conversations(data_args.eval_data_path)
    elif data_args.eval_ratio:
        conversations, held_out = split(data_args.data_path, data_args.eval_ratio, training_args.seed)
    if held_out is None and training_args.eval_strategy != "no":
        raise UserError("--eval_strategy is set but there is nothing to evaluate; add --eval_data_path or --eval_ratio.")
    train_dataset, eval_dataset = make(conversations), make(held_out) if held_out is not None else None

    compute_dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    model = load_model(config, model_args, training_args, lora_args, compute_dtype)
    if training_args.use_lora:
        model = add_adapter(model, training_args, lora_args)
    elif training_args.gradient_checkpointing:
        model.enable_input_require_grads()
    trainer = RecipeTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=Collator(training_args.padding_free),
    )
    metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
    safe_save_model_for_hf_trainer(trainer, training_args.output_dir)
    trainer.save_state()
    if eval_dataset is not None:
        metrics.update(trainer.evaluate())
    if trainer.args.should_save:
        curves.draw(trainer.state.log_history, training_args.output_dir)
    return metrics


def main():
    try:
        train()
    except UserError as error:
        cli.fail(error)


if __name__ == "__main__":
    main()
