"""Held-out accuracy: greedy answers, and of several drawn ones the chance that one of k is right.

N problems of this rank · S drawn answers of each.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from drivetrain.conf.errors import DrivetrainError
from drivetrain.model.generate import Request, Sampling
from drivetrain.train.rl.episodes import Environment, Played
from drivetrain.train.rl.guard import each_or_none
from drivetrain.train.rl.play import Task
from drivetrain.train.rl.rollout import Sampler, judged
from drivetrain.train.rl.samplers.base import Completions


def held_out_accuracy(sampler: Sampler, problems: int, samples: int) -> dict[str, float]:
    """`eval/accuracy` of greedy answers with its complement `eval/error`, and their mean length; with `samples` > 0
    also `eval/pass@1` and `eval/pass@SAMPLES` of answers drawn as in training. Collective.

    Answers that could not be made or judged are left out of all means; `eval/failed` is their number. A mean over
    nothing is left out itself.
    """
    world, cfg = sampler.world, sampler.cfg
    every = list(enumerate(sampler.environment.held_out(problems)))
    mine = every[world.rank :: world.size]
    greedy = Sampling(max_tokens=cfg.max_completion, temperature=0)
    tasks = [Task(problem, greedy, 1) for _, problem in mine]
    if samples:
        drawn = [(problem, sampler.sampling(f"held_out/{number}")) for number, problem in mine]
        tasks += [Task(problem, sampling, samples) for problem, sampling in drawn]
    groups = sampler.player.play(tasks, lambda requests: _completed(sampler, requests), world.any)
    world.barrier()  # judging has the ranks' patience to itself
    played = [one for group in groups for one in group]
    right = _marks(sampler, played)
    N = len(mine)
    known = ~np.isnan(right)
    lengths = np.array([one.trajectory.length for one in played[:N]], dtype=np.float64)
    right_NS, known_NS = (np.nan_to_num(right)[N:].reshape(N, samples), known[N:].reshape(N, samples))
    any_known_N, counts_N = known_NS.any(axis=1), np.maximum(known_NS.sum(axis=1), 1)
    sums = {
        "answers": known[:N].sum(),
        "right": np.nansum(right[:N]),
        "tokens": lengths[known[:N]].sum(),
        "failed": (~known).sum(),
        "drawn": any_known_N.sum(),
        "first": (right_NS.sum(axis=1) / counts_N).sum(),
        "any": right_NS.any(axis=1).sum() if samples else 0,
    }
    all_of = dict(zip(sums, world.sum([float(value) for value in sums.values()]), strict=True))
    found = {"eval/failed": all_of["failed"]}
    if answers := all_of["answers"]:
        accuracy = all_of["right"] / answers
        found |= {"eval/accuracy": accuracy, "eval/error": 1 - accuracy}
        found["eval/completion_tokens_mean"] = all_of["tokens"] / answers
    if prompts := all_of["drawn"]:
        found |= {"eval/pass@1": all_of["first"] / prompts, f"eval/pass@{samples}": all_of["any"] / prompts}
    return found


def _completed(sampler: Sampler, requests: Sequence[Request]) -> Completions:
    """What was completed, with the tries of a rollout where no other rank takes part in them."""
    if sampler.evaluator.collective:
        return sampler.generate(requests)
    for _ in range(1 + sampler.cfg.rollout.retries):
        try:
            return sampler.generate(requests)
        except DrivetrainError:
            raise
        except Exception as error:
            sampler.warnings.say("held-out problems were not completed", error)
    return [[None] * request.samples for request in requests]


def _marks(sampler: Sampler, played: Sequence[Played]) -> np.ndarray:
    """1 for each answer that is right, 0 for one that is not; NaN for one that failed or could not be judged."""
    alive = [one for one in played if one.trajectory.finish_reason != "failed"]
    rollout = sampler.cfg.rollout
    found = iter(
        each_or_none(
            partial(_right, sampler.environment),
            alive,
            rollout.timeout_seconds,
            rollout.retries,
            sampler.warnings,
        )
    )
    marks = [next(found) if one.trajectory.finish_reason != "failed" else None for one in played]
    return np.array([np.nan if mark is None else float(mark) for mark in marks], dtype=np.float64)


def _right(environment: Environment, played: Sequence[Played]) -> list[bool | None]:
    """None where no part of the environment's reward could be scored."""
    parts, correct = judged(environment, played)
    scores = zip(*parts.values(), strict=True) if parts else ((0.0,) for _ in played)
    return [right if any(map(math.isfinite, of)) else None for right, of in zip(correct, scores, strict=True)]
