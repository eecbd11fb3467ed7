"""The sampler: many prompts at once, each token drawn as if its sequence were alone.

B rows, one a running sample · V vocabulary · T packed tokens.

    generator = Generator(model, cfg.model, device, eos_ids=[eos])
    completions = generator.generate([Request(prompt, Sampling(max_tokens=64), samples=8)])
    for event in generator.stream(Request(prompt)): ...

or, as a server or a rollout does it, `submit` at any time and call `step` while `busy`: a step prefills requests
that wait, packed and without padding, and takes one token of every sample that runs. A prompt is prefilled once for
all its samples.

What a request's tokens depend on: the model, the prompt, the `Sampling` and the sample's number. The random numbers
of a draw are a function of (seed, sample, place in the completion) alone, not of what else runs, of the order of
arrival or of `max_batch`. The logits may differ in their last bits with the shape of a batch, since matrix
libraries add up in another order; by the way `model.draw` draws, that changes about one token in a million in fp32.
bf16 rounds 2^16 times more coarsely, so there a long completion may part ways where two tokens nearly tie.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from drivetrain.conf.schema import ModelConfig
from drivetrain.kernels.attention import make_documents
from drivetrain.model.cache import Cache, HostCache, PagedCache, PagedTokens
from drivetrain.model.draw import Row, Sampling, draw
from drivetrain.model.graphs import DecodeGraphs
from drivetrain.model.text import Decode, TextStream
from drivetrain.model.transformer import KeyValues, Transformer, logits

__all__ = ["Completion", "Event", "FinishReason", "Generator", "Request", "Sampling", "TooLong"]

FinishReason = Literal["stop", "length"]
Agree = Callable[[Tensor], Tensor]


class TooLong(ValueError):
    """A prompt that leaves no room for a completion. `length` and the `most` there may be, in tokens."""

    def __init__(self, length: int, most: int) -> None:
        super().__init__(
            f"the prompt is {length} tokens long and the model takes {most} (its max_seq_len less one); shorten it"
        )
        self.length, self.most = length, most


@dataclass(frozen=True, slots=True)
class Request:
    """`samples` completions of one prompt (at least one token); sample i draws with (sampling.seed, i)."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one sample.

    Attributes:
        request: what `submit` returned. sample: from 0.
        logprob: natural, under the model at temperature 1.
        behaviour_logprob: under the distribution that was sampled from, after temperature and filters: what an
            importance ratio divides by. 0 where the temperature is 0.
        log_kept: of the probability that the filters kept, 0 without any: behaviour_logprob + log_kept is the
            log-probability at this temperature before the filters.
        finish_reason: on the sample's last token. "stop": this is an end or stop token, or completed a stop text;
            "length": max_tokens or the model's max_seq_len is reached.
    """

    request: int
    sample: int
    token: int
    logprob: float
    behaviour_logprob: float
    log_kept: float
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Completion:
    """A sample's tokens, the end token included where it has one; the numbers are those of `Event`.

    `versions`: the number of the weights that drew each token, where weights change under way; else empty.
    `log_kept`: empty where no filter was applied.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    behaviour_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    versions: list[int] = field(default_factory=list)
    log_kept: list[float] = field(default_factory=list)

    def add(self, event: Event) -> None:
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)
        self.behaviour_logprobs.append(event.behaviour_logprob)
        self.log_kept.append(event.log_kept)
        self.finish_reason = event.finish_reason or self.finish_reason


@dataclass(slots=True, eq=False)
class _Running:
    """A request on its way. `alive`: numbers of the samples that go on; they are the rows of `group`, in order."""

    id: int
    request: Request
    limit: int  # tokens of a completion
    alive: list[int]
    tokens: list[list[int]]  # by sample
    streams: list[TextStream]  # by sample; none without stop texts
    group: Any = None

    @property
    def place(self) -> int:
        """Of the token to draw; the samples that are alive are all there."""
        return len(self.tokens[self.alive[0]])


class Generator:
    """Continuous batching over one model; not to be called from several threads at once.

    Args:
        model: a `Transformer`, or an engine's wrapper of one. Its weights may change between steps.
        backend: from `backend_of`, as the model's.
        eos_ids: tokens that end every completion.
        vocab_size: tokens from here on (padding of the matrix) are never drawn; None: all of them are.
        decode: tokens to text, for requests with stop texts.
        max_batch: samples that run at once.
        max_prefill: tokens of prompts in one step, a longer prompt has a step to itself; None: 8192 on a GPU, 1024
            on the CPU, whose caches hold what passes between two layers of so many.
        kv_tokens: tokens that the cache holds; None: as many as fit in half of the memory that is free, and as
            `max_batch` samples can use.
        agree: for a model whose forward pass is collective, where all ranks make the same calls: makes one tensor,
            int64 [B] on `device`, of those that the ranks have: the tokens that they drew, and once the room that
            they found. Their logits may differ in the last bit, and a rank that stopped alone would leave the
            others waiting in the next pass.
        any_rank: for such a model where each rank has requests of its own: whether any rank says True. Every rank
            then calls `step` until `busy` is False on all, and takes an empty pass where only others have work.
        paged: None: pages on a GPU, `HostCache` on the CPU.
        graphs: replay decoding from CUDA graphs, one for each of a few batch sizes; None: on a GPU, for a plain
            `Transformer`.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: ModelConfig,
        device: torch.device,
        *,
        backend: str = "sdpa",
        eos_ids: Sequence[int] = (),
        vocab_size: int | None = None,
        decode: Decode | None = None,
        max_batch: int = 256,
        max_prefill: int | None = None,
        kv_tokens: int | None = None,
        agree: Agree | None = None,
        any_rank: Callable[[bool], bool] | None = None,
        paged: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.model, self.cfg, self.device, self.backend = model, cfg, device, backend
        self.eos_ids, self.decode = frozenset(eos_ids), decode
        self.vocab_size = vocab_size or cfg.vocab_size
        self.agree, self.any_rank = agree, any_rank
        capacity = kv_tokens or min(max_batch * cfg.max_seq_len, _tokens_that_fit(model, cfg, device))
        if agree is not None and kv_tokens is None:
            capacity = int(agree(torch.tensor([capacity], device=device)))
        on_gpu = device.type == "cuda"
        self.max_batch, self.max_prefill = max_batch, max_prefill or (8192 if on_gpu else 1024)
        self.cache: Cache[Any] = HostCache(capacity, cfg.sliding_window, backend)
        self.graphs: DecodeGraphs | None = None
        if paged or (paged is None and on_gpu):
            self.cache = PagedCache(capacity, cfg.sliding_window, backend, device)
            if graphs or (graphs is None and on_gpu and type(model) is Transformer):
                self.graphs = DecodeGraphs(self.cache, self._logits, max_batch, cfg.max_seq_len)
        self.waiting: deque[_Running] = deque()
        self.running: list[_Running] = []
        self.submitted = 0

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs here."""
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Whether `submit` takes a request.

        Raises:
            TooLong: the prompt fills the model's context. ValueError: it is empty, has a token outside the
                vocabulary, stop texts without `decode`, or more than `max_batch` samples or than the cache holds.
        """
        prompt, sampling = len(request.prompt), request.sampling
        if not prompt:
            raise ValueError("a prompt has at least one token, this has 0")
        if prompt >= self.cfg.max_seq_len:
            raise TooLong(prompt, self.cfg.max_seq_len - 1)
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.cfg.vocab_size:
            raise ValueError(f"a prompt's tokens lie in [0, {self.cfg.vocab_size}), one of these does not")
        if not 1 <= request.samples <= self.max_batch:
            raise ValueError(
                f"a request takes 1 to max_batch={self.max_batch} samples, this {request.samples}"
            )
        if sampling.stop and self.decode is None:
            raise ValueError("stop texts need a Generator with decode=")
        cost = self.cache.cost(prompt, request.samples, self._limit(request))
        if cost > self.cache.capacity:
            raise ValueError(
                f"this request takes {cost} tokens of cache and there are {self.cache.capacity}; ask for fewer "
                "samples or max_tokens, or give the Generator more kv_tokens"
            )

    def _limit(self, request: Request) -> int:
        """Tokens of a completion: what is asked for, as far as the context has room."""
        return min(request.sampling.max_tokens, self.cfg.max_seq_len - len(request.prompt))

    def submit(self, request: Request) -> int:
        """Queue a request; its id. Raises as `check`."""
        self.check(request)
        self.submitted += 1
        samples, stop = range(request.samples), request.sampling.stop
        streams: list[TextStream] = []
        if stop and self.decode is not None:
            streams = [TextStream(self.decode, stop, request.prompt) for _ in samples]
        tokens: list[list[int]] = [[] for _ in samples]
        self.waiting.append(
            _Running(self.submitted, request, self._limit(request), list(samples), tokens, streams)
        )
        return self.submitted

    def cancel(self, request: int) -> None:
        """Forget a request and free its memory; nothing happens if it is finished."""
        self.waiting = deque(each for each in self.waiting if each.id != request)
        for each in self.running:
            if each.id == request:
                self.cache.keep(each.group, [])
        self.running = [each for each in self.running if each.id != request]

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One token of every sample that runs, and the first token of requests that there is room for.

        Raises:
            NotFinite: the model's logits are not finite.
        """
        going = [*self.running]
        begun = self._admit()
        events: list[Event] = []
        with self._uncompiled():
            # The same passes on every rank, in the same order.
            if self._anywhere(bool(begun)):
                events += self._prefill(begun) if begun else self._empty_pass()
            if self._anywhere(bool(going)):
                events += self._next_tokens(going) if going else self._empty_pass()
        return events

    def stream(self, request: Request) -> Iterator[Event]:
        """The tokens of one request as they come; an iterator that is closed early cancels it. The events of other
        requests that run are lost: with several at a time, call `step`."""
        wanted = self.submit(request)
        last = 0
        try:
            while last < request.samples:
                for event in self.step():
                    if event.request == wanted:
                        last += event.finish_reason is not None
                        yield event
        finally:
            self.cancel(wanted)

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """All completions, [request][sample]. The events of other requests that run are lost."""
        found = {self.submit(each): [Completion() for _ in range(each.samples)] for each in requests}
        while self._anywhere(self.busy):
            for event in self.step():
                if event.request in found:
                    found[event.request][event.sample].add(event)
        return list(found.values())

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Every length is a new shape. The stance is global to all threads: a model that has nothing compiled
        leaves it alone, and it must not outlive a step into the caller's code."""
        compiled = any(module._compiled_call_impl is not None for module in self.model.modules())
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    def _anywhere(self, here: bool) -> bool:
        return here if self.any_rank is None else self.any_rank(here)

    def _admit(self) -> list[_Running]:
        """Move waiting requests, oldest first, to where they run."""
        rows = sum(len(each.alive) for each in self.running)
        tokens = 0
        begun: list[_Running] = []
        while self.waiting:
            first = self.waiting[0]
            prompt = len(first.request.prompt)
            if rows + first.request.samples > self.max_batch or (
                begun and tokens + prompt > self.max_prefill
            ):
                break
            first.group = self.cache.admit(prompt, first.request.samples, first.limit)
            if first.group is None:
                break
            begun.append(self.waiting.popleft())
            rows, tokens = rows + first.request.samples, tokens + prompt
        self.running += begun
        return begun

    def _prefill(self, begun: list[_Running]) -> list[Event]:
        lengths = [len(each.request.prompt) for each in begun]
        tokens_T = self._on_device([token for each in begun for token in each.request.prompt])
        positions_T = self._on_device([place for length in lengths for place in range(length)])
        last_R = self._on_device(lengths).cumsum(0) - 1
        keys = self.cache.prompts([each.group for each in begun])
        logits_RV = self._logits(tokens_T, positions_T, keys, last_R)
        samples_R = self._on_device([each.request.samples for each in begun])
        return self._take(begun, logits_RV.repeat_interleave(samples_R, dim=0))

    def _next_tokens(self, going: list[_Running]) -> list[Event]:
        tokens = [each.tokens[sample][-1] for each in going for sample in each.alive]
        positions = [len(each.request.prompt) + each.place - 1 for each in going for _ in each.alive]
        tokens_B, positions_B = self._on_device(tokens), self._on_device(positions)
        keys = self.cache.next_tokens([each.group for each in going])
        if self.graphs is None:
            return self._take(going, self._logits(tokens_B, positions_B, keys))
        assert isinstance(keys, PagedTokens)
        return self._take(going, self.graphs.logits(tokens_B, positions_B, keys))

    def _on_device(self, values: list[int]) -> Tensor:
        return torch.tensor(values).to(self.device, non_blocking=True)

    def _logits(
        self, tokens_T: Tensor, positions_T: Tensor, keys: KeyValues, rows: Tensor | None = None
    ) -> Tensor:
        """fp32 [rows, vocab_size]."""

        def read(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
            return logits(hidden_TD if rows is None else hidden_TD[rows], weight_VD[: self.vocab_size])

        found: Tensor = self.model(tokens_T, positions_T, keys, read)
        return found

    def _empty_pass(self) -> list[Event]:
        """This rank's part in a pass that others need."""
        nothing = torch.zeros(1, dtype=torch.int64, device=self.device)
        one = torch.tensor([0, 1], dtype=torch.int32, device=self.device)
        self.model(
            nothing,
            nothing,
            make_documents(one, 1, 1, 1, self.cfg.sliding_window, backend=self.backend),
            lambda hidden_TD, weight_VD: hidden_TD,
        )
        return []

    def _take(self, through: list[_Running], logits_BV: Tensor) -> list[Event]:
        """Draw the next token of every row and drop the samples that it ends."""
        rows = [Row(each.request.sampling, i, each.place) for each in through for i in each.alive]
        drawn = torch.stack([part.double() for part in draw(logits_BV, rows, self.agree)])
        taken = iter(zip(*drawn.tolist(), strict=True))
        events = []
        for each in through:
            going: list[int] = []
            for row, sample in enumerate(each.alive):
                token, logprob, behaviour, kept = next(taken)
                each.tokens[sample].append(int(token))
                reason = self._reason(each, sample)
                events.append(Event(each.id, sample, int(token), logprob, behaviour, kept, reason))
                if reason is None:
                    going.append(row)
            if len(going) < len(each.alive):
                self.cache.keep(each.group, going)
                each.alive = [each.alive[row] for row in going]
        self.running = [each for each in self.running if each.alive]
        return events

    def _reason(self, each: _Running, sample: int) -> FinishReason | None:
        tokens, sampling = each.tokens[sample], each.request.sampling
        if tokens[-1] in self.eos_ids or tokens[-1] in sampling.stop_tokens:
            return "stop"
        if each.streams:
            each.streams[sample].push(tokens[-1])
            if each.streams[sample].stopped:
                return "stop"
        return "length" if len(tokens) == each.limit else None


def _tokens_that_fit(model: nn.Module, cfg: ModelConfig, device: torch.device) -> int:
    """Keys and values in half of the memory that is free, in the dtype of the weights."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    bytes_each = next(model.parameters(), torch.empty(0)).element_size()
    return free // 2 // (2 * cfg.layers * cfg.kv_heads * cfg.head_dim * bytes_each)
