"""Images that cannot be decoded: named when met, counted once each, refused above a limit.

The loading processes pass what they met along with the batch, so that the count depends on the
batches a run has consumed and not on how far its loaders have read ahead.
"""

import logging
from collections.abc import Iterable

import torch.distributed as dist

from conf.schema import ConfigError

_logger = logging.getLogger(__name__)

Broken = tuple[str, str]  # name and reason of a broken image
SHOWN = 20


class BrokenImages:
    """The distinct broken images that a run has met, of training and of evaluation.

    Args:
        limit: Most of them that the run may leave out.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.found: dict[str, str] = {}
        self.told = 0  # how many there were when their number was last logged

    def add(self, met: Iterable[Broken]) -> None:
        """Count what a batch of this process met and name what is new.

        Raises:
            ConfigError: There are more than `limit`; the message names them.
        """
        for name, reason in met:
            if name not in self.found:
                self.found[name] = reason
                _logger.warning(
                    "skipped a broken image (%d of at most %d): %s: %s",
                    len(self.found),
                    self.limit,
                    name,
                    reason,
                )
        self._check()

    def gather(self) -> int:
        """Count over all processes, which must all call it, and log the number if it grew.

        Returns:
            The number so far.

        Raises:
            ConfigError: Together they met more than `limit`.
        """
        together = dist.is_available() and dist.is_initialized()
        if together:
            shares: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(shares, self.found)
            for share in shares:
                self.found.update(share)
        self._check()
        if len(self.found) > self.told and (not together or dist.get_rank() == 0):
            _logger.warning("broken images so far: %d of at most %d", len(self.found), self.limit)
        self.told = len(self.found)
        return len(self.found)

    def _check(self) -> None:
        if len(self.found) <= self.limit:
            return
        lines = [f"  {name}: {reason}" for name, reason in list(self.found.items())[:SHOWN]]
        if len(self.found) > SHOWN:
            lines.append(f"  … and {len(self.found) - SHOWN} more")
        raise ConfigError(
            f"data.max_broken must be at least the number of images that cannot be decoded, got "
            f"{self.limit}; broken so far:\n" + "\n".join(lines)
        )
