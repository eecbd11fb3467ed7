"""Whether the keys of reinforcement learning fit together."""

from collections.abc import Iterator
from pathlib import Path

from drivetrain.conf.changes import has_checkpoint
from drivetrain.conf.environments import environment_problems
from drivetrain.conf.rewards import reward_problems
from drivetrain.conf.rollout import RolloutEngine, rollout_problems
from drivetrain.conf.schema import Device, GrpoConfig, KlEstimator, KlIn, RunConfig, Variant
from drivetrain.conf.source import tokenizer_of


def grpo_problems(config: RunConfig) -> Iterator[str]:
    """One sentence for every problem."""
    stage = config.stage
    if not isinstance(stage, GrpoConfig):
        return
    if stage.max_completion >= stage.seq_len:
        yield (
            f"stage.max_completion={stage.max_completion} leaves no room for a prompt in "
            f"stage.seq_len={stage.seq_len}; use a longer seq_len"
        )
    if stage.group_size < 2 and stage.variant is not Variant.reinforce_pp:
        yield (
            f"stage.group_size={stage.group_size} has nothing to compare a completion with; use 2 or more, or "
            "stage.variant=reinforce_pp"
        )
    ranks = config.cluster.nodes * config.cluster.nproc
    if stage.prompts_per_step * stage.updates < ranks:
        yield (
            f"stage.prompts_per_step={stage.prompts_per_step} is too few for {ranks} ranks, each of which samples "
            f"some of them; use {ranks} or more"
        )
    if stage.save_every % stage.updates:
        yield (
            f"stage.save_every={stage.save_every} is not a multiple of stage.updates={stage.updates}, so a resume "
            "would begin in the middle of a rollout; use a multiple"
        )
    if stage.sample_prompts:
        yield "stage.sample_prompts is not asked in stage=grpo, which shows its own rollouts; leave it out"
    yield from environment_problems(stage.environment)
    yield from reward_problems(stage.rewards, stage.environment_weight, stage.max_completion)
    yield from rollout_problems(stage.rollout, stage.updates)
    yield from _judge_pace(stage, ranks)
    if stage.rollout.engine is RolloutEngine.vllm and config.cluster.device is Device.cpu:
        yield (
            "stage.rollout.engine=vllm needs GPUs and cluster.device=cpu has none; use stage.rollout.engine=builtin"
        )
    yield from _divergence(config, stage)
    yield from _start(config)


def _judge_pace(stage: GrpoConfig, ranks: int) -> Iterator[str]:
    rubric, limit = stage.rewards.rubric, stage.rollout.timeout_seconds
    if not rubric.weight or rubric.per_minute <= 0:
        return
    completions = -(-stage.prompts_per_step * stage.updates // ranks) * stage.group_size
    seconds = 60 * completions / rubric.per_minute
    if seconds > limit:
        yield (
            f"stage.rewards.rubric.per_minute={rubric.per_minute} takes {seconds:.0f} s for the {completions} "
            f"completions of a rank, and stage.rollout.timeout_seconds={limit:g} gives them up before; raise one "
            "of them"
        )


def _divergence(config: RunConfig, stage: GrpoConfig) -> Iterator[str]:
    if not stage.kl_coef:
        return
    if stage.kl_estimator is KlEstimator.k1 and stage.kl_in is KlIn.loss:
        yield (
            "stage.kl_estimator=k1 in the loss has a gradient that is zero on average, so it would do nothing; use "
            "k2 or k3, or stage.kl_in=reward"
        )
    if config.lora.init_from is not None:
        yield (
            "stage.kl_coef compares with model.init_from alone, and lora.init_from adds to it; merge the adapter "
            "with `drivetrain export` first, or use stage.kl_coef=0"
        )


def _start(config: RunConfig) -> Iterator[str]:
    """A model that can half do it, and the tokenizer with which it can."""
    if config.data.path is not None or config.data.mixture:
        yield "stage=grpo makes its problems itself (stage.environment); leave data.path and data.mixture out"
    source = config.model.init_from
    if source is None and config.run_dir is not None and has_checkpoint(Path(config.run_dir)):
        return  # a resume goes on from there
    if source is None:
        yield (
            "stage=grpo practises what a model can do now and then; pass one that answers, as stage=sft makes, "
            "with model.init_from=DIR"
        )
    elif config.tokenizer is None and Path(source).is_dir() and tokenizer_of(Path(source)) is None:
        yield f"model.init_from={source} has no tokenizer.json; pass tokenizer=DIR"
