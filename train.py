"""Train, evaluate or fine-tune a Focal Transformer. What can be set: `python train.py --help`."""

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from conf import ConfigError, expand_resume, register_schemas, to_config

register_schemas()


ERROR = "error.txt"  # why a member of a sweep failed


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(node: DictConfig) -> None:
    """Compose, validate, run. A sweep goes on after a member that fails, and fails at its end."""
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    run_dir = Path(os.path.relpath(hydra_config.runtime.output_dir))
    told: tuple[type[Exception], ...] = (ConfigError, FloatingPointError)
    try:
        config = to_config(node)
        from training import NotSavedError, run  # imports torch: mistakes are told before that

        told = (*told, NotSavedError)
        run(config, run_dir, multirun=multirun)
        (run_dir / ERROR).unlink(missing_ok=True)
        return
    except Exception as error:
        if not multirun:
            if isinstance(error, told):
                raise SystemExit(f"error: {error}") from error
            raise
        (run_dir / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        failure = f"{run_dir} failed: {error}"
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error  # as a shell reports Ctrl-C
    # Hydra keeps what is raised until the sweep ends: not with the frames that hold the model.
    print(failure, file=sys.stderr)
    raise RuntimeError(failure)


if __name__ == "__main__":
    try:
        sys.argv[1:] = expand_resume(sys.argv[1:])
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    main()
