"""A Slurm of two nodes and a Ray cluster on this machine lose work in the middle; the bytes stay the same.

Skipped where an engine is not installed: Slurm by ``python -m tests.chaos.slurm_cluster`` and
``pip install -e '.[slurm]'``, Ray by ``pip install -e '.[ray]'``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from manifests import RunDir
from manifests.claims import look, read_claim
from pipeline.generate import make_shards
from pipeline.verify import problems

from ..chaos.slurm_cluster import slurm, why_not
from ..patience import PATIENCE, wait_for
from ..processes import ROOT, launch

Digests = Callable[[Path], dict[str, str]]
PIECES = ("source.shard_size=3", "attack.steps=60")  # 12 shards of a second or two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def single_run(world, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """What one worker makes of it."""
    out = tmp_path_factory.mktemp("single") / "run"
    make_shards(world.load(*PIECES), str(out))
    return out


def generate(world, out: Path, folder: Path, *arguments: str) -> subprocess.Popen[str]:  # type: ignore[no-untyped-def]
    """``python -m pipeline generate`` in ``folder``."""
    options = [part for override in PIECES for part in ("--set", override)]
    command = [
        "-m",
        "pipeline",
        "generate",
        "--recipe",
        str(world.recipe),
        "--out",
        str(out),
        *options,
        *arguments,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return launch(*command, cwd=folder, env=environment, fresh=True)  # Ray and submitit pass on what started them


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_slurm(world, single_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of an array of 4 the operator requeues one task, and one requeues itself after Slurm's warning: a sealed set."""
    pytest.importorskip("submitit", reason="needs submitit: pip install --editable '.[slurm]'")
    if reason := why_not():
        pytest.skip(reason)
    out, daemons = tmp_path / "run", tmp_path / "slurm"
    daemons.mkdir()
    with slurm(daemons):
        process = generate(world, out, tmp_path, "--launcher", "slurm", "--workers", "4")
        wait_for(lambda: look(RunDir(out).store).running, process)
        running = asked("squeue", "--noheader", "--states=RUNNING", "--format=%i", "--array").split()
        assert 1 <= len(running) <= 4 and all(re.fullmatch(r"\d+_\d", task) for task in running)
        asked("scontrol", "requeue", running[0])
        asked("scancel", "--signal=USR2", running[-1])
        out_text, err = process.communicate(timeout=PATIENCE)
        restarts = re.findall(r"Restarts=(\d+)", asked("scontrol", "show", "jobs"))
    assert process.returncode == 0, err
    assert "sealed, 36 samples" in out_text and any(int(count) for count in restarts)
    assert run_digests(out) == run_digests(single_run) and list(problems(str(out))) == []


def test_options_that_slurm_does_not_know(world, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A misspelt option of launch.slurm is named with the nearest, before anything is submitted."""
    pytest.importorskip("submitit", reason="needs submitit: pip install --editable '.[slurm]'")
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    line = cli(
        "generate",
        "--recipe",
        world.recipe,
        "--out",
        "run",
        "--launcher",
        "slurm",
        "--set",
        "launch.slurm={partitoin: gpu}",
    ).err
    assert "launch.slurm: unknown option 'partitoin'; did you mean 'partition'" in line.splitlines()[-1]


def test_ray(world, single_run: Path, run_digests: Digests, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Two actors, one killed with -9 while it makes a shard: Ray starts it again, and a sealed set comes back."""
    pytest.importorskip("ray", reason="needs ray: pip install --editable '.[ray]'")
    out = tmp_path / "run"
    process = generate(world, out, tmp_path, "--launcher", "ray", "--workers", "2")
    store = RunDir(out).store
    wait_for(lambda: look(store).running, process)
    claim = read_claim(store, min(look(store).running))
    assert claim is not None
    os.kill(claim.pid, signal.SIGKILL)
    out_text, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "sealed, 36 samples" in out_text, err
    assert run_digests(out) == run_digests(single_run) and list(problems(str(out))) == []


@pytest.mark.parametrize(("launcher", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_engine_that_is_not_installed(world, cli, tmp_path: Path, launcher: str, package: str) -> None:  # type: ignore[no-untyped-def]
    """The package is named, and how to install it."""
    try:
        __import__(package)
    except ImportError:
        told = cli("generate", "--recipe", world.recipe, "--out", tmp_path / "run", "--launcher", launcher)
        assert told.status == 2 and f"needs the package {package}: pip install" in told.err.splitlines()[-1]
    else:
        pytest.skip(f"{package} is installed")
