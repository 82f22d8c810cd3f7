"""The command line: ancestors' spellings, config files, and an error that names the nearest flag.

`parse(argv, classes)` is `HfArgumentParser` with three additions. A first argument that ends in .yaml, .yml or .json is
a config file whose entries stand before the command line, so the command line wins. Flags that transformers or the
ancestors (Qwen's finetune.py, FastChat's train_lora.py) spelled differently are translated, one notice each. An unknown
flag or a wrong value is one sentence.
"""

import difflib
import json
import os
import sys

from conversations import UserError

RENAMED = {  # old flag: new flag, or None where nothing is left to set
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "flash_attn": "attn_implementation",
    "group_by_length": "train_sampling_strategy",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": None,
    "save_safetensors": None,
    "logging_dir": None,
    "include_tokens_per_second": None,
    "local-rank": "local_rank",
}
VALUES = {  # new values for flags whose meaning changed with the name
    "flash_attn": {"true": "flash_attention_2", "false": "sdpa"},
    "group_by_length": {"true": "group_by_length", "false": "random"},
}


def parse(argv, classes, notice=print):
    """Parse `argv` (without the program's name) into one instance of each dataclass in `classes`.

    Raises:
        UserError: unknown flag, missing or wrong value, unreadable config file.
    """
    from transformers import HfArgumentParser

    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = _config_argv(argv[0]) + argv[1:]
    parser = HfArgumentParser(classes, allow_abbrev=False, description="Fine-tune a chat model on conversations.")
    parser.error = _raise
    flags = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
    argv = _translate(argv, set(flags), notice)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if rest:
        raise UserError(_unknown(rest[0], flags))
    return tuple(parsed)


def given(argv):
    """Names of the flags on a command line or in its config file, without dashes."""
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = _config_argv(argv[0]) + argv[1:]
    return {word[2:].split("=")[0] for word in argv if word.startswith("--")}


def _raise(message):
    raise UserError(message[0].upper() + message[1:] + ("" if message.endswith(".") else "."))


def _unknown(word, flags):
    name = word.lstrip("-").split("=")[0]
    near = difflib.get_close_matches(name, flags, n=1, cutoff=0.5)
    hint = f" Did you mean --{near[0]}?" if near else " See --help."
    return f"Unknown flag {word.split('=')[0]!r}.{hint}" if word.startswith("-") else f"Unexpected word {word!r}.{hint}"


def _config_argv(path):
    """A config file's entries as words of a command line; nothing is set for null."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            if path.endswith(".json"):
                entries = json.load(file)
            else:
                import yaml

                entries = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from None
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from None
        raise
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected entries of the form 'learning_rate: 1e-4', one for each flag.")
    words = []
    for name, value in entries.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def _translate(argv, flags, notice):
    """Replace old spellings; a flag that transformers still knows under its old name is left alone."""
    result, words = [], iter(range(len(argv)))
    for i in words:
        word = argv[i]
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or name not in RENAMED or name in flags:
            result.append(word)
            continue
        if not equals and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            value = argv[next(words)]
        new = RENAMED[name]
        if new is None:
            notice(f"--{name} has no effect any more and is left out.")
            continue
        value = VALUES.get(name, {}).get((value or "true").lower(), value)
        result.append(f"--{new}={value}" if value else f"--{new}")
        notice(f"--{name} is now --{new}: using {result[-1]}.")
    return result


def fail(error):
    """Print a user's mistake as one sentence and leave with exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def say(text):
    """Print once a run, not once a rank."""
    if rank() == 0:
        print(text, flush=True)


def rank():
    """Number of this process among all that train together, before and without torch.distributed."""
    return int(os.environ.get("RANK", 0))
