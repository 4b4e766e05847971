"""Tables and figures of ablations, from the folders that their sweeps left.

    python -m analysis.ablations outputs/ablation
    python -m analysis.ablations outputs/ablation --output docs/figures --page docs/ablations.md

Each sweep gives `ablation_NAME_SCALE.md`, `.csv` and `.png`, and its table on the console: size and
work of each variant's model, top-1 over seeds, speed and memory, and the paper's figures with their
source (`analysis/paper.yaml`). Members that are missing, unfinished or failed are listed with the
reason. Top-1 is that of the last epoch, for the best one is chosen by the figure that it then
reports; `--epoch best` takes it all the same.

With `--page` the tables also replace what lies between `<!-- ablation_NAME_SCALE -->` and
`<!-- end -->` in a Markdown page.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from analysis.figures import draw
from analysis.results import EPOCHS, Result, collect
from analysis.sweeps import find_sweeps
from analysis.tables import as_csv, markdown
from conf import ConfigError


def fill(page: str, results: Sequence[Result]) -> str:
    """Put tables into the places that a page has for them.

    Raises:
        ConfigError: The page has no place for a table.
    """
    for result in results:
        stem = result.sweep.stem
        place = re.compile(rf"(?<=<!-- {re.escape(stem)} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        found = place.search(page)
        if found is None:
            raise ConfigError(f"--page must hold <!-- {stem} --> and <!-- end -->")
        page = page[: found.start()] + markdown(result) + page[found.end() :]
    return page


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="sweeps, or above them")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: in each sweep")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page to put the tables in")
    parser.add_argument("--epoch", default=EPOCHS[0], choices=EPOCHS, help="which one counts")
    options = parser.parse_args(words)
    try:
        results = [collect(sweep, epoch=options.epoch) for sweep in find_sweeps(options.runs)]
        page = None
        if options.page is not None:
            if not options.page.is_file():
                raise ConfigError(f"--page must be a file, got {options.page}")
            page = fill(options.page.read_text(encoding="utf-8"), results)
        _write(results, options.output)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    if page is not None:
        options.page.write_text(page, encoding="utf-8")


def _write(results: Sequence[Result], output: Path | None) -> None:
    owners: dict[Path, Path] = {}
    for result in results:
        base = (output or result.sweep.path) / result.sweep.stem
        other = owners.setdefault(base, result.sweep.path)
        if other != result.sweep.path:
            raise ConfigError(
                f"--output must get sweeps of different names, got {base.name} from {other} and "
                f"from {result.sweep.path}"
            )
    for base, result in zip(owners, results, strict=True):
        base.parent.mkdir(parents=True, exist_ok=True)
        table = markdown(result)
        Path(f"{base}.md").write_text(table, encoding="utf-8")
        Path(f"{base}.csv").write_text(as_csv(result), encoding="utf-8")
        Path(f"{base}.png").write_bytes(draw(result))
        print(f"{table}\n{base}.md, .csv, .png\n")


if __name__ == "__main__":
    main()
