"""What a directory with weights is: a Hugging Face model, a run, or one checkpoint of a run."""

import dataclasses
from enum import Enum
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.hf_config import model_from_hf
from drivetrain.conf.schema import ModelConfig

MARKER = "complete.json"  # written last into a checkpoint's folder
RUN_CONFIG, HF_CONFIG, STATE = "config.yaml", "config.json", "state.json"
HF = "hf"  # in a run: what the Hugging Face directory that it came from, or began from, said of itself
EXPECTED = "pass a run directory, one of its checkpoints, or a Hugging Face directory"


class Kind(Enum):
    hugging_face = "hugging_face"
    run = "run"
    checkpoint = "checkpoint"


def kind_of(source: Path) -> Kind | None:
    """None where a directory is none of them, or does not exist."""
    if (source / MARKER).is_file():
        return Kind.checkpoint
    if (source / RUN_CONFIG).is_file() or (source / "checkpoints").is_dir():
        return Kind.run
    return Kind.hugging_face if (source / HF_CONFIG).is_file() else None


def describes(source: Path) -> bool:
    """Whether a run or a checkpoint says what model it is of."""
    return (source / (STATE if kind_of(source) is Kind.checkpoint else RUN_CONFIG)).is_file()


def model_of(source: Path) -> ModelConfig:
    """The model whose weights a directory holds.

    Raises:
        ConfigError: it holds none, or what describes the model cannot be read.
    """
    match kind_of(source):
        case Kind.hugging_face:
            return model_from_hf(source)
        case Kind.run:
            path = source / RUN_CONFIG
        case Kind.checkpoint:
            path = source / STATE
        case None:
            what = "has no config.json and no config.yaml" if source.is_dir() else "is no directory"
            raise ConfigError(f"{source} {what}; {EXPECTED}")
    try:
        tree = OmegaConf.load(path)  # JSON is YAML
        assert isinstance(tree, DictConfig)
        model = tree.config.model if path.name == STATE else tree.model
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), model))
    except Exception as error:  # YAML's, OmegaConf's and the file system's have no common ground
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path} does not say what the model is ({reason}); {EXPECTED}") from error
    assert isinstance(found, ModelConfig)
    return dataclasses.replace(found, init_from=None)


def tokenizer_of(source: Path) -> Path | None:
    """The tokenizer that belongs to the weights: beside them, or the copy that a run has."""
    places = {
        Kind.hugging_face: source,
        Kind.run: source / "tokenizer",
        Kind.checkpoint: source.parent.parent / "tokenizer",
    }
    kind = kind_of(source)
    place = places[kind] if kind else None
    return place if place is not None and (place / "tokenizer.json").is_file() else None


def hf_folder(source: Path) -> Path:
    """Where config.json and generation_config.json are: beside Hugging Face's weights, or where a run keeps them. A
    run that was trained here has no config.json there, and perhaps no such folder."""
    match kind_of(source):
        case Kind.run:
            return source / HF
        case Kind.checkpoint:
            return source.parent.parent / HF
    return source


def model_of_init_from(composed: DictConfig) -> ModelConfig:
    """What `model=auto` stands for: the model that the composed `init_from` holds.

    Raises:
        ConfigError: init_from is not given, or does not say what model it is.
    """
    if composed.init_from is None:
        raise ConfigError("model=auto takes its sizes from what it starts from: add model.init_from=DIR")
    try:
        return model_of(Path(composed.init_from))
    except ConfigError as error:
        raise ConfigError(f"model.init_from: {error}") from error
