"""A run that is killed at any file of its first, a middle or its last checkpoint goes on to the end it would have had."""

import json

import pytest

from helpers import ROOT, ROWS, argv, run_forked, write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory):
    """What killed.py found: three checkpoints of which one is kept, and a kill at each of their files."""
    folder = tmp_path_factory.mktemp("killed")
    data = write(folder / "rows.jsonl", ROWS)
    words = argv(tiny_model, data, "", "--use_lora", "--use_cpu", "True", "--max_steps", 3, "--save_steps", 1)
    place = words.index("--output_dir")
    words = [*words[:place], *words[place + 2 :], "--save_strategy", "steps", "--save_total_limit", "1"]
    more = [folder / "results.json", folder / "out", *words]
    codes, said = run_forked(folder, ROOT / "tests" / "training" / "killed.py", more, 1)
    assert codes == [0], said[-3000:]
    return json.loads((folder / "results.json").read_text())


def test_the_kills_are_at_every_file_of_every_save(results):
    assert results["undisturbed"][0] == 0
    events = [kill["event"] for kill in results["killed"]]
    for step in (1, 2, 3):
        for name in ("adapter_config.json", "trainer_state.json", "checkpoint.json"):
            assert f"open /.saving/unfinished/checkpoint-{step}/{name}" in events
        assert f"os.rename /.saving/unfinished/checkpoint-{step}" in events
        assert f"os.rename /.saving/checkpoint-{step}" in events
    assert "os.rename /checkpoint-1" in events and "os.rename /checkpoint-2" in events  # each gives way to the next


def test_no_half_of_a_checkpoint_has_its_name_and_once_there_is_one_there_always_is(results):
    kept = False
    for kill in results["killed"]:
        assert not kill["incomplete"], kill["event"]
        assert kill["left"] or not kept, kill["event"]
        kept = kept or bool(kill["left"])
    assert kept


def test_started_again_with_auto_every_killed_run_ends_as_an_undisturbed_one(results):
    def losses(log):
        return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]

    for kill in results["killed"]:
        assert kill["resumed"] == 0, kill["event"]
        assert losses(kill["log"]) == losses(results["undisturbed"][1]), kill["event"]
        assert kill["checkpoints"] == ["checkpoint-3"] and not kill["staging"], kill["event"]
