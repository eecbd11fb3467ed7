"""Which weights the frozen reference of `stage.kl_coef` is: those that the run began with, at every resume too.

`model.init_from` may be a run that has gone on since, whose newest checkpoint is another one. So a run keeps
`reference/model.json`: the folder, as seen from `model.init_from`, and a digest of what lies there.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from drivetrain.conf.errors import CheckpointError, DrivetrainError
from drivetrain.data.shards import hash_file, sync_directory
from drivetrain.train.checkpoint import MARKER
from drivetrain.train.mesh import World

FILE = Path("reference") / "model.json"


def pinned(run_dir: Path, source: Path, newest: Callable[[Path], Path], world: World) -> Path:
    """The folder with the reference's weights, chosen by rank 0 for all and kept at the first call. Collective.

    Args:
        source: `model.init_from`.
        newest: finds the weights that a run stands for now.

    Raises:
        CheckpointError: what the run began with has been removed or changed. ConfigError: there are no weights.
    """
    chosen: list[Any] = [None, None]
    if world.is_main:
        try:
            chosen[0] = str(_chosen(run_dir / FILE, source, newest))
        except DrivetrainError as error:
            chosen[1] = error
    dist.broadcast_object_list(chosen, src=0)
    folder, wrong = chosen
    if wrong is not None:
        raise wrong
    return Path(folder)


def _chosen(path: Path, source: Path, newest: Callable[[Path], Path]) -> Path:
    if not path.is_file():
        folder = newest(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"folder": str(folder.relative_to(source)), "digest": digest(folder)}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(kept, indent=1))
        temporary.replace(path)
        sync_directory(path.parent)
        return folder
    try:
        kept = json.loads(path.read_text())
        folder = source / kept["folder"]
        same = digest(folder) == kept["digest"]
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        same = False
    if not same:
        raise CheckpointError(
            f"the weights that the run began with and {path} names, the reference of stage.kl_coef, are no longer "
            f"those in model.init_from={source}; restore them, or start in another run_dir"
        )
    return folder


def digest(folder: Path) -> str:
    """Of a checkpoint's marker, which has the digests of its files; else of all safetensors.

    Raises:
        CheckpointError: there are none.
    """
    files = [folder / MARKER] if (folder / MARKER).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors; name a directory with weights")
    return xxhash.xxh3_64_hexdigest("".join(f"{file.name}={hash_file(file)}\n" for file in files).encode())
