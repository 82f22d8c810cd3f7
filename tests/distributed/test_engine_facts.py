"""What is known of each engine: how it is chosen and set up, what its configuration may not do, that it really runs."""

import dataclasses
import json

import pytest
import torch
import transformers

import finetune
from benchmarks import engine_table
from helpers import DOCUMENTS, ROOT
from recipe.console import UserError
from recipe.distributed import engines
from recipe.distributed.engines import ENGINES, Mode


def arguments(tmp_path, **fields):
    """Real TrainingArguments of one process on a CPU, with the fields of an engine set afterwards."""
    args = finetune.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for name, value in fields.items():
        setattr(args, name, value)
    return args


def choosing(engine, tmp_path):
    """TrainingArguments as `set_up` leaves them for an engine."""
    offloaded = {part: {"device": "cpu"} for part in engines.OFFLOADED} if engine.offloads else {}
    if engine.deepspeed_stage:
        return arguments(tmp_path, deepspeed={"zero_optimization": {"stage": engine.deepspeed_stage, **offloaded}})
    if engine.checkpoint_format == "FSDP2":
        return arguments(tmp_path, fsdp=True, fsdp_config={"cpu_offload": engine.offloads})
    return arguments(tmp_path)


# DDP is what several processes run without a flag: tests/distributed/test_engines.py
CHOSEN = [engine for engine in ENGINES.values() if engine != engines.DDP]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("engine", CHOSEN, ids=lambda engine: engine.label)
def test_what_an_engine_refuses_is_refused_with_the_remedy_and_nothing_else(engine, mode, tmp_path):
    args = choosing(engine, tmp_path)
    args.use_lora = mode != Mode.FULL
    lora = finetune.LoraArguments(q_lora=mode == Mode.QLORA)
    assert engines.engine_of(args) == engine and engines.training_mode(args, lora) == mode
    if (engine.label, mode) == ("FSDP2 offload", "QLoRA"):
        with pytest.raises(UserError, match="QLoRA training with FSDP2 offload: 4-bit weights stay on the GPU: leave"):
            engines.refuse_unsupported(args, lora)
    else:
        engines.refuse_unsupported(args, lora)


@pytest.mark.parametrize("stage", [0, 1, 4, "2"])
def test_zero_stages_that_are_not_supported_are_refused(stage, tmp_path):
    args = arguments(tmp_path, deepspeed={"zero_optimization": {"stage": stage}})
    with pytest.raises(UserError, match=f"stage {stage} is not supported; use stage 2 or 3"):
        engines.refuse_unsupported(args, finetune.LoraArguments())


def test_the_table_in_the_readme_is_that_of_the_engines():
    assert engine_table.table() in DOCUMENTS


# ----------------------------------------------------------------------------------------------------------------------
# The engine that was chosen is the one that runs


@pytest.fixture
def process_group():
    """A real gloo group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def trainer(tiny_model, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = transformers.Trainer(model, arguments(tmp_path))
    trainer.model_wrapped = trainer.accelerator.prepare(model)
    return trainer


@pytest.mark.parametrize("engine", [e for e in CHOSEN if e.wrapped_class], ids=lambda engine: engine.label)
def test_an_engine_that_silently_does_not_run_is_an_error(engine, trainer, process_group, tmp_path):
    trainer.args = choosing(engine, tmp_path)
    with pytest.raises(UserError, match=f"{engine.label} was asked for and Qwen2ForCausalLM would run"):
        engines.assert_engine_runs(trainer)
    trainer.model_wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
    with pytest.raises(UserError, match=f"{engine.label} was asked for and DistributedDataParallel would run"):
        engines.assert_engine_runs(trainer)


def test_one_process_is_the_model_itself(trainer, process_group):
    engines.assert_engine_runs(trainer)
    trainer.model_wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
    with pytest.raises(UserError, match="one process was asked for and DistributedDataParallel would run"):
        engines.assert_engine_runs(trainer)
    trainer.model_wrapped = torch.nn.Sequential(trainer.model)
    with pytest.raises(UserError, match="one process was asked for and Sequential would run"):
        engines.assert_engine_runs(trainer)


def test_fsdp2_is_known_by_the_class_that_torch_mixes_in(trainer, process_group, tmp_path):
    trainer.args = choosing(engines.FSDP2, tmp_path)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    trainer.model_wrapped = trainer.model = torch.distributed.fsdp.fully_shard(trainer.model, mesh=mesh)
    engines.assert_engine_runs(trainer)
    trainer.args = choosing(engines.ONE_PROCESS, tmp_path)
    with pytest.raises(UserError, match="one process was asked for and FSDPQwen2ForCausalLM would run"):
        engines.assert_engine_runs(trainer)


@pytest.mark.parametrize("wrapped_class", ["NewEngine", "newEngine", "DeepSpeed", "Parallel"])
def test_an_engine_that_nobody_knows_never_passes(trainer, process_group, monkeypatch, wrapped_class):
    new = dataclasses.replace(engines.ONE_PROCESS, label="new", wrapped_class=wrapped_class)
    monkeypatch.setattr(engines, "engine_of", lambda args: new)
    for model in (trainer.model, torch.nn.parallel.DistributedDataParallel(trainer.model)):
        trainer.model_wrapped = model
        with pytest.raises(UserError, match="new was asked for"):
            engines.assert_engine_runs(trainer)


# ----------------------------------------------------------------------------------------------------------------------
# Setting up


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("ds_config_*.json"), *(ROOT / "recipe").rglob("ds_config_*.json")]),
    ids=lambda path: path.stem,
)
def test_our_deepspeed_configurations_leave_everything_to_the_command_line(path):
    config = json.loads(path.read_text())
    assert not {"optimizer", "scheduler"} & set(config)
    left = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert all(config[name] == "auto" for name in left)
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    zero = config["zero_optimization"]
    assert zero["stage"] == int(path.stem[len("ds_config_zero")])
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    assert ("offload_optimizer" in zero) == ("offload" in path.stem)
    # torch's own AdamW, which needs no compiler where the user trains
    assert config.get("zero_force_ds_cpu_optimizer", False) is False


@pytest.mark.parametrize(
    "change, told",
    [
        ({"scheduler": {"type": "WarmupLR"}}, "its scheduler WarmupLR would replace --lr_scheduler_type cosine"),
        ({"optimizer": {"type": "Lamb"}}, "its optimizer Lamb would replace --optim adamw_torch"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr 0.001 .*--learning_rate 5e-05"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5 would override --max_grad_norm 1.0"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu 4 .*--per_device_train_batch_size 8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 2 .*--gradient_accumulation_steps 1"),
        ({"bf16": {"enabled": True}}, "bf16.enabled True would override --bf16 False"),
    ],
)
def test_a_configuration_that_would_override_the_command_line_names_both(tmp_path, change, told):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **change}))
    with pytest.raises(UserError, match=f"--deepspeed {path}: .*{told}"):
        engines.deepspeed_config(arguments(tmp_path, deepspeed=str(path)))


def test_what_a_configuration_leaves_open_follows_the_command_line_and_the_users_dict_stays_as_it_is(tmp_path):
    given = {"zero_optimization": {"stage": 3}}
    config = engines.deepspeed_config(arguments(tmp_path, deepspeed=given))
    assert config["gradient_clipping"] == config["bf16"]["enabled"] == "auto"
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert given == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    "content, told", [(None, "cannot be read"), ("{", "not valid JSON"), ("[1]", "expected a JSON object")]
)
def test_a_configuration_that_cannot_be_read_is_one_sentence(tmp_path, content, told):
    path = tmp_path / "mine.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=f"--deepspeed {path}: {told}"):
        engines.deepspeed_config(arguments(tmp_path, deepspeed=str(path)))
    with pytest.raises(UserError, match=f"--fsdp_config {path}: {told}"):
        engines.fsdp_config(arguments(tmp_path, fsdp=True, fsdp_config=str(path)))


def test_an_ancestors_path_means_the_configuration_beside_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path, deepspeed="finetune/ds_config_zero3.json")
    args.deepspeed = engines.deepspeed_config(args)
    assert engines.engine_of(args) == engines.ZERO3
    assert "finetune/ds_config_zero3.json: not found; using" in capsys.readouterr().out


def test_fsdp_of_the_ancestors_becomes_fsdp2(tmp_path):
    args = arguments(tmp_path, fsdp="full_shard auto_wrap offload")
    args.fsdp_config = engines.fsdp_config(args)
    assert args.fsdp is True and args.fsdp_config["version"] == 2
    assert engines.engine_of(args) == engines.FSDP2_OFFLOAD
    with pytest.raises(UserError, match="version 1 is not supported; use 2"):
        engines.fsdp_config(arguments(tmp_path, fsdp=True, fsdp_config={"version": 1}))


def test_engines_exclude_each_other_and_one_process_on_a_cpu_needs_none(tmp_path, capsys):
    with pytest.raises(UserError, match="--deepspeed and --fsdp exclude each other"):
        finetune.TrainingArguments(output_dir=str(tmp_path), deepspeed="a", fsdp=True)
    args = finetune.TrainingArguments(output_dir=str(tmp_path), deepspeed="a")
    assert engines.engine_of(args) == engines.ONE_PROCESS and "DeepSpeed is left out" in capsys.readouterr().out


def test_several_gpus_without_a_launcher_are_no_data_parallel(monkeypatch, tmp_path, capsys):
    start = transformers.TrainingArguments.__post_init__

    def with_four_gpus(self):
        start(self)
        self._n_gpu = 4

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", with_four_gpus)
    args = finetune.TrainingArguments(output_dir=str(tmp_path))
    assert args.n_gpu == 1 and args.train_batch_size == args.per_device_train_batch_size
    assert "one of 4 GPUs is used; for all: torchrun --nproc_per_node 4 finetune.py" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# The model under an engine


@pytest.mark.parametrize(
    "zero3, frozen, quantized, version, reentrant",
    [
        (False, True, True, "0.19.2", False),  # DDP, FSDP2 and ZeRO-2
        (True, True, False, "0.19.2", True),
        (True, True, False, "0.16.0", True),
        (True, True, False, "0.19.8", False),
        (True, True, True, "0.19.8", True),
        (True, False, False, "0.19.2", False),
    ],
)
def test_the_kind_of_gradient_checkpointing_follows_the_engine(zero3, frozen, quantized, version, reentrant):
    assert engines.use_reentrant(zero3, frozen, quantized, version) is reentrant


def test_fsdp2_wraps_the_layers_that_the_model_has_also_where_its_class_names_others(tmp_path):
    from accelerate import FullyShardedDataParallelPlugin

    config = transformers.Qwen3_5TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="Could not find the transformer layer class .*Vision"):
        FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap").set_auto_wrap_policy(
            model
        )
    engines.adapt_model(model, arguments(tmp_path))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {kind.__name__ for kind in wrapped} == {type(model.model.layers[0]).__name__}
