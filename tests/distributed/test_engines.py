"""Every engine, for real, on two CPU ranks: the losses of one process, weights that load, runs that can be resumed.

Each engine is started once (ranks.py) and runs all its trainings; the tests compare what they left behind.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers import ROOT, run_ranks
from recipe.distributed.engines import ENGINES, Mode, Verdict

OFFLOADED = ROOT / "recipe" / "distributed"
FLAGS = {  # label of an engine: what chooses it
    "one process": ["--use_cpu", "True"],
    "DDP": ["--use_cpu", "True"],
    "ZeRO-2": ["--deepspeed", ROOT / "ds_config_zero2.json"],
    "ZeRO-3": ["--deepspeed", ROOT / "ds_config_zero3.json"],
    "FSDP2": ["--fsdp", "True", "--fsdp_config", OFFLOADED / "fsdp_config.json"],
    "ZeRO-2 offload": ["--deepspeed", OFFLOADED / "ds_config_zero2_offload.json"],
    "ZeRO-3 offload": ["--deepspeed", OFFLOADED / "ds_config_zero3_offload.json"],
}
MODES = {Mode.FULL: [], Mode.LORA: ["--use_lora"], Mode.QLORA: ["--q_lora"]}
SHARED = [label for label in FLAGS if label != "one process"]
WHOLE = [label for label in FLAGS if not ENGINES[label].offloads]
WORDS = "one two three four five six seven eight nine ten eleven twelve".split() * 4
pytestmark = pytest.mark.slow


def write(path, first, count):
    messages = [
        [{"role": "user", "content": f"say {word} {n}"}, {"role": "assistant", "content": word * (1 + n % 3)}]
        for n, word in list(enumerate(WORDS))[first : first + count]
    ]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in messages))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "metric.py").write_text(METRIC)
    return write(folder / "rows.jsonl", 0, 45), write(folder / "held_out.jsonl", 45, 3), folder / "metric.py"


SMALL = dict(
    vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=997, pad_token_id=997,
)  # fmt: skip


def random_model(folder, tokenizer, config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3(small_tokenizer, tmp_path_factory):
    """Folder with a random two-layer Qwen3 with a head of its own and drop-out in its attention."""
    config = transformers.Qwen3Config(**SMALL, tie_word_embeddings=False, attention_dropout=0.1)
    return random_model(tmp_path_factory.mktemp("qwen3"), small_tokenizer, config)


@pytest.fixture(scope="module")
def moe(small_tokenizer, tmp_path_factory):
    """Folder with a random two-layer Qwen3 mixture of four experts."""
    config = transformers.Qwen3MoeConfig(**SMALL, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    return random_model(tmp_path_factory.mktemp("moe"), small_tokenizer, config)


@pytest.fixture(scope="module")
def hybrid(small_tokenizer, tmp_path_factory):
    """Folder with a random Qwen3.5 text model: a gated delta net and a layer of full attention."""
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
    config = transformers.Qwen3_5TextConfig(**SMALL, **linear, layer_types=["linear_attention", "full_attention"])
    return random_model(tmp_path_factory.mktemp("hybrid"), small_tokenizer, config)


METRIC = """
import zlib

def fingerprint(answer, reference, messages):
    return zlib.crc32(answer.encode()) % 1000
"""


def jobs(label, folder, tiny_model, qwen3, moe, hybrid, data):
    """The trainings of one engine: (name, what tests/distributed/ranks.py is to run)."""
    rows, held_out, metric = data
    offloads = ENGINES[label].offloads

    def argv(model, output, accumulation, *more):
        each = 8 // accumulation // (1 if label == "one process" else 2)  # 8 rows a step everywhere
        words = [
            "--model_name_or_path", model, "--data_path", rows, "--output_dir", output, "--bf16", "False",
            "--per_device_train_batch_size", each, "--gradient_accumulation_steps", accumulation,
            "--logging_steps", "1", "--learning_rate", "1e-2", "--disable_tqdm", "True", *FLAGS[label], *more,
        ]  # fmt: skip
        return list(map(str, words))

    plain = ["--max_steps", "7", "--save_strategy", "no"]  # an epoch of 45 rows ends in the sixth
    answers = ["--eval_data_path", held_out, "--eval_generate", "3", "--eval_strategy", "steps"]
    yield "twice", {"argv": argv(tiny_model, folder / "twice", 1), "twice": True}
    for mode, flags in MODES.items():
        no_dropout = [*flags, *(["--lora_dropout", "0"] if flags else [])]
        dropout = [*flags, *(["--lora_dropout", "0.2"] if flags else [])]
        name = f"{mode} 1"
        more = [*plain, *answers, "--eval_steps", "7", "--eval_on_start", "True", "--metric", f"{metric}:fingerprint"]
        yield name, {"argv": argv(tiny_model, folder / name, 1, *more, *no_dropout)}
        long = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", *answers, "--eval_steps", "3",
                *dropout]  # fmt: skip
        name, again = folder / f"{mode} whole", folder / f"{mode} resumed"
        resume = [*long, "--resume_from_checkpoint", "auto"]
        if offloads:  # in the processes of the engine that does not offload, whose checkpoint it takes up
            name, again = folder.parent / f"{mode} whole", folder / f"{mode} taken over"
            yield (
                f"{mode} taken over",
                {"argv": argv(qwen3, again, 1, *resume), "copy": [name / "checkpoint-3", again / "checkpoint-3"]},
            )
            continue
        yield f"{mode} 2", {"argv": argv(tiny_model, folder / f"{mode} 2", 2, *plain, *no_dropout)}
        yield f"{mode} whole", {"argv": argv(qwen3, name, 1, *long), "gather": folder / f"{mode}.pt"}
        yield (
            f"{mode} resumed",
            {"argv": argv(qwen3, again, 1, *resume), "copy": [name / "checkpoint-3", again / "checkpoint-3"]},
        )
        if ENGINES[label].resumes_with_other_world_size and mode != Mode.QLORA:
            saved = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", *no_dropout]
            yield f"{mode} saved", {"argv": argv(tiny_model, folder / f"{mode} saved", 1, *saved)}
        if mode == Mode.LORA:
            stopped = folder / "stopped"
            one = 0 if label == "one process" else 1
            yield "stopped", {"argv": argv(qwen3, stopped, 1, *long), "signalled": [one, 4, "SIGTERM"]}
            yield "gone on", {"argv": argv(qwen3, stopped, 1, *resume)}
        checkpointed = [*plain, "--gradient_checkpointing", "True", *no_dropout]
        name = f"{mode} checkpointed"
        yield name, {"argv": argv(tiny_model, folder / name, 1, *checkpointed)}
        name, long = f"{mode} long", ["--activation_offloading", "True", "--tiled_mlp", "True"]
        yield name, {"argv": argv(tiny_model, folder / name, 1, *checkpointed, *long), "long": [64, 256]}
        packed = [
            "--pack_tokens",
            "64",
            "--max_steps",
            "3",
            "--save_strategy",
            "no",
            "--gradient_checkpointing",
            "True",
        ]
        yield f"{mode} hybrid", {"argv": argv(hybrid, folder / f"{mode} hybrid", 2, *packed, *no_dropout)}
    if not offloads:
        three = ["--max_steps", "3", "--save_strategy", "no"]
        yield "experts", {"argv": argv(moe, folder / "moe", 1, *three)}
        for mode, flags in list(MODES.items())[1:]:
            more = [*flags, "--lora_experts", "True", "--lora_r", "8", "--gradient_checkpointing", "True"]
            name = f"experts {mode}"
            yield name, {"argv": argv(moe, folder / name, 1, *three, *more), "gather": folder / f"{name}.pt"}


@pytest.fixture(scope="module")
def ran(tiny_model, qwen3, moe, hybrid, data, tmp_path_factory):
    """Function from an engine's label to {training: what it left}; an engine runs when it is first asked for."""
    results = {}
    launched_as = {label: ENGINES[label].checkpoint_format if ENGINES[label].offloads else label for label in FLAGS}

    def start(label):
        folder = tmp_path_factory.mktemp(label)
        todo = dict(jobs(label, folder, tiny_model, qwen3, moe, hybrid, data))
        for other in launched_as:
            if launched_as[other] == label != other:  # in the same processes
                offload = jobs(other, folder / "offload", tiny_model, qwen3, moe, hybrid, data)
                todo |= {f"offload {name}": job for name, job in offload}
        return run_ranks(folder, todo, 1 if label == "one process" else 2)

    def of(label):
        launched = launched_as[label]
        if launched not in results:
            results[launched] = {"problem": "it did not end"}  # not again for each test
            results[launched] = start(launched)
        left = results[launched]
        assert not left["problem"], left["problem"]
        return {name[8:]: left[name] for name in left if name.startswith("offload ")} if label != launched else left

    return of


def log(result, key):
    return [entry[key] for entry in result["log"] if key in entry]


@pytest.mark.parametrize("label", ENGINES)
def test_the_verdict_on_an_engine_is_what_these_tests_run_with_it(label):
    engine, paths = ENGINES[label], pathlib.Path("folder")
    names = dict(jobs(label, *[paths] * 5, [paths] * 3)) if label in FLAGS else {}
    for mode in set(Mode) - set(engine.refuses):
        resumed, trained = f"{mode} resumed" in names, f"{mode} 1" in names
        assert engine.verdict == (Verdict.RESUMES if resumed else Verdict.TRAINS if trained else Verdict.GPU)


@pytest.mark.parametrize("engine", SHARED)
def test_arguments_built_again_or_copied_are_the_same_and_change_nothing_more(ran, engine):
    result = ran(engine)["twice"]
    libraries = ("KMP_", "TORCH", "ACCELERATE_MIXED", "ACCELERATE_DYNAMO", "LOCAL_WORLD", "FSDP_CPU")
    changed = [name for name in result["environment"] if not name.startswith(libraries)]
    assert result["equal"], result["facts"]
    assert result["facts"][0][0] == engine and result["facts"][0][5] == 2
    assert changed == (["ACCELERATE_USE_FSDP", "FSDP_STATE_DICT_TYPE"] if engine == "FSDP2" else [])
    assert result["later"] == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", SHARED)
def test_the_engine_that_was_asked_for_ran(ran, engine, mode):
    facts = ENGINES[engine]
    for name in (name for name in ran(engine) if name in (f"{mode} 1", f"{mode} 2")):
        result = ran(engine)[name]
        assert facts.wrapped_class in result["classes"] and facts.deepspeed_stage == result["stage"]
        assert result["partitioned"] == (result["parameters"] if facts.shards_weights else 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "engine, accumulation", [(engine, count) for engine in SHARED for count in (1, 2) if count == 1 or engine in WHOLE]
)
def test_losses_and_gradients_are_those_of_one_process_also_where_an_epoch_ends_unevenly(
    ran, engine, mode, accumulation
):
    alone, shared = (ran(which)[f"{mode} {steps}"] for which, steps in (("one process", 1), (engine, accumulation)))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert len(log(alone, key)) == 7
        assert log(shared, key) == pytest.approx(log(alone, key), rel=1e-4)
    assert min(log(alone, "shared")) > min(log(shared, "shared")) > 0  # prefixes: a row holds more of them alone


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", WHOLE)
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(ran, engine, mode):
    plain, checkpointed = (ran(engine)[f"{mode} {how}"] for how in ("1", "checkpointed"))
    for key in ("loss", "grad_norm"):
        assert len(log(plain, key)) == 7
        assert log(checkpointed, key) == pytest.approx(log(plain, key), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", WHOLE)
def test_what_lets_long_rows_fit_changes_no_loss_and_no_gradient(ran, engine, mode):
    """Layers are checkpointed, feed-forward layers take 64 tokens at once, and the inputs of layers lie in files."""
    long, plain = (ran(engine)[f"{mode} {how}"] for how in ("long", "1"))
    assert "feed-forward layers in pieces of 64 tokens" in long["said"] and "until then in files in" in long["said"]
    for key in ("loss", "grad_norm"):
        assert log(long, key) == pytest.approx(log(plain, key), rel=1e-5), key


@pytest.mark.parametrize("engine", SHARED[:4])
def test_a_mixture_of_experts_trains_as_in_one_process(ran, engine):
    result = ran(engine)["experts"]
    assert log(result, "loss") == pytest.approx(log(ran("one process")["experts"], "loss"), rel=1e-4)
    assert result["leaves"] or engine != "ZeRO-3"  # a layer of experts is gathered at once


@pytest.mark.parametrize("mode", [Mode.LORA, Mode.QLORA])
@pytest.mark.parametrize("engine", [label for label in WHOLE if label in SHARED])
def test_adapters_of_experts_train_as_in_one_process(ran, engine, mode):
    name = f"experts {mode}"
    result, alone = ran(engine), ran("one process")
    assert log(result[name], "loss") == pytest.approx(log(alone[name], "loss"), rel=1e-4)
    assert log(result[name], "grad_norm") == pytest.approx(log(alone[name], "grad_norm"), rel=1e-3)
    assert alone[name]["expert_bytes"] == 2 * 4 * 3 * 64 * 32 * (4 if mode == Mode.LORA else 0.5)
    assert result[name]["expert_bytes"] == alone[name]["expert_bytes"] / (2 if ENGINES[engine].shards_weights else 1)
    saved = load_file(result["folder"] / name / "adapter_model.safetensors")
    assert sum(".experts." in weight for weight in saved) == 8
    for weight, trained in torch.load(result["folder"] / f"{name}.pt").items():
        assert torch.equal(saved[weight.replace(".default", "")], trained)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", WHOLE[1:])
def test_gated_delta_nets_over_different_numbers_of_documents_on_the_ranks_train_as_in_one_process(ran, engine, mode):
    alone, shared = (ran(which)[f"{mode} hybrid"] for which in ("one process", engine))
    for key in ("loss", "grad_norm"):
        assert len(log(alone, key)) == 3
        assert log(shared, key) == pytest.approx(log(alone, key), rel=1e-4)
    assert set(log(shared, "padding")) == {0}  # rows are packed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", SHARED)
def test_evaluation_and_answers_on_all_ranks_are_those_of_one_process(ran, engine, mode):
    alone, shared = (ran(which)[f"{mode} 1"] for which in ("one process", engine))
    for key in ("eval_loss", "eval_fingerprint", "eval_exact_match"):  # fingerprint: of the text of the answers
        assert len(log(alone, key)) == 2  # before the first step and after the last one
        assert log(shared, key) == pytest.approx(log(alone, key), rel=1e-4), key
    assert log(alone, "eval_fingerprint")[0] != 0  # texts of some length


RELOAD = """
import json, sys, torch, transformers, peft
verdicts = {}
for engine in sys.argv[1:]:
    for mode in ("full", "LoRA", "QLoRA"):
        folder = f"{engine}/{mode} whole"
        gathered = torch.load(f"{engine}/{mode}.pt", weights_only=True)
        kind = transformers.AutoModelForCausalLM if mode == "full" else peft.AutoPeftModelForCausalLM
        model = kind.from_pretrained(folder, dtype=torch.float32)
        loaded = {name: p for name, p in model.named_parameters() if mode == "full" or "lora_" in name}
        verdicts[folder] = {
            "keys": sorted(loaded) == sorted(gathered),
            "shapes": all(loaded[name].shape == gathered[name].shape for name in gathered),
            "equal": all(torch.equal(loaded[name], gathered[name]) for name in gathered),
            "moved": mode == "full" or bool(gathered[next(name for name in gathered if "lora_B" in name)].any()),
            "numbers": sum(p.numel() for p in loaded.values()) > 10_000,
        }
print(json.dumps(verdicts))
"""


@pytest.fixture(scope="module")
def reloaded(ran):
    """{folder: {check: whether it holds}} of what every engine saved, loaded in a process without this recipe."""
    folders = [str(ran(engine)["folder"]) for engine in WHOLE]
    done = subprocess.run([sys.executable, "-c", RELOAD, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", WHOLE)
def test_what_was_trained_is_what_plain_transformers_and_peft_load_in_a_fresh_process(ran, reloaded, engine, mode):
    verdict = reloaded[f"{ran(engine)['folder']}/{mode} whole"]
    assert verdict.keys() == {"keys", "shapes", "equal", "moved", "numbers"} and all(verdict.values()), verdict


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", WHOLE)
def test_a_resumed_run_takes_the_steps_of_an_unbroken_one(ran, engine, mode):
    whole, resumed = (ran(engine)[f"{mode} {how}"] for how in ("whole", "resumed"))
    for key in ("loss", "learning_rate", "eval_loss"):
        assert log(resumed, key) == pytest.approx(log(whole, key), rel=1e-5), key
    assert len(log(resumed, "loss")) == 6  # three of the checkpoint's log and three of its own
    folder = ran(engine)["folder"]
    assert not (folder / f"{mode} resumed" / ".rehearsal").exists()
    metrics = [
        json.loads((folder / f"{mode} {how}" / "best" / "metrics.json").read_text()) for how in ("whole", "resumed")
    ]
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("engine", [label for label in SHARED if ENGINES[label].resumes_with_other_world_size])
def test_a_run_goes_on_with_another_number_of_processes(ran, tiny_model, data, engine, tmp_path):
    jobs = {}
    for mode in (Mode.FULL, Mode.LORA):
        words = ["--model_name_or_path", tiny_model, "--data_path", data[0], "--output_dir", tmp_path / mode,
                 "--bf16", "False", "--per_device_train_batch_size", 2, "--logging_steps", 1, "--learning_rate", "1e-2",
                 "--disable_tqdm", "True", *FLAGS[engine], "--max_steps", 6, "--resume_from_checkpoint", "auto",
                 "--save_strategy", "no", *[*MODES[mode], "--lora_dropout", "0"] * (mode == Mode.LORA)]  # fmt: skip
        checkpoint = ran(engine)["folder"] / f"{mode} saved" / "checkpoint-3"
        jobs[mode] = {"argv": list(map(str, words)), "copy": [checkpoint, tmp_path / mode / "checkpoint-3"]}
    left = run_ranks(tmp_path, jobs, 4)
    assert not left["problem"], left["problem"]
    for mode in jobs:
        assert "x 4 ranks" in left[mode]["said"]
        assert log(left[mode], "loss") == pytest.approx(log(ran(engine)[f"{mode} saved"], "loss"), rel=1e-4), mode
        assert len(log(left[mode], "loss")) == 6


def test_full_training_under_fsdp2_writes_each_ranks_part_and_an_adapter_is_whole(ran):
    folder = ran("FSDP2")["folder"]
    parts = {path.name for path in (folder / "full saved" / "checkpoint-3" / "pytorch_model_fsdp_0").glob("*.distcp")}
    assert parts == {"__0_0.distcp", "__1_0.distcp"}
    assert (folder / "LoRA saved" / "checkpoint-3" / "pytorch_model_fsdp.bin").exists()


@pytest.mark.parametrize("engine", WHOLE)
def test_a_signal_to_one_rank_ends_all_and_the_run_goes_on_bit_for_bit(ran, engine):
    whole, stopped, gone_on = (ran(engine)[name] for name in ("LoRA whole", "stopped", "gone on"))
    assert stopped["code"] == 143
    assert stopped["stage"] == ENGINES[engine].deepspeed_stage
    assert stopped["partitioned"] == (stopped["parameters"] if ENGINES[engine].shards_weights else 0)
    assert sorted(path.name for path in (ran(engine)["folder"] / "stopped").glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",  # of the second start, which deleted checkpoint-3
    ]
    for key in ("loss", "grad_norm", "eval_loss"):
        assert log(gone_on, key) == log(whole, key)
    assert len(log(gone_on, "loss")) == 6
    files = [
        load_file(ran(engine)["folder"] / name / "adapter_model.safetensors") for name in ("stopped", "LoRA whole")
    ]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        assert torch.equal(tensor, files[1][name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", [label for label in FLAGS if ENGINES[label].offloads])
def test_a_checkpoint_is_taken_up_with_offloading_and_goes_on_as_without(ran, engine, mode):
    whole = ran(ENGINES[engine].checkpoint_format)[f"{mode} whole"]
    taken_over = ran(engine)[f"{mode} taken over"]
    for key in ("loss", "learning_rate", "eval_loss"):
        assert log(taken_over, key) == pytest.approx(log(whole, key), rel=1e-5), key


@pytest.mark.parametrize("engine", WHOLE)
def test_a_checkpoint_of_an_adapter_holds_no_frozen_weights(ran, engine):
    folder = ran(engine)["folder"]
    sizes = {}
    for mode in ("full", "LoRA"):
        files = (folder / f"{mode} whole" / "checkpoint-6").rglob("*")
        sizes[mode] = sum(f.stat().st_size for f in files if f.suffix in (".pt", ".safetensors", ".bin", ".distcp"))
    adapter = (folder / "LoRA whole" / "adapter_model.safetensors").stat().st_size
    assert sizes["LoRA"] < 5 * adapter + 200_000
