"""The sampler with many requests: in what company, on what cache and by what kernels changes no token."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.conf.schema import ModelConfig
from drivetrain.kernels.op import INTERPRETED
from drivetrain.model.cache import PAGE, PagedCache
from drivetrain.model.generate import Completion, Generator, Request, Sampling
from drivetrain.model.graphs import FixedBatch, buckets
from drivetrain.model.transformer import Transformer

VOCAB, CONTEXT = 40, 64  # of the small models
CPU = torch.device("cpu")
Models = dict[int | None, Transformer]
caches = pytest.mark.parametrize("paged", [False, True], ids=["host", "paged"])
pytestmark = pytest.mark.usefixtures("short_prompts_are_shared")


def sampler(model: Transformer, **options: Any) -> Generator:
    return Generator(model, model.cfg, CPU, **options)


# --- company ------------------------------------------------------------------------------------------------

requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=35),
    sampling=st.builds(
        Sampling,
        max_tokens=st.integers(1, 20),
        temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
        top_k=st.sampled_from([0, 7]),
        top_p=st.sampled_from([1.0, 0.8]),
        seed=st.integers(0, 5),
        stop_tokens=st.sampled_from([(), (3, 11, 20, 30)]),
    ),
    samples=st.integers(1, 4),
)


@settings(max_examples=20)
@given(
    asked=st.lists(st.tuples(requests, st.integers(0, 6)), min_size=1, max_size=6),
    window=st.sampled_from([None, 4]),
    paged=st.booleans(),
    max_batch=st.integers(4, 12),
    max_prefill=st.sampled_from([1, 20, 1000]),
    room=st.sampled_from([8 * CONTEXT, None]),
    cancelled=st.integers(0, 8),
)
def test_company_changes_no_token(
    models: Models,
    asked: list[tuple[Request, int]],
    window: int | None,
    paged: bool,
    max_batch: int,
    max_prefill: int,
    room: int | None,
    cancelled: int,
) -> None:
    """Whatever arrives when, runs beside it, waits for room or is cancelled; with all of its samples or some."""
    model = models[window]
    generator = sampler(model, paged=paged, max_batch=max_batch, max_prefill=max_prefill, kv_tokens=room)
    found: dict[int, list[Completion]] = {}
    wanted: dict[int, Request] = {}
    arrivals = sorted(asked, key=lambda pair: pair[1])
    for step in range(1000):
        while arrivals and arrivals[0][1] <= step:
            request = arrivals.pop(0)[0]
            number = generator.submit(request)
            wanted[number], found[number] = request, [Completion() for _ in range(request.samples)]
        if step == 3 and cancelled in wanted:
            generator.cancel(cancelled)
            wanted.pop(cancelled)
        for event in generator.step():
            found[event.request][event.sample].add(event)
        if not arrivals and not generator.busy:
            break
    assert not generator.busy
    for number, request in wanted.items():
        for sample, completion in enumerate(found[number]):
            alone = sampler(model).generate([replace(request, samples=sample + 1)])[0][sample]
            assert completion.tokens == alone.tokens
            assert completion.finish_reason == alone.finish_reason
            assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
            assert completion.behaviour_logprobs == pytest.approx(alone.behaviour_logprobs, abs=1e-4)
    kept = generator.cache
    if isinstance(kept, PagedCache):
        assert sorted(kept.free) == list(range(1, kept.pages + 1))
    else:
        assert kept.used == 0  # type: ignore[attr-defined]


@caches
def test_a_prompt_is_run_once_for_its_samples_and_never_padded(models: Models, paged: bool) -> None:
    passes: list[int] = []
    model = models[None]
    hook = model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    sampling = Sampling(max_tokens=3)
    try:
        generator = sampler(model, paged=paged)
        generator.generate([Request([1] * 20, sampling, 4), Request([2] * 7, sampling, 1)])
    finally:
        hook.remove()
    assert passes == [27, 5, 5]


def test_a_closed_stream_frees_its_memory(models: Models) -> None:
    generator = sampler(models[None], paged=True)
    stream = generator.stream(Request([1, 2, 3], Sampling(max_tokens=9), 2))
    events = [next(stream) for _ in range(5)]
    stream.close()
    assert [event.sample for event in events] == [0, 1, 0, 1, 0]
    assert not generator.busy
    assert isinstance(generator.cache, PagedCache) and len(generator.cache.free) == generator.cache.pages


def test_a_request_waits_until_there_is_room(models: Models) -> None:
    sampling = Sampling(max_tokens=4)
    generator = sampler(models[None], max_batch=3)
    for samples in (2, 2, 1):
        generator.submit(Request([1, 2], sampling, samples))
    order = [[event.request for event in generator.step()] for _ in range(8)]
    assert order == [[1, 1]] * 4 + [[2, 2, 3]] * 4  # the third does not overtake the second


# --- other backends -----------------------------------------------------------------------------------------


def test_empty_rows_of_a_fixed_batch_change_nothing(models: Models) -> None:
    """What CUDA graphs replay: a batch padded with empty rows, in tensors that keep what was in them."""
    model = models[4]
    expected = sampler(model, paged=True)
    fixed = sampler(model, paged=True)
    assert isinstance(fixed.cache, PagedCache)
    batch = FixedBatch.empty(fixed.cache, 12, -(-CONTEXT // PAGE))

    class Replay:
        def logits(self, tokens_B: Tensor, positions_B: Tensor, keys: Any) -> Tensor:
            batch.fill(tokens_B, positions_B, keys)
            return fixed._logits(batch.tokens_B, batch.positions_B, batch.keys)[: len(tokens_B)]

    fixed.graphs = Replay()  # type: ignore[assignment]
    asked = [
        Request([1] * 20, Sampling(max_tokens=18), 4),
        Request([5], Sampling(max_tokens=6), 3),
        Request([2] * 16, Sampling(max_tokens=9), 2),
    ]
    for mine, other in zip(fixed.generate(asked), expected.generate(asked), strict=True):
        assert [each.tokens for each in mine] == [each.tokens for each in other]


def test_a_graph_for_every_batch() -> None:
    assert buckets(1) == [1] and buckets(6) == [1, 2, 4, 6]
    assert buckets(40) == [1, 2, 4, 8, 16, 32, 40]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_kernels_draw_the_same_tokens(
    backend: str, small_cfg: ModelConfig, built: Callable[..., Transformer]
) -> None:
    if backend == "triton" and not INTERPRETED:
        pytest.skip("interpreted on the CPU only")
    cfg = replace(small_cfg, head_dim=16, layers=1, sliding_window=18)
    asked = [Request([3, 1, 4] * 6, Sampling(max_tokens=3), 2), Request([1], Sampling(max_tokens=2))]
    expected = sampler(built(cfg)).generate(asked)
    found = sampler(built(cfg, backend), backend=backend, paged=True).generate(asked)
    assert [[each.tokens for each in row] for row in found] == [
        [each.tokens for each in row] for row in expected
    ]


def test_code_between_two_tokens_may_still_compile(models: Models) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(1)
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend)
    for _ in sampler(models[None]).stream(Request([3], Sampling(max_tokens=2))):
        double(torch.ones(3))
    assert compiled == [1]
