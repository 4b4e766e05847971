"""The notebooks run top to bottom, and the documentation shows the figures that they export."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from kernels import FocalGeometry, FocalLevel
from notebooks import ablation_tables, growth, key_maps
from notebooks.execution import NOTEBOOKS, execute
from notebooks.figures import BLUE, GREY, LARGEST, ORANGE, ROOT, SKY

PAGE = ROOT / "docs" / "notebooks.md"
FIGURES = ROOT / "docs" / "figures"
HEADER = (
    "ablation,scale,interaction,model.shift,model.window_size,parameters,flops,epoch,runs,finished,"
    "top1_mean,top1_deviation,top1_by_seed,paper_model,paper_top1,paper_top1_source"
)


def ablation_folder(folder: Path) -> Path:
    """Tables as `python -m analysis.ablations` writes them: a variant without runs, no paper."""
    tables = {
        "window_shift": [
            "window,false,3,1000000,20000000,last,3,3,70.0,1.0,0:70,Swin-T,80.2,recalled",
            "window,true,3,1000000,20000000,last,3,3,71.5,0.5,0:71,Swin-T,81.2,released",
            "both,false,3,1200000,24000000,last,3,2,75.0,0.7,0:75,Focal-T,82.2,released",
            "both,true,3,1200000,24000000,last,3,0,,,,Focal-T,81.9,recalled",
        ],
        "pooling": ["fc,true,3,1,1,last,1,1,70.0,,0:70,,,", "mean,true,3,,,last,1,1,70.5,,0:70,,,"],
    }
    for name, lines in tables.items():
        text = [HEADER, *(f"{name},cpu,{line}" for line in lines)]
        (folder / f"ablation_{name}_cpu.csv").write_text("\n".join(text) + "\n")
        (folder / f"ablation_{name}_cpu.md").write_text("| a |\n|---|\n")
    return folder


def exported(name: str) -> set[str]:
    """The figures that a notebook says it saves."""
    source = NOTEBOOKS[name].read_text(encoding="utf-8")
    return {f"{stem}.png" for stem in re.findall(r'figures\.save\(figure, \\"(\w+)\\"\)', source)}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_top_to_bottom_and_exports_its_figures(name: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    environment = {
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "ABLATION_TABLES": str(ablation_folder(tmp_path)),
    }
    execute(NOTEBOOKS[name], figures=figures, **environment)
    written = {path.name for path in figures.iterdir()}
    assert written
    assert written == exported(name)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_page_shows_every_figure_of_a_notebook(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = set(re.findall(rf"\(figures/({name}_\w+\.png)\)", page))
    stored = {path.name: path.stat().st_size for path in FIGURES.glob(f"{name}_*.png")}
    assert shown == set(stored)
    assert shown == exported(name)
    assert all(size <= LARGEST for size in stored.values())


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=list(NOTEBOOKS))
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_missing_ablation_tables_are_told_with_the_command_that_makes_them(tmp_path: Path) -> None:
    ablation_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found: cpu.*python -m analysis\.ablations"):
        ablation_tables.read_tables("imagenet", tmp_path)


def test_a_file_that_is_no_ablation_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "ablation_x_cpu.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"ablation_x_cpu\.csv must be a table"):
        ablation_tables.read_tables("cpu", tmp_path)


def test_an_effect_changes_one_setting_and_needs_two_results(tmp_path: Path) -> None:
    pooling, shift = ablation_tables.read_tables("cpu", ablation_folder(tmp_path))
    assert [effect.label for effect in ablation_tables.effects(pooling)] == [
        "interaction fc → mean"
    ]
    window, moved = ablation_tables.effects(shift)
    assert window.label == "interaction window → both (shift false)"
    assert (window.here, window.paper) == pytest.approx((5.0, 2.0))
    assert window.recalled
    assert window.error == pytest.approx((1.0 / 3 + 0.49 / 2) ** 0.5)
    assert moved.label == "shift false → true (window)"
    assert (moved.here, moved.paper) == pytest.approx((1.5, 1.0))


@pytest.mark.parametrize(
    ("boundary", "shift", "window", "colours", "keys"),
    [
        ("wrap", 0, (1, 1), {BLUE: 49, SKY: 120}, 169),
        ("wrap", 0, (0, 0), {BLUE: 49, SKY: 51, ORANGE: 69}, 169),
        ("mask", 0, (0, 0), {BLUE: 49, SKY: 51}, 100),
        # Of the window's 49 tokens 4 · 4 lie on the query's side of both seams.
        ("wrap", 3, (3, 3), {BLUE: 16, GREY: 33, SKY: 51, ORANGE: 69}, 136),
    ],
)
def test_a_drawn_level_shows_each_kind_of_key(
    boundary: str, shift: int, window: tuple[int, int], colours: dict[str, int], keys: int
) -> None:
    geometry = FocalGeometry(7, (FocalLevel(1, 13),), boundary, shift)
    axes = Figure().subplots()
    assert key_maps.draw_level(axes, geometry, (28, 28), window, 0, (3, 3)) == keys
    drawn = Counter(to_hex(patch.get_facecolor()) for patch in axes.patches)
    assert drawn == {to_hex(colour): count for colour, count in colours.items()}


def test_only_a_window_on_the_map_is_drawn() -> None:
    geometry = FocalGeometry(7, (FocalLevel(1, 7),))
    with pytest.raises(ValueError, match=r"window must lie in the 2 by 3 windows, got \(2, 0\)"):
        key_maps.draw_level(Figure().subplots(), geometry, (14, 20), (2, 0), 0)


def test_growth_ends_with_the_whole_geometry() -> None:
    illustration = FocalGeometry(4, [(1, 8), (2, 6), (4, 5)])  # type: ignore[arg-type]
    points = growth.focal_growth(illustration)
    assert [(p.keys, p.field, p.level) for p in points] == [
        (16, 4, 0),
        (36, 6, 0),
        (64, 8, 0),
        (100, 12, 1),
        (125, 20, 2),
    ]


def test_growth_shows_the_whole_geometry_even_where_it_sees_no_further() -> None:
    points = growth.focal_growth(FocalGeometry(7, (FocalLevel(1, 7), FocalLevel(7, 1))))
    assert [(p.keys, p.field) for p in points] == [(49, 7), (50, 7)]
    clipped = growth.focal_growth(FocalGeometry(7, (FocalLevel(1, 13), FocalLevel(7, 3))), 14)
    assert clipped[-1].field == 14
