"""Documents that branch: a beginning shared by several ends gives what each gives with a beginning of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.kernels.attention import Documents, attention, make_documents

BACKENDS = ["reference", "sdpa", "triton"]


@dataclass(frozen=True)
class Tree:
    """Documents of one row: how long each one's beginning is, and its branches; none: it does not branch."""

    documents: list[tuple[int, list[int]]]
    heads: int
    groups: int
    head_dim: int
    seed: int

    @property
    def tokens(self) -> int:
        return sum(beginning + sum(branches) for beginning, branches in self.documents)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    branches = st.lists(st.integers(1, 40), max_size=4)
    document = st.tuples(st.integers(0, 70), branches).filter(lambda one: one[0] + sum(one[1]) > 0)
    return Tree(
        draw(st.lists(document, min_size=1, max_size=3)),
        heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([16, 24])),
        seed=draw(st.integers(0, 2**32)),
    )


def packed(tree: Tree) -> tuple[Documents, list[tuple[list[int], int]]]:
    """The documents in one row; of each beginning and branch, its tokens' places and how many are shared."""
    ends, first, shared, alone, at = [], [], [], [], 0
    for beginning, branches in tree.documents:
        start, at = at, at + beginning
        common = list(range(start, at))
        first += [start] * beginning
        shared += [start] * beginning
        alone.append((common, 0))
        for length in branches:
            alone.append(([*common, *range(at, at + length)], beginning))
            first += [at] * length
            shared += [start + beginning] * length
            at += length
        ends.append(at)
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    branches_2T = torch.tensor([first, shared], dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    return make_documents(cu_seqlens, longest, at, at, branches_2T=branches_2T), alone


def alone(tree: Tree, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    """Each beginning and each branch as a document of its own, by the definition."""
    out_TNH = torch.zeros_like(q_TNH)
    for places, beginning in packed(tree)[1]:
        if places:
            length = len(places)
            one = make_documents(torch.tensor([0, length], dtype=torch.int32), length, length, length)
            parts = (x[places] for x in (q_TNH, k_TKH, v_TKH))
            out_TNH = out_TNH.index_copy(
                0, torch.tensor(places[beginning:]), attention(*parts, one, backend="reference")[beginning:]
            )
    return out_TNH


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12)
@given(tree=trees())
def test_a_shared_beginning_changes_nothing(
    assert_no_worse: Callable[..., None], backend: str, tree: Tree
) -> None:
    generator = torch.Generator().manual_seed(tree.seed)
    heads = (tree.heads * tree.groups, tree.heads, tree.heads)
    qkv = [torch.randn(tree.tokens, n, tree.head_dim, generator=generator) for n in heads]
    documents, _ = packed(tree)
    assert_no_worse(
        lambda *x: attention(*x, documents, backend=backend),
        lambda *x: alone(tree, *x),
        qkv,
        [16.0, 12.0, 12.0, 40.0],  # as of documents that do not branch (test_attention_triton.py)
    )


def test_branches_without_meaning_are_refused() -> None:
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    branches_2T = torch.tensor([[0, 0, 2, 3], [0, 0, 2, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match="no sliding window"):
        make_documents(cu_seqlens, 4, 4, 4, sliding_window=2, branches_2T=branches_2T)
    with pytest.raises(ValueError, match="are causal"):
        make_documents(cu_seqlens, 4, 4, 4, causal=False, branches_2T=branches_2T)


def test_two_intervals_keep_torchs_rules() -> None:
    tree = Tree([(5, [3, 4]), (6, [])], 1, 2, 16, 0)
    documents, _ = packed(tree)
    q_TNH, k_TKH, v_TKH = (torch.randn(tree.tokens, n, 16, requires_grad=True) for n in (2, 1, 1))
    arguments = (q_TNH, k_TKH, v_TKH, documents.seen_4T, documents.shared_4T, 0.25)
    torch.library.opcheck(torch.ops.drivetrain.attention_two, arguments)
