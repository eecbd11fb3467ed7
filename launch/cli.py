"""The command line. A verb imports what it needs inside its function, so that `--help` answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from drivetrain.conf.errors import DrivetrainError

app = typer.Typer(
    help="Train a language model through its whole life: documents, shards, pretraining, a checkpoint that talks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
data_app = typer.Typer(help="Documents to token shards, and what is in them.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")

# Typer brings a Click of its own or uses the one that is installed, and exports BadParameter, a UsageError, alone.
CLICK_ERROR: Any = typer.BadParameter.__mro__[2]  # ClickException

console = Console()
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value...", help="Hydra overrides.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(context_settings=OVERRIDES)
def launch(
    overrides: Overrides = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Sweep: run every combination.")] = False,
) -> None:
    """Compose, check, start and follow a job; exits with its status (75: saved and stopped on request)."""
    if multirun:
        from drivetrain.launch.sweep import sweep

        raise typer.Exit(sweep(overrides or [], console).exit_status)
    from drivetrain.launch.job import launch as launch_job

    raise typer.Exit(launch_job(overrides or [], console).exit_status)


@app.command(context_settings=OVERRIDES)
def resume(run_dir: RunDir, overrides: Overrides = None) -> None:
    """Go on from the newest whole checkpoint, on other ranks or another engine if asked."""
    from drivetrain.launch.job import resume as resume_job

    raise typer.Exit(resume_job(run_dir, overrides or [], console).exit_status)


@app.command(context_settings=OVERRIDES)
def plan(
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="GPU to plan for.")] = "H100 SXM",
    mfu: Annotated[float, typer.Option(help="Share of its peak that is assumed.")] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Memory per rank by part, FLOPs, time and checkpoint size; nothing is started."""
    import dataclasses

    from drivetrain.conf.compose import compose
    from drivetrain.conf.validate import validate
    from drivetrain.launch.plan import make_plan, render

    config = compose(overrides or [])
    validate(config, data=False)
    made = make_plan(config, gpu=gpu, mfu=mfu)
    if as_json:
        print(json.dumps(dataclasses.asdict(made), indent=1))
    else:
        console.print(render(made))


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, special ones included.")] = 32768,
) -> None:
    """Train a byte-level BPE with the special tokens of chat and tools."""
    from drivetrain.data.tokenizer import train_tokenizer

    train_tokenizer(inputs, vocab_size, out)
    console.print(f"{vocab_size:,} tokens -> {out}", markup=False)


@data_app.command("build")
def data_build(
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
    from drivetrain.data.build import build

    manifest = build(
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


@data_app.command("inspect")
def data_inspect(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """Counts, lengths and sample text of a directory of shards."""
    from drivetrain.data.inspect import inspect, render

    found = inspect(directory)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.print(render(found))


@data_app.command("verify")
def data_verify(directory: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Compare every file with the checksum in the manifest."""
    from drivetrain.data.inspect import verify

    verify(directory)
    console.print(f"{directory}: every checksum matches", markup=False)


@app.command()
def generate(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A run directory, or a Hugging Face directory.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue; with --chat, the user's message.")],
    chat: Annotated[bool, typer.Option("--chat", help="Answer, by the tokenizer's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Of the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Of the likeliest tokens with this share.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Of tokens this many times as likely as the likeliest.")] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this; repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions of the prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a completion.")] = False,
) -> None:
    """Continue a prompt, or answer it, with a run's newest checkpoint or a Hugging Face model."""
    from drivetrain.model.draw import Sampling
    from drivetrain.train.serve import Sampler

    try:
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=tuple(stop or []),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    sampler = Sampler(source, max_batch=max(samples, 1))
    if chat:
        request = sampler.chat_request([{"role": "user", "content": prompt}], sampling, samples)
    else:
        request = sampler.request(prompt, sampling, samples)
    if as_json:
        for completion in sampler.complete(request):
            print(json.dumps(completion))
    elif samples == 1:
        sys.stdout.write("" if chat else prompt)
        for piece in sampler.stream(request):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        for number, completion in enumerate(sampler.complete(request)):
            console.rule(f"sample {number}")
            sys.stdout.write(completion["text"] + "\n")


TASKS, PROBE = "Tasks", "Memorisation"  # panels of `drivetrain eval --help`


@app.command("eval")
def eval_(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A run, a checkpoint of one, or a Hugging Face directory."),
    ],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Shards to measure the loss on.")] = None,
    split: Annotated[str, typer.Option(metavar="held_out|train")] = "held_out",
    tokens: Annotated[int | None, typer.Option(min=1, help="To read. Default: the run's, or 131072.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Default: the run's, or 2048.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws sequences, documents and shots.")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="bf16|fp32", help="Default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|NAME",
            help="JSONL, reasoning_gym:NAME?size=N or lm_eval:NAME,NAME; repeatable.",
            rich_help_panel=TASKS,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask by chat template.", rich_help_panel=TASKS)
    ] = False,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Answered questions before each.", rich_help_panel=TASKS)
    ] = None,
    shots_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Drawn from these.", rich_help_panel=TASKS)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First N questions.", rich_help_panel=TASKS)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.", rich_help_panel=TASKS)] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends an answer; repeatable.", rich_help_panel=TASKS),
    ] = None,
    extract: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Its last match is the answer.", rich_help_panel=TASKS)
    ] = None,
    memorisation: Annotated[
        bool, typer.Option("--memorisation", help="What comes back word for word.", rich_help_panel=PROBE)
    ] = False,
    documents: Annotated[int, typer.Option(min=2, help="Of each split.", rich_help_panel=PROBE)] = 200,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens given.", rich_help_panel=PROBE)] = 50,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens compared.", rich_help_panel=PROBE)] = 50,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers as JSON.")] = None,
    examples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every question and its answer as JSONL.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the tasks.")] = None,
) -> None:
    """Held-out loss, tasks and memorisation of a run or a Hugging Face model."""
    import re

    from drivetrain.launch.evaluate import DTYPES, Wanted, check_writable, evaluate, render, write
    from drivetrain.train.evaluation.memorisation import Probe
    from drivetrain.train.evaluation.tasks import TaskOptions

    if split not in ("held_out", "train"):
        raise typer.BadParameter(f"'--split': {split} is neither held_out nor train")
    if precision is not None and precision not in DTYPES:
        raise typer.BadParameter(f"'--precision': {precision} is neither bf16 nor fp32")
    if plot is not None and not tasks:
        raise typer.BadParameter("'--plot': it draws tasks; name some with --tasks")
    try:
        pattern = re.compile(extract, re.DOTALL) if extract is not None else None
    except re.error as error:
        raise typer.BadParameter(f"'--extract': {extract} is no regular expression ({error})") from error
    check_writable([out, examples, plot])
    options = TaskOptions(
        chat=chat,
        shots=shots or 0,
        shots_from=shots_from,
        limit=limit,
        max_tokens=max_tokens,
        stop=tuple(stop) if stop else None,
        extract=pattern,
        seed=seed or 0,
    )
    probe = Probe(documents=documents, prefix=prefix, suffix=suffix, seed=seed or 0)
    wanted = Wanted(
        source=source,
        data=data,
        split=split,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        tasks=tuple(tasks or []),
        options=options,
        shots=shots,
        probe=probe if memorisation else None,
        precision=precision,
    )
    found, rows = evaluate(wanted)
    write(found, rows, out, examples, plot)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.print(render(found))


@app.command()
def chat(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A run directory, or a Hugging Face directory.")
    ],
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Of the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Of the likeliest tokens with this share.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Of tokens this many times as likely as the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Default: a new one.")] = None,
    fixes: Annotated[
        Path, typer.Option(metavar="DIR", help="Where /fix writes corrections, for SFT and as pairs.")
    ] = Path("corrections"),
) -> None:
    """Talk to a model in the terminal; /help lists what else can be typed."""
    import secrets

    from drivetrain.launch.chat import chat as talk
    from drivetrain.model.draw import Sampling

    try:
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=secrets.randbits(63) if seed is None else seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    talk(source, sampling, system, fixes)


@app.command()
def serve(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A run directory, or a Hugging Face directory.")
    ],
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
        from drivetrain.conf.errors import ConfigError

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


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="config.json, safetensors, tokenizer.")],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    max_shard_gb: GigaBytes = 5.0,
) -> None:
    """Check a Hugging Face directory and write it as a run directory."""
    from drivetrain.launch.weights import import_hf

    written = import_hf(source, out, int(max_shard_gb * 1e9))
    console.print(written.said(out), markup=False, soft_wrap=True)


@app.command()
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


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...")],
    out: Annotated[Path | None, typer.Option(help="Default: the first run's report/.")] = None,
) -> None:
    """Draw the curves of one or several runs into one HTML page and PNGs."""
    from drivetrain.launch.report import build_report

    console.print(str(build_report(run_dirs, out)), markup=False, soft_wrap=True)


@app.command(context_settings={**OVERRIDES, "allow_interspersed_args": False})
def bench(
    name: Annotated[str, typer.Argument(metavar="kernels|step|data|rollout", help="What to measure.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="OPTION...", help="Of that script.")] = None,
) -> None:
    """Measure here, beside what else is installed here; `bench NAME --help` says what a benchmark takes."""
    from drivetrain.launch.bench import bench as run

    raise typer.Exit(run(name, options or []))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, what is missing, and what is used instead."""
    import dataclasses

    from drivetrain.launch.doctor import examine, render

    checks = examine()
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        console.print(render(checks))
    raise typer.Exit(1 if any(check.status == "fail" for check in checks) else 0)


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong usage, 75 saved and stopped; a traceback only with --debug."""
    arguments: list[str] = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        result: Any = app(
            args=[word for word in arguments if word != "--debug"],
            prog_name="drivetrain",
            standalone_mode=False,
        )
    except DrivetrainError as error:
        if debug:
            raise
        _complain(str(error))
        sys.exit(error.exit_status)
    except CLICK_ERROR as error:
        _complain_of_usage(error)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        _complain(f"{type(error).__name__}: {error} (run again with --debug for the trace)")
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)


def _complain_of_usage(error: Any) -> None:
    """One sentence, and where to read on; nothing where the help was asked for and has been shown."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "drivetrain"
    if sentence := error.format_message().strip().rstrip("."):
        _complain(f"{sentence} (see `{command} --help`)")


def _complain(message: str) -> None:
    Console(stderr=True).print(
        f"[bold red]error:[/bold red] {_escaped(message)}", soft_wrap=True, highlight=False
    )


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
