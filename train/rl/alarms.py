"""When a run that learns by reward goes wrong: it has one answer for everything, or gets longer and not better."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

COLLAPSED = 0.05  # of the entropy of the first steps
LONGER = 1.25  # times as long as before
BETTER = 0.05  # of a standard deviation of the reward


class RlAlarms:
    """Each alarm is given once until its cause has gone.

    Args:
        window: steps whose means are compared with those of the `window` before.
        state: from an earlier `state()`, perhaps of another window.
    """

    def __init__(self, window: int, state: Mapping[str, Any] | None = None) -> None:
        self.window, state = window, state or {}
        self._first = [float(each) for each in state.get("first", ())]
        self._rewards: deque[tuple[float, float]] = deque(
            ((mean, deviation) for mean, deviation in state.get("rewards", ())), maxlen=2 * window
        )
        self._lengths: deque[float] = deque(state.get("lengths", ()), maxlen=2 * window)
        self._given = set(map(str, state.get("given", ())))

    def state(self) -> dict[str, Any]:
        """What a later run goes on from, as JSON has it."""
        return {
            "first": list(self._first),
            "rewards": [list(each) for each in self._rewards],
            "lengths": list(self._lengths),
            "given": sorted(self._given),
        }

    def check(self, step: int, entropy: float, reward: float, deviation: float, length: float) -> list[str]:
        """Sentences about this step; most steps have none.

        Args:
            entropy: nats a token. reward, deviation: mean and standard deviation of the step's completions.
            length: their mean, in tokens.
        """
        if len(self._first) < max(1, self.window // 5):
            self._first.append(entropy)
        self._rewards.append((reward, deviation))
        self._lengths.append(length)
        begun = float(np.mean(self._first))
        found = [
            *self._once(
                "entropy",
                entropy < COLLAPSED * begun,
                f"step {step}: the entropy is {entropy:.4f} nats a token, and was {begun:.4f} at first: the policy "
                "has one answer left, and nothing more to learn from comparing; raise stage.entropy_coef or "
                "stage.clip_high, or lower optim.lr",
            )
        ]
        if len(self._lengths) == 2 * self.window:
            before, now = np.array(self._rewards).reshape(2, self.window, 2).mean(axis=1)
            short, long = np.array(self._lengths).reshape(2, self.window).mean(axis=1)
            found += self._once(
                "longer",
                bool(long > LONGER * short and now[0] - before[0] < BETTER * max(now[1], 1e-9)),
                f"step {step}: completions have grown from {short:.0f} to {long:.0f} tokens and the reward has "
                f"not ({before[0]:.3f}, now {now[0]:.3f}); use stage.variant=dr_grpo, or "
                "stage.rewards.overlong.weight=1",
            )
        return found

    def unscored(self, step: int, many: Mapping[str, int], completions: int) -> list[str]:
        """Sentences about parts of the reward that most of a step's completions go without.

        Args:
            many: completions that a part could not score.
        """
        return [
            sentence
            for name, missing in many.items()
            for sentence in self._once(
                f"unscored {name}",
                2 * missing > completions,
                f"step {step}: {missing} of {completions} completions could not be scored by {name} and go without "
                "it; the log of each rank says why",
            )
        ]

    def _once(self, name: str, wrong: bool, sentence: str) -> list[str]:
        if not wrong:
            self._given.discard(name)
        elif name not in self._given:
            self._given.add(name)
            return [sentence]
        return []
