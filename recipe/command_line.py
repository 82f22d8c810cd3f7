"""The command line: config files, ancestors' spellings, and errors that name the nearest flag.

`parse(argv, classes)` is `HfArgumentParser` with these additions. A first word that ends in .yaml, .yml or .json is a
config file whose entries stand before the command line, so the command line wins. Flags that transformers or the
ancestors (Qwen's finetune.py, FastChat's train_lora.py) spelled differently are translated, one notice each. An unknown
flag or a wrong value is one sentence. --help shows our own flags before those inherited from transformers.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import typing
from collections.abc import Sequence

from recipe.console import UserError

CONFIG_FILES = (".yaml", ".yml", ".json")
RENAMED = {  # old flag: new flag, or None where nothing is left to set
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all steps
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "flash_attn": "attn_implementation",
    "group_by_length": "train_sampling_strategy",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": None,
    "save_safetensors": None,
    "logging_dir": None,
    "include_tokens_per_second": None,
    "fsdp_transformer_layer_cls_to_wrap": None,  # the model names it
    "fsdp_min_num_params": None,
}
VALUES = {  # new values for flags whose meaning changed with the name
    "flash_attn": {True: "flash_attention_2", False: "auto"},
    "group_by_length": {True: "group_by_length", False: "random"},
}


def parse(argv, classes, notice=print):
    """Parse `argv` (without the program's name) into one instance of each dataclass in `classes`.

    Raises:
        UserError: unknown flag, missing or wrong value, unreadable config file.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        classes,
        allow_abbrev=False,
        formatter_class=_Help,
        usage="%(prog)s [run.yaml] --model_name_or_path NAME --data_path FILE [--flag value ...]",
        description="Fine-tune a chat model on conversations. A config file holds flags, too, as 'flag: value'.",
    )
    parser.error = _raise
    parser._negative_number_matcher = re.compile(r"-[.\d]")  # -1e-4 is a value; argparse would take it for a flag
    several = _widen(parser, classes)
    _group(parser, classes)
    flags = {option[2:] for option in parser._option_string_actions if option.startswith("--")}
    values, rest = parser.parse_known_args(_translated(_expanded(argv), flags, notice))
    if rest:
        raise UserError(_unknown(rest[0], flags))
    for name in several:
        if isinstance(words := getattr(values, name), list) and len(words) == 1:
            setattr(values, name, words[0])
    try:
        return tuple(
            cls(**{field.name: getattr(values, field.name) for field in dataclasses.fields(cls) if field.init})
            for cls in classes
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        _raise(str(error))


def given(argv):
    """Names of the flags on a command line or in its config file, without dashes."""
    return {word[2:].split("=")[0].replace("-", "_") for word in _expanded(argv) if word.startswith("--")}


def _raise(message):
    """One sentence, with one spelling of the flag: argparse names --learning_rate/--learning-rate."""
    message = re.sub(r"(--\w+)/--[\w-]+", r"\1", " ".join(message.split()))
    raise UserError(message.rstrip(".") + ".") from None


def _unknown(word, flags):
    if not word.startswith("-"):
        hint = "A config file comes before all flags." if word.endswith(CONFIG_FILES) else "See --help."
        return f"Unexpected word {word!r}. {hint}"
    word = word.split("=")[0]
    typed = flags - {"local_rank"}  # launchers give that one
    near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), sorted(typed), n=1, cutoff=0.5)
    return f"Unknown flag {word!r}. " + (f"Did you mean --{near[0]}?" if near else "See --help.")


# ----------------------------------------------------------------------------------------------------------------------
# Config files


def _expanded(argv):
    """The command line with a config file's entries in the file's place."""
    start = 1 if argv and argv[0].startswith("--local_rank=") else 0  # deepspeed's launcher puts that first
    for file in argv[start : start + 1]:
        if file.endswith(CONFIG_FILES) and not file.startswith("-"):
            return [*argv[:start], *_config_argv(file), *argv[start + 1 :]]
    return list(argv)


def _config_argv(path):
    """A config file's entries as words of a command line; nothing is set for null and for an empty list."""
    entries = _entries(path)
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected entries of the form 'learning_rate: 1e-4', one for each flag.")
    words = []
    for name, value in entries.items():
        if value is False and str(name).endswith("strategy"):
            value = "no"  # which YAML reads as False
        if isinstance(value, list):
            words += [f"--{name}", *map(_word, value)] if value else []
        elif value is not None:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value):
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)


def _entries(path):
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, as YAML 1.2 does, where PyYAML asks for 1.0e-4."""

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    kind = "JSON" if path.endswith(".json") else "YAML"
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file) if kind == "JSON" else yaml.load(file, Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}: not valid YAML: line {error.problem_mark.line + 1}: {error.problem}.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid {kind}: {' '.join(str(error).split())}.") from None


# ----------------------------------------------------------------------------------------------------------------------
# Old spellings


def _translated(argv, flags, notice):
    """Replace old spellings that this version of transformers no longer has, or has as deprecated ones."""
    renamed = {old: new for old, new in RENAMED.items() if (new in flags if new else old not in flags)}
    words, rest, notices = [], list(argv), {}
    while rest:
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in renamed:
            words.append(word)
            continue
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        new = renamed[name]
        if new is None:
            notices[name] = f"--{name} has no effect any more and is left out."
            continue
        value = _new_value(name, value)
        words.append(f"--{new}={value}" if value else f"--{new}")
        notices[name] = f"--{name} is now --{new}: using {words[-1]}."
    for text in notices.values():
        notice(text)
    return words


def _new_value(name, value):
    if name in VALUES:
        from transformers.hf_argparser import string_to_bool

        try:
            return VALUES[name][string_to_bool(value or "true")]
        except argparse.ArgumentTypeError:
            raise UserError(f"--{name} {value}: expected true or false.") from None
    if name == "warmup_ratio" and re.fullmatch(r"[1-9]\d*(\.\d*)?", value):
        raise UserError(f"--{name} {value}: expected a share of all steps, below 1; --warmup_steps counts steps.")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# What HfArgumentParser leaves to be done


def _widen(parser, classes):
    """Accept every value that a field's type allows: HfArgumentParser takes one member of a union.

    Returns:
        Names of the flags that may be one text or a list of them.
    """
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    several = []
    for action in parser._actions:
        members = {typing.get_origin(member) or member for member in typing.get_args(hints.get(action.dest))}
        configs = [member for member in members if dataclasses.is_dataclass(member)]
        if configs:
            action.type = lambda text, config=configs[0]: config(**_json_object(text))
        elif dict in members:
            action.type = _json_or_path if str in members else _json_object
        elif {str, bool} <= members or {str, typing.Literal} <= members:
            action.type = _true_false_or_text
        elif {str, list} <= members and action.nargs is None:
            action.nargs = "+"
            several.append(action.dest)
    return several


def _json_object(text):
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{{\"key\": 1}}', got {text}")
    return value


def _json_or_path(text):
    return _json_object(text) if text.startswith("{") else text


def _true_false_or_text(text):
    return {"true": True, "false": False}.get(text.lower(), text)


def _group(parser, classes):
    """Put what each class declares itself first in --help, under the class's name, and what it inherits last."""
    inherited = parser._optionals
    for cls in classes:
        group = parser.add_argument_group(cls.__name__.replace("Arguments", " arguments").lower())
        for action in list(inherited._group_actions):
            if action.dest in inspect.get_annotations(cls):
                inherited._group_actions.remove(action)
                group._group_actions.append(action)
    inherited.title = "arguments inherited from transformers.TrainingArguments"
    parser._action_groups.remove(inherited)
    parser._action_groups.append(inherited)


KINDS = {"int": "INT", "float": "FLOAT", "string_to_bool": "BOOL"}  # an argument's type and its name in --help


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, the kind of its value, and its default where the text does not tell it."""

    def add_argument(self, action):
        if not isinstance(action, argparse._StoreFalseAction):  # --no_x, the twin of --x
            super().add_argument(action)

    def _format_action_invocation(self, action):
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        kind = KINDS.get(getattr(action.type, "__name__", None), "TEXT")
        return f"{action.option_strings[0]} {self._format_args(action, kind)}"

    def _get_help_string(self, action):
        told = re.search("default|required", action.help, re.IGNORECASE)
        return action.help if told else super()._get_help_string(action)


def add_model_flags(parser: argparse.ArgumentParser, thinking: Sequence[str]) -> None:
    """Add the flags of a tool that uses a trained model; they mean what they mean in training.

    Args:
        parser: the tool's parser.
        thinking: the values of --thinking, the default first.
    """
    from transformers.hf_argparser import string_to_bool

    switch = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    parser.add_argument("--model_name_or_path", required=True, help="Model folder, adapter folder or hub name.")
    parser.add_argument("--base", help="Base model of the adapter. Default: the one that the adapter names.")
    parser.add_argument("--q_lora", **switch, help="Hold the base model in 4 bits (NF4). Default False.")
    parser.add_argument("--chat_template", help="Jinja file to use instead of the model's own chat template.")
    parser.add_argument(
        "--thinking", choices=thinking, default=thinking[0], help=f"As in training. Default {thinking[0]}."
    )
    parser.add_argument("--trust_remote_code", **switch, help="Run code that comes with the model. Default False.")
    parser.add_argument("--cache_dir", help="Folder for downloaded models. Default: the hub's own.")


def model_options(args: argparse.Namespace) -> dict:
    """Return what `recipe.model.loading.load` takes of the flags of `add_model_flags`."""
    return {name: getattr(args, name) for name in ("base", "chat_template", "trust_remote_code", "cache_dir")}
