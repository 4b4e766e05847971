"""Train, evaluate or fine-tune a Focal Transformer. What can be set: `python train.py --help`."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from conf import ConfigError, expand_arguments, register_schemas, to_config
from launching import run_member

register_schemas()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(node: DictConfig) -> None:
    """Compose, validate, run."""
    try:
        config = to_config(node)
        hydra_config = HydraConfig.get()
        run_dir = Path(os.path.relpath(hydra_config.runtime.output_dir))
        if hydra_config.mode == RunMode.MULTIRUN:
            run_member(config.trainer, hydra_config, run_dir)
            return
        from training import NotSavedError, run  # imports torch: mistakes are told before that

        try:
            run(config, run_dir)
        except (FloatingPointError, NotSavedError) as error:
            raise SystemExit(f"error: {error}") from error
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error  # as a shell reports Ctrl-C


if __name__ == "__main__":
    try:
        sys.argv[1:] = expand_arguments(sys.argv[1:])
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    main()
