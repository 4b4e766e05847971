"""The arithmetic of docs/scaling.md."""

from pathlib import Path

import pytest

from benchmarks.scaling_estimate import Assumptions, all_reduce, estimate, parse, report

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"


def test_a_row_matches_a_hand_count() -> None:
    given = Assumptions(utilisation=0.1, half_batch=0, overlap=0, hop_us=0, link_efficiency=1)
    row = estimate("focal_tiny", 8, 128, given)
    speed = 989e12 * 0.1 / (6 * 4.92e9)
    assert row.gpu_images == pytest.approx(speed)
    assert row.reduce == pytest.approx(2 * 7 / 8 * 28.88e6 * 4 / 450e9)
    assert row.step == pytest.approx(128 / speed + row.reduce)
    assert row.steps == 300 * 1251  # 1,281,167 // 1,024
    evaluation = 300 * 50_000 / (8 * 3 * speed)
    assert row.hours == pytest.approx((row.steps * row.step + evaluation) / 3600)
    assert row.node_megabytes == pytest.approx(8 * 128 / row.step * 0.11)


def test_the_slowest_link_counts() -> None:
    given = Assumptions(hop_us=0, link_efficiency=1)
    assert all_reduce(1e9, 8, given) == pytest.approx(2 * 7 / 8 / 450)
    assert all_reduce(1e9, 16, given) == pytest.approx(2 * 15 / 16 / 50)


def test_the_page_shows_what_the_script_prints() -> None:
    page = PAGE.read_text(encoding="utf-8")
    values, table = report(Assumptions()).split("\n\n")
    assert table in page
    for line in values.splitlines():
        name, value = line.split(" = ")
        assert f"| `{name}` | {value} |" in page


def test_every_assumption_is_an_option() -> None:
    assert parse([]) == Assumptions()
    assert parse(["--epochs", "30", "--overlap", "0"]) == Assumptions(epochs=30, overlap=0)
    with pytest.raises(SystemExit):
        parse(["--utilisation", "0"])
