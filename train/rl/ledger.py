"""Which prompts a run is done with. They are numbers from 0 on, each is settled once, in about this order."""

from collections.abc import Iterable, Mapping
from itertools import count, islice
from typing import Any


class Ledger:
    """All prompts below `first` are settled, and those in `taken`: trained on, or given up.

    Args:
        state: from an earlier `state()`.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.first = int(state["prompts"]) if state else 0
        self.taken = set(map(int, state.get("taken", ()))) if state else set()

    def upcoming(self, many: int, besides: Iterable[int] = ()) -> list[int]:
        """The first `many` that are not settled, nor among `besides`."""
        busy = {*self.taken, *besides}
        return list(islice((number for number in count(self.first) if number not in busy), many))

    def settle(self, numbers: Iterable[int]) -> None:
        self.taken |= {number for number in numbers if number >= self.first}
        while self.first in self.taken:
            self.taken.remove(self.first)
            self.first += 1

    def state(self) -> dict[str, Any]:
        return {"prompts": self.first, "taken": sorted(self.taken)}
