"""A shuffle of any size in O(1) memory: a keyed permutation instead of an index array.

A Feistel network over the smallest power of two that holds the domain, walked along its cycle until it lands
inside (Black and Rogaway 2002, method "cycle-walking"). The two halves may differ by one bit, so the power of
two is less than twice the domain and the walk takes fewer than two steps on average.
"""

import numpy as np
import xxhash

ROUNDS = 8
_M1, _M2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # golden ratio; Stafford-style mixer
_32 = np.uint64(32)


class Permutation:
    """A bijection of 0..size-1 that depends on `key` alone; evaluated in any order, for any subset.

    Args:
        size: how many numbers, 1 to 2^62.
        key: any text; different keys give unrelated orders.
    """

    def __init__(self, size: int, key: str) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation needs 1 to 2^62 elements, not {size}")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = [
            np.uint64(xxhash.xxh3_64_intdigest(f"{key}/{size}/{round_}".encode())) for round_ in range(ROUNDS)
        ]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of int64 `index` (each in 0..size-1), int64, same shape."""
        value = self._rounds(index.astype(np.uint64))
        limit = np.uint64(self.size)
        while (outside := value >= limit).any():
            value[outside] = self._rounds(value[outside])
        return value.astype(np.int64)

    def _rounds(self, value: np.ndarray) -> np.ndarray:
        # Alternating rounds change the high half by a function of the low one, then the reverse: an
        # unbalanced network needs no swap, and each round is its own inverse.
        high, low = value >> self._low_bits, value & self._low_mask
        for round_, key in enumerate(self._keys):
            if round_ % 2 == 0:
                high ^= _mix(low, key) & self._high_mask
            else:
                low ^= _mix(high, key) & self._low_mask
        return (high << self._low_bits) | low


def _mix(half: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit hash of each element under `key`; the best-mixed bits are brought down."""
    mixed = (half + key) * _M1
    mixed ^= mixed >> _32
    mixed *= _M2
    mixed ^= mixed >> _32
    return mixed
