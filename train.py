"""Train, evaluate or fine-tune a Focal Transformer. What can be set: `python train.py --help`."""

import os
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from conf import Config, ConfigError, register_schemas, validate


def to_config(node: DictConfig) -> Config:
    """The composed configuration as validated dataclasses; nothing below sees OmegaConf.

    Raises:
        ConfigError: A mandatory key has no value, or a value breaks a rule.
    """
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be set: {missing[0]}=VALUE")
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    validate(config)
    return config


register_schemas()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(node: DictConfig) -> None:
    """Compose, validate, run."""
    try:
        config = to_config(node)
        from training import run  # imports torch: a mistake in the settings is told before that

        hydra_config = HydraConfig.get()
        run_dir = Path(os.path.relpath(hydra_config.runtime.output_dir))
        run(config, run_dir, multirun=hydra_config.mode == RunMode.MULTIRUN)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
