"""A directory of weights as something that talks: opened on one device, text in and text out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.hf_values import generation_ends
from drivetrain.conf.schema import Kernels, ModelConfig, Precision
from drivetrain.conf.source import hf_folder, model_of, tokenizer_of
from drivetrain.data.tokenizer import eos_id, load_tokenizer, vocab_size
from drivetrain.model.backend import backend_of
from drivetrain.model.generate import Completion, FinishReason, Generator, Request, Sampling
from drivetrain.model.text import TextStream
from drivetrain.model.transformer import Transformer, build_model
from drivetrain.train.build import fill_from
from drivetrain.train.prompts import Prompts


@dataclass(frozen=True, slots=True)
class OpenModel:
    """Weights on a device, ready to run, with the tokenizer beside them."""

    model: Transformer
    cfg: ModelConfig
    backend: str
    device: torch.device
    tokenizer: Tokenizer
    tokenizer_dir: Path
    eos_ids: tuple[int, ...]

    def prompts(self) -> Prompts:
        return Prompts(self.tokenizer_dir, self.tokenizer, self.eos_ids[0])

    def generator(self, **options: Any) -> Generator:
        """A `Generator` over it; `options` are its own."""
        return Generator(
            self.model,
            self.cfg,
            self.device,
            backend=self.backend,
            eos_ids=self.eos_ids,
            vocab_size=min(self.cfg.vocab_size, vocab_size(self.tokenizer_dir)),
            decode=self.tokenizer.decode,
            **options,
        )


def open_model(
    source: Path, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> OpenModel:
    """Where a SOURCE is opened: a run directory (its newest whole checkpoint), one of its checkpoints, or a Hugging
    Face directory. Memory: one copy of the weights in `dtype`, and the largest tensor.

    Args:
        device: None: the first GPU, else the CPU.
        dtype: of the weights; None: bf16 on a GPU, fp32 on the CPU.

    Raises:
        ConfigError: the directory is none of these, has no tokenizer, names end tokens that the model has not, or
            has not saved a checkpoint.
        CheckpointError: the weights are damaged, or do not fit their configuration.
    """
    cfg = model_of(source)
    tokenizer_dir = tokenizer_of(source)
    if tokenizer_dir is None:
        raise ConfigError(f"{source} has no tokenizer.json; copy the files of its tokenizer there")
    tokenizer, ends = load_tokenizer(tokenizer_dir), _eos_ids(source, cfg, tokenizer_dir)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    precision = Precision.fp32 if dtype == torch.float32 else Precision.bf16
    backend = backend_of(Kernels.auto, device, cfg.head_dim, precision)
    model = build_model(cfg, backend)
    # Before there are weights: they are narrowed tensor by tensor as they are read.
    model.to(dtype)
    model.materialize(device)
    model.requires_grad_(False)
    fill_from(source, cfg)(model)
    return OpenModel(model, cfg, backend, device, tokenizer, tokenizer_dir, ends)


def _eos_ids(source: Path, cfg: ModelConfig, tokenizer_dir: Path) -> tuple[int, ...]:
    """The tokenizer's, then those of the generation_config.json that the weights came with."""
    return tuple(dict.fromkeys([eos_id(tokenizer_dir), *generation_ends(hf_folder(source), cfg.vocab_size)]))


@dataclass(frozen=True, slots=True)
class Piece:
    """One sampled token: the text that it lets be told, and its log-probability at temperature 1."""

    token: int
    logprob: float
    text: str
    finish_reason: FinishReason | None


class Sampler:
    """Text in, text out, over an `OpenModel`."""

    def __init__(self, source: Path | OpenModel, **options: Any) -> None:
        self.opened = source if isinstance(source, OpenModel) else open_model(source)
        self.tokenizer = self.opened.tokenizer
        self.generator = self.opened.generator(**options)

    @cached_property
    def prompts(self) -> Prompts:
        """Requests for this model."""
        return self.opened.prompts()

    def request(self, prompt: str, sampling: Sampling, samples: int = 1) -> Request:
        """`Prompts.continued`."""
        return self.prompts.continued(prompt, sampling, samples)

    def stream(self, request: Request) -> Iterator[Piece]:
        """The tokens of a request for one sample, as they come."""
        if request.samples != 1:
            raise ValueError(f"a stream of text is one sample's, this request has {request.samples}")
        stream = TextStream(self.tokenizer.decode, request.sampling.stop, request.prompt)
        for event in self.generator.stream(request):
            text = stream.push(event.token)
            if event.finish_reason:
                text += stream.finish()
            yield Piece(event.token, event.logprob, text, event.finish_reason)

    def complete(self, request: Request) -> list[dict[str, Any]]:
        """`text, tokens, logprobs, finish_reason` of each sample."""
        (completions,) = self.generator.generate([request])
        return [
            {
                "text": self.text(each, request.sampling, request.prompt),
                "tokens": each.tokens,
                "logprobs": each.logprobs,
                "finish_reason": each.finish_reason,
            }
            for each in completions
        ]

    def text(self, completion: Completion, sampling: Sampling, prompt: Sequence[int] = ()) -> str:
        """A completion's text, without its stop text and special tokens.

        Args:
            prompt: what it follows; without one the text begins as a document does, with SentencePiece's tokenizers
                by leaving out a space.
        """
        stream = TextStream(self.tokenizer.decode, sampling.stop, prompt)
        return "".join(stream.push(token) for token in completion.tokens) + stream.finish()
