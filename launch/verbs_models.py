"""Verbs of models: made to talk, served, brought in and handed out. See cli.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain.conf.errors import ConfigError
from drivetrain.launch.words import console

if TYPE_CHECKING:
    from drivetrain.model.draw import Sampling

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A run directory, or a Hugging Face directory.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest token.")]
TopK = Annotated[int, typer.Option(min=0, help="Of the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Of the likeliest tokens with this share.")]
MinP = Annotated[float, typer.Option(help="Of tokens this many times as likely as the likeliest.")]
LARGEST_SEED = 2**63 - 1


def _sampling(**settings: Any) -> "Sampling":
    from drivetrain.model.draw import Sampling

    try:
        return Sampling(**settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def generate(
    source: Source,
    prompt: Annotated[str, typer.Option(help="Text to continue; with --chat, the user's message.")],
    chat: Annotated[bool, typer.Option("--chat", help="Answer, by the tokenizer's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this; repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions of the prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a completion.")] = False,
) -> None:
    """Continue a prompt, or answer it, with a run's newest checkpoint or a Hugging Face model."""
    sampling = _sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or []),
    )
    from drivetrain.launch.generate import Asked
    from drivetrain.launch.generate import generate as run

    run(source, Asked(prompt, chat, sampling, samples), as_json)


def chat(
    source: Source,
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 1024,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, max=LARGEST_SEED, help="Default: a new one.")] = None,
    fixes: Annotated[
        Path, typer.Option(metavar="DIR", help="Where /fix writes corrections, for SFT and as pairs.")
    ] = Path("corrections"),
) -> None:
    """Talk to a model in the terminal; /help lists what else can be typed."""
    import secrets

    sampling = _sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=secrets.randbits(63) if seed is None else seed,
    )
    from drivetrain.launch.chat import chat as talk

    talk(source, sampling, system, fixes)


def serve(
    source: Source,
    host: Annotated[str, typer.Option(help="To listen on; any other needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the key that clients must send.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model; default: the folder's.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 256,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Of a chat's answer, if a request does not say.")
    ] = 2048,
) -> None:
    """Serve a model over OpenAI's HTTP interface, with a page to chat with at /."""
    try:
        from drivetrain.launch.server import serve as run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette", "pydantic"):
            raise
        raise ConfigError(
            f"serve needs {error.name}, which is not installed; run `pip install 'drivetrain[serve]'`"
        ) from error
    run(
        source,
        host=host,
        port=port,
        key_file=api_key_file,
        name=name,
        max_batch=max_batch,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
    )


GigaBytes = Annotated[
    float, typer.Option("--max-shard-gb", min=0.001, help="Largest file, in GB (10^9 bytes).")
]


def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="config.json, safetensors, tokenizer.")],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    max_shard_gb: GigaBytes = 5.0,
) -> None:
    """Check a Hugging Face directory and write it as a run directory."""
    from drivetrain.launch.weights import import_hf

    written = import_hf(source, out, int(max_shard_gb * 1e9))
    console.print(written.said(out), markup=False, soft_wrap=True)


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A run, an imported directory, a checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32. Default: as imported; bf16 for what was trained.")
    ] = None,
    max_shard_gb: GigaBytes = 5.0,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="A LoRA run's adapters alone, in PEFT's format.")
    ] = False,
) -> None:
    """Write weights, configuration and tokenizer as transformers and vLLM load them."""
    from drivetrain.launch.weights import WORDS, export_adapter, export_hf

    if adapter:
        console.print(export_adapter(source, out).said(out), markup=False, soft_wrap=True)
        return
    if dtype is not None and dtype not in WORDS:
        raise typer.BadParameter(f"'--dtype': {dtype} is none of {', '.join(WORDS)}")
    written = export_hf(source, out, dtype, int(max_shard_gb * 1e9))
    console.print(written.said(out), markup=False, soft_wrap=True)
