"""The built-in sampler on the weights that are trained: sharded ones are gathered layer by layer, as they run."""

from collections.abc import Callable, Sequence

from drivetrain.conf.errors import ConfigError
from drivetrain.model.cache import HostCache
from drivetrain.model.generate import Completion, Generator, Request
from drivetrain.train.engine.base import Engine
from drivetrain.train.rl.samplers.base import Completions


class Shared:
    """A collective `Completer`: its weights are always the newest.

    Args:
        make: a generator on the engine's model. One that holds keys and values on the CPU is kept; pages on a GPU
            are given back after every call, for training needs their room.
    """

    collective = follows = True

    def __init__(self, make: Callable[[], Generator]) -> None:
        self.make, self.version = make, 0
        self._kept: Generator | None = None

    def generate(self, requests: Sequence[Request]) -> Completions:
        generator = self._kept or self.make()
        self._kept = generator if isinstance(generator.cache, HostCache) else None
        found: Completions = []
        try:
            completions: list[list[Completion]] = generator.generate(requests)
        except ValueError as error:  # it cannot be done at all, as in `Batching`
            raise ConfigError(str(error)) from error
        for group in completions:
            found.append([*group])
        return found

    def sync(self, engine: Engine, version: int) -> None:
        self.version = version

    def close(self) -> None:
        """It has started nothing."""
