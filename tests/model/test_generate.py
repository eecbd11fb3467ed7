"""The sampler against full forward passes, itself in other company, and transformers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.conf.schema import ModelConfig
from drivetrain.conf.source import model_of
from drivetrain.kernels.attention import make_documents
from drivetrain.kernels.op import INTERPRETED
from drivetrain.model import cache
from drivetrain.model.cache import PAGE, PagedCache
from drivetrain.model.generate import Completion, Generator, Request, Sampling
from drivetrain.model.graphs import FixedBatch, buckets
from drivetrain.model.hf import fill_from_hf
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import Transformer, build_model, logits

VOCAB, CONTEXT = 40, 64
CPU = torch.device("cpu")
GREEDY = Sampling(max_tokens=12, temperature=0.0)
CFG = ModelConfig(
    name="small",
    vocab_size=VOCAB,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_seq_len=CONTEXT,
    init_std=0.5,  # logits far from each other
)


def built(cfg: ModelConfig, backend: str = "sdpa") -> Transformer:
    model = build_model(cfg, backend)
    model.materialize(CPU)
    initialize(model, cfg, 1)
    return model


MODELS = {window: built(replace(CFG, sliding_window=window)) for window in (None, 4)}
windows = pytest.mark.parametrize("window", MODELS, ids=["full", "sliding"])
caches = pytest.mark.parametrize("paged", [False, True], ids=["host", "paged"])


@pytest.fixture(autouse=True, scope="module")
def short_prompts_are_shared() -> Iterator[None]:
    """On the CPU too, where only long ones are worth it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "WORTH_SHARING", 9)
        yield


def sampler(model: Transformer, **options: Any) -> Generator:
    return Generator(model, model.cfg, CPU, **options)


def one(model: Transformer, prompt: list[int], sampling: Sampling = GREEDY, **options: Any) -> Completion:
    return sampler(model, **options).generate([Request(prompt, sampling)])[0][0]


def full_logprobs(model: Transformer, tokens: Sequence[int]) -> Tensor:
    """[T, V] of the whole text in one forward pass."""
    T = len(tokens)
    documents = make_documents(torch.tensor([0, T], dtype=torch.int32), T, T, T, model.cfg.sliding_window)
    with torch.no_grad():
        return model(torch.tensor(tokens), torch.arange(T), documents, logits).log_softmax(-1)


def check_logprobs(model: Transformer, prompt: list[int], completion: Completion) -> None:
    logprobs_TV = full_logprobs(model, prompt + completion.tokens)[len(prompt) - 1 : -1]
    expected = logprobs_TV[torch.arange(len(completion.tokens)), completion.tokens]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4)


# --- one request --------------------------------------------------------------------------------------------


@caches
@windows
def test_greedy_is_the_argmax_of_a_full_forward_pass(window: int | None, paged: bool) -> None:
    model = MODELS[window]
    for prompt, samples in (([3, 1, 4, 1, 5], 1), ([7] * 16, 2), ([9, 2] * 10, 3)):
        sampling = replace(GREEDY, max_tokens=20)
        (found,) = sampler(model, paged=paged).generate([Request(prompt, sampling, samples)])
        assert len(found) == samples
        for each in found:
            logprobs_TV = full_logprobs(model, prompt + each.tokens)[len(prompt) - 1 : -1]
            assert each.tokens == logprobs_TV.argmax(-1).tolist()
            assert each.behaviour_logprobs == [0.0] * 20 and each.finish_reason == "length"
            check_logprobs(model, prompt, each)


@caches
@windows
def test_logprobs_are_the_models_and_those_sampled_from(window: int | None, paged: bool) -> None:
    model, prompt = MODELS[window], [2, 9, 30]
    sampling = Sampling(max_tokens=25, temperature=2.0, top_k=5, seed=3)
    for each in sampler(model, paged=paged).generate([Request(prompt, sampling, 2)])[0]:
        check_logprobs(model, prompt, each)
        logprobs_TV = full_logprobs(model, prompt + each.tokens)[len(prompt) - 1 : -1]
        likeliest_T5, tokens_T5 = (logprobs_TV / 2).topk(5)
        at = [row.index(token) for row, token in zip(tokens_T5.tolist(), each.tokens, strict=True)]
        expected = likeliest_T5.log_softmax(-1)[torch.arange(25), at]
        torch.testing.assert_close(torch.tensor(each.behaviour_logprobs), expected, rtol=1e-4, atol=1e-4)
    plain = one(model, prompt, Sampling(max_tokens=9))
    assert plain.behaviour_logprobs == pytest.approx(plain.logprobs, abs=1e-6)


def test_a_seed_repeats_itself_and_another_does_not() -> None:
    first, again, other = (
        one(MODELS[None], [7], Sampling(temperature=1.5, max_tokens=20, seed=seed)) for seed in (5, 5, 6)
    )
    assert first == again and first.tokens != other.tokens
    torch.manual_seed(99)  # the global generator plays no part
    assert one(MODELS[None], [7], Sampling(temperature=1.5, max_tokens=20, seed=5)) == first


def test_a_sample_is_the_same_among_more_or_fewer() -> None:
    request = Request([7, 3], Sampling(max_tokens=20, seed=5), samples=5)
    many = sampler(MODELS[None]).generate([request])[0]
    assert len({tuple(each.tokens) for each in many}) == 5
    few = sampler(MODELS[None]).generate([replace(request, samples=2)])[0]
    assert [each.tokens for each in few] == [each.tokens for each in many[:2]]


def test_end_tokens_and_stop_tokens_are_the_last() -> None:
    model = MODELS[None]
    tokens = one(model, [3]).tokens
    stop = tokens[4]
    expected = tokens[: tokens.index(stop) + 1]
    by_eos = one(model, [3], eos_ids=[stop])
    by_token = one(model, [3], replace(GREEDY, stop_tokens=(stop,)))
    assert by_eos.tokens == by_token.tokens == expected
    assert by_eos.finish_reason == by_token.finish_reason == "stop"
    assert len(one(model, [3], replace(GREEDY, max_tokens=5)).tokens) == 5


def test_a_stop_text_ends_with_the_token_that_completes_it() -> None:
    def decode(tokens: list[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    model = MODELS[None]
    tokens = one(model, [3]).tokens
    text = f"{tokens[4]}><{tokens[5]}"
    found = one(model, [3], replace(GREEDY, stop=("never", text)), decode=decode)
    place = next(i for i in range(len(tokens)) if text in decode(tokens[: i + 1]))
    assert found.tokens == tokens[: place + 1] and found.finish_reason == "stop"


def test_the_context_ends_a_completion() -> None:
    found = one(MODELS[None], [3] * 60, replace(GREEDY, max_tokens=100))
    assert len(found.tokens) == CONTEXT - 60 and found.finish_reason == "length"


def test_tokens_past_the_vocabulary_are_never_drawn() -> None:
    model = MODELS[None]
    sampling = Sampling(max_tokens=12, temperature=5.0)
    (found,) = sampler(model, vocab_size=6).generate([Request([3], sampling, 10)])
    assert {token for each in found for token in each.tokens} == set(range(6))
    greedy = one(model, [3], vocab_size=6)
    expected = float(full_logprobs(model, [3])[0, :6].log_softmax(-1).max())
    assert greedy.logprobs[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("request_", "options", "said"),
    [
        (Request([]), {}, "this has 0"),
        (Request([1] * CONTEXT), {}, "this has 64"),
        (Request([VOCAB]), {}, r"lie in \[0, 40\)"),
        (Request([-1]), {}, r"lie in \[0, 40\)"),
        (Request([1], samples=9), {"max_batch": 8}, "max_batch=8"),
        (Request([1], samples=0), {}, "this 0"),
        (Request([1], Sampling(stop=("a",))), {}, "decode="),
        (Request([1] * 9, Sampling(max_tokens=9), 2), {"kv_tokens": 26}, "takes 27 tokens of cache"),
    ],
)
def test_a_request_that_cannot_run_is_refused(request_: Request, options: dict[str, Any], said: str) -> None:
    generator = sampler(MODELS[None], **options)
    with pytest.raises(ValueError, match=said):
        generator.submit(request_)
    assert not generator.busy


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
    asked: list[tuple[Request, int]],
    window: int | None,
    paged: bool,
    max_batch: int,
    max_prefill: int,
    room: int | None,
    cancelled: int,
) -> None:
    """Whatever arrives when, runs beside it, waits for room or is cancelled; with all of its samples or some."""
    model = MODELS[window]
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
def test_a_prompt_is_run_once_for_its_samples_and_never_padded(paged: bool) -> None:
    passes: list[int] = []
    model = MODELS[None]
    hook = model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    sampling = Sampling(max_tokens=3)
    try:
        generator = sampler(model, paged=paged)
        generator.generate([Request([1] * 20, sampling, 4), Request([2] * 7, sampling, 1)])
    finally:
        hook.remove()
    assert passes == [27, 5, 5]


def test_a_closed_stream_frees_its_memory() -> None:
    generator = sampler(MODELS[None], paged=True)
    stream = generator.stream(Request([1, 2, 3], Sampling(max_tokens=9), 2))
    events = [next(stream) for _ in range(5)]
    stream.close()
    assert [event.sample for event in events] == [0, 1, 0, 1, 0]
    assert not generator.busy
    assert isinstance(generator.cache, PagedCache) and len(generator.cache.free) == generator.cache.pages


def test_a_request_waits_until_there_is_room() -> None:
    sampling = Sampling(max_tokens=4)
    generator = sampler(MODELS[None], max_batch=3)
    for samples in (2, 2, 1):
        generator.submit(Request([1, 2], sampling, samples))
    order = [[event.request for event in generator.step()] for _ in range(8)]
    assert order == [[1, 1]] * 4 + [[2, 2, 3]] * 4  # the third does not overtake the second


# --- several ranks ------------------------------------------------------------------------------------------


def test_the_agreed_token_goes_on_and_stops() -> None:
    """What another rank drew: the text goes on with it, its log-probability is told, and it may be the stop."""
    model, drawn = MODELS[None], []

    def agree(tokens_B: Tensor) -> Tensor:
        drawn.extend(tokens_B.tolist())
        return torch.tensor([[11, 12, 13][len(drawn) - 1]])

    found = one(model, [3], agree=agree, eos_ids=[13], kv_tokens=CONTEXT)
    assert found.tokens == [11, 12, 13]
    assert drawn == full_logprobs(model, [3, 11, 12]).argmax(-1).tolist()
    check_logprobs(model, [3], found)


def test_an_idle_rank_takes_every_pass_of_the_others() -> None:
    passes: list[int] = []
    busy = iter([True] * 3 * 3 + [False])  # 3 x (goes on, prefill, decode), then all are done

    def any_rank(here: bool) -> bool:
        assert not here
        return next(busy)

    model = MODELS[4]
    hook = model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    try:
        assert sampler(model, any_rank=any_rank).generate([]) == []
    finally:
        hook.remove()
    assert passes == [1] * 6


# --- other backends -----------------------------------------------------------------------------------------


def test_empty_rows_of_a_fixed_batch_change_nothing() -> None:
    """What CUDA graphs replay: a batch padded with empty rows, in tensors that keep what was in them."""
    model = MODELS[4]
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
def test_other_kernels_draw_the_same_tokens(backend: str) -> None:
    if backend == "triton" and not INTERPRETED:
        pytest.skip("interpreted on the CPU only")
    cfg = replace(CFG, head_dim=16, layers=1, sliding_window=18)
    asked = [Request([3, 1, 4] * 6, Sampling(max_tokens=3), 2), Request([1], Sampling(max_tokens=2))]
    expected = sampler(built(cfg)).generate(asked)
    found = sampler(built(cfg, backend), backend=backend, paged=True).generate(asked)
    assert [[each.tokens for each in row] for row in found] == [
        [each.tokens for each in row] for row in expected
    ]


def test_code_between_two_tokens_may_still_compile() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(1)
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend)
    for _ in sampler(MODELS[None]).stream(Request([3], Sampling(max_tokens=2))):
        double(torch.ones(3))
    assert compiled == [1]


THEIR_SIZES: dict[str, Any] = {
    "vocab_size": 130,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Mistral": {"sliding_window": 9},
    "GPT2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 130},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_token_for_token(family: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"eos_token_id": None, "initializer_range": 0.3} if family == "GPT2" else THEIR_SIZES
    config = getattr(transformers, f"{family}Config")(**{**sizes, **FAMILIES[family]})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    cfg = model_of(tmp_path)
    model = build_model(cfg, "sdpa")
    model.materialize(CPU)
    fill_from_hf(model, cfg, tmp_path)
    generator = torch.Generator().manual_seed(6)
    prompts = [torch.randint(0, 130, (length,), generator=generator).tolist() for length in (1, 17, 40)]
    found = sampler(model).generate(
        [Request(prompt, replace(GREEDY, max_tokens=30), 2) for prompt in prompts]
    )
    for prompt, pair in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=30, pad_token_id=0
        )
        assert pair[0].tokens == pair[1].tokens == expected[0, len(prompt) :].tolist()
