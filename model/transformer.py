"""The decoder: what Llama 3, Qwen 2 and 3, Mistral and SmolLM2 share.

T packed tokens · D width · N query heads · K key/value heads · H head dim · F hidden width of the MLP ·
V vocabulary. There is no batch dimension: documents lie end to end, and `Documents` says where each begins.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from drivetrain.conf.schema import Checkpointing, ModelConfig, RopeScaling
from drivetrain.kernels.attention import Documents, attention
from drivetrain.kernels.rms_norm import add_rms_norm, rms_norm
from drivetrain.kernels.rope import rope, rope_frequencies, rope_tables
from drivetrain.kernels.swiglu import swiglu

R = TypeVar("R")


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


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, backend: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.heads, cfg.kv_heads, cfg.head_dim
        self.sliding_window, self.backend = cfg.sliding_window, backend
        # Query, key and value rows in one matrix: one product instead of three.
        self.wqkv = nn.Linear(cfg.dim, (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim, bias=cfg.qkv_bias)
        self.wo = nn.Linear(cfg.heads * cfg.head_dim, cfg.dim, bias=cfg.out_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, backend) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, backend) if cfg.qk_norm else None

    def forward(self, x_TD: Tensor, cos_Th: Tensor, sin_Th: Tensor, documents: Documents) -> Tensor:
        heads = (self.heads, self.kv_heads, self.kv_heads)
        qkv_TH = self.wqkv(x_TD).unflatten(-1, (sum(heads), self.head_dim))
        q_TNH, k_TKH, v_TKH = qkv_TH.split(heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH, k_TKH = rope(q_TNH, k_TKH, cos_Th, sin_Th, backend=self.backend)
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


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, backend: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps, backend)
        self.attn = Attention(cfg, backend)
        self.mlp_norm = AddRMSNorm(cfg.dim, cfg.norm_eps, backend)
        self.mlp = MLP(cfg, backend)
        self.checkpointing = Checkpointing.none

    def forward(self, x_TD: Tensor, cos_Th: Tensor, sin_Th: Tensor, documents: Documents) -> Tensor:
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
            preserve_rng_state=False,
            context_fn=keep,
        )

    def _run(self, x_TD: Tensor, cos_Th: Tensor, sin_Th: Tensor, documents: Documents) -> Tensor:
        attended_TD = self.attn(self.attn_norm(x_TD), cos_Th, sin_Th, documents)
        normed_TD, x_TD = self.mlp_norm(attended_TD, x_TD)
        return x_TD + self.mlp(normed_TD)


_SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.drivetrain.attention.default,
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
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg, backend) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps, backend)
        tied = cfg.tie_embeddings
        self.head = Head(self.embed.weight if tied else nn.Parameter(torch.empty(cfg.vocab_size, cfg.dim)))

    def materialize(self, device: torch.device) -> None:
        """Allocate the weights, uninitialised, on `device`; a tied head stays tied."""
        self.to_empty(device=device)
        if self.cfg.tie_embeddings and self.head.weight is not self.embed.weight:
            self.head = Head(self.embed.weight)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        documents: Documents,
        read: Callable[[Tensor, Tensor], R],
    ) -> R:
        """Run T packed tokens.

        Args:
            tokens_T: int32 or int64 [T]. positions_T: int [T], from 0 in each document.
            documents: from `make_documents`, with this model's `sliding_window`.
            read: called with hidden_TD (the compute dtype) and weight_VD.
        """
        cos_Th, sin_Th = rope_tables(positions_T, _frequencies(self.cfg).to(positions_T.device))
        x_TD = self.embed(tokens_T)
        documents = documents.with_bias(x_TD.dtype)
        for block in self.blocks:
            x_TD = block(x_TD, cos_Th, sin_Th, documents)
        return self.head(self.norm(x_TD), read)


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
