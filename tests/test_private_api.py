"""The private parts of libraries that this project touches; docs/architecture.md says where and why."""

import argparse
import atexit
import threading

import pytest
import transformers

PRIVATE = [
    (argparse.ArgumentParser(), "_negative_number_matcher"),
    (argparse.HelpFormatter, "_format_action_invocation"),
    (argparse.HelpFormatter, "_format_args"),
    (argparse.ArgumentDefaultsHelpFormatter, "_get_help_string"),
    (transformers.HfArgumentParser, "_parse_dataclass_field"),
    (transformers.TrainingArguments("output", use_cpu=True), "_n_gpu"),
    (threading, "_shutdown"),
    (atexit, "_run_exitfuncs"),
]


@pytest.mark.parametrize("owner, name", PRIVATE, ids=[name for _, name in PRIVATE])
def test_a_private_part_still_exists(owner, name):
    assert hasattr(owner, name)
