"""Train, evaluate or fine-tune a Focal Transformer. What can be set: `python train.py --help`."""

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from conf import ConfigError, expand_arguments, register_schemas, to_config
from launching import MemberError, run_member

register_schemas()

ERROR = "error.txt"  # why a run failed; gone when it is run again and ends well


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(node: DictConfig) -> None:
    """Compose, validate, run; a member of a sweep as a command of its own."""
    hydra_config = HydraConfig.get()
    run_dir = Path(os.path.relpath(hydra_config.runtime.output_dir))
    sweep = hydra_config.mode == RunMode.MULTIRUN
    told: tuple[type[Exception], ...] = (ConfigError, FloatingPointError)
    try:
        config = to_config(node)
        if sweep:
            run_member(config.trainer, hydra_config, run_dir)
            return
        from training import NotSavedError, run  # imports torch: mistakes are told before that

        told = (*told, NotSavedError)
        run(config, run_dir)
        (run_dir / ERROR).unlink(missing_ok=True)
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error  # as a shell reports Ctrl-C
    except MemberError as error:
        print(f"error: {error}", file=sys.stderr)
        raise  # when the sweep ends: the others run
    except Exception as error:
        if hydra_config.output_subdir is not None:  # a folder of its own, see `keep_to_itself`
            (run_dir / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        if isinstance(error, told) and not sweep:
            raise SystemExit(f"error: {error}") from error
        raise


if __name__ == "__main__":
    try:
        sys.argv[1:] = expand_arguments(sys.argv[1:])
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    # Read when torch is imported. On a CPU fresh memory then comes in huge pages where the system
    # has them, instead of a page fault per 4 KiB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    main()
