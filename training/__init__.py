"""Training: one loop over Lightning Fabric, its checkpoints, metrics and records."""

from training.run import run

__all__ = ["run"]
