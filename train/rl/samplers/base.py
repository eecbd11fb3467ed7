"""Whoever completes the prompts of a rollout."""

from collections.abc import Sequence
from typing import Protocol

from drivetrain.model.generate import Completion, Request
from drivetrain.train.engine.base import Engine

Completions = list[list[Completion | None]]


class Completer(Protocol):
    """Completes token by token what it is given.

    Attributes:
        collective: every rank calls `generate` as often as the others, if need be with no request; else any thread
            of any rank calls it when it likes.
        follows: it samples from the weights that are trained; else from a model of its own.
        version: updates that the weights have seen which it samples from.
    """

    collective: bool
    follows: bool
    version: int

    def generate(self, requests: Sequence[Request]) -> Completions:
        """[request][sample]; None in the place of completions that were tried and given up.

        Raises:
            ConfigError: what a user has to mend. Other errors, `GivenUp` among them: another try may help.
        """

    def sync(self, engine: Engine, version: int) -> None:
        """Sample from the engine's weights as they are, which have seen `version` updates, from the next token on,
        in completions that are under way too. Collective."""

    def close(self) -> None:
        """End what it has started; `generate` fails from then on."""
