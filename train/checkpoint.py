"""Checkpoints that any engine reads on any number of ranks.

A checkpoint is a folder `step_00000100/`: safetensors shards written through torch.distributed.checkpoint,
`state.json` (step, data position, versions, configuration, W&B run id) and, last of all, `complete.json` with
the xxh3 digest of every file. A folder without that marker does not count. Nothing in it is ever unpickled.
"""

import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from drivetrain.conf.errors import CheckpointError
from drivetrain.conf.schema import CheckpointConfig, RunConfig
from drivetrain.data.shards import hash_file, sync_directory
from drivetrain.train.mesh import World

MARKER = "complete.json"
STATE = "state.json"
PACKAGES = ("drivetrain", "torch", "triton", "deepspeed", "numpy")  # whose versions it records
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """Steps with a marker, ascending."""
    if not folder.is_dir():
        return []
    matches = [_NAME.fullmatch(entry.name) for entry in folder.iterdir() if (entry / MARKER).is_file()]
    return sorted(int(match[1]) for match in matches if match)


def verify(folder: Path) -> None:
    """Compare every file of one checkpoint with the digests in its marker.

    Raises:
        CheckpointError: names the first file that is missing, cut short or changed.
    """
    try:
        digests: dict[str, str] = json.loads((folder / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / MARKER} is missing or garbled; the checkpoint is not complete"
        ) from error
    for name, digest in sorted(digests.items()):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint cannot be used")
        if hash_file(path) != digest:
            raise CheckpointError(f"{path} is corrupt: its xxh3 digest is not the one in {MARKER}")


def newest_whole(folder: Path, say: Callable[[str], None]) -> int | None:
    """The newest step whose files all match their digests; says which ones it passed over and why."""
    for step in reversed(complete_steps(folder)):
        try:
            verify(folder / checkpoint_name(step))
        except CheckpointError as error:
            say(f"{error}; falling back to an earlier one")
            continue
        return step
    return None


def set_aside(folder: Path, step: int, say: Callable[[str], None]) -> None:
    """Rename the complete checkpoints after `step`, which a resume passed over, to `*.corrupt`.

    Under their own names they would be the newest ones, and pruning would keep them instead of whole ones.
    """
    for newer in complete_steps(folder):
        if newer > step:
            path = folder / checkpoint_name(newer)
            aside = path.with_name(path.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            say(f"{path} is kept as {aside.name}; remove it when nobody needs it")


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of one checkpoint.

    Raises:
        CheckpointError: missing or not JSON.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from error
    return state


def is_reward_model(folder: Path) -> bool:
    """Whether a checkpoint has a value head in place of the vocabulary's."""
    stage = read_state(folder).get("config", {}).get("stage", {})
    return bool(stage.get("name") == "reward_model")


def no_logits(folder: Path) -> CheckpointError:
    """What to say where text is wanted of a reward model."""
    return CheckpointError(
        f"{folder} is a reward model's, whose head gives a score in place of logits; name the model that it was "
        "made from"
    )


def load_tensors(folder: Path, tensors: dict[str, Tensor], process_group: Any = None) -> None:
    """Fill `tensors` (plain or sharded) by name, in place. Collective, unless there is no process group.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            if alone:  # torch says so each time; here it is meant
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(folder)),
                process_group=process_group,
                no_dist=alone,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} does not fit this model: {reason}") from error


class _Writer(HuggingFaceStorageWriter):
    """Writes into `<name>.tmp`; the coordinator renames it when every rank has finished.

    Each rank leaves the digest of the files that it wrote beside them; the coordinator gathers them into the
    marker. So a checkpoint that has its final name is whole.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.final, self.temporary = folder, folder.with_name(folder.name + ".tmp")
        super().__init__(str(self.temporary), save_distributed=True)
        self.state = state

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in future.wait()}:
            path = self.temporary / name
            _write_synced(path.with_name(name + ".xxh3"), hash_file(path))
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        digests = {}
        for sidecar in sorted(self.temporary.glob("*.xxh3")):
            digests[sidecar.stem] = sidecar.read_text()
            sidecar.unlink()
        _write_synced(self.temporary / STATE, json.dumps(self.state, indent=1))
        digests[STATE] = hash_file(self.temporary / STATE)
        _write_synced(self.temporary / MARKER, json.dumps({"files": digests}, indent=1))
        if self.final.exists():  # a folder that lost its marker: it did not count
            shutil.rmtree(self.final)
        self.temporary.rename(self.final)
        sync_directory(self.final.parent)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def origin(config: RunConfig) -> dict[str, Any]:
    """The configuration and the versions that a checkpoint comes from, as JSON takes them."""
    return {
        "config": OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(slots=True)
class _Pending:
    step: int
    done: Any  # a concurrent.futures.Future


class Checkpointer:
    """Saves without stopping the training, keeps what the configuration says, never touches the last whole one.

    Every method but `finished` is collective.
    """

    def __init__(self, folder: Path, cfg: CheckpointConfig, world: World) -> None:
        self.folder, self.cfg, self.world = folder, cfg, world
        self._pending: _Pending | None = None
        # Saving talks in the background while training talks: it needs a group of its own.
        self._group = dist.new_group(backend="gloo") if cfg.asynchronous else None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for torn in folder.glob("*.tmp"):
                shutil.rmtree(torn)
        world.barrier()

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> str | None:
        """Begin saving (or save, when not asynchronous).

        Returns:
            Why the *previous* save (this one, when not asynchronous) failed, or None. A failed save leaves
            every earlier checkpoint as it was.
        """
        failed = self.wait()
        writer = _Writer(self.folder / checkpoint_name(step), state)
        if self._group is not None:
            done = async_save(
                dict(tensors),
                storage_writer=writer,
                process_group=self._group,
                async_checkpointer_type=AsyncCheckpointerType.THREAD,
            )
            self._pending = _Pending(step, done)
            return failed
        try:
            dcp_save(dict(tensors), storage_writer=writer)
        except Exception as error:
            return self._clean(step, error)
        self._prune()
        return None

    def finished(self) -> bool:
        """Whether a background save has ended on this rank; once it has on all, `wait` does not block."""
        return self._pending is not None and self._pending.done.done()

    def wait(self) -> str | None:
        """Let a background save end. Returns why it failed, or None."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        error: BaseException | None = pending.done.exception()
        if self.world.any(error is not None):
            return self._clean(pending.step, error or RuntimeError("another rank could not write its part"))
        self._prune()
        return None

    def _clean(self, step: int, error: BaseException) -> str:
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(self.folder / f"{checkpoint_name(step)}.tmp", ignore_errors=True)
        self.world.barrier()
        return f"the checkpoint of step {step} could not be written: {_root_cause(error)}; earlier ones are whole"

    def _prune(self) -> None:
        if not self.world.is_main:
            return
        steps = complete_steps(self.folder)
        for step in steps[: -self.cfg.keep_last]:
            if not (self.cfg.keep_every and step % self.cfg.keep_every == 0):
                shutil.rmtree(self.folder / checkpoint_name(step))


def _root_cause(error: BaseException) -> str:
    """The operating system's words out of torch's nested ones."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
