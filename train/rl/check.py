"""Whether all that stage=grpo names can be made, asked before a run is: `python -m drivetrain.train.rl.check`.

The launcher starts it as a process of its own (launch/practice.py), since it imports and runs what a user wrote.
It reads {"config": YAML, "tokenizer": DIR or null, "here": BOOL} from its standard input, makes environment and
rewards as a rank does, and writes {"problems": [...], "warnings": [...]} to its standard output. It
reads no weights.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from drivetrain.conf.compose import to_run_config
from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.rewards import ModelReward, RewardsConfig
from drivetrain.conf.rollout import RolloutEngine
from drivetrain.conf.schema import GrpoConfig
from drivetrain.conf.source import Kind, kind_of, tokenizer_of
from drivetrain.data.chat import Chat
from drivetrain.data.readers import Unusable
from drivetrain.train.checkpoint import checkpoint_name, complete_steps, is_reward_model
from drivetrain.train.rl.environments import build_environment
from drivetrain.train.rl.episodes import Environment, Problem
from drivetrain.train.rl.play import Player
from drivetrain.train.rl.rewards import build_rewards
from drivetrain.train.rl.sandbox import NoWalls

# What an engine needs, and the extra that brings it.
LIBRARIES = {
    RolloutEngine.vllm: [("vllm", "vllm")],
    RolloutEngine.vllm_server: [("openai", "rl"), ("httpx", "rl")],
    RolloutEngine.endpoint: [("openai", "rl")],
}


@dataclass(frozen=True, slots=True)
class Findings:
    """One sentence each; only problems keep a run from starting."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def of(self, what: str, here: bool) -> Iterator[None]:
        """Keep what is wrong with a part; the next one is tried all the same."""
        try:
            yield
        except NoWalls as error:
            said = str(error) if what in str(error) else f"{what}: {error}"
            if here:
                self.problems.append(said)
            else:
                self.warnings.append(f"{said}; the nodes may have walls that this one lacks")
        except DrivetrainError as error:
            self.problems.append(str(error))
        except Exception as error:  # a user's own code
            self.problems.append(f"{what} cannot be used: {type(error).__name__}: {error}; correct it")


def check(stage: GrpoConfig, seed: int, tokenizer: Path | None, here: bool) -> Findings:
    """Make and close everything once.

    Args:
        tokenizer: the run's; None leaves out what depends on it.
        here: whether ranks run on this machine; walls that another one may have are no problem.
    """
    found = Findings()
    with found.of("stage.rollout.engine", here):
        _libraries(stage.rollout.engine)
    _rewards(stage, here, found)
    chat = None
    if tokenizer is not None:
        with found.of(f"the tokenizer in {tokenizer}", here):
            chat = Chat(tokenizer)
    what = f"stage.environment={stage.environment}"
    with found.of(what, here):
        environment = build_environment(stage.environment, seed, stage.eval_problems, stage.eval_unseen)
        try:
            _asked(environment, stage, chat)
        finally:
            environment.close()
    return found


def _libraries(engine: RolloutEngine) -> None:
    for library, extra in LIBRARIES.get(engine, []):
        if find_spec(library) is None:
            raise ConfigError(
                f"stage.rollout.engine={engine.value} needs {library}; run `pip install 'drivetrain[{extra}]'`"
            )


def _rewards(stage: GrpoConfig, here: bool, found: Findings) -> None:
    """One part after the other, each alone."""
    whole = stage.rewards
    off = RewardsConfig()
    for name in (each for each in off.__slots__ if each != "checkers" and getattr(whole, each).weight):
        mine = getattr(whole, name)
        with found.of(f"stage.rewards.{name}", here):
            if isinstance(mine, ModelReward):
                _reward_model(Path(str(mine.run)))
                continue
            if name == "rubric":
                mine = replace(mine, cache=None)  # nothing is made yet
            alone = replace(off, checkers=whole.checkers, **{name: mine})
            build_rewards(alone, stage.max_completion).close()


def _reward_model(run: Path) -> None:
    """As far as can be seen without its weights."""
    where = f"stage.rewards.reward_model.run={run}"
    kind = kind_of(run)
    steps = complete_steps(run / "checkpoints") if kind is Kind.run else []
    folder = run / "checkpoints" / checkpoint_name(max(steps)) if steps else run
    if kind not in (Kind.run, Kind.checkpoint) or kind_of(folder) is not Kind.checkpoint:
        raise ConfigError(f"{where} holds no checkpoint; name the directory of a stage=reward_model run")
    if not is_reward_model(folder):
        raise ConfigError(f"{where} holds no reward model; name the directory of a stage=reward_model run")
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        raise ConfigError(f"{where} has no tokenizer.json; copy the files of its tokenizer there")
    Chat(tokenizer)


def _asked(environment: Environment, stage: GrpoConfig, chat: Chat | None) -> None:
    """The first problems, as the model will see them."""
    problems: list[Callable[[], Problem]] = [lambda: environment.problem(0)]
    if stage.eval_every and (held_out := environment.held_out(1)):
        problems.append(lambda: held_out[0])
    player = None if chat is None else Player(environment, chat, (), stage.seq_len)
    for make in problems:
        problem = make()
        if player is None:
            continue
        try:
            length = len(player.prompt(problem))
        except Unusable as error:
            raise ConfigError(
                f"stage.environment={stage.environment}: a problem cannot be shown: {error}"
            ) from error
        if length > (room := stage.seq_len - stage.max_completion):
            raise ConfigError(
                f"a prompt of stage.environment={stage.environment} has {length} tokens, and "
                f"stage.seq_len={stage.seq_len} with stage.max_completion={stage.max_completion} leaves room for "
                f"{room}; raise stage.seq_len"
            )


def main() -> None:
    # What users' modules print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.read())
    tree = OmegaConf.create(asked["config"])
    assert isinstance(tree, DictConfig)
    config = to_run_config(tree, tree.get("experiment"))
    assert isinstance(config.stage, GrpoConfig)
    tokenizer = None if asked["tokenizer"] is None else Path(asked["tokenizer"])
    answers.write(json.dumps(asdict(check(config.stage, config.seed, tokenizer, asked["here"]))))
    answers.flush()
    os._exit(0)  # threads of libraries that would not end


if __name__ == "__main__":
    main()
