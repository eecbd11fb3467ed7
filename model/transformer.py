"""The decoder: what Llama 3, Qwen 2 and 3, Mistral, SmolLM and GPT-2 share.

T packed tokens · D width · N query heads · K key/value heads · H head dim · F hidden width of the MLP ·
V vocabulary. There is no batch dimension: documents lie end to end, and `Documents` says where each begins.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from drivetrain.conf.schema import Checkpointing, LoraConfig, Mlp, ModelConfig, Norm, Positions, RopeScaling
from drivetrain.kernels.attention import Documents, attention
from drivetrain.kernels.rms_norm import add_rms_norm, rms_norm
from drivetrain.kernels.rope import rope, rope_frequencies, rope_tables
from drivetrain.kernels.swiglu import swiglu

R = TypeVar("R")


class KeyValues(Protocol):
    """In place of `Documents`: tokens that also see keys and values of earlier passes (`model.cache`)."""

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Keep this pass's keys and values, and return what its queries make of all that they see: [T, N, H]."""


class _Norm(nn.Module):
    def __init__(self, width: int, eps: float, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.backend = eps, backend


class RMSNorm(_Norm):
    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, eps=self.eps, backend=self.backend)


class AddRMSNorm(_Norm):
    """The norm of x + residual, and that sum."""

    def forward(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x_TD, residual_TD, self.weight, eps=self.eps, backend=self.backend)


class LayerNorm(nn.Module):
    """Torch's own, with weight and bias (Ba et al., 2016)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.layer_norm(x_TD, self.weight.shape, self.weight, self.bias, self.eps)


class AddLayerNorm(LayerNorm):
    """The norm of x + residual, and that sum."""

    def forward(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        sum_TD = x_TD + residual_TD
        return super().forward(sum_TD), sum_TD


def _norm(cfg: ModelConfig, backend: str) -> nn.Module:
    return (
        LayerNorm(cfg.dim, cfg.norm_eps)
        if cfg.norm is Norm.layer
        else RMSNorm(cfg.dim, cfg.norm_eps, backend)
    )


def _add_norm(cfg: ModelConfig, backend: str) -> nn.Module:
    if cfg.norm is Norm.layer:
        return AddLayerNorm(cfg.dim, cfg.norm_eps)
    return AddRMSNorm(cfg.dim, cfg.norm_eps, backend)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, backend: str, layer: int) -> None:
        super().__init__()
        self.layer, self.rotary = layer, is_rotary(cfg, layer)
        self.heads, self.kv_heads, self.head_dim = cfg.heads, cfg.kv_heads, cfg.head_dim
        self.sliding_window, self.backend = cfg.sliding_window, backend
        # Query, key and value rows in one matrix: one product instead of three.
        self.wqkv = nn.Linear(cfg.dim, (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim, bias=cfg.qkv_bias)
        self.wo = nn.Linear(cfg.heads * cfg.head_dim, cfg.dim, bias=cfg.out_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, backend) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, backend) if cfg.qk_norm else None

    def forward(
        self, x_TD: Tensor, cos_Th: Tensor, sin_Th: Tensor, documents: Documents | KeyValues
    ) -> Tensor:
        heads = (self.heads, self.kv_heads, self.kv_heads)
        qkv_TH = self.wqkv(x_TD).unflatten(-1, (sum(heads), self.head_dim))
        q_TNH, k_TKH, v_TKH = qkv_TH.split(heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        if self.rotary:
            q_TNH, k_TKH = rope(q_TNH, k_TKH, cos_Th, sin_Th, backend=self.backend)
        if not isinstance(documents, Documents):
            return self.wo(documents.attend(self.layer, q_TNH, k_TKH, v_TKH).flatten(1))
        out_TNH = attention(
            q_TNH,
            k_TKH,
            v_TKH,
            documents,
            sliding_window=self.sliding_window,
            backend=self.backend,
        )
        return self.wo(out_TNH.flatten(1))


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.w_gate_up = nn.Linear(cfg.dim, 2 * cfg.ffn_dim, bias=cfg.mlp_bias)
        self.w_down = nn.Linear(cfg.ffn_dim, cfg.dim, bias=cfg.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w_down(swiglu(self.w_gate_up(x_TD), backend=self.backend))


class GeluMLP(nn.Module):
    """GPT-2's: GELU with the tanh approximation (Hendrycks and Gimpel, 2016)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.w_up = nn.Linear(cfg.dim, cfg.ffn_dim, bias=cfg.mlp_bias)
        self.w_down = nn.Linear(cfg.ffn_dim, cfg.dim, bias=cfg.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w_down(F.gelu(self.w_up(x_TD), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, backend: str, layer: int) -> None:
        super().__init__()
        self.attn_norm = _norm(cfg, backend)
        self.attn = Attention(cfg, backend, layer)
        self.mlp_norm = _add_norm(cfg, backend)
        self.mlp = GeluMLP(cfg) if cfg.mlp is Mlp.gelu else MLP(cfg, backend)
        self.checkpointing = Checkpointing.none
        self.draws = False  # whether the forward pass draws random numbers

    def forward(
        self, x_TD: Tensor, cos_Th: Tensor, sin_Th: Tensor, documents: Documents | KeyValues
    ) -> Tensor:
        if self.checkpointing is Checkpointing.none or not torch.is_grad_enabled():
            return self._run(x_TD, cos_Th, sin_Th, documents)
        # Inside the block, so that parameter names and FSDP's hooks stay as they are.
        keep = _keep_matmuls if self.checkpointing is Checkpointing.selective else noop_context_fn
        return checkpoint(
            self._run,
            x_TD,
            cos_Th,
            sin_Th,
            documents,
            use_reentrant=False,
            preserve_rng_state=self.draws,
            context_fn=keep,
        )

    def _run(self, x_TD: Tensor, cos_Th: Tensor, sin_Th: Tensor, documents: Documents | KeyValues) -> Tensor:
        attended_TD = self.attn(self.attn_norm(x_TD), cos_Th, sin_Th, documents)
        normed_TD, x_TD = self.mlp_norm(attended_TD, x_TD)
        return x_TD + self.mlp(normed_TD)


_SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.drivetrain.attention.default,
    torch.ops.drivetrain.attention_two.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_matmuls() -> Any:
    """Selective checkpointing: keep the outputs of matmuls and attention, recompute the cheap rest."""

    def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Head(nn.Module):
    """The vocabulary matrix as a module, so that engines which gather weights on use see this use."""

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        assert isinstance(weight_VD, nn.Parameter)
        self.weight = weight_VD

    def forward(self, hidden_TD: Tensor, read: Callable[[Tensor, Tensor], R]) -> R:
        return read(hidden_TD, self.weight)


def logits(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """The plain head: all logits, [T, V] fp32."""
    return F.linear(hidden_TD, weight_VD).float()


class Transformer(nn.Module):
    """The whole model. `forward` hands the last hidden states and the head's matrix to `read`.

    A loss that never holds the logits, a sampler that wants one row of them and a probe that wants the
    hidden states are all a `read`; the model knows none of them.
    """

    def __init__(self, cfg: ModelConfig, backend: str) -> None:
        super().__init__()
        self.cfg = cfg
        self.frequencies_h: Tensor | None = None  # no buffer: it stays fp32 whatever the model is cast to
        self.lora = LoraConfig()  # the adapters that model/lora.py has added
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        learned = cfg.positions is Positions.learned
        self.position_embed = nn.Embedding(cfg.max_seq_len, cfg.dim) if learned else None
        self.blocks = nn.ModuleList(Block(cfg, backend, layer) for layer in range(cfg.layers))
        self.norm = _norm(cfg, backend)
        tied = cfg.tie_embeddings
        weight_VD = self.embed.weight if tied else nn.Parameter(torch.empty(cfg.vocab_size, cfg.dim))
        self.head: nn.Module = Head(weight_VD)  # or what model/value_head.py puts in its place

    def materialize(self, device: torch.device) -> None:
        """Allocate the weights, uninitialised, on `device`; a tied head stays tied."""
        self.to_empty(device=device)
        tied = self.cfg.tie_embeddings and isinstance(self.head, Head)
        if tied and self.head.weight is not self.embed.weight:
            self.head = Head(self.embed.weight)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        documents: Documents | KeyValues,
        read: Callable[[Tensor, Tensor], R],
    ) -> R:
        """Run T packed tokens.

        Args:
            tokens_T: int32 or int64 [T]. positions_T: int [T], from 0 in each document; below `max_seq_len`
                where they are learned.
            documents: from `make_documents`, with this model's `sliding_window`; or a pass of `model.cache`.
            read: called with hidden_TD (the compute dtype) and weight_VD.
        """
        if self.frequencies_h is None or self.frequencies_h.device != positions_T.device:
            # Once: the copy from the host would break the capture of a CUDA graph.
            self.frequencies_h = _frequencies(self.cfg).to(positions_T.device)
        cos_Th, sin_Th = rope_tables(positions_T, self.frequencies_h)
        x_TD = self.embed(tokens_T)
        if self.position_embed is not None:
            x_TD = x_TD + self.position_embed(positions_T)
        if isinstance(documents, Documents):
            documents = documents.with_bias(x_TD.dtype)
        for block in self.blocks:
            x_TD = block(x_TD, cos_Th, sin_Th, documents)
        found: R = self.head(self.norm(x_TD), read)
        return found


def is_rotary(cfg: ModelConfig, layer: int) -> bool:
    """Whether a layer, from 0, turns its queries and keys."""
    left_out = cfg.nope_every > 0 and (layer + 1) % cfg.nope_every == 0
    return cfg.positions is Positions.rope and not left_out


def _frequencies(cfg: ModelConfig) -> Tensor:
    scaling = cfg.rope_scaling or RopeScaling(factor=1.0)
    return rope_frequencies(
        cfg.head_dim,
        cfg.rope_theta,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_seq_len=scaling.original_max_seq_len,
    )


def build_model(cfg: ModelConfig, backend: str, device: str = "meta") -> Transformer:
    """The model without weights, by default on the meta device: nothing is allocated.

    Args:
        backend: from `backend_of`.
    """
    with torch.device(device):
        return Transformer(cfg, backend)


def fused_rows(cfg: ModelConfig, name: str) -> list[int] | None:
    """Row counts of the matrices that lie one above the other in parameter `name`; None for one matrix."""
    if ".wqkv." in name:
        return [cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim]
    if ".w_gate_up." in name:
        return [cfg.ffn_dim, cfg.ffn_dim]
    return None


def unique_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Fully-qualified names and parameters, tied ones once, compile's wrappers left out of the names."""
    for name, parameter in model.named_parameters():
        yield name.replace("_orig_mod.", ""), parameter
