"""Held-out accuracy: greedy answers, and of several drawn ones the chance that one of k is right."""

from dataclasses import replace

import numpy as np
import xxhash

from drivetrain.model.generate import Request, Sampling
from drivetrain.train.rl.rollout import Sampler


def held_out_accuracy(sampler: Sampler, problems: int, samples: int) -> dict[str, float]:
    """`eval/accuracy` of greedy answers with its complement `eval/error`, and their mean length; with `samples` > 0
    also `eval/pass@1` and `eval/pass@SAMPLES` of answers drawn as in training. Collective.
    """
    world, cfg = sampler.world, sampler.cfg
    every = list(enumerate(sampler.environment.held_out(problems)))
    mine = every[world.rank :: world.size]
    prompts = [sampler.prompt(problem) for _, problem in mine]
    greedy = Sampling(max_tokens=cfg.max_completion, temperature=0)
    asked = [Request(prompt, greedy) for prompt in prompts]
    if samples:
        drawn = Sampling(
            max_tokens=cfg.max_completion, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k
        )
        asked += [
            Request(prompt, replace(drawn, seed=_seed(sampler.seed, number)), samples)
            for (number, _), prompt in zip(mine, prompts, strict=True)
        ]
    answered = sampler.generate(asked)
    questions = [problem for _, problem in mine] * (2 if samples else 1)
    scored = [
        sampler.sample(problem, one)
        for problem, group in zip(questions, answered, strict=True)
        for one in group
    ]
    right = np.array(sampler.environment.correct(sampler.environment.reward.score(scored)), dtype=np.float64)
    N, tokens = len(mine), sum(sample.tokens for sample in scored[: len(mine)])
    drawn_NS = right[N:].reshape(N, samples)
    sums = [right[:N].sum(), float(tokens), drawn_NS.mean(axis=1).sum() if samples else 0.0]
    sums.append(drawn_NS.any(axis=1).sum() if samples else 0.0)
    accuracy, length, first, any_of = (total / len(every) for total in world.sum([float(x) for x in sums]))
    found = {"eval/accuracy": accuracy, "eval/error": 1 - accuracy, "eval/completion_tokens_mean": length}
    if samples:
        found |= {"eval/pass@1": first, f"eval/pass@{samples}": any_of}
    return found


def _seed(seed: int, number: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}/held_out/{number}".encode()) >> 1
