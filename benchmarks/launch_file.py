"""The launch table's file as text: read its entries, put measured ones in.

Within the braces of ``TABLE`` a line is an entry or a comment; comments belong to the entries below
them. New entries go to the end, under a comment of their own that says where they were measured;
the entries that they replace are taken out, and a comment that is left without entries goes as
well. All other lines stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kernels.launch_table import Tile

__all__ = ["Key", "read_entries", "rewrite"]

Key = tuple[str, int, int, str]  # kernel, padded head_dim, bytes per element, target

ENTRY = re.compile(
    r'    \("(\w+)", (\d+), (\d+), "(\w+)"\): Tile\((\d+), (\d+), (\d+), (\d+)\),(?:  #.*)?'
)
OPENING = re.compile(r"^TABLE: .*= \{$", re.MULTILINE)


def _parse(line: str) -> tuple[Key, Tile]:
    match = ENTRY.fullmatch(line)
    if match is None:
        raise ValueError(f"a line of the launch table must be an entry or a comment, got {line!r}")
    kernel, head_dim, itemsize, target, *sizes = match.groups()
    return (kernel, int(head_dim), int(itemsize), target), Tile(*(int(size) for size in sizes))


def _split(source: str) -> tuple[str, list[str], str]:
    """What is before the entries, their lines, what is behind them."""
    opening = OPENING.search(source)
    end = source.find("\n}", opening.end()) if opening else -1
    if opening is None or end < 0:
        raise ValueError("the launch table must be a dict literal: TABLE: ... = {")
    start = opening.end() + 1
    return source[:start], source[start : end + 1].splitlines(), source[end + 1 :]


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def read_entries(source: str) -> dict[Key, Tile]:
    """The entries of a launch table's file.

    Raises:
        ValueError: It has another form.
    """
    return dict(_parse(line) for line in _split(source)[1] if not _is_comment(line))


def rewrite(source: str, entries: Mapping[Key, Tile], comment: Sequence[str]) -> str:
    """The file with ``entries`` put in.

    Args:
        source: The file.
        entries: What was measured.
        comment: Lines that say where; each is cut to the width of the house.

    Returns:
        The new file; the same for the same arguments, and in the formatter's form.

    Raises:
        ValueError: The file has another form.
    """
    before, lines, after = _split(source)
    groups: list[tuple[list[str], list[str]]] = [([], [])]
    for line in lines:
        if _is_comment(line):
            if groups[-1][1]:
                groups.append(([], []))
            groups[-1][0].append(line)
        elif _parse(line)[0] not in entries:
            groups[-1][1].append(line)
        else:
            groups[-1][1].append("")
    kept = [
        line
        for comments, held in groups
        if any(held)
        for line in [*comments, *(entry for entry in held if entry)]
    ]
    new = [f"    # {line}"[:100].rstrip() for line in comment] if entries else []
    for (kernel, head_dim, itemsize, target), tile in sorted(entries.items()):
        sizes = f"{tile.block_m}, {tile.block_n}, {tile.num_warps}, {tile.num_stages}"
        new.append(f'    ("{kernel}", {head_dim}, {itemsize}, "{target}"): Tile({sizes}),')
    return before + "\n".join([*kept, *new]) + "\n" + after
