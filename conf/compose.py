"""From command-line overrides to a `RunConfig`, and from a frozen `config.yaml` back to one."""

import dataclasses
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.explain import explain, misuse
from drivetrain.conf.learning_rate import default_matrix_rate, default_rate
from drivetrain.conf.schema import SCHEMAS, DataConfig, ModelConfig, RopeScaling, RunConfig
from drivetrain.conf.schema import options as options
from drivetrain.conf.source import model_of_init_from


def register_schemas() -> None:
    """Make the dataclasses known to Hydra as `<group>/<option>_schema`. Harmless when called twice."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for group, schemas in SCHEMAS.items():
        for option, schema in schemas.items():
            store.store(group=group, name=f"{option}_schema", node=_node(schema))
    _register_source(ModelConfig(rope_scaling=RopeScaling()))  # not null, so that a word may set a part of it


def _register_source(model: ModelConfig) -> None:
    """What `model=auto` begins with."""
    ConfigStore.instance().store(group="model", name="source_schema", node=OmegaConf.structured(model))


def _node(schema: type) -> DictConfig:
    node: DictConfig = OmegaConf.structured(schema)
    if schema is DataConfig:  # Hydra forbids new keys everywhere; the names in a mixture are the user's own
        OmegaConf.set_struct(node.mixture, False)
    return node


def compose(overrides: Sequence[str], source: ModelConfig | None = None) -> RunConfig:
    """Compose and type-check one run.

    Args:
        overrides: `key=value` words in Hydra's grammar.
        source: what `model=auto` stands for, where that is known; else it is read from `model.init_from`.

    Raises:
        ConfigError: an unknown key, a wrong type or value, a missing group option, or words that are no
            override; the message names the key, what was given, what is allowed and the nearest valid name.
    """
    if problem := misuse(overrides):
        raise ConfigError(problem)
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("drivetrain.conf", version_base="1.3"):
            composed = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
            if composed.hydra.runtime.choices.get("model") == "auto":
                # Again, with the source's values below those of the experiment and the words.
                _register_source(source or model_of_init_from(composed.model))
                composed = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
            return to_run_config(composed, composed.hydra.runtime.choices.get("experiment"))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(explain(error, overrides)) from error


def to_run_config(composed: DictConfig, experiment: str | None) -> RunConfig:
    """Typed objects out of a composed tree; Hydra's own node is left behind.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a key is unknown, or a mandatory value is missing or has the
            wrong type.
        ConfigError: a group's `name` is not one of its options.
    """
    base = OmegaConf.structured(RunConfig)
    for group, schemas in SCHEMAS.items():
        name = composed[group].name if len(schemas) > 1 else next(iter(schemas))
        if name not in schemas:
            raise ConfigError(f"{group}.name is {name}, and {group} can be {', '.join(schemas)}")
        base[group] = _node(schemas[name])
    base = OmegaConf.merge(base, {key: composed[key] for key in composed if key != "hydra"})
    base.experiment = experiment
    OmegaConf.resolve(base)
    _fill_rates(base)
    config = OmegaConf.to_object(base)
    assert isinstance(config, RunConfig)
    return config


def _fill_rates(base: ListConfig | DictConfig) -> None:
    """The learning rates that were not given."""
    assert isinstance(base, DictConfig)
    stage, optim = base.stage.name, base.optim
    if OmegaConf.is_missing(optim, "lr"):
        optim.lr = default_rate(stage, base.lora.rank)
    if OmegaConf.is_missing(optim, "matrix_lr"):  # false where there is no such key
        optim.matrix_lr = default_matrix_rate(stage)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every dotted key and its plain value; enums as their names, a mixture's sources by their names."""

    def walk(prefix: str, value: object) -> Iterator[tuple[str, Any]]:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        if isinstance(value, dict) and value:
            for name, child in value.items():
                yield from walk(f"{prefix}.{name}" if prefix else name, child)
        else:
            yield prefix, value.name if isinstance(value, Enum) else value

    return dict(walk("", config))


def load(path: Path) -> RunConfig:
    """Read a frozen `config.yaml`.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit the schema.
    """
    try:
        raw = OmegaConf.load(path)
        if not isinstance(raw, DictConfig):
            raise ConfigError("it is a list and not keys with values")
        return to_run_config(raw, raw.get("experiment"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; is its folder a run directory?") from error
    except (
        OmegaConfBaseException,
        ConfigError,
        yaml.YAMLError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:
        reason = str(error) if isinstance(error, ConfigError) else explain(error, [])
        raise ConfigError(f"{path} is not a run's configuration: {reason}") from error
