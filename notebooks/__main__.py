"""Execute notebooks and export their figures to docs/figures: `python -m notebooks [NAME…]`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from nbclient.exceptions import CellExecutionError, CellTimeoutError

from notebooks.execution import NOTEBOOKS, execute


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NOTEBOOKS)} (all)")
    names = parser.parse_args(words).names or list(NOTEBOOKS)
    unknown = [name for name in names if name not in NOTEBOOKS]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(NOTEBOOKS)}, got {', '.join(unknown)}")
    for name in names:
        start = time.monotonic()
        try:
            execute(NOTEBOOKS[name])
        except (CellExecutionError, CellTimeoutError) as error:
            raise SystemExit(f"{NOTEBOOKS[name].name}: {error}") from error
        print(f"{NOTEBOOKS[name].name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
