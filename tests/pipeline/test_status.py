"""What status says of a run in any state."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests import RunDir, UserError
from pipeline.status import Survey, _ranges, status_lines


def lines_of(run: Path, *, content: bool = False) -> list[str]:
    return status_lines(str(run), Survey(RunDir(run)).look(tars=True, content=content))


def test_a_sealed_run(finished_run: Path) -> None:
    lines = lines_of(finished_run)
    assert lines[0] == f"{finished_run}: 3 of 3 shards done, 0 missing, 0 damaged" and lines[-1].strip() == "sealed"
    assert any("1 error of 36" in line and "verified rate" in line for line in lines)


def test_missing_and_damaged_shards(run_copy: Path) -> None:
    """Missing: no part file. Damaged: there was one, and a tar is not as it says; sizes always, content on request."""
    (run_copy / "manifest" / "part-000000.parquet").unlink()
    tar = run_copy / "dad" / "dad-000001.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1
    tar.write_bytes(data)
    assert "2 of 3 shards done, 1 missing, 0 damaged" in lines_of(run_copy)[0]
    lines = lines_of(run_copy, content=True)
    assert "1 of 3 shards done, 1 missing, 1 damaged" in lines[0] and any(f"damaged: {tar}: " in line for line in lines)
    assert any(line.strip() == "missing: 0" for line in lines) and "run the same `make shards` command again" in lines[-1]
    tar.unlink()
    assert "1 of 3 shards done, 1 missing, 1 damaged" in lines_of(run_copy)[0]


def test_not_sealed_yet(run_copy: Path) -> None:
    """All shards there, the manifest not: the run must not be called sealed."""
    (run_copy / "manifest.parquet").unlink()
    assert "not sealed yet" in lines_of(run_copy)[-1]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory here"):
        lines_of(tmp_path)


def test_ranges() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
