"""How much of its training documents a model gives back word for word, beside documents that it never saw.

A document is extractable with k tokens of context if greedy decoding from its first k tokens gives its next tokens
(Carlini et al. 2022, arXiv 2202.07646, definition 3.1). Whether decoding takes a token is read off one forward pass
over the document, as long as it has taken all the tokens before; nothing is generated but for the examples.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.data.permutation import Permutation
from drivetrain.data.shards import (
    DTYPES,
    HELD_OUT,
    TRAIN,
    Manifest,
    map_document_ends,
    map_lengths,
    map_tokens,
)
from drivetrain.model.generate import Request, Sampling
from drivetrain.train.evaluation.loss import check_tokenizer
from drivetrain.train.evaluation.score import Advance, Pair, Score, Scorer, silent
from drivetrain.train.evaluation.tasks import mean_and_error
from drivetrain.train.serve import Sampler

MOST_READ = 1 << 20  # documents whose lengths are looked at
BLOCK = 4096
EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """`documents` of each split, at random by `seed`; `prefix` (k) tokens are given and the `suffix` after them is
    compared. 50 and 50 are the paper's."""

    documents: int = 200
    prefix: int = 50
    suffix: int = 50
    seed: int = 0


def memorisation(
    sampler: Sampler, directory: Path, probe: Probe, advance: Advance = silent
) -> dict[str, Any]:
    """The probe's numbers.

    Returns:
        For `train`, `held_out` and `difference` (train less held out): `extractable`, the share of documents whose
        whole suffix comes back; `matched`, the mean number of the suffix's first tokens that do; `loss`, nats a
        token of the suffix. Each has `value` and `stderr`. `examples`: the training documents of which most did.

    Raises:
        ConfigError: prefix and suffix are longer than the model's context, or the shards another tokenizer's.
        DataError: a split has fewer than two documents that are long enough.
    """
    opened = sampler.opened
    k, n = probe.prefix, probe.suffix
    if k + n - 1 > opened.cfg.max_seq_len:
        raise ConfigError(
            f"--prefix {k} and --suffix {n} are longer than the model's max_seq_len={opened.cfg.max_seq_len}; "
            "use shorter ones"
        )
    manifest = check_tokenizer(opened, directory)
    texts = {split: draw_documents(directory, manifest, split, probe) for split in (TRAIN, HELD_OUT)}
    pairs = [
        Pair(tuple(text[:k].tolist()), tuple(text[k:].tolist())) for split in texts.values() for text in split
    ]
    scores = Scorer(opened).score(pairs, advance)
    seen = len(texts[TRAIN])
    parts = {TRAIN: _numbers(scores[:seen]), HELD_OUT: _numbers(scores[seen:])}
    return {
        "directory": str(directory),
        "prefix": k,
        "suffix": n,
        **{split: {"documents": len(texts[split]), **part} for split, part in parts.items()},
        "difference": {name: _difference(parts[TRAIN][name], parts[HELD_OUT][name]) for name in parts[TRAIN]},
        "examples": _examples(sampler, pairs[:seen], scores[:seen]),
    }


def draw_documents(directory: Path, manifest: Manifest, split: str, probe: Probe) -> list[np.ndarray]:
    """The first prefix + suffix tokens of random documents that are longer than that by their end-of-text token.

    Raises:
        DataError: fewer than two are.
    """
    shards, wanted = manifest.split(split), probe.prefix + probe.suffix
    first = np.concatenate(([0], np.cumsum([shard.documents for shard in shards]))).astype(np.int64)
    total = int(first[-1])
    chosen: list[tuple[int, int]] = []  # shard, and the document in it
    for start in range(0, min(total, MOST_READ), BLOCK):
        order = Permutation(total, f"{probe.seed}/{split}/memorisation")
        numbers = order(np.arange(start, min(start + BLOCK, total), dtype=np.int64))
        of_shard = np.searchsorted(first, numbers, side="right") - 1
        lengths = np.empty_like(numbers)
        for shard in np.unique(of_shard).tolist():
            here = of_shard == shard
            lengths[here] = map_lengths(directory, shards[shard])[numbers[here] - first[shard]]
        chosen += [
            (int(of_shard[i]), int(numbers[i] - first[of_shard[i]])) for i in np.flatnonzero(lengths > wanted)
        ]
        if len(chosen) >= probe.documents:
            break
    if len(chosen) < 2:
        raise DataError(
            f"{directory} has {len(chosen)} {split} documents of more than {wanted} tokens, and a comparison takes "
            "two; use a shorter --prefix or --suffix, or other data"
        )
    return _read(directory, manifest, split, chosen[: probe.documents], wanted)


def _read(
    directory: Path, manifest: Manifest, split: str, chosen: list[tuple[int, int]], wanted: int
) -> list[np.ndarray]:
    by_shard: dict[int, list[int]] = defaultdict(list)
    for shard, document in chosen:
        by_shard[shard].append(document)
    item, shards = DTYPES[manifest.dtype].itemsize, manifest.split(split)
    found = []
    for shard, documents in sorted(by_shard.items()):
        tokens = map_tokens(directory, shards[shard], manifest.dtype)
        starts = map_document_ends(directory, shards[shard])
        for document in documents:
            start = int(starts[document]) // item
            found.append(tokens[start : start + wanted].copy())
    return found


def _numbers(scores: list[Score]) -> dict[str, dict[str, float]]:
    return {
        "extractable": mean_and_error([score.greedy for score in scores]),
        "matched": mean_and_error([score.leading for score in scores]),
        "loss": mean_and_error([-score.logprob / score.tokens for score in scores]),
    }


def _difference(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Of two independent means."""
    return {"value": one["value"] - other["value"], "stderr": math.hypot(one["stderr"], other["stderr"])}


def _examples(sampler: Sampler, pairs: list[Pair], scores: list[Score]) -> list[dict[str, Any]]:
    most = sorted(range(len(pairs)), key=lambda i: -scores[i].leading)[:EXAMPLES]
    sampling = Sampling(max_tokens=len(pairs[0].continuation), temperature=0)
    requests = [Request(pairs[i].context, sampling) for i in most]
    completions = sampler.generator.generate(requests)
    decode = sampler.tokenizer.decode
    return [
        {
            "prefix": decode(list(pairs[i].context)),
            "suffix": decode(list(pairs[i].continuation)),
            "generated": decode(completion.tokens),
            "matched": scores[i].leading,
        }
        for i, (completion,) in zip(most, completions, strict=True)
    ]
