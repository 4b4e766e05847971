"""Training: one loop over Lightning Fabric, its checkpoints, metrics and records."""

from training.run import run
from training.saving import NotSavedError
from training.signals import RunStopped

__all__ = ["NotSavedError", "RunStopped", "run"]
