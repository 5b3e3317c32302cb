"""Settings: reading, strictness, and round trips."""

from pathlib import Path

import pytest

from gvu.config import OptimConfig, RolloutConfig, TrainConfig, docs, leaves, load_config, to_dict, to_yaml
from gvu.errors import GvuError

KEYS = [
    "steps", "seed", "precision", "output", "model.name", "model.adapter", "model.device", "prompts.source",
    "prompts.limit", "prompts.tag_weights", "rollout.prompts_per_step", "rollout.num_generations",
    "rollout.temperature", "rollout.top_k", "rollout.top_p", "rollout.min_p", "rollout.cfg", "reward.kind",
    "reward.via", "reward.instruction", "reward.teacher", "reward.ema_decay", "reward.decoder_steps",
    "reward.micro_batch", "advantage.scale", "advantage.eps", "advantage.dead_below", "advantage.skip_dead",
    "loss.beta", "loss.clip_low", "loss.clip_high", "optim.lr", "optim.beta1", "optim.beta2", "optim.weight_decay",
    "optim.warmup_steps", "optim.schedule", "optim.max_grad_norm", "optim.updates_per_rollout", "optim.micro_batch",
    "lora.r", "lora.alpha", "lora.dropout", "lora.scope", "eval.benchmarks", "eval.images_per_prompt", "eval.seed",
    "eval.every", "eval.before_after", "log.sample_every", "log.sample_prompts", "log.save_every", "log.tensorboard",
]  # fmt: skip


def load(*overrides: str, file: Path | None = None) -> TrainConfig:
    return load_config(TrainConfig, file=file, overrides=overrides)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_list_of_keys_is_frozen() -> None:
    assert list(leaves(TrainConfig)) == KEYS


def test_every_key_is_documented() -> None:
    assert [key for key, text in docs(TrainConfig).items() if not text] == []


def test_defaults_file_and_overrides_in_that_order(tmp_path: Path) -> None:
    file = write(tmp_path, "optim:\n  lr: 1e-6\n  beta1: 0\nloss.beta: 1\nmodel:\n")
    config = load("optim.beta1=0.5", file=file)
    assert (config.optim.lr, config.optim.beta1, config.loss.beta) == (1e-6, 0.5, 1.0)
    assert config.rollout == RolloutConfig()
    assert type(config.loss.beta) is float


def test_typed_overrides() -> None:
    config = load(
        "model.adapter=null", "eval.benchmarks=geneval-mini,geneval++-mini", "log.tensorboard=false",
        "model.name=123", "prompts.tag_weights={counting: 2}", "reward.instruction=Describe: it # all",
    )  # fmt: skip
    assert config.model.adapter is None
    assert config.eval.benchmarks == ("geneval-mini", "geneval++-mini")
    assert config.log.tensorboard is False
    assert config.model.name == "123"
    assert config.prompts.tag_weights == {"counting": 2.0}
    assert config.reward.instruction == "Describe: it # all"
    assert load("eval.benchmarks=").eval.benchmarks == ()


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("instruction", ["What is it...", "a: b # c", "true", "", "two\nlines", "é漢"])
def test_yaml_round_trip(tmp_path: Path, comments: bool, instruction: str) -> None:
    config = load("optim.lr=3.3e-7", f"reward.instruction={instruction}", "eval.benchmarks=[geneval++-mini]",
                  "prompts.tag_weights={colors: 1.5}")  # fmt: skip
    assert load(file=write(tmp_path, to_yaml(config, comments=comments))) == config


def test_to_dict_is_plain() -> None:
    assert to_dict(TrainConfig())["eval"]["benchmarks"] == list(TrainConfig().eval.benchmarks)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ["'optim.lrr'", "'optim.lr'"]),
        ("lr=1", ["'lr'", "'optim.lr'"]),
        ("rolout.top_k=3", ["'rolout.top_k'", "'rollout.top_k'"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "a number"]),
        ("optim.lr=.nan", ["optim.lr", "nan", "a number"]),
        ("optim.lr=true", ["optim.lr", "True", "a number"]),
        ("optim.lr=[", ["optim.lr", "'['", "a number"]),
        ("steps=1.5", ["steps", "1.5", "a whole number"]),
        ("steps=true", ["steps", "True", "a whole number"]),
        ("steps=0", ["steps", "0", "at least 1"]),
        ("log.tensorboard=1", ["log.tensorboard", "1", "true or false"]),
        ("reward.kind=best", ["reward.kind", "'best'", "'geometric_mean'"]),
        ("eval.benchmarks=imagenet", ["eval.benchmarks", "'imagenet'", "'geneval-mini'"]),
        ("loss.beta=-1", ["loss.beta", "-1", "at least 0"]),
        ("rollout.num_generations=1", ["rollout.num_generations", "1", "at least 2"]),
        ("rollout.temperature=0", ["rollout.temperature", "0", "above 0"]),
        ("lora.r=0", ["lora.r", "0", "at least 1"]),
        ("lora.scope=heads", ["lora.scope", "'heads'", "'attention'"]),
        ("optim=3", ["optim", "'3'", "optim.lr=..."]),
        ("output=", ["output", "folder"]),
        ("steps", ["'steps'", "section.key=value"]),
    ],
)
def test_bad_overrides_name_key_value_and_expectation(override: str, parts: list[str]) -> None:
    with pytest.raises(GvuError) as caught:
        load(override)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim:\n  lrr: 1\n", ["'optim.lrr'", "run.yaml", "'optim.lr'"]),
        ("optim:\n  lr: fast\n", ["optim.lr", "'fast'", "a number", "run.yaml"]),
        ("optim: 3\n", ["optim", "3", "run.yaml"]),
        ("lora:\n  r: -1\n", ["lora.r", "-1", "run.yaml"]),
        ("model:\n  name: 5\n", ["model.name", "5", "text", "run.yaml"]),
        ("- a\n", ["run.yaml", "mapping"]),
        ("a: [\n", ["run.yaml", "not YAML"]),
        ("loss: !!python/object/apply:os.getcwd []\n", ["run.yaml", "not YAML"]),
    ],
)
def test_bad_files_name_the_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(GvuError) as caught:
        load(file=write(tmp_path, text))
    assert [part for part in parts if part not in str(caught.value)] == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GvuError, match="No such file"):
        load(file=tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"output: caf\xe9\n")
    with pytest.raises(GvuError, match="not UTF-8"):
        load(file=tmp_path / "latin.yaml")


def test_components_check_themselves_in_python() -> None:
    assert OptimConfig(lr=1).lr == 1.0
    with pytest.raises(GvuError, match="max_grad_norm is 0"):
        OptimConfig(max_grad_norm=0)
    with pytest.raises(GvuError, match="schedule is 'step'"):
        OptimConfig(schedule="step")  # type: ignore[arg-type]


def test_sampling_carries_every_field() -> None:
    sampling = RolloutConfig(temperature=0.9, top_k=5, top_p=0.8, min_p=0.03, cfg=3).sampling
    values = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.cfg)
    assert values == (0.9, 5, 0.8, 0.03, 3.0)
