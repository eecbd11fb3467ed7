"""What the keys of preference learning say together."""

from pathlib import Path

import pytest

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.paths import absolute_paths
from drivetrain.conf.preference import preference_problems
from drivetrain.conf.validate import validate

FROM = "model.init_from=somewhere"
WRONG = {
    "stage=dpo": (
        "stage=dpo learns from comparisons of answers and needs a model that can read them; pass its weights with "
        "model.init_from=DIR"
    ),
    f"stage=dpo {FROM} stage.loss=ipo stage.label_smoothing=0.1": (
        "stage.label_smoothing=0.1 is for stage.loss=dpo and simpo; stage.loss=ipo is a square and has no labels, "
        "so use stage.label_smoothing=0"
    ),
    f"stage=reward_model {FROM} stage.sample_prompts=[a]": (
        "stage.sample_prompts asks for answers and stage=reward_model gives scores; leave it out"
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_does_not_fit_says_so(words: str) -> None:
    assert list(preference_problems(compose(words.split()))) == [WRONG[words]]


@pytest.mark.parametrize(
    "words", ["stage=sft", f"stage=dpo {FROM}", f"stage=reward_model {FROM} lora.rank=8"]
)
def test_what_fits_is_let_through(words: str) -> None:
    assert not list(preference_problems(compose(words.split())))


def test_a_run_that_has_saved_goes_on_from_that(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    config = compose(["stage=dpo", f"run_dir={tmp_path}"])
    assert list(preference_problems(config))
    (folder / "complete.json").write_text("{}")
    assert not list(preference_problems(config))


def test_what_pairs_are_judged_by() -> None:
    with pytest.raises(ConfigError, match=r"mfu, eval/loss, eval/accuracy or eval/margin"):
        validate(compose(["stage=dpo", FROM, "objective=eval/bits_per_byte"]), data=False)
    for wrong in ("stage.beta=0", "stage.margin=-1", "stage.label_smoothing=0.5"):
        with pytest.raises(ConfigError, match="out of range"):
            validate(compose(["stage=dpo", FROM, wrong]), data=False)


def test_a_judge_needs_a_run() -> None:
    part = "stage.rewards.reward_model"
    words = ["stage=grpo", FROM, f"{part}.weight=2"]
    assert list(preference_problems(compose(words))) == [
        f"{part}.weight=2.0 needs the directory of a stage=reward_model run; pass {part}.run=DIR"
    ]
    config = absolute_paths(compose([*words, f"{part}.run=judge"]))
    run = Path("judge").absolute()
    assert list(preference_problems(config)) == [
        f"{part}.run={run} holds no whole checkpoint; pass the directory of a stage=reward_model run "
        "that has saved one"
    ]
    assert not list(preference_problems(compose(["stage=grpo", FROM, f"{part}.run=judge"])))
