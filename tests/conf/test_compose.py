from pathlib import Path

import pytest

from drivetrain.conf.compose import compose, load, options, to_yaml
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.learning_rate import RATES
from drivetrain.conf.schema import SCHEMAS, ModelConfig, MuonConfig, SftConfig, ZeroConfig

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    "default": [],
    **{f"model_{name}": [f"model={name}"] for name in options("model") if name != "auto"},
    **{f"experiment_{name}": [f"experiment={name}"] for name in options("experiment")},
    "engine_zero": ["engine=zero"],
    "stage_sft": ["stage=sft"],
    "stage_grpo": ["stage=grpo"],
    "stage_dpo": ["stage=dpo"],
    "stage_reward_model": ["stage=reward_model"],
    "optim_muon": ["optim=muon"],
    "tracker_wandb": ["tracker=wandb"],
}


@pytest.mark.parametrize("name", CASES)
def test_composed_configurations_are_the_recorded_ones(name: str, update_golden: bool) -> None:
    path = GOLDEN / f"{name}.yaml"
    composed = to_yaml(compose(CASES[name]))
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(composed)
    assert path.is_file(), f"record it: pytest {Path(__file__).parent} --update-golden"
    assert composed == path.read_text()


def test_no_recorded_configuration_is_orphaned() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


MIXTURE = "data.mixture={a: {path: x, weight: 2}, b: {path: y}}"


@pytest.mark.parametrize("words", [*CASES.values(), [MIXTURE], ["stage.sample_prompts=[a,'b: c']"]])
def test_a_written_configuration_reads_back_equal(words: list[str], tmp_path: Path) -> None:
    config = compose(words)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config


def test_the_command_line_wins_over_the_experiment_and_that_over_groups() -> None:
    config = compose(["experiment=gpt2_124m", "engine=zero", "stage.steps=7"])
    assert (config.stage.steps, config.stage.seq_len, config.engine.compile) == (7, 1024, True)
    assert isinstance(config.engine, ZeroConfig)
    assert config.model.name == config.experiment == "gpt2_124m"
    assert compose([]).stage.steps == 1000


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ([], 6e-4),
        (["lora.rank=8"], 6e-4),
        (["stage=sft"], 2e-5),
        (["stage=sft", "lora.rank=8"], 2e-4),
        (["stage=reward_model"], 1e-5),
        (["stage=dpo", "stage.loss=simpo"], 1e-6),
        (["stage=dpo", "lora.rank=1"], 1e-5),
        (["stage=grpo"], 1e-6),
        (["stage=grpo", "lora.rank=16"], 1e-5),
        (["stage=sft", "optim.lr=3e-3"], 3e-3),
        (["stage=grpo", "optim=muon", "lora.rank=16", "optim.lr=6e-4"], 6e-4),
    ],
)
def test_a_stage_has_a_learning_rate_where_none_is_given(words: list[str], rate: float) -> None:
    assert compose(words).optim.lr == rate


def test_muons_rate_of_matrices_follows_the_stage() -> None:
    for words, rate in (([], 0.02), (["stage=sft"], 6.7e-4), (["stage=sft", "optim.matrix_lr=1"], 1)):
        optim = compose(["optim=muon", *words]).optim
        assert isinstance(optim, MuonConfig) and optim.matrix_lr == rate


def test_every_stage_has_a_usual_rate() -> None:
    assert set(RATES) == set(SCHEMAS["stage"])


def test_an_experiment_outside_the_package_composes(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    defaults = "[override /optim: muon, override /stage: sft, _self_]"
    text = f"# @package _global_\ndefaults: {defaults}\noptim: {{lr: 0.5}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    config = compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert isinstance(config.optim, MuonConfig) and config.optim.lr == 0.5 and config.experiment == "mine"
    assert isinstance(config.stage, SftConfig) and config.optim.matrix_lr == 6.7e-4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "does not exist; is its folder a run directory?"),
        ("- a\n", "is not a run's configuration: it is a list and not keys with values"),
        ("a: [\n", "expected the node content, but found '<stream end>' in line 2"),
        ("optim.lr: 0.1\n", "is not a run's configuration: "),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert reason in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("  lr: 0.0006", "  lrr: 0.0006", "unknown key optim.lrr; did you mean optim.lr?"),
        ("  steps: 1000", "  steps: many", "stage.steps must be a whole number, not many"),
        ("seed: 0", "sed: 0", "unknown key sed; did you mean seed?"),
        ("  name: fsdp", "  name: ddp", "engine.name is ddp, and engine can be fsdp, zero"),
    ],
)
def test_a_changed_configuration_is_refused(old: str, new: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    written = to_yaml(compose([]))
    assert old in written
    path.write_text(written.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path} is not a run's configuration: {reason}"


def parameters(m: ModelConfig) -> int:
    heads = (m.heads + 2 * m.kv_heads) * m.head_dim
    attention = m.dim * heads + m.heads * m.head_dim * m.dim + (2 * m.head_dim if m.qk_norm else 0)
    block = attention + 3 * m.dim * m.ffn_dim + 2 * m.dim
    return m.layers * block + m.dim + m.vocab_size * m.dim * (1 if m.tie_embeddings else 2)


# Totals of the published weights, counted once where embeddings are tied.
PUBLISHED = {
    "llama3_1b": 1_235_814_400,  # huggingface.co/meta-llama/Llama-3.2-1B, safetensors
    "llama3_8b": 8_030_261_248,  # huggingface.co/meta-llama/Llama-3.1-8B, safetensors
    "llama3_70b": 70_553_706_496,  # huggingface.co/meta-llama/Llama-3.1-70B, safetensors
    "smollm2_135m": 134_515_008,  # huggingface.co/HuggingFaceTB/SmolLM2-135M, safetensors
    "qwen3_0p6b": 596_049_920,  # huggingface.co/Qwen/Qwen3-0.6B, num_parameters() of the loaded model
    "qwen3_8b": 8_190_735_360,  # huggingface.co/Qwen/Qwen3-8B, safetensors
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert parameters(compose([f"model={name}"]).model) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "total"),
    # huggingface.co/openai-community/gpt2 and gpt2-xl: num_parameters() of the loaded models.
    [("gpt2_124m", 124_439_808), ("gpt2_xl", 1_557_611_200)],
)
def test_gpt2_in_this_block_has_about_as_many_parameters(name: str, total: int) -> None:
    assert parameters(compose([f"model={name}"]).model) == pytest.approx(total, rel=0.01)


def test_the_tiny_model_is_as_small_as_its_comment_says() -> None:
    assert parameters(compose([]).model) == pytest.approx(2.2e6, rel=0.03)
