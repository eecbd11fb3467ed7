"""What each stage has: `stage.*` of a run. Parts with many keys of their own are in rewards.py and rollout.py."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from drivetrain.conf.rewards import RewardsConfig
from drivetrain.conf.rollout import RolloutConfig


class TooLong(Enum):
    """What becomes of conversations longer than a row: they are left out, or their beginning is taken."""

    drop = "drop"
    truncate = "truncate"


class Variant(Enum):
    """Which objective of reinforcement learning; docs/grpo.md has each one's formula and paper."""

    grpo = "grpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    gspo = "gspo"
    cispo = "cispo"
    rloo = "rloo"
    reinforce_pp = "reinforce_pp"


class KlEstimator(Enum):
    """Of KL(policy || reference) from one token: log ratio, half its square, or the one that is never negative."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KlIn(Enum):
    """Where kl_coef times the divergence goes."""

    loss = "loss"
    reward = "reward"


class Importance(Enum):
    """What corrects the gap between the sampler's log-probabilities and the trainer's: nothing, truncated weights
    of the tokens, or of whole completions."""

    off = "off"
    token = "token"
    sequence = "sequence"


class PreferenceLoss(Enum):
    """What is learned from pairs: by comparison with a reference model (DPO, IPO), or without one (SimPO)."""

    dpo = "dpo"
    ipo = "ipo"
    simpo = "simpo"


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What every stage has. Lengths are in tokens, intervals in optimizer steps (0: never)."""

    name: str = MISSING
    steps: int = MISSING
    seq_len: int = MISSING
    tokens_per_step: int = MISSING  # over all ranks; a multiple of seq_len
    micro_batch: Any = "auto"  # sequences a rank puts through the model at once; auto: as many as fit
    eval_every: int = 0
    eval_tokens: int = 131072  # held-out tokens an evaluation reads
    save_every: int = 0
    log_every: int = 1  # at least 1: a run without metrics has no summary
    sample_prompts: list[str] = field(default_factory=list)  # continued at each evaluation
    sample_tokens: int = 48


@dataclass(kw_only=True, slots=True)
class PretrainConfig(StageConfig):
    z_loss: float = 0.0  # weight of logsumexp(logits)^2 (PaLM, section 5)


@dataclass(kw_only=True, slots=True)
class SftConfig(StageConfig):
    """Conversations packed into rows of seq_len. `sample_prompts` are what a user says, answered as in a chat."""

    too_long: TooLong = TooLong.drop


@dataclass(kw_only=True, slots=True)
class GrpoConfig(StageConfig):
    """Reinforcement learning on problems whose answers can be checked. A rollout, `group_size` completions of each
    of its prompts, is sampled by the model itself; `seq_len` is the length of a packed row, and `tokens_per_step`
    what a step has at most."""

    tokens_per_step: int = 0  # follows from the numbers below
    environment: str = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    prompts_per_step: int = MISSING
    group_size: int = MISSING  # completions of one prompt
    max_completion: int = MISSING  # tokens
    rewards: RewardsConfig = field(default_factory=RewardsConfig)  # added to the environment's own
    environment_weight: float = 1.0  # of the environment's own reward
    variant: Variant = Variant.grpo
    rollout: RolloutConfig = field(default_factory=RolloutConfig)  # who completes the prompts, and when
    updates: int = 1  # steps that share out one rollout
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    clip_low: float = 0.2  # the ratio's lower bound is 1 less this
    clip_high: float = 0.2  # and its upper bound 1 plus this
    dynamic_sampling: bool = False  # other prompts in place of groups whose rewards are all equal (DAPO)
    max_tries: int = 3  # rounds of sampling for one rollout, the first included
    kl_coef: float = 0.0  # 0: no reference model
    kl_estimator: KlEstimator = KlEstimator.k3
    kl_in: KlIn = KlIn.loss
    entropy_coef: float = 0.0
    importance: Importance = Importance.token
    importance_cap: float = 2.0
    eval_problems: int = 100  # held-out ones, answered greedily
    eval_unseen: bool = (
        True  # no question is both held out and trained on; false: they differ in their seeds alone
    )
    eval_samples: int = 0  # answers to each that are drawn besides, for pass@k; 0: none

    def __post_init__(self) -> None:
        most = self.prompts_per_step * self.group_size * self.seq_len
        if self.tokens_per_step not in (0, most):
            raise ValueError(
                f"stage.tokens_per_step={self.tokens_per_step} follows from prompts_per_step, group_size and "
                "seq_len and cannot be given; leave it out"
            )
        self.tokens_per_step = most


@dataclass(kw_only=True, slots=True)
class DpoConfig(StageConfig):
    """Preference pairs, packed into rows of seq_len; the reference is the model that training begins with.
    `sample_prompts` are what a user says, answered as in a chat."""

    loss: PreferenceLoss = PreferenceLoss.dpo
    beta: float = 0.1  # simpo: 2.0 to 2.5 in the paper
    margin: float = 0.5  # simpo alone: what the chosen answer must win by, γ in the paper
    label_smoothing: float = 0.0  # dpo and simpo: the share of pairs that are taken to be the wrong way round


@dataclass(kw_only=True, slots=True)
class RewardModelConfig(StageConfig):
    """Preference pairs, packed into rows of seq_len, for a model whose head gives one number in place of logits."""
