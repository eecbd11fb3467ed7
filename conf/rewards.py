"""What completions are rewarded for: `stage.rewards`. A part with weight 0 is off.

Each part of the reward is multiplied by its weight and logged under its name; the reward is their sum.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum

from drivetrain.conf.environments import is_target


class Walls(Enum):
    """What shuts code in. `auto` is namespaces where the kernel grants them, else filters (Landlock and seccomp).
    `none` keeps only limits and the throw-away directory: for a machine that may be lost."""

    auto = "auto"
    namespaces = "namespaces"
    filters = "filters"
    none = "none"


class Extract(Enum):
    """Where in a completion the answer stands: in its last <answer> tag, its last \\boxed{}, after its last
    "answer:", its last number, all of it. `auto`: the first of tag, boxed, answer that is there, else all of it."""

    auto = "auto"
    tag = "tag"
    boxed = "boxed"
    answer = "answer"
    number = "number"
    all = "all"


class Share(Enum):
    """What a program gets that passes some of its tests: their share, or nothing."""

    share = "share"
    all = "all"


@dataclass(kw_only=True, slots=True)
class SandboxConfig:
    """What code that a model wrote may use up; sizes in MiB."""

    walls: Walls = Walls.auto
    seconds: float = 10.0  # of wall time
    cpu_seconds: int = 10  # of each process
    memory: int = 512  # shared out evenly among `processes`
    disk: int = 64  # the throw-away directory
    output: int = 1  # printed, both streams together
    processes: int = 1  # 1: it can start no other
    packages: bool = False  # let it import what is installed beside drivetrain (numpy, ...)


@dataclass(kw_only=True, slots=True)
class GymReward:
    """reasoning-gym's own score, from 0 to 1."""

    weight: float = 0.0
    extract: Extract = Extract.auto
    seconds: float = 5.0  # for one answer


@dataclass(kw_only=True, slots=True)
class ExactReward:
    """1 where the answer is one of the right ones, without regard to case, white space and commas of thousands."""

    weight: float = 0.0
    extract: Extract = Extract.auto


@dataclass(kw_only=True, slots=True)
class RegexReward:
    """1 where a regular expression is found; without one, the sample's own, `reference["pattern"]`."""

    weight: float = 0.0
    pattern: str | None = None
    extract: Extract = Extract.all


@dataclass(kw_only=True, slots=True)
class FormatReward:
    """1 where the whole completion has this form."""

    weight: float = 0.0
    pattern: str = r"<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*\S\s*"


@dataclass(kw_only=True, slots=True)
class MathReward:
    """1 where math-verify finds the answer equal to the right one."""

    weight: float = 0.0
    seconds: float = 5.0  # for one answer


@dataclass(kw_only=True, slots=True)
class OverlongReward:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): 0, falling to -1 over the last `buffer` tokens."""

    weight: float = 0.0
    buffer: int = 0  # tokens; 0: a quarter of stage.max_completion


@dataclass(kw_only=True, slots=True)
class CodeReward:
    """Tests that the last fenced block passes; `reference["tests"]` are texts to run, or inputs with outputs."""

    weight: float = 0.0
    give: Share = Share.share
    workers: int = 0  # programs that run at a time; 0: as many as there are cores
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)


@dataclass(kw_only=True, slots=True)
class Criterion:
    """One question about a completion that is answered with yes or no."""

    name: str
    asks: str
    weight: float = 1.0  # negative: a fault


@dataclass(kw_only=True, slots=True)
class RubricReward:
    """Criteria that an OpenAI-compatible model judges: the weights of those met, as a share of the positive ones.
    A sample's own list, `reference["rubric"]`, comes before `criteria`."""

    weight: float = 0.0
    url: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key; it may be unset
    criteria: list[Criterion] = field(default_factory=list)
    cache: str | None = None  # directory in which verdicts are kept
    seconds: float = 60.0  # for one verdict, with everything that is tried again
    tries: int = 4
    concurrent: int = 8
    per_minute: int = 0  # requests; 0: no limit
    max_tokens: int = 1024


@dataclass(kw_only=True, slots=True)
class ModelReward:
    """The score of a reward model."""

    weight: float = 0.0
    run: str | None = None  # the directory of a stage=reward_model run


@dataclass(kw_only=True, slots=True)
class CustomReward:
    """A function of yours, `package.module:name`, from a list of samples to a list of numbers."""

    weight: float = 0.0
    target: str = ""


@dataclass(kw_only=True, slots=True)
class RewardsConfig:
    gym: GymReward = field(default_factory=GymReward)
    exact: ExactReward = field(default_factory=ExactReward)
    regex: RegexReward = field(default_factory=RegexReward)
    format: FormatReward = field(default_factory=FormatReward)
    math: MathReward = field(default_factory=MathReward)
    overlong: OverlongReward = field(default_factory=OverlongReward)
    code: CodeReward = field(default_factory=CodeReward)
    rubric: RubricReward = field(default_factory=RubricReward)
    reward_model: ModelReward = field(default_factory=ModelReward)
    custom: CustomReward = field(default_factory=CustomReward)
    checkers: int = 1  # processes a rank that gym and math compare answers in


def reward_problems(rewards: RewardsConfig, environment_weight: float, max_completion: int) -> Iterator[str]:
    """One sentence for every problem of the parts that are on, as far as it can be seen without making them."""
    parts = {item.name: getattr(rewards, item.name) for item in fields(rewards) if item.name != "checkers"}
    if not environment_weight and not any(part.weight for part in parts.values()):
        yield (
            "stage.environment_weight=0 and no part of stage.rewards has a weight, so nothing would be learned; "
            "give one of them a weight"
        )
    for name in ("regex", "format"):
        pattern = parts[name].pattern
        if parts[name].weight and pattern is not None:
            yield from pattern_problems(pattern, f"stage.rewards.{name}.pattern")
    if rewards.overlong.weight:
        yield from overlong_problems(rewards.overlong.buffer, max_completion)
    if rewards.custom.weight:
        yield from target_problems(rewards.custom.target)
    if rewards.rubric.weight and not rewards.rubric.model:
        yield "stage.rewards.rubric.model is empty; give the name that the server knows"


def pattern_problems(pattern: str, where: str) -> Iterator[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{where}={pattern!r} is no regular expression: {error}; correct it"


def overlong_problems(buffer: int, max_completion: int) -> Iterator[str]:
    if buffer > max_completion:
        yield (
            f"stage.rewards.overlong.buffer={buffer} is not within stage.max_completion={max_completion}; "
            "use less"
        )


def target_problems(target: str) -> Iterator[str]:
    if not is_target(target):
        yield f"stage.rewards.custom.target={target!r} is not of the form package.module:name; correct it"
