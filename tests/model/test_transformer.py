import pytest
import torch
from torch import Tensor

from drivetrain.conf.schema import Checkpointing, ModelConfig
from drivetrain.kernels.attention import make_documents
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import (
    Block,
    Transformer,
    build_model,
    fused_rows,
    logits,
    unique_parameters,
)

LENGTHS = [5, 1, 10, 16]


def config(**changes: object) -> ModelConfig:
    values = {
        "dim": 24,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn_dim": 40,
        "vocab_size": 50,
    }
    return ModelConfig(name="small", max_seq_len=32, **(values | changes))  # type: ignore[arg-type]


def made(cfg: ModelConfig, backend: str = "sdpa", seed: int = 0) -> Transformer:
    model = build_model(cfg, backend)
    model.materialize(torch.device("cpu"))
    initialize(model, cfg, seed)
    return model


def packed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    tokens_T = torch.randint(0, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return tokens_T, torch.cat([torch.arange(length) for length in LENGTHS]), cu_seqlens


def all_logits(model: Transformer, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    documents = make_documents(cu_seqlens, max(LENGTHS), 32, 16, model.cfg.sliding_window)
    with torch.no_grad():
        return model(tokens_T, positions_T, documents, logits)


def gradients(model: Transformer) -> dict[str, Tensor]:
    tokens_T, positions_T, cu_seqlens = packed()

    def read(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_TD, weight_VD, tokens_T.roll(-1), torch.ones(32))[0]

    model.zero_grad()
    model(tokens_T, positions_T, make_documents(cu_seqlens, 16, 32, 16), read).backward()
    return {name: p.grad.clone() for name, p in unique_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_a_token_sees_its_own_document_up_to_itself_and_nothing_else(
    backend: str, sliding_window: int | None
) -> None:
    # One layer: through several, a sliding window passes on what lies further back.
    model = made(config(layers=1, sliding_window=sliding_window), backend)
    tokens_T, positions_T, cu_seqlens = packed()
    before = all_logits(model, tokens_T, positions_T, cu_seqlens)
    document_T = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    for place in range(32):
        changed = tokens_T.clone()
        changed[place] = (changed[place] + 7) % 50
        moved = (all_logits(model, changed, positions_T, cu_seqlens) != before).any(dim=-1)
        index = torch.arange(32)
        sees = (document_T == document_T[place]) & (index >= place)
        if sliding_window:
            sees &= index < place + sliding_window
        assert moved.tolist() == sees.tolist()


def test_positions_count_from_the_documents_start() -> None:
    model = made(config())
    tokens_T, positions_T, cu_seqlens = packed()
    whole = all_logits(model, tokens_T, positions_T, cu_seqlens)
    shifted = all_logits(model, tokens_T, positions_T + 100, cu_seqlens)
    torch.testing.assert_close(shifted, whole, rtol=1e-3, atol=1e-4)  # RoPE sees distances only


@pytest.mark.parametrize("mode", [Checkpointing.block, Checkpointing.selective])
def test_recomputing_changes_no_gradient_and_no_name(mode: Checkpointing) -> None:
    model = made(config(qk_norm=True))
    expected = gradients(model)
    runs: list[str] = []
    for module in model.blocks:
        assert isinstance(module, Block)
        module.checkpointing = mode
        module.mlp_norm.register_forward_hook(lambda *_: runs.append("again"))
    found = gradients(model)
    assert list(found) == list(expected) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(runs) == 4  # two blocks, each forward and once more in backward
    runs.clear()
    all_logits(model, *packed())
    assert len(runs) == 2  # nothing to recompute for


def test_a_tied_head_is_one_parameter_with_both_gradients() -> None:
    tied = made(config(tie_embeddings=True))
    assert tied.head.weight is tied.embed.weight
    assert "head.weight" not in dict(unique_parameters(tied))
    loose = made(config())
    with torch.no_grad():
        for name, parameter in unique_parameters(loose):
            parameter.copy_(tied.get_parameter(name))
    summed, apart = gradients(tied), gradients(loose)
    torch.testing.assert_close(summed["embed.weight"], apart["embed.weight"] + apart["head.weight"])


def test_building_allocates_nothing() -> None:
    model = build_model(config(vocab_size=10**7, dim=10**5), "sdpa")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_fused_rows_say_where_the_stacked_matrices_lie() -> None:
    cfg = config(qkv_bias=True, mlp_bias=True)
    parts = {
        name: (fused_rows(cfg, name), p.shape[0]) for name, p in build_model(cfg, "sdpa").named_parameters()
    }
    assert parts["blocks.1.attn.wqkv.weight"] == ([32, 16, 16], 64)
    assert parts["blocks.1.attn.wqkv.bias"] == ([32, 16, 16], 64)
    assert parts["blocks.0.mlp.w_gate_up.weight"] == ([40, 40], 80)
    fused = {name for name, (rows, _) in parts.items() if rows is not None}
    assert fused == {name for name in parts if "wqkv" in name or "w_gate_up" in name}


def test_names_leave_out_compiles_wrapper() -> None:
    model = build_model(config(), "sdpa")
    names = [name for name, _ in unique_parameters(model)]
    model.blocks[0] = torch.compile(model.blocks[0])  # type: ignore[assignment]
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert [name for name, _ in unique_parameters(model)] == names


def test_read_is_given_the_normed_hidden_states_and_the_heads_matrix() -> None:
    model = made(config())
    tokens_T, positions_T, cu_seqlens = packed()
    documents = make_documents(cu_seqlens, 16, 32, 16)
    hidden_TD, weight_VD = model(tokens_T, positions_T, documents, lambda hidden, weight: (hidden, weight))
    assert hidden_TD.shape == (32, 24) and weight_VD is model.head.weight
    with torch.no_grad():
        model.norm.weight.zero_()
    hidden_TD = model(tokens_T, positions_T, documents, lambda hidden, _: hidden)
    assert not hidden_TD.any()
