"""A finished run as something that talks: its newest weights on one device."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drivetrain.conf.compose import load
from drivetrain.data.tokenizer import eos_id, load_tokenizer
from drivetrain.model.backend import backend_of
from drivetrain.model.generate import generate
from drivetrain.model.transformer import build_model, unique_parameters
from drivetrain.train import checkpoint
from drivetrain.train.build import weights_folder


@dataclass(frozen=True, slots=True)
class Piece:
    """One sampled token: the text that it adds, and its log-probability at temperature 1."""

    token: int
    logprob: float
    text: str


class Sampler:
    """Loads a run directory's newest whole checkpoint.

    Raises:
        ConfigError: the directory is not a run, or has not saved a checkpoint.
        CheckpointError: the checkpoint does not fit the configuration.
    """

    def __init__(self, run_dir: Path) -> None:
        config = load(run_dir / "config.yaml")
        folder = weights_folder(run_dir)
        self.cfg = config.model
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(run_dir / "tokenizer")
        self.eos_id = eos_id(run_dir / "tokenizer")
        self.model = build_model(config.model, backend_of(config.kernels, self.device))
        self.model.materialize(self.device)
        self.model.requires_grad_(False)
        checkpoint.load_tensors(folder, {f"model.{name}": p for name, p in unique_parameters(self.model)})

    def stream(self, prompt: str, *, max_tokens: int, temperature: float, seed: int) -> Iterator[Piece]:
        """Sample tokens one by one; text appears when its bytes make whole characters."""
        drawn = generate(
            self.model,
            self.tokenizer.encode(prompt).ids or [self.eos_id],
            max_tokens=max_tokens,
            max_seq_len=self.cfg.max_seq_len,
            stop_id=self.eos_id,
            vocab_size=self.tokenizer.get_vocab_size(),
            device=self.device,
            sliding_window=self.cfg.sliding_window,
            temperature=temperature,
            seed=seed,
        )
        tokens: list[int] = []
        shown = ""
        for token, logprob in drawn:
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            whole = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(shown) :]
            shown += whole
            yield Piece(token, logprob, whole)

    def collect(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """`text, tokens, logprobs, finish_reason` of a whole completion."""
        drawn = list(pieces)
        stopped = bool(drawn) and drawn[-1].token == self.eos_id
        return {
            "text": "".join(piece.text for piece in drawn),
            "tokens": [piece.token for piece in drawn],
            "logprobs": [piece.logprob for piece in drawn],
            "finish_reason": "stop" if stopped else "length",
        }
