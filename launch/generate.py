"""`drivetrain generate SOURCE`: completions of one prompt, on standard output."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.source import tokenizer_of
from drivetrain.data.readers import Unusable
from drivetrain.data.tokenizer import require_chat_template
from drivetrain.launch.output import write
from drivetrain.model.generate import Request, Sampling
from drivetrain.train.prompts import require_text
from drivetrain.train.serve import Sampler


@dataclass(frozen=True, slots=True)
class Asked:
    """`prompt`: a text to continue, or in a chat the user's message."""

    prompt: str
    chat: bool
    sampling: Sampling
    samples: int


def generate(source: Path, asked: Asked, as_json: bool) -> None:
    """Write the completions; nothing is written before there is a first token.

    Raises:
        ConfigError: what is asked cannot be asked of this model. DrivetrainError: the weights are broken, or
            standard output cannot be written.
    """
    with _as_usage():
        require_text(asked.prompt, "--prompt")
        for text in asked.sampling.stop:
            require_text(text, "--stop")
    tokenizer = tokenizer_of(source)
    if asked.chat and tokenizer is not None:
        require_chat_template(tokenizer)  # before the weights are read
    sampler = Sampler(source, max_batch=asked.samples)
    with _as_usage():
        request = _request(sampler, asked)
        sampler.generator.check(request)
    if as_json:
        for completion in sampler.complete(request):
            write(json.dumps(completion) + "\n")
    elif asked.samples == 1:
        _stream(sampler, request, "" if asked.chat else asked.prompt)
    else:
        _list(sampler, request)


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    try:
        yield
    except (Unusable, ValueError) as error:
        raise ConfigError(str(error)) from error


def _request(sampler: Sampler, asked: Asked) -> Request:
    if asked.chat:
        message = {"role": "user", "content": asked.prompt}
        return sampler.prompts.answered([message], asked.sampling, asked.samples)
    return sampler.prompts.continued(asked.prompt, asked.sampling, asked.samples)


def _stream(sampler: Sampler, request: Request, before: str) -> None:
    pieces = sampler.stream(request)
    first = next(pieces)
    write(before + first.text)
    try:
        for piece in pieces:
            write(piece.text)
    finally:
        write("\n")


def _list(sampler: Sampler, request: Request) -> None:
    from rich.console import Console

    console = Console()
    for number, completion in enumerate(sampler.complete(request)):
        console.rule(f"sample {number}")
        write(completion["text"] + "\n")
