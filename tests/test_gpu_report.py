"""The GPU report: its parts, its time, and what it says without a GPU."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_report, throughput, timing
from benchmarks.gpu_report import Part, run_part, write_report

CPU = torch.device("cpu")


def test_parts_that_fail_hang_or_lack_a_package_take_nothing_from_the_others(tmp_path):
    sleep = ("timeit", "-n1", "-r1", "-s", "import time", "time.sleep(60)")
    parts = [
        (Part("tests", ("no_such_module",)), 20.0),
        (Part("attention", ("timeit", "-n1", "-r1", "pass"), ("no_such_package",)), 20.0),
        (Part("throughput", sleep, ()), 0.5),
        (Part("tune", ("timeit", "-n1", "-r1", "pass"), ()), 20.0),
    ]
    for part, seconds in parts:
        run_part(part, seconds, tmp_path, {})
    results = write_report(tmp_path / "gpu.md", tmp_path, timing.environment(CPU))
    assert [r.status for r in results] == ["failed", "failed", "timed out", "passed"]
    text = (tmp_path / "gpu.md").read_text()
    assert "No module named no_such_module" in text
    assert "missing packages: no_such_package" in text
    assert "1 loop, best of 1" in text
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert len(saved["parts"]) == 4


def test_models_are_timed_with_options_that_the_command_takes():
    arguments = [part.arguments for part in gpu_report.benchmark_parts("cuda")]
    parsed = [throughput.parse(x[1:]) for x in arguments if x[0] == "benchmarks.throughput"]
    assert [(x.batch, x.compile) for x in parsed] == [
        (256, None),
        (128, None),
        (128, "default"),
        (128, "reduce-overhead"),
    ]


def test_only_files_with_gpu_tests_are_collected():
    assert "tests/test_gpu.py" in gpu_report.gpu_test_files()
    assert "tests/test_geometry.py" not in gpu_report.gpu_test_files()


def test_the_benchmarks_get_what_the_tests_left(tmp_path):
    assert gpu_report.ALL_MINUTES < 8.75
    assert gpu_report.minutes_left(tmp_path) == gpu_report.ALL_MINUTES
    path = tmp_path / "tests-result.json"
    for age, expected in ((10.0, gpu_report.ALL_MINUTES - 2), (3600.0, gpu_report.ALL_MINUTES)):
        path.write_text(json.dumps({"seconds": 120.0, "ended": time.time() - age}))
        assert gpu_report.minutes_left(tmp_path) == pytest.approx(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_the_report_says_so_in_one_line():
    command = [sys.executable, "-m", "benchmarks.gpu_report", "tests"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("no GPU found; `make bench-gpu-check`")


def test_a_part_names_no_folder_of_this_machine(tmp_path):
    code = "import torch; raise SystemExit(f'{torch.__file__} {__import__(\"os\").getcwd()}/x.py')"
    (tmp_path / "noisy.py").write_text(code)
    part = gpu_report.Part("noisy", ("noisy",))
    result = gpu_report.run_part(part, 60.0, tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert result.output == "torch/__init__.py x.py"
