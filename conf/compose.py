"""From YAML files and overrides to one typed, validated configuration."""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from conf.schema import Config, ConfigError, register_schemas
from conf.validation import validate


def to_config(node: DictConfig) -> Config:
    """A composed configuration as validated dataclasses; nothing after this sees OmegaConf.

    Raises:
        ConfigError: A mandatory key has no value, or a value breaks a rule.
    """
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be set: {missing[0]}=VALUE")
    config = OmegaConf.to_object(node)
    if not isinstance(config, Config):
        raise ConfigError("the primary configuration must start from schema/config")
    validate(config)
    return config


def compose(*overrides: str) -> Config:
    """The configuration that `python train.py OVERRIDES` would run, for use from Python.

    Raises:
        ConfigError: A mandatory key has no value, or a value breaks a rule.
        hydra.errors.HydraException: An override names no key or has the wrong type.
    """
    register_schemas()
    folder = str(Path(__file__).resolve().parent)
    with hydra.initialize_config_dir(folder, version_base="1.3"):
        return to_config(hydra.compose("config", overrides=list(overrides)))
