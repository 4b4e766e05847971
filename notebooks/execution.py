"""Execute a notebook top to bottom in a fresh kernel."""

from __future__ import annotations

import os
from pathlib import Path

from notebooks.figures import FOLDER, ROOT

__all__ = ["NOTEBOOKS", "execute"]

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
CELL_SECONDS = 600


def execute(path: Path, *, figures: Path | None = None, **environment: str) -> None:
    """Run all cells; the file stays as it is, without outputs.

    Args:
        path: The notebook.
        figures: Where its figures go; None for docs/figures.
        environment: Further variables of the kernel's environment.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed; holds its traceback.
        nbclient.exceptions.CellTimeoutError: A cell ran for more than 10 minutes.
    """
    import nbformat
    from nbclient import NotebookClient

    environment = {**os.environ, **environment}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if figures is not None:
        environment[FOLDER] = str(figures)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=environment)
