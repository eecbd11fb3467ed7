"""Whether the keys of preference learning fit together."""

from collections.abc import Iterator
from pathlib import Path

from drivetrain.conf.changes import has_checkpoint
from drivetrain.conf.rewards import ModelReward
from drivetrain.conf.schema import DpoConfig, GrpoConfig, PreferenceLoss, RewardModelConfig, RunConfig


def preference_problems(config: RunConfig) -> Iterator[str]:
    """One sentence for every problem."""
    stage = config.stage
    if isinstance(stage, GrpoConfig):
        yield from _judge(stage.rewards.reward_model)
    if not isinstance(stage, (DpoConfig, RewardModelConfig)):
        return
    goes_on = config.run_dir is not None and has_checkpoint(Path(config.run_dir))
    if config.model.init_from is None and not goes_on:
        yield (
            f"stage={stage.name} learns from comparisons of answers and needs a model that can read them; pass its "
            "weights with model.init_from=DIR"
        )
    if isinstance(stage, DpoConfig) and stage.loss is PreferenceLoss.ipo and stage.label_smoothing:
        yield (
            f"stage.label_smoothing={stage.label_smoothing} is for stage.loss=dpo and simpo; stage.loss=ipo is a "
            "square and has no labels, so use stage.label_smoothing=0"
        )
    if isinstance(stage, RewardModelConfig) and stage.sample_prompts:
        yield "stage.sample_prompts asks for answers and stage=reward_model gives scores; leave it out"


def _judge(reward: ModelReward) -> Iterator[str]:
    """The reward model that completions are judged by."""
    if not reward.weight:
        return
    word = f"stage.rewards.reward_model.weight={reward.weight}"
    if reward.run is None:
        yield f"{word} needs the directory of a stage=reward_model run; pass stage.rewards.reward_model.run=DIR"
    elif not has_checkpoint(Path(reward.run)):
        yield (
            f"stage.rewards.reward_model.run={reward.run} holds no whole checkpoint; pass the directory of a "
            "stage=reward_model run that has saved one"
        )
