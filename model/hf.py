"""Weights of Hugging Face directories, tensor by tensor and only the rows that are asked for.

`conf/hf_tensors.py` says which tensors of theirs make up each of ours; here the numbers move. Our matrices may be
several of theirs one above the other (query, key, value; gate, up), and GPT-2's are stored transposed.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from drivetrain.conf.errors import CheckpointError
from drivetrain.conf.hf_tensors import DTYPES, Part, tensors_of
from drivetrain.conf.schema import ModelConfig
from drivetrain.model.initialize import local_rows
from drivetrain.model.transformer import Transformer, unique_parameters
from drivetrain.model.value_head import has_value_head


class HfWeights:
    """An open Hugging Face directory whose tensors were found to be those of a model.

    Attributes:
        bytes_read: of numbers, so far.

    Raises:
        CheckpointError: tensors are missing, extra, misshapen or of another dtype; the sentence names them.
    """

    def __init__(self, directory: Path, cfg: ModelConfig) -> None:
        self.directory = directory
        self.parts, self._stored = tensors_of(directory, cfg)
        self._files: dict[Path, Any] = {}
        self.bytes_read = 0

    def __enter__(self) -> "HfWeights":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def dtype_of(self, name: str) -> str:
        """Safetensors' name of the dtype of our parameter `name`; of several, the widest.

        Raises:
            CheckpointError: parts of one matrix are in bf16 and in fp16, which no common one holds.
        """
        dtypes = {self._stored[part.name].dtype for part in self.parts[name]}
        if dtypes == {"BF16", "F16"}:
            raise CheckpointError(
                f"{self.directory} has parts of {name} in BF16 and in F16; convert it to one dtype"
            )
        return max(dtypes, key=DTYPES.__getitem__)

    def rows(self, name: str, first: int, last: int) -> Iterator[Tensor]:
        """Rows `first` to `last` of our parameter `name`, in pieces from top to bottom, in the files' dtype.

        Raises:
            CheckpointError: a tied head is in the files too, and differs from the embedding.
        """
        top = 0
        for part in self.parts[name]:
            start, stop = max(first, top), min(last, top + part.rows)
            if start < stop:
                piece = self._read(part, part.name, start - top, stop - top)
                if part.twin in self._stored:
                    self._compare(part, piece, start - top, stop - top)
                yield piece
            top += part.rows

    def whole(self, name: str) -> Tensor:
        """Our parameter `name`, contiguous, in the files' dtype."""
        pieces = list(self.rows(name, 0, sum(part.rows for part in self.parts[name])))
        return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, part: Part, stored_name: str, start: int, stop: int) -> Tensor:
        at = self._stored[stored_name]
        if at.file not in self._files:
            # Mapped, not read: what a slice does not touch stays on the disk.
            self._files[at.file] = safe_open(at.file, framework="pt")
        slices = self._files[at.file].get_slice(at.name)
        piece: Tensor = slices[:, start:stop].T if part.transposed else slices[start:stop]
        self.bytes_read += piece.numel() * piece.element_size()
        return piece

    def _compare(self, part: Part, piece: Tensor, start: int, stop: int) -> None:
        assert part.twin is not None
        if self._stored[part.twin].shape != part.shape or not torch.equal(
            self._read(part, part.twin, start, stop), piece
        ):
            raise CheckpointError(
                f"{self.directory} has a {part.twin} that is not its {part.name}, and its config.json says "
                "tie_word_embeddings=true; set that to false there"
            )


@torch.no_grad()
def fill_from_hf(model: Transformer, cfg: ModelConfig, directory: Path) -> None:
    """Fill a materialised model in place: of a sharded parameter, this rank reads its own rows only. Adapters and a
    value head stay as they are.

    Raises:
        CheckpointError: the directory's tensors are not those of this model.
    """
    with HfWeights(directory, cfg) as weights:
        parameters = dict(unique_parameters(model))
        names = [name for name in weights.parts if name != "head.weight" or not has_value_head(model)]
        for name in names:
            local, row = local_rows(parameters[name].detach())
            filled = 0
            for piece in weights.rows(name, row, row + len(local)):
                local[filled : filled + len(piece)].copy_(piece)
                filled += len(piece)
            assert filled == len(local)


def to_hf(parts: list[Part], whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and contiguous tensors of theirs that one of our parameters becomes.

    Args:
        parts: of this parameter, from `layout`.
    """
    for part, rows in zip(parts, whole.split([part.rows for part in parts]), strict=True):
        yield part.name, (rows.T if part.transposed else rows).contiguous()
