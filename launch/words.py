"""Arguments and options that several verbs have, and the console that they print to."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value...", help="Hydra overrides.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
