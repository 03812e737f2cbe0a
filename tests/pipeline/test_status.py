"""The report of `status` on a run in any state."""

from __future__ import annotations

import json
import os
import time
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
    assert (
        any(line.strip() == "missing: 0" for line in lines) and "run the same `make shards` command again" in lines[-1]
    )
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


def claim(run: Path, shard: int, **fields: object) -> None:
    """A claim as a worker on another machine writes it."""
    (run / "work").mkdir(exist_ok=True)
    about = {"shard": shard, "host": "far", "machine": "far", "pid": 7, "worker": f"w{shard}", "beat": 1} | fields
    (run / "work" / f"running-{shard:06d}.json").write_text(json.dumps(about))


def unsealed(run: Path, *missing: int) -> RunDir:
    for shard in missing:
        (run / "manifest" / f"part-{shard:06d}.parquet").unlink()
    (run / "manifest.parquet").unlink()
    return RunDir(run)


def test_running_shards(run_copy: Path) -> None:
    """Every running shard with its worker and count; speed is that of running workers, ETA counts their samples."""
    survey = Survey(unsealed(run_copy, 1, 2))
    claim(run_copy, 1, samples=4, verified=3, rejected=1, rate=0.5)
    claim(run_copy, 2, samples=6, verified=2, rejected=3, rate=1.5)
    state = survey.look(tars=True)
    lines = status_lines("OUT", state)
    assert lines[0] == "OUT: 1 of 3 shards done, 2 missing, 0 damaged, 2 running"
    assert "running: shard 1 on far, process 7: 4 images so far, 0.5 images/s" in lines[1]
    assert state.rate == 2.0 and state.counts.total() == 12 + 4 + 6
    assert any("2.0 images/s" in line and "about 0:00:07 to go" in line for line in lines)  # 14 of 36 at 2 a second
    assert lines[-1].strip() == "at work"


def test_silent_workers_do_not_count(run_copy: Path) -> None:
    """A worker without heartbeat for long is called silent and adds no speed; idle time is never part of a speed."""
    survey = Survey(unsealed(run_copy, 1))
    claim(run_copy, 1, samples=4, rate=0.5)
    hour_ago = time.time() - 3600
    os.utime(run_copy / "work" / "running-000001.json", (hour_ago, hour_ago))
    state = survey.look()
    assert state.rate == 0 and any("no heartbeat for 1:00:0" in line for line in status_lines("OUT", state))
    assert "nothing is running" in status_lines("OUT", state)[-1]
    claim(run_copy, 1, samples=5, rate=0.5, beat=2)
    os.utime(
        run_copy / "work" / "running-000001.json", (hour_ago, hour_ago)
    )  # whatever the clocks say: its content has changed
    assert survey.look().rate == 0.5


def test_each_part_is_read_once(run_copy: Path) -> None:
    """A second look at a run reads only what is new; a part that was replaced by another is read again."""
    survey = Survey(RunDir(run_copy))
    before = survey.look().counts
    part = run_copy / "manifest" / "part-000001.parquet"
    part.unlink()
    assert len(survey.look().done) == 2
    part.write_bytes(b"no part at all")
    assert "part-000001.parquet: damaged" in survey.look().damaged[0] and before.total() == 36


def test_watching_ends_when_sealed(finished_run: Path, cli) -> None:  # type: ignore[no-untyped-def]
    told = cli("status", finished_run, "--watch")
    assert told.status == 0 and told.out.count("3 of 3 shards done") == 1
