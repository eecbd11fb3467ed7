"""Log-likelihoods of given tokens after given tokens, many at once and without padding.

T packed tokens of R rows of S · V vocabulary · D width · Q tokens whose log-probabilities are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drivetrain.data.packing import best_fit
from drivetrain.data.tokenizer import bos_id, text_ids, vocab_size
from drivetrain.kernels.attention import Documents, make_documents
from drivetrain.model.transformer import logits
from drivetrain.train.serve import OpenModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # that a model may be evaluated in
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # of one pass
MOST_LOGITS = 1 << 26  # in memory at once: 256 MiB in fp32
Advance = Callable[[int, int], object]  # told how many more are done, of how many in all


def silent(more: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Tokens to start from (at least one), and the tokens after them that are scored (at least one)."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """What the model makes of a continuation.

    Attributes:
        logprob: of all its tokens, in nats. tokens: how many they are.
        leading: as many of its first tokens greedy decoding gives back, word for word, before it departs.
        cut: tokens of the context that were left out, from the left, because they did not fit the model.
    """

    logprob: float
    tokens: int
    leading: int
    cut: int

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding gives the whole continuation."""
        return self.leading == self.tokens


@dataclass(frozen=True, slots=True)
class _Asked:
    """A pair as the model sees it: the last token is predicted and no input."""

    pair: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    cut: int


class Scorer:
    """Scores pairs with one model.

    Inputs are sorted by length and packed best-fit into rows, each a document of its own. An input that another one
    begins with is not run again: the choices of a question which are one token long take one pass of the question.

    Args:
        batch_tokens: of one pass; None: what suits the device. A longer input has a pass to itself.
    """

    def __init__(self, opened: OpenModel, batch_tokens: int | None = None) -> None:
        self.opened = opened
        self.batch_tokens = batch_tokens or BATCH_TOKENS[opened.device.type]
        self.drawn = min(opened.cfg.vocab_size, vocab_size(opened.tokenizer_dir))  # what decoding can give

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], advance: Advance = silent) -> list[Score]:
        """The pairs' scores, in their order; `advance` is told how many are done.

        Raises:
            ValueError: an empty context or continuation, a token outside the vocabulary, or a continuation that the
                model's max_seq_len has no room for.
        """
        by_inputs: dict[tuple[int, ...], list[_Asked]] = {}
        for number, pair in enumerate(pairs):
            asked = self._asked(number, pair)
            by_inputs.setdefault(asked.inputs, []).append(asked)
        found: list[Score | None] = [None] * len(pairs)
        for batch in self._batches(_runs(by_inputs)):
            scores = self._pass(batch)
            for number, score in scores.items():
                found[number] = score
            advance(len(scores), len(pairs))
        return [score for score in found if score is not None]

    def _asked(self, number: int, pair: Pair) -> _Asked:
        cfg = self.opened.cfg
        whole = (*pair.context, *pair.continuation)
        if not pair.context or not pair.continuation:
            raise ValueError("a pair has at least one token of context and one to score")
        if len(pair.continuation) > cfg.max_seq_len:
            raise ValueError(
                f"a continuation of {len(pair.continuation)} tokens is longer than the model's max_seq_len="
                f"{cfg.max_seq_len}"
            )
        if not 0 <= min(whole) <= max(whole) < cfg.vocab_size:
            raise ValueError(f"a pair's tokens lie in [0, {cfg.vocab_size}), one of these does not")
        cut = max(0, len(whole) - 1 - cfg.max_seq_len)
        return _Asked(number, whole[cut:-1], pair.continuation, cut)

    def _batches(self, runs: list[list[_Asked]]) -> list[list[list[_Asked]]]:
        """Runs by length, the longest first, so that rows are alike: about `batch_tokens` in each batch."""
        batches: list[list[list[_Asked]]] = []
        room = 0
        for run in sorted(runs, key=lambda run: -len(run[-1].inputs)):
            length = len(run[-1].inputs)
            if not batches or length > room:
                batches.append([])
                room = self.batch_tokens
            batches[-1].append(run)
            room -= length
        return batches

    def _pass(self, runs: list[list[_Asked]]) -> dict[int, Score]:
        opened = self.opened
        inputs = [run[-1].inputs for run in runs]
        tokens_T, positions_T, documents, starts = _packed(inputs, opened)
        asked = [(each, start) for run, start in zip(runs, starts, strict=True) for each in run]
        # A target's logits are at the token before it; the last input is the one before the last target.
        rows_Q = [
            start + len(each.inputs) - len(each.targets) + place
            for each, start in asked
            for place in range(len(each.targets))
        ]
        targets_Q = torch.tensor([token for each, _ in asked for token in each.targets])
        device = opened.device

        def read(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
            return _statistics(
                hidden_TD, weight_VD, torch.tensor(rows_Q).to(device), targets_Q.to(device), self.drawn
            )

        logprobs_Q, greedy_Q = opened.model(tokens_T, positions_T, documents, read).cpu().tolist()
        found, at = {}, 0
        for each, _ in asked:
            n = len(each.targets)
            leading = next((i for i, same in enumerate(greedy_Q[at : at + n]) if not same), n)
            found[each.pair] = Score(sum(logprobs_Q[at : at + n]), n, leading, each.cut)
            at += n
        if not all(np.isfinite(logprobs_Q)):
            raise FloatingPointError("the model's logits are not finite; its weights may be damaged")
        return found


def _runs(by_inputs: dict[tuple[int, ...], list[_Asked]]) -> list[list[_Asked]]:
    """What can be read off one document each: inputs of which the last, the longest, begins with all the others."""
    runs: list[list[_Asked]] = []
    for inputs in sorted(by_inputs):  # in this order an input is followed by those that begin with it
        last = runs[-1][-1].inputs if runs else None
        if last is not None and inputs[: len(last)] == last:
            runs[-1] += by_inputs[inputs]
        else:
            runs.append(list(by_inputs[inputs]))
    return runs


def _packed(
    inputs: Sequence[tuple[int, ...]], opened: OpenModel
) -> tuple[Tensor, Tensor, Documents, list[int]]:
    """Tokens, positions and documents of rows as long as the longest input, and where each input starts.

    What a row has left over is one more document, of token 0, that nobody reads.
    """
    lengths = [len(each) for each in inputs]
    S = max(lengths)
    rows = best_fit(np.array(lengths), S)
    tokens_T = np.zeros(len(rows) * S, dtype=np.int64)
    starts, ends = [0] * len(inputs), []
    for row, members in enumerate(rows):
        at = row * S
        for member in members:
            starts[member] = at
            tokens_T[at : at + lengths[member]] = inputs[member]
            at += lengths[member]
            ends.append(at)
        if at < (row + 1) * S:
            ends.append((row + 1) * S)
    cu_seqlens = np.array([0, *ends], dtype=np.int32)
    positions_T = np.arange(len(tokens_T)) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    device = opened.device
    documents = make_documents(
        torch.from_numpy(cu_seqlens).to(device),
        int(np.diff(cu_seqlens).max()),
        len(tokens_T),
        S,
        opened.cfg.sliding_window,
        backend=opened.backend,
    )
    return (
        torch.from_numpy(tokens_T).to(device),
        torch.from_numpy(positions_T).to(device),
        documents,
        starts,
    )


def _statistics(
    hidden_TD: Tensor, weight_VD: Tensor, rows_Q: Tensor, targets_Q: Tensor, drawn: int
) -> Tensor:
    """Log-probability of each target, and whether it is the likeliest of the first `drawn` tokens: fp32 [2, Q]."""
    chunk = max(1, MOST_LOGITS // len(weight_VD))
    found = []
    for rows_C, targets_C in zip(rows_Q.split(chunk), targets_Q.split(chunk), strict=True):
        logits_CV = logits(hidden_TD[rows_C], weight_VD)
        logprobs_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1) - logits_CV.logsumexp(dim=-1)
        likeliest_C = logits_CV[:, :drawn].argmax(dim=-1)
        found.append(torch.stack([logprobs_C, (likeliest_C == targets_C).float()]))
    return torch.cat(found, dim=1)


class Texts:
    """Texts as the model's tokens, begun as documents of its shards begin."""

    def __init__(self, opened: OpenModel) -> None:
        self.tokenizer = opened.tokenizer
        self.bos = bos_id(opened.tokenizer_dir)
        self.first = (
            opened.eos_ids[0] if self.bos is None else self.bos
        )  # what a document's first token follows

    def tokens(self, text: str) -> list[int]:
        return text_ids(self.tokenizer, self.bos, text)

    def pair(self, context: str, continuation: str) -> Pair:
        """A text and what follows it, as tokens of the two together: a word is cut where the tokenizer cuts it.

        White space at the end of the context belongs to the continuation, since most tokenizers make it part of the
        next word. Where the two texts meet within a token, that token is scored. Without context, `first` is it.
        """
        whole, before = self.tokens(context + continuation), self.tokens(context.rstrip())
        pairs = zip(before, whole[:-1], strict=False)
        shared = next(
            (i for i, (one, other) in enumerate(pairs) if one != other), min(len(before), len(whole) - 1)
        )
        return Pair(tuple(whole[:shared]) or (self.first,), tuple(whole[shared:]))
