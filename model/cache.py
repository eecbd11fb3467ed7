"""Keys and values of the tokens that a sampler has been through, and the attention that reads them.

T packed tokens · B sequences that take one token each · N query heads · K key/value heads, G = N/K heads a group ·
H head dim. A group is one prompt with its S samples: they begin together and stay at the same length until they
leave, and share the prompt's keys. `HostCache` serves the CPU; `PagedCache` has pages of L tokens, P in all and M a
sequence at most, and serves GPUs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.kernels.attention import Documents, attention, make_documents
from drivetrain.kernels.decode_attention import decode_attention
from drivetrain.model.transformer import KeyValues

PAGE = 16  # L, tokens: what kernels/decode_attention.py is compiled and checked for
FIRST_ROOM = 64  # tokens that a sample has room for at first on the CPU; doubled when they are full
WORTH_SHARING = (
    64  # tokens of a prompt from which two calls, of which one reads it for all samples, beat one on the CPU
)

KV = tuple[Tensor, Tensor]
G = TypeVar("G")


class Cache(Protocol[G]):
    """Where a `Generator` keeps keys and values. Tokens are counted over prompts and samples."""

    capacity: int

    def cost(self, prompt: int, samples: int, new: int) -> int:
        """Tokens of capacity that a prompt of `prompt` tokens and `samples` of up to `new` more take."""

    def admit(self, prompt: int, samples: int, new: int) -> G | None:
        """Reserve room for a group; None where others must leave first."""

    def prompts(self, groups: Sequence[G]) -> KeyValues:
        """For the pass over these groups' prompts, packed end to end."""

    def next_tokens(self, groups: Sequence[G]) -> KeyValues:
        """For a pass over one more token of every row of these groups, group by group."""

    def keep(self, group: G, rows: Sequence[int]) -> None:
        """Give up all rows of a group but these; with none, its prompt too."""


@dataclass(frozen=True, slots=True)
class _Prompts:
    """How packed prompts attend to themselves."""

    lengths: list[int]
    documents: Documents | None  # None with sdpa, which takes them one by one: no mask over all of them
    sliding_window: int | None
    backend: str

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        window = self.sliding_window
        if self.documents is not None:
            return attention(q_TNH, k_TKH, v_TKH, self.documents, sliding_window=window, backend=self.backend)
        parts = zip(*(x.split(self.lengths) for x in (q_TNH, k_TKH, v_TKH)), strict=True)
        return torch.cat([_causal(q, k, v, window) for q, k, v in parts])


def _causal(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, window: int | None) -> Tensor:
    T = len(q_TNH)
    mask_TT = None
    if window is not None and window < T:
        index_T = torch.arange(T, device=q_TNH.device)
        age_TT = index_T[:, None] - index_T
        mask_TT = (age_TT >= 0) & (age_TT < window)
    q_1NTH, k_1KTH, v_1KTH = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))
    out_1NTH = F.scaled_dot_product_attention(
        q_1NTH,
        k_1KTH,
        v_1KTH,
        attn_mask=mask_TT,
        is_causal=mask_TT is None,
        enable_gqa=q_TNH.shape[1] != k_TKH.shape[1],
    )
    return out_1NTH[0].transpose(0, 1)


def _packed(lengths: list[int], window: int | None, backend: str, device: torch.device) -> _Prompts:
    if backend == "sdpa":
        return _Prompts(lengths, None, window, backend)
    T = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    documents = make_documents(cu_seqlens, max(lengths), T, T, window, backend=backend)
    return _Prompts(lengths, documents, window, backend)


# --- the CPU ------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class HostGroup:
    """`base`: where in the text a row's own buffer begins: after the prompt, which all rows share, or at 0 for a
    single sample or a short prompt, of which each row has a copy. Lists have an entry a layer."""

    prompt: int
    rows: int
    new: int
    length: int
    base: int
    prefix: list[KV] = field(default_factory=list)  # [1, K, prompt, H]
    own: list[KV] = field(default_factory=list)  # [S, K, room, H]

    def keep_prompt(self, k_TKH: Tensor, v_TKH: Tensor) -> None:
        k_1KTH, v_1KTH = k_TKH.transpose(0, 1).unsqueeze(0), v_TKH.transpose(0, 1).unsqueeze(0)
        room = self.prompt - self.base + min(self.new, FIRST_ROOM)
        shape = (self.rows, k_TKH.shape[1], room, k_TKH.shape[2])
        k_SKCH, v_SKCH = k_TKH.new_empty(shape), v_TKH.new_empty(shape)
        if self.base:
            self.prefix.append((k_1KTH.contiguous(), v_1KTH.contiguous()))
        else:
            k_SKCH[:, :, : self.prompt], v_SKCH[:, :, : self.prompt] = k_1KTH, v_1KTH
        self.own.append((k_SKCH, v_SKCH))

    def keep_token(self, layer: int, k_SKH: Tensor, v_SKH: Tensor) -> KV:
        place = self.length - 1 - self.base
        if place == self.own[layer][0].shape[2]:
            self.own[layer] = tuple(torch.cat([x, torch.empty_like(x)], dim=2) for x in self.own[layer])  # type: ignore[assignment]
        k_SKCH, v_SKCH = self.own[layer]
        k_SKCH[:, :, place], v_SKCH[:, :, place] = k_SKH, v_SKH
        return k_SKCH, v_SKCH


class HostCache:
    """`Cache` for the CPU: a group's rows are at one length, so nothing is padded and nothing masked."""

    def __init__(self, capacity: int, sliding_window: int | None, backend: str) -> None:
        self.capacity, self.used = capacity, 0
        self.sliding_window, self.backend = sliding_window, backend

    def cost(self, prompt: int, samples: int, new: int) -> int:
        base = _base(prompt, samples)
        return base + samples * (prompt - base + new)

    def admit(self, prompt: int, samples: int, new: int) -> HostGroup | None:
        cost = self.cost(prompt, samples, new)
        if self.used + cost > self.capacity:
            return None
        self.used += cost
        return HostGroup(prompt, samples, new, prompt, _base(prompt, samples))

    def prompts(self, groups: Sequence[HostGroup]) -> KeyValues:
        lengths = [group.prompt for group in groups]
        return _HostPrompts(groups, _packed(lengths, self.sliding_window, self.backend, torch.device("cpu")))

    def next_tokens(self, groups: Sequence[HostGroup]) -> KeyValues:
        for group in groups:
            group.length += 1
        return _HostTokens(groups, self.sliding_window)

    def keep(self, group: HostGroup, rows: Sequence[int]) -> None:
        each = group.prompt - group.base + group.new
        self.used -= (group.rows - len(rows)) * each + (0 if rows else group.base)
        group.rows = len(rows)
        if not rows:
            group.prefix, group.own = [], []
            return
        index = torch.tensor(rows)
        group.own = [(k_SKCH[index], v_SKCH[index]) for k_SKCH, v_SKCH in group.own]


def _base(prompt: int, samples: int) -> int:
    return prompt if samples > 1 and prompt >= WORTH_SHARING else 0


@dataclass(frozen=True, slots=True)
class _HostPrompts:
    groups: Sequence[HostGroup]
    packed: _Prompts

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        for group, k, v in zip(
            self.groups, k_TKH.split(self.packed.lengths), v_TKH.split(self.packed.lengths), strict=True
        ):
            group.keep_prompt(k, v)
        return self.packed.attend(q_TNH, k_TKH, v_TKH)


@dataclass(frozen=True, slots=True)
class _HostTokens:
    groups: Sequence[HostGroup]
    sliding_window: int | None

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        rows = [group.rows for group in self.groups]
        q_TKGH = q_TNH.unflatten(1, (k_TKH.shape[1], -1))
        parts = zip(self.groups, q_TKGH.split(rows), k_TKH.split(rows), v_TKH.split(rows), strict=True)
        out = [self._attend(layer, group, q_SKGH, k, v) for group, q_SKGH, k, v in parts]
        return torch.cat(out).flatten(1, 2)

    def _attend(self, layer: int, group: HostGroup, q_SKGH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
        own = group.keep_token(layer, k_SKH, v_SKH)
        first = 0 if self.sliding_window is None else max(0, group.length - self.sliding_window)
        near = slice(max(0, first - group.base), group.length - group.base)
        k_SKCH, v_SKCH = (x[:, :, near] for x in own)
        if first >= group.base:
            return F.scaled_dot_product_attention(q_SKGH, k_SKCH, v_SKCH)
        # The prompt's keys are read once for all samples, and the two parts weighed by the sums of their softmax
        # (Juravsky et al. 2024, "Hydragen", section 3.1).
        S, K, heads, H = q_SKGH.shape
        k_1KPH, v_1KPH = (x[:, :, first:] for x in group.prefix[layer])
        q_1KQH = q_SKGH.transpose(0, 1).reshape(1, K, S * heads, H)
        shared_1KQH, shared_lse_1KQ = _attention_with_lse(q_1KQH, k_1KPH, v_1KPH)
        shared_SKGH = shared_1KQH.view(K, S, heads, H).transpose(0, 1)
        own_SKGH, own_lse_SKG = _attention_with_lse(q_SKGH, k_SKCH, v_SKCH)
        share_SKG = torch.sigmoid(shared_lse_1KQ.view(K, S, heads).transpose(0, 1) - own_lse_SKG)
        return torch.lerp(own_SKGH, shared_SKGH, share_SKG.unsqueeze(-1).to(own_SKGH.dtype))


_attention_with_lse: Callable[[Tensor, Tensor, Tensor], KV] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
)


# --- pages --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class PagedGroup:
    """table_SM: int32 on the CPU, the pages of each row; the prompt's full pages are the same in all."""

    prompt: int
    length: int
    table_SM: Tensor

    @property
    def rows(self) -> int:
        return len(self.table_SM)


@dataclass(frozen=True, slots=True)
class PagedTokens:
    """A pass over one token a row. A row of `lengths_B` 0 is none: it writes to page 0, which is no sequence's."""

    cache: "PagedCache"
    table_BM: Tensor
    lengths_B: Tensor  # this token included
    places_B: Tensor  # int64: page · L + token in it, where this token's key goes

    def attend(self, layer: int, q_BNH: Tensor, k_BKH: Tensor, v_BKH: Tensor) -> Tensor:
        k_PLKH, v_PLKH = self.cache.write(layer, self.places_B, k_BKH, v_BKH)
        return decode_attention(
            q_BNH.unsqueeze(1),
            k_PLKH,
            v_PLKH,
            self.table_BM,
            self.lengths_B,
            sliding_window=self.cache.sliding_window,
            backend=self.cache.backend,
        ).squeeze(1)


@dataclass(frozen=True, slots=True)
class _PagedPrompts:
    """`places_T`: as in `PagedTokens`. `copied`, `copies`: a prompt's last page that is not full, and those of
    the other rows that get a copy, because each row goes on to write into its own."""

    cache: "PagedCache"
    packed: _Prompts
    places_T: Tensor
    copied: Tensor
    copies: Tensor

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        for pages_PLKH in self.cache.write(layer, self.places_T, k_TKH, v_TKH):
            if len(self.copies):
                pages_PLKH[self.copies] = pages_PLKH[self.copied]
        return self.packed.attend(q_TNH, k_TKH, v_TKH)


class PagedCache:
    """`Cache` of pages, which `decode_attention` reads in place: sequences come and go, nothing moves.

    The pages are allocated when the first keys come, in their dtype.
    """

    def __init__(self, capacity: int, sliding_window: int | None, backend: str, device: torch.device) -> None:
        self.pages = capacity // PAGE
        self.capacity = self.pages * PAGE
        self.sliding_window, self.backend, self.device = sliding_window, backend, device
        self.free = list(range(self.pages, 0, -1))  # page 0 is for rows that are none
        self.layers: dict[int, KV] = {}

    def cost(self, prompt: int, samples: int, new: int) -> int:
        shared, own = self._pages(prompt, new)
        return (shared + samples * own) * PAGE

    @staticmethod
    def _pages(prompt: int, new: int) -> tuple[int, int]:
        """Full pages of the prompt, and those that each row has to itself."""
        return prompt // PAGE, -(-(prompt + new) // PAGE) - prompt // PAGE

    def admit(self, prompt: int, samples: int, new: int) -> PagedGroup | None:
        shared, own = self._pages(prompt, new)
        if shared + samples * own > len(self.free):
            return None
        prefix = [self.free.pop() for _ in range(shared)]
        rows = [prefix + [self.free.pop() for _ in range(own)] for _ in range(samples)]
        return PagedGroup(prompt, prompt, torch.tensor(rows, dtype=torch.int32))

    def prompts(self, groups: Sequence[PagedGroup]) -> KeyValues:
        lengths = [group.prompt for group in groups]
        packed = _packed(lengths, self.sliding_window, self.backend, self.device)
        places_T = torch.cat([_places(group.table_SM[0], torch.arange(group.prompt)) for group in groups])
        pairs = [
            (int(last_S[0]), int(page))
            for group in groups
            if group.prompt % PAGE
            for last_S in [group.table_SM[:, group.prompt // PAGE]]
            for page in last_S[1:]
        ]
        copied, copies = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).to(self.device).unbind(1)
        return _PagedPrompts(self, packed, places_T.to(self.device), copied, copies)

    def next_tokens(self, groups: Sequence[PagedGroup]) -> PagedTokens:
        for group in groups:
            group.length += 1
        most = max(group.table_SM.shape[1] for group in groups)
        table_BM = torch.cat([F.pad(group.table_SM, (0, most - group.table_SM.shape[1])) for group in groups])
        lengths_B = torch.tensor([group.length for group in groups for _ in range(group.rows)])
        places_B = torch.cat([_places(group.table_SM, torch.tensor([group.length - 1])) for group in groups])
        return PagedTokens(
            self,
            table_BM.to(self.device),
            lengths_B.to(self.device, torch.int32),
            places_B.flatten().to(self.device),
        )

    def write(self, layer: int, places_T: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> KV:
        """Put keys and values where they belong; all pages of the layer, [P, L, K, H] each."""
        if layer not in self.layers:
            shape = (self.pages + 1, PAGE, *k_TKH.shape[1:])
            self.layers[layer] = (k_TKH.new_zeros(shape), v_TKH.new_zeros(shape))
        for pages_PLKH, x_TKH in zip(self.layers[layer], (k_TKH, v_TKH), strict=True):
            pages_PLKH.flatten(0, 1).index_copy_(0, places_T, x_TKH)
        return self.layers[layer]

    def keep(self, group: PagedGroup, rows: Sequence[int]) -> None:
        shared = group.prompt // PAGE
        kept = set(rows)
        for row, pages in enumerate(group.table_SM.tolist()):
            if row not in kept:
                self.free.extend(pages[shared:])
        if not rows:
            self.free.extend(group.table_SM[0, :shared].tolist() if group.rows else [])
        group.table_SM = group.table_SM[list(rows)]


def _places(table: Tensor, positions: Tensor) -> Tensor:
    """Of positions in a text, given its pages [..., M]: [..., positions]."""
    return table[..., positions // PAGE].long() * PAGE + positions % PAGE
