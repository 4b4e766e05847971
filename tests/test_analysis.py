"""Tables and figures of sweeps: made-up sweeps in the real format, and a real one."""

import csv
import io
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import OmegaConf
from test_train import python_train

import conf
from analysis.ablations import fill, main
from analysis.costs import count
from analysis.paper import QUANTITIES, SOURCES, paper_row
from analysis.results import collect
from analysis.sweeps import find_sweeps, read_sweep
from analysis.tables import as_csv, markdown
from conf import compose, register_schemas
from training.records import Records

ROOT = str(Path(conf.__file__).parent)
BASE = ("experiment=debug", "trainer.epochs=2", "model.depths=[1,1,1,1]", "name=ablation/boundary")
AXES = {"model.boundary": "wrap,mask", "trainer.seed": "0,1,2"}
MEMBERS = [
    {"model.boundary": boundary, "trainer.seed": seed}
    for boundary in ("wrap", "mask")
    for seed in ("0", "1", "2")
]


def write_sweep(folder: Path, axes: dict[str, Any] | None = None, *arguments: str) -> Path:
    """What Hydra leaves of a sweep before its first member."""
    register_schemas()
    folder.mkdir(parents=True)
    with hydra.initialize_config_dir(ROOT, version_base="1.3"):
        node = hydra.compose("config", overrides=[*BASE], return_hydra_config=True)
    OmegaConf.set_struct(node, False)
    node.hydra.sweeper.params = AXES if axes is None else axes
    node.hydra.overrides.task = [*BASE, *arguments]
    OmegaConf.save(node, folder / "multirun.yaml")
    return folder


def write_member(
    folder: Path, given: dict[str, str], top1: list[float], error: str | None = None
) -> None:
    """What a run leaves that evaluated `top1` after each epoch."""
    texts = [f"{key}={value}" for key, value in given.items()]
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump([*texts, *BASE]))
    if error is not None:
        (folder / "error.txt").write_text(error)
    config = compose(*BASE, *texts)
    values = asdict(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    records = Records(folder, name="x", logger=config.logger, config=values, warn=print)
    for epoch, value in enumerate(top1, start=1):
        line = {"images_per_second": 100.0 * epoch, "peak_memory_bytes": epoch << 30}
        records.write("epoch", epoch, {"epoch": epoch, "val_top1": value, **line})
    records.close()


def write_all(folder: Path, results: list[list[float]]) -> Path:
    write_sweep(folder)
    for index, (member, top1) in enumerate(zip(MEMBERS, results, strict=True)):
        write_member(folder / str(index), member, top1)
    return folder


DONE = [[10.0, 90.0], [10.0, 92.0], [99.0, 97.0], [1.0, 80.0], [1.0, 80.0], [1.0, 80.5]]


def test_top1_is_mean_and_deviation_over_seeds_of_the_last_epoch(tmp_path: Path) -> None:
    result = collect(read_sweep(write_all(tmp_path / "cpu", DONE)))
    wrap, mask = result.rows
    assert (wrap.label, mask.label) == ("wrap", "mask")
    assert wrap.top1 == [90.0, 92.0, 97.0]
    assert wrap.mean == pytest.approx(93.0)
    assert wrap.deviation == pytest.approx(statistics.stdev([90, 92, 97]))
    assert wrap.images_per_second == 200.0
    assert wrap.memory == 2048
    assert result.notes == ()
    best = collect(result.sweep, epoch="best")
    assert best.rows[0].top1 == [90.0, 92.0, 99.0]
    assert "of the last epoch" in markdown(result)
    assert "of each run's best epoch" in markdown(best)


def test_a_table_shows_the_models_cost_and_the_papers_figure_with_its_source(
    tmp_path: Path,
) -> None:
    text = markdown(collect(read_sweep(write_all(tmp_path / "cpu", DONE))))
    cost = count(asdict(compose(*BASE)))
    row = next(line for line in text.splitlines() if line.startswith("| wrap"))
    assert f"{cost.parameters / 1e6:.2f}M" in row
    assert f"{cost.flops / 1e6:.1f}M" in row
    assert "93.00 ± 3.61 (3)" in row
    assert "82.2 (released)" in row
    assert "(released)" not in next(x for x in text.splitlines() if x.startswith("| mask"))


def test_cost_is_that_of_the_released_model() -> None:
    config = compose("model=focal_tiny", "data=synthetic", "data.img_size=224")
    cost = count(asdict(config))
    assert cost.parameters == 28_827_460
    assert cost.flops / 1e9 == pytest.approx(4.901, abs=5e-4)


def test_missing_unfinished_and_failed_members_are_told_with_the_reason(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "cpu")
    write_member(folder / "a", MEMBERS[0], [50.0, 60.0])
    write_member(folder / "b", MEMBERS[1], [50.0])
    failed = "Traceback (most recent call last):\n  File x\nFloatingPointError: the loss is nan\n"
    write_member(folder / "c", MEMBERS[2], [50.0], failed)
    result = collect(read_sweep(folder))
    assert result.notes == (
        "wrap, seed 1: unfinished: 1 of 2 epochs",
        "wrap, seed 2: failed: FloatingPointError: the loss is nan",
        "mask, seed 0: missing: it has not begun",
        "mask, seed 1: missing: it has not begun",
        "mask, seed 2: missing: it has not begun",
    )
    text = markdown(result)
    assert "60.00 (1 of 3)" in text
    assert "— (0 of 3)" in text
    assert all(f"- {note}\n" in text for note in result.notes)


def test_a_member_that_finished_after_it_had_failed_counts(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "cpu", {"model.boundary": "wrap"})
    write_member(folder / "0", {"model.boundary": "wrap"}, [1.0, 60.0], "OSError: disk full")
    (row,) = collect(read_sweep(folder)).rows
    assert row.top1 == [60.0]


def test_a_line_that_was_cut_off_ends_a_members_history(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "cpu", {"model.boundary": "wrap"})
    write_member(folder / "0", {"model.boundary": "wrap"}, [1.0, 60.0])
    file = folder / "0/metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    (member,) = read_sweep(folder).members
    assert member.fault == "unfinished: 1 of 2 epochs"


def test_of_two_folders_of_a_member_the_finished_one_counts_and_strays_are_named(
    tmp_path: Path,
) -> None:
    folder = write_sweep(tmp_path / "cpu", {"model.boundary": "wrap"})
    write_member(folder / "new", {"model.boundary": "wrap"}, [1.0])
    write_member(folder / "old", {"model.boundary": "wrap"}, [1.0, 2.0])
    write_member(
        folder / "short", {"model.boundary": "wrap", "trainer.batch_size": "8"}, [1.0, 3.0]
    )
    result = collect(read_sweep(folder))
    assert result.rows[0].top1 == [2.0]
    assert result.notes == ("left out, as they differ in more than the axes: short",)


def test_members_of_other_settings_than_the_axes_are_told(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "cpu", DONE)
    file = folder / "4/config.yaml"
    file.write_text(file.read_text().replace("clip_grad: 5.0", "clip_grad: 1.0"))
    notes = collect(read_sweep(folder)).notes
    assert notes == ("members differ off the axes: trainer.clip_grad: 5.0 → 1.0",)


def test_one_more_member_by_a_later_command_leaves_the_others_where_they_are(
    tmp_path: Path,
) -> None:
    folder = write_all(tmp_path / "cpu", DONE)
    more = write_sweep(tmp_path / "more", AXES, "model.boundary=wrap", "trainer.seed=7")
    (more / "multirun.yaml").replace(folder / "multirun.yaml")
    write_member(folder / "6", {"model.boundary": "wrap", "trainer.seed": "7"}, [1.0, 50.0])
    result = collect(read_sweep(folder))
    assert result.notes == ()
    assert [row.label for row in result.rows] == ["wrap", "mask"]
    assert [len(row.top1) for row in result.rows] == [4, 3]
    assert 50.0 in result.rows[0].top1


def test_axes_are_those_of_the_command_line_too_and_one_value_is_no_column(tmp_path: Path) -> None:
    axes = {"model.boundary": "wrap,mask", "model.window_size": 7, "trainer.seed": "range(3)"}
    folder = write_sweep(tmp_path / "cpu", axes, "trainer.seed=0", "model.expand_size=0,3")
    sweep = read_sweep(folder)
    assert sweep.axes == ("model.boundary", "model.expand_size")
    assert sweep.fixed == {"model.window_size": "7"}
    assert [tuple(member.values.values()) for member in sweep.members] == [
        ("wrap", "7", "0"),
        ("wrap", "7", "3"),
        ("mask", "7", "0"),
        ("mask", "7", "3"),
    ]


SWEEPS = {
    ("interaction", "cpu"): ["window", "local", "global", "both"],
    ("depth", "imagenet"): [
        f"{blocks}, {depths}"
        for blocks in ("swin", "both")
        for depths in ("2-2-2-2", "2-2-4-2", "2-2-6-2")
    ],
    ("depth", "cpu"): [
        f"{blocks}, {depths}"
        for blocks in ("swin", "both")
        for depths in ("1-1-1-1", "1-1-2-1", "1-1-3-1")
    ],
    ("window_size", "cpu"): ["swin, 3", "swin, 6", "both, 3", "both, 6"],
    ("window_shift", "cpu"): ["window, false", "window, true", "both, false", "both, true"],
}


@pytest.mark.parametrize(("name", "scale"), SWEEPS)
def test_a_sweep_of_an_experiment_has_its_variants_at_its_scale_beside_the_papers(
    name: str, scale: str, tmp_path: Path
) -> None:
    register_schemas()
    given = [f"experiment=ablation/{name}", f"scale={scale}", "data.img_size=56"]
    with hydra.initialize_config_dir(ROOT, version_base="1.3"):
        node = hydra.compose("config", overrides=given, return_hydra_config=True)
    OmegaConf.save(node, tmp_path / "multirun.yaml")
    result = collect(read_sweep(tmp_path))
    assert (result.sweep.name, result.sweep.scale) == (name, scale)
    assert [row.label for row in result.rows] == SWEEPS[name, scale]
    assert all(row.paper is not None for row in result.rows)


def test_csv_has_every_number_in_full(tmp_path: Path) -> None:
    results = [[1.0, 90.0 + 1 / 3 * seed] for seed in range(6)]
    result = collect(read_sweep(write_all(tmp_path / "cpu", results)))
    lines = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert [line["model.boundary"] for line in lines] == ["wrap", "mask"]
    assert float(lines[0]["top1_mean"]) == statistics.fmean([90, 90 + 1 / 3, 90 + 2 / 3])
    assert int(lines[0]["flops"]) == count(asdict(compose(*BASE))).flops
    assert (lines[0]["paper_top1"], lines[0]["paper_top1_source"]) == ("82.2", "released")
    assert lines[1]["paper_top1"] == ""


def test_files_and_page_are_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_all(tmp_path / "runs/boundary/cpu", DONE)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- ablation_boundary_cpu -->\nold\n<!-- end -->\nafter\n")
    main([str(tmp_path / "runs"), "--output", str(tmp_path / "out"), "--page", str(page)])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"ablation_boundary_cpu.{kind}" for kind in ("csv", "md", "png")]
    table = (tmp_path / "out/ablation_boundary_cpu.md").read_text()
    assert table in capsys.readouterr().out
    assert (tmp_path / "out/ablation_boundary_cpu.png").read_bytes().startswith(b"\x89PNG")
    begin, end = "<!-- ablation_boundary_cpu -->\n", "<!-- end -->\n"
    assert page.read_text() == f"before\n{begin}{table}{end}after\n"
    again = fill(page.read_text(), [collect(s) for s in find_sweeps([tmp_path / "runs"])])
    assert again == page.read_text()


def test_a_sweep_without_any_run_has_a_table_and_a_figure(tmp_path: Path) -> None:
    main([str(write_sweep(tmp_path / "cpu"))])
    assert "— (0 of 3)" in (tmp_path / "cpu/ablation_boundary_cpu.md").read_text()
    assert (tmp_path / "cpu/ablation_boundary_cpu.png").is_file()


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "none", "RUNS must be folders, got"),
        (tmp_path / "empty", "no multirun.yaml lies under"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(path)])
    first, second = (write_sweep(tmp_path / name / "cpu") for name in ("a", "b"))
    with pytest.raises(SystemExit, match="sweeps of different names"):
        main([str(first), str(second), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="--page must be a file"):
        main([str(first), "--page", str(tmp_path / "none.md")])
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(SystemExit, match="--page must hold <!-- ablation_boundary_cpu -->"):
        main([str(first), "--page", str(tmp_path / "page.md")])
    (first / "multirun.yaml").write_text("a: [")
    with pytest.raises(SystemExit, match=r"multirun.yaml must be what Hydra writes"):
        main([str(first)])


def test_data_that_are_not_here_leave_the_cost_out_with_the_reason(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "cpu", {"model.boundary": "wrap"})
    write_member(folder / "0", {"model.boundary": "wrap"}, [1.0, 2.0])
    config = yaml.safe_load((folder / "0/config.yaml").read_text())
    config["data"] = asdict(compose("data=imagefolder", "data.root=/not/here").data)
    (folder / "0/config.yaml").write_text(yaml.safe_dump(config))
    result = collect(read_sweep(folder))
    assert result.rows[0].cost is None
    assert "not counted: data.root" in result.notes[0]
    assert result.rows[0].top1 == [2.0]


@pytest.mark.parametrize(
    ("ablation", "values", "model", "top1"),
    [
        ("window_shift", {"interaction": "both", "model.shift": "true"}, "Focal-T with", 81.9),
        ("depth", {"interaction": "swin", "model.depths": "[1,1,1,1]"}, "Swin-T, 2-2-2-2", 78.7),
        ("window_size", {"interaction": "both", "model.window_size": "14"}, "Focal-T, win", 82.3),
    ],
)
def test_a_variant_stands_beside_what_it_stands_for_in_the_paper(
    ablation: str, values: dict[str, str], model: str, top1: float
) -> None:
    row = paper_row(ablation, values)
    assert row is not None
    assert row.model.startswith(model)
    assert row.figures["top1"].value == top1
    assert row.figures["top1"].source == "recalled"


def test_every_figure_of_the_paper_has_a_known_quantity_and_source() -> None:
    content = yaml.safe_load(
        (Path(paper_row.__code__.co_filename).parent / "paper.yaml").read_text()
    )
    for row in [row for rows in content.values() for row in rows]:
        figures = {key: value for key, value in row.items() if key not in ("when", "model")}
        assert figures.keys() <= set(QUANTITIES)
        assert all(source in SOURCES for _, source in figures.values())


def test_a_real_sweep_is_read(tmp_path: Path) -> None:
    given = ["experiment=debug", "model.depths=[1,1,1,1]", "model.boundary=wrap,mask"]
    done = python_train(tmp_path, "-m", *given, "trainer.seed=3", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    result = collect(read_sweep(tmp_path / "sweep"))
    assert result.notes == ()
    assert [row.label for row in result.rows] == ["wrap", "mask"]
    for index, row in enumerate(result.rows):
        lines = (tmp_path / f"sweep/{index}/metrics.jsonl").read_text().splitlines()
        assert row.top1 == [json.loads(lines[-1])["val_top1"]]
