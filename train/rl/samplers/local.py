"""The built-in sampler on a whole copy of the weights in each rank: no rank waits for another, nor for training."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from drivetrain.model.generate import Completion, Generator, Request
from drivetrain.model.transformer import Transformer
from drivetrain.train.engine.base import Engine, copy_weights
from drivetrain.train.rl.samplers.batching import Batching


class Local(Batching):
    """Weights change between two decode steps; what is under way goes on, its keys and values as they are, and each
    token is marked with the version that drew it.

    Args:
        model: materialised, of any content until the first `sync`. generator: over it.
    """

    def __init__(self, model: Transformer, generator: Generator, seconds: float) -> None:
        super().__init__(seconds)
        self.model, self.generator = model, generator
        self._open: dict[int, list[Completion]] = {}
        self._going: dict[int, int] = {}  # samples that are not finished, by request

    def _enter(self) -> None:
        if self.generator.device.type == "cuda":
            torch.cuda.set_device(self.generator.device)
            self.stream = torch.cuda.Stream()  # beside training's

    def _on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.generator.device.type == "cuda" else nullcontext()

    def _submit(self, request: Request) -> int:
        number = self.generator.submit(request)
        self._open[number] = [Completion() for _ in range(request.samples)]
        self._going[number] = request.samples
        return number

    def _step(self) -> list[tuple[int, list[Completion]]]:
        with self._on_stream():
            events = self.generator.step()
        finished = []
        for event in events:
            completion = self._open[event.request][event.sample]
            completion.add(event)
            completion.versions.append(self.version)
            if event.finish_reason is not None:
                self._going[event.request] -= 1
                if not self._going[event.request]:
                    del self._going[event.request]
                    finished.append((event.request, self._open.pop(event.request)))
        return finished

    def _cancel(self, request: int) -> None:
        self.generator.cancel(request)
        self._open.pop(request, None)
        self._going.pop(request, None)

    def _take_weights(self, engine: Engine, version: int) -> None:
        copy_weights(engine, self.model)
        if self.generator.device.type == "cuda":
            torch.cuda.synchronize(self.generator.device)
