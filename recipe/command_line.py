"""Read a command line and a config file into argument classes, and write them as a config file.

The parser is transformers' HfArgumentParser with these additions:

* A first word that ends in .yaml, .yml or .json is a config file. Its entries follow the rules of the command line,
  which wins over them.
* Flags that transformers or the ancestors (Qwen's finetune.py, FastChat's train_lora.py) spelled differently are
  translated, with one notice each.
* A mistake is one sentence, and an unknown flag names the nearest known one.
* --help shows the flags of this project before those of transformers.
"""

import argparse
import copy
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

from recipe.console import UserError

CONFIG_FILES = (".yaml", ".yml", ".json")
RENAMED = {  # old flag: new flag
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a share of all steps
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "flash_attn": "attn_implementation",
    "group_by_length": "train_sampling_strategy",
    "no_cuda": "use_cpu",
}
WITHOUT_EFFECT = (  # old flags without a successor
    "overwrite_output_dir",
    "save_safetensors",
    "logging_dir",
    "include_tokens_per_second",
    "fsdp_transformer_layer_cls_to_wrap",  # the model names it
    "fsdp_min_num_params",
)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of a numeric flag, at_least <= value < below; it serves as the `choices` of an argparse argument."""

    at_least: float
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value and (self.below is None or value < self.below)

    def __iter__(self) -> Iterator[str]:
        return iter([str(self)])

    def __str__(self) -> str:
        return f"at least {self.at_least:g}" + (f" and below {self.below:g}" if self.below is not None else "")


def read(argv: Sequence[str], classes: Sequence[type], notice: Callable[[str], object] = print) -> dict[str, Any]:
    """Return the flags that a command line and its config file name, with their values; old spellings, too.

    Args:
        argv: the words after the program's name.
        classes: argument dataclasses; each of their fields is a flag.
        notice: called with one sentence for each old spelling.
    Raises:
        UserError: unknown flag, missing or wrong value, unreadable config file.
        SystemExit: after --help.
    """
    parser, unnamed = _parser(classes), object()
    flags = list(defaults(classes))
    named = argparse.Namespace(**dict.fromkeys(flags, unnamed))
    path, words = split(argv)
    entries = _entries(path) if path and not {"-h", "--help"} & set(words) else []
    for source, part in ((f"{path}: ", entries), ("", words)):
        try:
            _, rest = parser.parse_known_args(part, named)
            if rest:
                raise UserError(_unknown(rest[0], flags))
        except UserError as error:
            raise UserError(f"{source}{error}") from None
    values = {name: getattr(named, name) for name in flags if getattr(named, name) is not unnamed}
    _unwrap_single_words(values, classes)
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in (*entries, *words) if word.startswith("--")}
    for old, new in RENAMED.items():
        if old in typed and new in flags:
            values[old] = values[new]
            notice(f"--{old} is now --{new}: using --{new}={values[new]}.")
    for old in WITHOUT_EFFECT:
        if old in typed and old not in flags:
            notice(f"--{old} has no effect any more and is left out.")
    return values


def defaults(classes: Sequence[type]) -> dict[str, Any]:
    """Return all flags of these dataclasses with their defaults."""
    fields = [field for cls in classes for field in dataclasses.fields(cls) if field.init]
    return {f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory() for f in fields}


def build(values: dict[str, Any], classes: Sequence[type]) -> tuple[Any, ...]:
    """Make one instance of each dataclass; flags that are absent in `values` have their defaults.

    Raises:
        UserError: a value that the class refuses.
    """
    names = [{field.name for field in dataclasses.fields(cls)} for cls in classes]
    try:
        return tuple(
            cls(**{name: value for name, value in values.items() if name in known})
            for cls, known in zip(classes, names, strict=True)
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        _raise(str(error))


def split(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the config file of a command line, or None, and all other words."""
    start = 1 if argv and argv[0].startswith("--local_rank=") else 0  # deepspeed's launcher puts that first
    for word in argv[start : start + 1]:
        if word.endswith(CONFIG_FILES) and not word.startswith("-"):
            return word, [*argv[:start], *argv[start + 1 :]]
    return None, list(argv)


def _raise(message: str) -> typing.NoReturn:
    """Raise a UserError of one sentence; argparse names all spellings of a flag, of which the first one is kept."""
    message = re.sub(r"(--\w+)(/--[\w-]+)+", r"\1", " ".join(message.split()))
    raise UserError(message.rstrip(".") + ".") from None


def _unknown(word: str, flags: Sequence[str]) -> str:
    if not word.startswith("-"):
        hint = "A config file comes before all flags." if word.endswith(CONFIG_FILES) else "See --help."
        return f"Unexpected word {word!r}. {hint}"
    word = word.split("=")[0]
    typed = sorted({*flags} - {"local_rank"})  # launchers give that one
    near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), typed, n=1, cutoff=0.5)
    return f"Unknown flag {word!r}. " + (f"Did you mean --{near[0]}?" if near else "See --help.")


# ----------------------------------------------------------------------------------------------------------------------
# Config files


def _entries(path: str) -> list[str]:
    """Return a config file's entries as words of a command line; null and an empty list set nothing.

    argparse would take them as defaults (`set_defaults`), but checks neither the type nor the choices of a default.
    """
    import yaml

    kind = "JSON" if path.endswith(".json") else "YAML"
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = json.load(file, object_pairs_hook=_unique) if kind == "JSON" else _yaml(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}: not valid YAML: line {error.problem_mark.line + 1}: {error.problem}.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid {kind}: {' '.join(str(error).split())}.") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected entries of the form 'learning_rate: 1e-4', one for each flag.")
    words = []
    for name, value in entries.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(_word, value)] if value else []
        elif value is not None:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _yaml(file: typing.TextIO) -> dict[str, Any] | None:
    """Load a mapping whose texts and numbers stay as they are written, so that `no` is a word and 007 keeps its zeros.

    Only what stands in an inner mapping, such as lr_scheduler_kwargs, gets a type from YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, as YAML 1.2 and JSON do; PyYAML expects 1.0e-4."""

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    loader = Loader(file)

    def plain(node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [plain(item) for item in node.value]
        is_word = isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null"
        return node.value if is_word else loader.construct_object(node, deep=True)

    root = loader.get_single_node()
    if not isinstance(root, yaml.MappingNode):
        return None
    _unique([(key.value, value) for key, value in root.value])
    loader.flatten_mapping(root)  # entries that are merged by <<
    return {str(key.value): plain(value) for key, value in root.value}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict, and raise ValueError when a key stands twice, which JSON and YAML pass over."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} stands there twice")
    return dict(pairs)


# What a run.yaml holds even where it is the default, as it decides what is learnt.
RECORDED = """
    model_name_or_path data_path model_max_length learning_rate lr_scheduler_type warmup_steps num_train_epochs
    per_device_train_batch_size gradient_accumulation_steps weight_decay max_grad_norm optim seed bf16 fp16 use_lora
    activation_checkpointing lora_r lora_alpha lora_dropout
""".split()
# What it never holds, or not with this value: secrets, what belongs to one process or one start, what is always so.
NOT_RECORDED = ("hub_token", "local_rank", "resume_from_checkpoint")
ALWAYS_SO = {
    "label_names": ["labels"],
    "prediction_loss_only": True,
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": False,
    "do_eval": True,
}


def flag(default: Any, help: str, *, at_least: float | None = None, below: float | None = None, **more: Any) -> Any:
    """Make a field of an argument class: its default, the text that --help shows, and the bounds of a number."""
    if at_least is not None:
        more["choices"] = Bounds(at_least, below)
    return dataclasses.field(default=default, metadata={"help": help, **more})


def resolved(arguments: Sequence[Any]) -> dict[str, Any]:
    """Return all flags of these argument instances as the run resolved them; without secrets."""
    known = defaults([type(part) for part in arguments])
    named = {name: value for part in arguments for name, value in vars(part).items() if name in known}
    return {name: _recorded(value) for name, value in named.items() if name not in NOT_RECORDED}


def run_yaml(arguments: Sequence[Any]) -> str:
    """Return a config file that repeats the run of these argument instances; the last one is written for adapters only.

    It holds the flags that differ from their defaults and those that decide what is learnt, as the run resolved them.
    """
    import torch
    import yaml

    adapter = any(getattr(part, "use_lora", False) for part in arguments)
    classes = [type(part) for part in arguments[: None if adapter else -1]]
    known, entries = defaults(classes), {}
    for name, default in known.items():
        value = next(_recorded(getattr(part, name)) for part in arguments if hasattr(part, name))
        skipped = name in NOT_RECORDED or RENAMED.get(name) in known or ALWAYS_SO.get(name, ...) == value
        if name == "use_cpu" and not torch.cuda.is_available():
            skipped = True  # there was no choice
        if not skipped and value not in (None, [], {}) and (name in RECORDED or value != _recorded(default)):
            entries[name] = value
    return yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def write_run_yaml(arguments: Sequence[Any], folder: str) -> None:
    """Write `run_yaml` of these argument instances beside the weights in a folder."""
    with open(os.path.join(folder, "run.yaml"), "w", encoding="utf-8") as file:
        file.write(run_yaml(arguments))


def _recorded(value: Any) -> Any:
    """Return a value as a config file holds it: the value of an enum, of a dataclass what differs from its defaults."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_recorded(item) for item in value]
    if dataclasses.is_dataclass(value):
        known = defaults([type(value)])
        return {name: item for name, item in vars(value).items() if name in known and item != known[name]}
    return value


# ----------------------------------------------------------------------------------------------------------------------
# The parser


def _parser(classes: Sequence[type]) -> argparse.ArgumentParser:
    """Build a parser with a group of flags for each class, and one for all that the classes inherit."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        add_help=False,
        allow_abbrev=False,
        formatter_class=_Help,
        usage="%(prog)s [run.yaml] --model_name_or_path NAME --data_path FILE [--flag value ...]",
        description="Fine-tune a chat model on conversations. A config file holds flags, too, as 'flag: value'.",
    )
    parser.error = _raise
    parser._negative_number_matcher = re.compile(r"-[.\d]")  # -1e-4 is a value; argparse would take it for a flag
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    flags, inherited = set(defaults(classes)), []
    for cls in classes:
        group = parser.add_argument_group(cls.__name__.replace("Arguments", " arguments").lower())
        for field in _arguments(cls, flags):
            if field.name in inspect.get_annotations(cls):
                parser._parse_dataclass_field(group, field)
            else:
                inherited.append(field)
    group = parser.add_argument_group("arguments inherited from transformers.TrainingArguments")
    for field in inherited:
        parser._parse_dataclass_field(group, field)
    _add_old_flags(parser, flags)
    return parser


def _arguments(cls: type, flags: set[str]) -> Iterator[dataclasses.Field]:
    """Yield copies of a dataclass's fields as HfArgumentParser needs them; it changes what it gets."""
    hints = typing.get_type_hints(cls)
    for field in map(copy.copy, dataclasses.fields(cls)):
        if not field.init or RENAMED.get(field.name) in flags:
            continue
        field.type = _type(hints[field.name])
        old = [name for name, new in RENAMED.items() if new == field.name and name not in TRANSLATED]
        switch = {"nargs": "?", "const": True} if hints[field.name] == str | bool else {}
        aliases = {"aliases": [word for name in old for word in _spellings(name)]}
        field.metadata = {**switch, **field.metadata, **aliases}
        if isinstance(field.metadata.get("choices"), Bounds):
            del field.metadata["choices"]  # flag_rules checks them, in edited defaults, too
        yield field


def _add_old_flags(parser: argparse.ArgumentParser, flags: set[str]) -> None:
    """Add the old flags whose values need a translation, and those that are only accepted."""
    for old, convert in TRANSLATED.items():
        if RENAMED[old] in flags:
            parser.add_argument(
                *_spellings(old), dest=RENAMED[old], type=convert, nargs="?", const="true", help=argparse.SUPPRESS
            )
    for old in set(WITHOUT_EFFECT) - flags:
        parser.add_argument(*_spellings(old), nargs="?", help=argparse.SUPPRESS)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share of all steps, below 1, got {text}; see --warmup_steps")
    return value


def _switch(on: str, off: str, text: str) -> str:
    from transformers.hf_argparser import string_to_bool

    return on if string_to_bool(text) else off


TRANSLATED = {  # old flags whose values changed with the name
    "warmup_ratio": _share,
    "flash_attn": functools.partial(_switch, "flash_attention_2", "auto"),
    "group_by_length": functools.partial(_switch, "group_by_length", "random"),
}


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _type(hint: Any) -> Any:
    """Return what argparse makes of a word for a field of this type; HfArgumentParser takes one member of a union."""
    members = {typing.get_origin(member) or member for member in typing.get_args(hint)}
    for config in filter(dataclasses.is_dataclass, members):
        return lambda text: config(**_json_object(text))
    if dict in members:
        # transformers parses JSON, too, but its error does not name the flag.
        return _json_or_path if str in members else _json_object
    if {str, bool} <= members or {str, typing.Literal} <= members:
        return _true_false_or_text
    return list[str] if {str, list} <= members else hint


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{{\"key\": 1}}', got {text}")
    return value


def _json_or_path(text: str) -> dict[str, Any] | str:
    return _json_object(text) if text.startswith("{") else text


def _true_false_or_text(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _unwrap_single_words(values: dict[str, Any], classes: Sequence[type]) -> None:
    """Turn lists of one word into the word where a field may hold either."""
    for cls in classes:
        for name, hint in typing.get_type_hints(cls).items():
            if _type(hint) == list[str] != hint and len(values.get(name, ())) == 1:
                values[name] = values[name][0]


KINDS = {"int": "INT", "float": "FLOAT", "string_to_bool": "BOOL"}  # an argument's type and its name in --help


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, the kind of its value, and its default unless that is None or empty."""

    def add_argument(self, action: argparse.Action) -> None:
        if action.const is not False:  # --no_x, the twin of --x
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        kind = KINDS.get(getattr(action.type, "__name__", ""), "TEXT")
        return f"{action.option_strings[0]} {self._format_args(action, kind)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


def add_model_flags(parser: argparse.ArgumentParser, thinking: Sequence[str], several: bool = False) -> None:
    """Add the flags of a tool that uses a trained model; they mean what they mean in training.

    Args:
        parser: the tool's parser.
        thinking: the values of --thinking.
        several: whether the tool takes more than one model.
    """
    from transformers.hf_argparser import string_to_bool

    switch = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    text = "Model folder, adapter folder or hub name"
    if several:
        parser.add_argument("--model_name_or_path", nargs="+", required=True, help=f"{text}; several are compared.")
    else:
        parser.add_argument("--model_name_or_path", required=True, help=f"{text}.")
    parser.add_argument("--base", help="Base model of the adapter. Default: the one that the adapter names.")
    parser.add_argument("--q_lora", **switch, help="Hold the base model in 4 bits (NF4). Default False.")
    parser.add_argument("--chat_template", help="Jinja file to use instead of the model's own chat template.")
    parser.add_argument(
        "--chat_template_kwargs",
        type=_json_object,
        help="Variables for the chat template, as JSON. Default: training's.",
    )
    parser.add_argument("--thinking", choices=thinking, help="Thoughts, as in training. Default: training's.")
    parser.add_argument("--model_max_length", type=int, help="Longest conversation in tokens. Default: no limit.")
    parser.add_argument("--trust_remote_code", **switch, help="Run code that comes with the model. Default False.")
    parser.add_argument("--cache_dir", help="Folder for downloaded models. Default: the hub's own.")


def model_options(args: argparse.Namespace) -> dict:
    """Return what `recipe.model.loading.load` takes of the flags of `add_model_flags`."""
    return {name: getattr(args, name) for name in ("base", "chat_template", "trust_remote_code", "cache_dir")}
