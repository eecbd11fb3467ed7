"""What kernels.py measures: an operation's inputs, our implementation, and what else computes the same.

T tokens · D width · V vocabulary · N query heads · K key/value heads · H head dim. Attention is in
kernels_attention.py.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[..., Any]
Peers = dict[str, Callable[[tuple[Tensor, ...]], Run]]  # each makes its function, given one set of the inputs
EPS = 1e-5
PRODUCTS = "products alone"  # a peer that computes less than the operation


class NotMeasured(Exception):
    """Why a peer cannot be measured here."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation on inputs of one shape.

    Attributes:
        draw: one set of input tensors. gradients: how many of them, the first ones, get a gradient; 0 for an
            operation without a backward pass.
        ours: takes those tensors; so does what each of `peers` makes.
        bound: what the roofline counts, "bytes" (each input read and each output written once) or "flops".
            work: that amount, by direction.
        backward_apart: the forward pass under no_grad is also the one before a backward pass, so that the
            difference of the two directions is the backward pass.
    """

    op: str
    shape: str
    draw: Callable[[], tuple[Tensor, ...]]
    gradients: int
    ours: Run
    peers: Peers
    bound: str
    work: dict[str, float]
    backward_apart: bool = True


@dataclass(frozen=True)
class Sizes:
    """A model's widths, and how much of everything is measured with them."""

    name: str
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    tokens: int = 16384
    loss_tokens: int = 8192
    attention_tokens: int = 32768
    rows: tuple[int, ...] = (2048, 16384, 32768)  # tokens of a sequence, that many in each row
    caches: tuple[tuple[int, int], ...] = ((64, 8192), (8, 32768))  # sequences, tokens of each


LLAMA = Sizes("llama3_8b", 4096, 32, 8, 128, 14336, 128256)
GPT2 = Sizes("gpt2_xl", 1600, 25, 25, 64, 6400, 50257, caches=((64, 2048), (8, 8192)))
TINY = Sizes("tiny", 32, 2, 1, 16, 48, 96, 24, 24, 32, (16, 32), ((2, 32),))


@dataclass(frozen=True)
class Place:
    """Where and with what is measured."""

    device: torch.device
    dtype: torch.dtype
    backend: str

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype) * scale

    @property
    def bytes_each(self) -> int:
        return self.dtype.itemsize


def module(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotMeasured(f"{name} is not installed: pip install {install}") from error


def fixed(run: Run) -> Callable[[tuple[Tensor, ...]], Run]:
    return lambda _: run


def compiled(place: Place, run: Run) -> Callable[[tuple[Tensor, ...]], Run]:
    def make(_: tuple[Tensor, ...]) -> Run:
        if place.device.type == "cpu":
            raise NotMeasured("compiled on a GPU only")
        torch.compiler.reset()
        return torch.compile(run, dynamic=False, fullgraph=True)

    return make


def liger(place: Place, function: str, wrap: Callable[[Any], Run]) -> Callable[[tuple[Tensor, ...]], Run]:
    """`wrap` makes the peer of Liger-Kernel's autograd function of that name."""

    def make(_: tuple[Tensor, ...]) -> Run:
        ops = module("liger_kernel.ops", "liger-kernel")
        if place.device.type == "cpu":
            raise NotMeasured("Liger-Kernel runs on a GPU only")
        if not hasattr(ops, function):
            raise NotMeasured(f"this version of liger_kernel has no {function}")
        return wrap(getattr(ops, function).apply)

    return make


# --- element by element -------------------------------------------------------------------------------------


def rms_norm_case(sizes: Sizes, place: Place) -> Iterator[Case]:
    from drivetrain.kernels.rms_norm import rms_norm

    T, D = sizes.tokens, sizes.dim
    pass_bytes = T * D * place.bytes_each

    def torchs(x_TD: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(x_TD, (D,), weight_D, EPS)

    yield Case(
        op="rms_norm",
        shape=f"{sizes.name} {T}x{D}",
        draw=lambda: (place.draw(T, D), place.draw(D)),
        gradients=2,
        ours=partial(rms_norm, eps=EPS, backend=place.backend),
        peers={
            "torch": fixed(torchs),
            "torch.compile": compiled(place, torchs),
            "Liger": liger(place, "LigerRMSNormFunction", lambda f: lambda x, w: f(x, w, EPS)),
        },
        bound="bytes",
        work={"forward": 2 * pass_bytes, "forward+backward": 5 * pass_bytes},
    )


def add_rms_norm_case(sizes: Sizes, place: Place) -> Iterator[Case]:
    from drivetrain.kernels.rms_norm import add_rms_norm

    T, D = sizes.tokens, sizes.dim
    pass_bytes = T * D * place.bytes_each

    def torchs(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        sum_TD = x_TD + residual_TD
        return F.rms_norm(sum_TD, (D,), weight_D, EPS), sum_TD

    yield Case(
        op="add_rms_norm",
        shape=f"{sizes.name} {T}x{D}",
        draw=lambda: (place.draw(T, D), place.draw(T, D), place.draw(D)),
        gradients=3,
        ours=partial(add_rms_norm, eps=EPS, backend=place.backend),
        peers={
            "torch": fixed(torchs),
            "torch.compile": compiled(place, torchs),
            "Liger": liger(place, "LigerFusedAddRMSNormFunction", lambda f: lambda x, r, w: f(x, r, w, EPS)),
        },
        bound="bytes",
        work={"forward": 4 * pass_bytes, "forward+backward": 8 * pass_bytes},
    )


def rope_case(sizes: Sizes, place: Place) -> Iterator[Case]:
    from drivetrain.kernels.rope import rope, rope_frequencies, rope_ref, rope_tables

    T, N, K, H = sizes.tokens, sizes.heads, sizes.kv_heads, sizes.head_dim
    frequencies_h = rope_frequencies(H, 500000.0).to(place.device)
    cos_Th, sin_Th = rope_tables(torch.arange(T, device=place.device), frequencies_h)
    cos_1TH, sin_1TH = (torch.cat((table, table), dim=-1)[None].to(place.dtype) for table in (cos_Th, sin_Th))

    def torchs(q_TNH: Tensor, k_TKH: Tensor) -> tuple[Tensor, Tensor]:
        return rope_ref(q_TNH, k_TKH, cos_Th, sin_Th)

    def ligers(function: Any) -> Run:
        def run(q_TNH: Tensor, k_TKH: Tensor) -> list[Tensor]:
            heads_first = (x[None].transpose(1, 2) for x in (q_TNH, k_TKH))
            return [x.transpose(1, 2)[0] for x in function(*heads_first, cos_1TH, sin_1TH)]

        return run

    once = 2 * T * (N + K) * H * place.bytes_each + 2 * T * (H // 2) * 4
    yield Case(
        op="rope",
        shape=f"{sizes.name} {T}x({N}+{K})x{H}",
        draw=lambda: (place.draw(T, N, H), place.draw(T, K, H)),
        gradients=2,
        ours=lambda q, k: rope(q, k, cos_Th, sin_Th, backend=place.backend),
        peers={
            "torch": fixed(torchs),
            "torch.compile": compiled(place, torchs),
            "Liger": liger(place, "LigerRopeFunction", ligers),
        },
        bound="bytes",
        work={"forward": once, "forward+backward": 2 * once},
    )


def swiglu_case(sizes: Sizes, place: Place) -> Iterator[Case]:
    from drivetrain.kernels.swiglu import swiglu, swiglu_ref

    T, hidden = sizes.tokens, sizes.ffn_dim
    pass_bytes = T * hidden * place.bytes_each

    def halves(function: Any) -> Run:
        return lambda gate_up: function(*gate_up.chunk(2, dim=-1))

    yield Case(
        op="swiglu",
        shape=f"{sizes.name} {T}x2x{hidden}",
        draw=lambda: (place.draw(T, 2 * hidden),),
        gradients=1,
        ours=partial(swiglu, backend=place.backend),
        peers={
            "torch": fixed(swiglu_ref),
            "torch.compile": compiled(place, swiglu_ref),
            "Liger": liger(place, "LigerFusedGateUpSiLUMulFunction", lambda f: f),
            "Liger, halves": liger(place, "LigerSiLUMulFunction", halves),
        },
        bound="bytes",
        work={"forward": 3 * pass_bytes, "forward+backward": 8 * pass_bytes},
    )


# --- the vocabulary -----------------------------------------------------------------------------------------


def _vocabulary(
    sizes: Sizes, place: Place
) -> tuple[str, Callable[[], tuple[Tensor, ...]], Tensor, dict[str, float]]:
    """Shape, inputs, targets and FLOPs of an operation that multiplies T hidden states with the vocabulary."""
    T, D, V = sizes.loss_tokens, sizes.dim, sizes.vocab_size
    targets_T = torch.randint(V, (T,), device=place.device)

    def draw() -> tuple[Tensor, Tensor]:
        return place.draw(T, D), place.draw(V, D, scale=D**-0.5)

    product = 2.0 * T * D * V
    return f"{sizes.name} {T}x{D}x{V}", draw, targets_T, {"forward": product, "forward+backward": 3 * product}


class _Products(torch.autograd.Function):
    """The matrix products of a linear layer alone; the logits stand for their own gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_TV = hidden_TD @ weight_VD.T
        ctx.save_for_backward(hidden_TD, weight_VD, logits_TV)
        return logits_TV[0, 0].float()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TD, weight_VD, logits_TV = ctx.saved_tensors
        return logits_TV @ weight_VD, logits_TV.T @ hidden_TD


def linear_cross_entropy_case(sizes: Sizes, place: Place) -> Iterator[Case]:
    from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy

    shape, draw, targets_T, work = _vocabulary(sizes, place)
    ones_T = torch.ones(len(targets_T), device=place.device)

    def torchs(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), targets_T, reduction="sum")

    def ligers(function: Any) -> Run:
        # bias, class weights, ignore_index, lse_square_scale, label_smoothing, reduction
        return lambda h, w: function(h, w, targets_T, None, None, -100, 0.0, 0.0, "sum")[0]

    yield Case(
        op="linear_cross_entropy",
        shape=shape,
        draw=draw,
        gradients=2,
        ours=lambda h, w: linear_cross_entropy(h, w, targets_T, ones_T, backend=place.backend),
        peers={
            PRODUCTS: fixed(_Products.apply),
            "torch": fixed(torchs),
            "torch.compile": compiled(place, torchs),
            "Liger": liger(place, "LigerFusedLinearCrossEntropyFunction", ligers),
        },
        bound="flops",
        work=work,
        backward_apart=False,
    )


def token_logprob_case(sizes: Sizes, place: Place) -> Iterator[Case]:
    from drivetrain.kernels.token_logprob import token_logprob, token_logprob_ref

    shape, draw, targets_T, work = _vocabulary(sizes, place)

    def torchs(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprob_ref(hidden_TD, weight_VD, targets_T, 0.7)

    yield Case(
        op="token_logprob",
        shape=shape,
        draw=draw,
        gradients=2,
        ours=lambda h, w: token_logprob(h, w, targets_T, temperature=0.7, backend=place.backend),
        peers={
            PRODUCTS: fixed(_Products.apply),
            "torch": fixed(torchs),
            "torch.compile": compiled(place, torchs),
        },
        bound="flops",
        work=work,
        backward_apart=False,
    )
