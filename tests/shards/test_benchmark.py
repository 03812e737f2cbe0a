"""The benchmark of reading: `python -m shards bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from shards.__main__ import main
from shards.benchmark import BareTars, write_run


def test_bench_prints_all_four(forked: Callable[..., object]) -> None:
    """A tiny set shows all four ways, each with its ratio to the bare loop."""
    program = "import sys; from shards.__main__ import main; main(sys.argv[1:])"
    result = forked(
        program, "bench", "--images", "256", "--shards", "2", "--workers", "0,1", "--repeats", "1", "--samples", "2000"
    )
    lines = result.stdout.splitlines()  # type: ignore[attr-defined]
    for name in ("bare loop", "webdataset", "torchvision ImageFolder", "this reader"):
        line = next(line for line in lines if line.startswith(name))
        assert line.count("(") == 2 and (name != "bare loop" or line.count("(1.00)") == 2)
    assert any("one epoch planned" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--workers=-1", "--workers: -1: from 0 to 8"),
        ("--workers=0,3 --shards=2", "--workers: 0,3: from 0 to 2, so that each has a tar; raise --shards"),
        ("--workers=two", "--workers: 'two' is not a list of numbers"),
        ("--samples=-5", "'--samples': -5 is not in the range"),
        ("--samples=10", "--samples: 10: fewer than a batch of 1024"),
    ],
)
def test_bench_refuses_before_it_measures(arguments: str, reason: str) -> None:
    result = CliRunner().invoke(main, ["bench", *arguments.split()], prog_name="python -m shards")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1 and reason in result.stderr


def test_the_bare_loop_of_the_benchmark_reads_every_image(tmp_path: Path) -> None:
    """The loop that others are measured against reads the incomplete last batch too."""
    write_run(tmp_path / "run", tmp_path / "flat", 70, 2)
    batches = list(BareTars(sorted((tmp_path / "run" / "clean").glob("*.tar"))))
    assert [len(labels) for _, labels in batches] == [64, 6]
