"""Verbs of data and tokenizers. See cli.py."""

import json
from pathlib import Path
from typing import Annotated

import typer

from drivetrain.launch import output
from drivetrain.launch.words import AsJson, console


def train_tokenizer(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, special ones included.")] = 32768,
) -> None:
    """Train a byte-level BPE with the special tokens of chat and tools."""
    from drivetrain.data.tokenizer import train_tokenizer as train

    train(inputs, vocab_size, out)
    console.print(f"{vocab_size:,} tokens -> {out}", markup=False)


def build(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    workers: Annotated[int, typer.Option(help="Processes; 0: one a core.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of documents kept for evaluation.")] = 0.005,
    text_key: Annotated[str, typer.Option(help="Field of the text in JSONL and Parquet.")] = "text",
    licence: Annotated[str | None, typer.Option(help="Recorded in the manifest.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in OUT.")] = False,
    strict: Annotated[bool, typer.Option(help="Stop at the first broken line.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The input is conversations, for stage=sft.")] = False,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Chosen and rejected answers, for stage=dpo and reward_model.")
    ] = False,
) -> None:
    """Turn txt, jsonl(.gz/.zst), parquet or folders of them into token shards."""
    from drivetrain.data.build import build as write

    manifest = write(
        inputs,
        tokenizer,
        out,
        workers=workers,
        held_out=held_out,
        text_key=text_key,
        licence=licence,
        overwrite=overwrite,
        strict=strict,
        chat=chat,
        pairs=pairs,
    )
    for split in ("train", "held_out"):
        documents = sum(shard.documents for shard in manifest.split(split))
        said = f"{split}: {documents:,} documents, {manifest.tokens(split):,} tokens"
        if chat or pairs:
            learned = sum(shard.loss_tokens or 0 for shard in manifest.split(split))
            said = f"{said.replace('documents', 'conversations')}, {learned:,} of them learned"
            said += f", in {documents // 2:,} pairs" if pairs else ""
        console.print(said, markup=False)


def inspect(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """Counts, lengths and sample text of a directory of shards."""
    from drivetrain.data.inspect import inspect as examine
    from drivetrain.data.inspect import render

    found = examine(directory)
    if as_json:
        output.write(json.dumps(found, indent=1) + "\n")
    else:
        console.print(render(found))


def verify(directory: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Compare every file with the checksum in the manifest."""
    from drivetrain.data.inspect import verify as compare

    compare(directory)
    console.print(f"{directory}: every checksum matches", markup=False)
