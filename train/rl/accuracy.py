"""Held-out accuracy: greedy answers, and of several drawn ones the chance that one of k is right."""

import numpy as np

from drivetrain.model.generate import Sampling
from drivetrain.train.rl.play import Task
from drivetrain.train.rl.rollout import Sampler, judged


def held_out_accuracy(sampler: Sampler, problems: int, samples: int) -> dict[str, float]:
    """`eval/accuracy` of greedy answers with its complement `eval/error`, and their mean length; with `samples` > 0
    also `eval/pass@1` and `eval/pass@SAMPLES` of answers drawn as in training. Collective.
    """
    world, cfg = sampler.world, sampler.cfg
    every = list(enumerate(sampler.environment.held_out(problems)))
    mine = every[world.rank :: world.size]
    greedy = Sampling(max_tokens=cfg.max_completion, temperature=0)
    tasks = [Task(problem, greedy, 1) for _, problem in mine]
    if samples:
        drawn = [(problem, sampler.sampling(f"held_out/{number}")) for number, problem in mine]
        tasks += [Task(problem, sampling, samples) for problem, sampling in drawn]
    played = [one for group in sampler.player.play(tasks, sampler.generate, world.any) for one in group]
    right = np.array(judged(sampler.environment, played)[1], dtype=np.float64)
    N, tokens = len(mine), sum(one.trajectory.length for one in played[: len(mine)])
    drawn_NS = right[N:].reshape(N, samples)
    sums = [right[:N].sum(), float(tokens), drawn_NS.mean(axis=1).sum() if samples else 0.0]
    sums.append(drawn_NS.any(axis=1).sum() if samples else 0.0)
    accuracy, length, first, any_of = (total / len(every) for total in world.sum([float(x) for x in sums]))
    found = {"eval/accuracy": accuracy, "eval/error": 1 - accuracy, "eval/completion_tokens_mean": length}
    if samples:
        found |= {"eval/pass@1": first, f"eval/pass@{samples}": any_of}
    return found
