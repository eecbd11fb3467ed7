"""A directory of weights as something that talks: opened on one device, text in and text out."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import Kernels, ModelConfig
from drivetrain.conf.source import model_of, tokenizer_of
from drivetrain.data.chat import Chat
from drivetrain.data.tokenizer import eos_id, load_tokenizer, vocab_size
from drivetrain.model.backend import backend_of
from drivetrain.model.generate import Completion, FinishReason, Generator, Request, Sampling
from drivetrain.model.transformer import Transformer, build_model, unique_parameters
from drivetrain.train.build import fill_from
from drivetrain.train.engine.base import Engine


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
    Face directory.

    Args:
        device: None: the first GPU, else the CPU.
        dtype: of the weights; None: bf16 on a GPU, fp32 on the CPU.

    Raises:
        ConfigError: the directory is none of these, has no tokenizer, or has not saved a checkpoint.
        CheckpointError: the weights are damaged, or do not fit their configuration.
    """
    cfg = model_of(source)
    tokenizer_dir = tokenizer_of(source)
    if tokenizer_dir is None:
        raise ConfigError(f"{source} has no tokenizer.json; copy the files of its tokenizer there")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = backend_of(Kernels.auto, device)
    model = build_model(cfg, backend)
    model.materialize(device)
    model.requires_grad_(False)
    fill_from(source, cfg)(model)
    model.to(dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))
    tokenizer, ends = load_tokenizer(tokenizer_dir), _eos_ids(source, tokenizer_dir)
    return OpenModel(model, cfg, backend, device, tokenizer, tokenizer_dir, ends)


def _eos_ids(source: Path, tokenizer_dir: Path) -> tuple[int, ...]:
    """The tokenizer's, then those of a Hugging Face model's generation_config.json."""
    ends = [eos_id(tokenizer_dir)]
    path = source / "generation_config.json"
    if path.is_file():
        try:
            more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not a JSON object ({error}); copy it again") from error
        ends += more if isinstance(more, list) else [] if more is None else [more]
    return tuple(dict.fromkeys(ends))


def copy_weights(engine: Engine, model: Transformer) -> None:
    """An engine's whole weights into a plain model of the same shape, in place and in its dtype. Collective.

    For a sampler beside training, in place of sampling on the engine's own sharded model: that gathers all weights
    for every token, this once. It costs a copy of the model on every rank.
    """
    mine = dict(unique_parameters(model))
    for name, whole in engine.full_weights():
        mine[name].detach().copy_(whole)


class TextStream:
    """Text of tokens that come one by one: whole characters, and nothing from a stop text on.

    Args:
        stop: texts that the completion ends before.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.before = 0  # tokens from here on are decoded
        self.read = 0  # those up to here have been told
        self.held = ""  # may be the beginning of a stop text
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token adds to what can be told."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        told = self.tokenizer.decode(self.tokens[self.before : self.read])
        text = self.tokenizer.decode(self.tokens[self.before :])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        # A token's text depends on the one before it (a space at the beginning, a character in two tokens).
        self.before, self.read = self.read, len(self.tokens)
        return self._tell(self.held + text[len(told) :])

    def _tell(self, text: str) -> str:
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        begun = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def finish(self) -> str:
        """What was held back, after the last token; bytes that are no whole character are left out."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


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

    def request(self, prompt: str, sampling: Sampling, samples: int = 1) -> Request:
        """For a text to be continued, in which special tokens count; an empty one begins a document."""
        tokens = self.tokenizer.encode(prompt).ids or [self.opened.eos_ids[0]]
        return Request(tokens, self._with_stop_tokens(sampling), samples)

    def chat_request(self, messages: list[dict[str, Any]], sampling: Sampling, samples: int = 1) -> Request:
        """For the assistant's next turn, by the tokenizer's chat template.

        Raises:
            ConfigError: it has none. Unusable: the template refuses the messages.
        """
        chat = Chat(self.opened.tokenizer_dir)
        end = chat.stop_id()
        if end is not None:
            sampling = dataclasses.replace(sampling, stop_tokens=(*sampling.stop_tokens, end))
        return Request(chat.prompt(messages), self._with_stop_tokens(sampling), samples)

    def _with_stop_tokens(self, sampling: Sampling) -> Sampling:
        """A stop text that spells a special token stands for the token, which decodes to nothing."""
        added = {token.content: i for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        tokens = tuple(added[text] for text in sampling.stop if text in added)
        return dataclasses.replace(sampling, stop_tokens=(*sampling.stop_tokens, *tokens))

    def stream(self, request: Request) -> Iterator[Piece]:
        """The tokens of a request for one sample, as they come."""
        if request.samples != 1:
            raise ValueError(f"a stream of text is one sample's, this request has {request.samples}")
        stream = TextStream(self.tokenizer, request.sampling.stop)
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
                "text": self.text(each, request.sampling),
                "tokens": each.tokens,
                "logprobs": each.logprobs,
                "finish_reason": each.finish_reason,
            }
            for each in completions
        ]

    def text(self, completion: Completion, sampling: Sampling) -> str:
        """A completion's text, without its stop text and special tokens."""
        stream = TextStream(self.tokenizer, sampling.stop)
        return "".join(stream.push(token) for token in completion.tokens) + stream.finish()
