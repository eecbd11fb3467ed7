"""Groups from every rank to every rank, as columns of numbers.

    group        number, samples, prompt tokens, parts and rewards and marks of its samples
    trajectory   tokens, of which those that the model wrote, with their log-probabilities and versions

A token takes 5 bytes, one that the model wrote 13; each rank receives the groups of all.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from drivetrain.train.mesh import World
from drivetrain.train.rl.episodes import Trajectory
from drivetrain.train.rl.rollout import Group

ENDS = ("stop", "length", "failed")


def share(groups: Sequence[Group], world: World) -> list[Group]:
    """All ranks' groups on every rank, by their numbers, without log-probabilities at temperature 1. Collective."""
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, columns(groups))
    return sorted((group for part in everyone for group in rows(part)), key=lambda group: group.number)


def columns(groups: Sequence[Group]) -> dict[str, Any]:
    every = [one for group in groups for one in group.completions]
    return {
        "number": np.array([group.number for group in groups], dtype=np.int64),
        "samples": np.array([len(group.completions) for group in groups], dtype=np.int32),
        "prompt": _ragged([group.prompt for group in groups], np.int32),
        "names": [list(group.parts) for group in groups],
        "parts": [np.array(list(group.parts.values()), dtype=np.float64) for group in groups],
        "rewards": _ragged([group.rewards for group in groups], np.float64),
        "correct": _ragged([group.correct for group in groups], np.bool_),
        "judged": [group.judged for group in groups],
        "tokens": _ragged([one.tokens for one in every], np.int32),
        "written": _ragged([one.written for one in every], np.bool_),
        "behaviour": _ragged([one.behaviour_logprobs for one in every], np.float32),
        "versions": _ragged([one.versions for one in every], np.int32),
        "end": np.array([ENDS.index(one.finish_reason) for one in every], dtype=np.int8),
        "turns": np.array([one.turns for one in every], dtype=np.int32),
    }


def rows(found: dict[str, Any]) -> list[Group]:
    every = [
        Trajectory(
            tokens=tokens.tolist(),
            written=written.tolist(),
            behaviour_logprobs=behaviour.tolist(),
            finish_reason=ENDS[end],  # type: ignore[arg-type]
            turns=int(turns),
            versions=versions.tolist(),
        )
        for tokens, written, behaviour, end, turns, versions in zip(
            _split(found["tokens"]),
            _split(found["written"]),
            _split(found["behaviour"]),
            found["end"],
            found["turns"],
            _split(found["versions"]),
            strict=True,
        )
    ]
    groups, first = [], 0
    for place, (number, samples) in enumerate(zip(found["number"], found["samples"], strict=True)):
        parts = dict(zip(found["names"][place], found["parts"][place].tolist(), strict=True))
        mine = every[first : (first := first + samples)]
        groups.append(Group(int(number), [], mine, parts, judged=found["judged"][place]))
    for name in ("prompt", "rewards", "correct"):
        for group, values in zip(groups, _split(found[name]), strict=True):
            setattr(group, name, values.tolist())
    return groups


def _ragged(lists: Sequence[Sequence[Any]], kind: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lists end to end, and their lengths."""
    lengths = np.array([len(each) for each in lists], dtype=np.int64)
    flat = np.fromiter((value for each in lists for value in each), dtype=kind, count=int(lengths.sum()))
    return flat, lengths


def _split(ragged: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    flat, lengths = ragged
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
