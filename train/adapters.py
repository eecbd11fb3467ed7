"""The two parts of a LoRA run's weights: a frozen base that lies elsewhere, and the adapters in its checkpoints.

A checkpoint says which base its adapters belong to: where it lay, and a digest of its files.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from drivetrain.conf.errors import CheckpointError, DrivetrainError
from drivetrain.conf.schema import LoraConfig, ModelConfig, RunConfig
from drivetrain.data.shards import hash_file
from drivetrain.model.initialize import local_rows
from drivetrain.model.lora import adapter_parameters, adapter_shapes, add_adapters, initialize_adapters
from drivetrain.model.peft_format import read_peft
from drivetrain.model.transformer import Transformer
from drivetrain.model.value_head import has_value_head, initialize_value_head, value_head_parameters
from drivetrain.train import checkpoint
from drivetrain.train.engine.base import Fill
from drivetrain.train.mesh import World


@dataclass(frozen=True, slots=True)
class Base:
    """`path`: a checkpoint's folder or a Hugging Face directory. `digest`: of its files' contents."""

    path: str
    digest: str


def digest_of(folder: Path) -> str:
    """xxh3 of a checkpoint's marker, which has the digest of every file; else of config.json and all weights."""
    if (folder / checkpoint.MARKER).is_file():
        return hash_file(folder / checkpoint.MARKER)
    digest = xxhash.xxh3_128()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def find_base(
    config: RunConfig, resolve: Callable[[Path], Path], state: dict[str, Any] | None, world: World
) -> Base | None:
    """The base of a LoRA run: what `model.init_from` stands for, and in a resume the one that it began with.

    Args:
        resolve: from a run directory to its newest checkpoint.
        state: of the checkpoint that is resumed.

    Returns:
        The same on every rank; None without LoRA. Collective.

    Raises:
        CheckpointError: the base of the checkpoint is not there any more.
    """
    if not config.lora.rank:
        return None
    found: list[Any] = [None]
    if world.is_main:
        try:
            found[0] = _find_base(config, resolve, state)
        except (DrivetrainError, OSError) as error:
            found[0] = error
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    base: Base = found[0]
    return base


def _find_base(config: RunConfig, resolve: Callable[[Path], Path], state: dict[str, Any] | None) -> Base:
    init_from = Path(str(config.model.init_from))
    if state is None:
        folder = resolve(init_from)
        return Base(str(folder.absolute()), digest_of(folder))
    began = Base(**state["base"])
    return Base(str(locate(began, init_from, resolve).absolute()), began.digest)


def locate(base: Base, elsewhere: Path | None, resolve: Callable[[Path], Path]) -> Path:
    """The folder with a base's weights: where they lay, or `elsewhere`; a run there may have saved newer ones.

    Raises:
        CheckpointError: the weights in neither of them have the base's digest.
    """
    places = [Path(base.path), *([elsewhere] if elsewhere is not None else [])]
    for place in places:
        if place.is_dir():
            folder = resolve(place)
            if digest_of(folder) == base.digest:
                return folder
    if elsewhere is None:
        where, remedy = "that does not hold", "restore them there"
    else:
        where = f"neither that nor {elsewhere} holds"
        remedy = "restore them, or pass the directory where they lie as model.init_from"
    raise CheckpointError(
        f"the adapters were trained on the weights in {base.path}, and {where} them; {remedy}"
    )


def base_state(base: Base | None) -> dict[str, Any]:
    """What a checkpoint's state says of the base."""
    return {} if base is None else {"base": asdict(base)}


def with_adapters(config: RunConfig, folder: Path | None, fill_base: Fill) -> Fill:
    """A fill for a model with adapters: the base's weights, and adapters from a checkpoint, from `lora.init_from`,
    or new ones; a value head, where the model has one, likewise."""

    def fill(model: Transformer) -> None:
        if has_value_head(model):
            initialize_value_head(model, config.seed)
        fill_base(model)
        if folder is not None:
            own = [*adapter_parameters(model), *value_head_parameters(model)]
            checkpoint.load_tensors(folder, {f"model.{name}": parameter.detach() for name, parameter in own})
            return
        initialize_adapters(model, config.seed)
        if config.lora.init_from is not None:
            _copy_in(model, read_peft(Path(config.lora.init_from), config.model, config.lora))

    return fill


def merged_with(folder: Path, lora: LoraConfig, scores: bool, fill_base: Fill) -> Fill:
    """A fill for a model without adapters of its own: the base's weights with a checkpoint's adapters added.

    Args:
        scores: whether the checkpoint has a value head, which is taken too.
    """

    def fill(model: Transformer) -> None:
        fill_base(model)
        add_adapters(model, read_adapters(folder, model.cfg, lora), model.cfg, lora)
        if scores:
            own = value_head_parameters(model)
            checkpoint.load_tensors(folder, {f"model.{name}": parameter.detach() for name, parameter in own})

    return fill


@torch.no_grad()
def _copy_in(model: Transformer, adapters: dict[str, Tensor]) -> None:
    """Copy whole adapters into a model's, of which a rank may hold some rows."""
    for name, parameter in adapter_parameters(model):
        local, row = local_rows(parameter)
        local.copy_(adapters[name][row : row + len(local)])


def read_adapters(folder: Path, model: ModelConfig, lora: LoraConfig) -> dict[str, Tensor]:
    """The whole adapters of a checkpoint in fp32, by name. Collective where there is a process group."""
    found = {f"model.{name}": torch.empty(shape) for name, shape in adapter_shapes(model, lora).items()}
    checkpoint.load_tensors(folder, found)
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


def lora_of(folder: Path) -> tuple[LoraConfig, Base] | None:
    """The adapters' settings and base of a checkpoint's folder; None for a checkpoint with whole weights."""
    state = checkpoint.read_state(folder)
    if "base" not in state:
        return None
    return LoraConfig(**state["config"]["lora"]), Base(**state["base"])
