"""The paths in a configuration: a frozen one means the same wherever it is read."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from drivetrain.conf.schema import GrpoConfig, RunConfig


def absolute_paths(config: RunConfig) -> RunConfig:
    """`data.path`, the mixture's paths, `tokenizer`, both `init_from` and the reward model of `stage.rewards`, seen
    from the current directory."""
    return _map(config, lambda _, path: _absolute(path))


def paths_at_resume(
    new: RunConfig, said: dict[str, object], frozen: dict[str, object], anew: Iterable[str]
) -> RunConfig:
    """Absolute paths of a run composed again: those that were not said anew stay where they were.

    Args:
        new: composed of the words of the start and of the resume.
        said: the words of the start alone, composed and flattened.
        frozen: the configuration that the run has, flattened.
        anew: keys of the resume's words; the same relative path may be another place there.
    """
    given = [f"{key}." for key in anew]

    def place(key: str, path: str) -> str:
        stays = said.get(key) == path and not any(f"{key}.".startswith(word) for word in given)
        return str(frozen[key]) if stays and frozen.get(key) else _absolute(path)

    return _map(new, place)


def _absolute(path: str) -> str:
    return os.path.normpath(Path(path).absolute())


def _map(config: RunConfig, change: Callable[[str, str], str]) -> RunConfig:
    def changed(key: str, path: str | None) -> str | None:
        return None if path is None else change(key, path)

    mixture = {
        name: replace(source, path=change(f"data.mixture.{name}.path", source.path))
        for name, source in config.data.mixture.items()
    }
    stage = config.stage
    if isinstance(stage, GrpoConfig):
        run = changed("stage.rewards.reward_model.run", stage.rewards.reward_model.run)
        judge = replace(stage.rewards.reward_model, run=run)
        stage = replace(stage, rewards=replace(stage.rewards, reward_model=judge))
    return replace(
        config,
        stage=stage,
        data=replace(config.data, path=changed("data.path", config.data.path), mixture=mixture),
        tokenizer=changed("tokenizer", config.tokenizer),
        model=replace(config.model, init_from=changed("model.init_from", config.model.init_from)),
        lora=replace(config.lora, init_from=changed("lora.init_from", config.lora.init_from)),
    )
