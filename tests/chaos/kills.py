"""kill -9 at chosen and at random moments of stage 1, and what must hold after each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from manifests import RunDir
from manifests.claims import look, read_claim
from pipeline.generate import make_shards
from pipeline.recipe import Recipe
from pipeline.status import Survey, status_lines
from pipeline.verify import problems

from ..conftest import World, digests
from ..patience import PATIENCE, wait_for
from ..processes import DEVNULL, launch

Kill = Callable[[World, Path, random.Random], bool]  # whether something died of it; else the command had already ended


def check_survivors(out: Path, whole: dict[str, str]) -> None:
    """Whatever stands under a final name has the bytes of an undisturbed run, and ``status`` can tell what is there."""
    if not (out / "run.json").exists():
        return
    for name, digest in digests(out).items():
        assert whole[name] == digest, f"{name} stands under its final name with other bytes"
    run = RunDir(out)
    status_lines(str(out), Survey(run).look(tars=True, content=True))


def check_finished(world: World, out: Path, whole: dict[str, str]) -> None:
    """The same command goes on to the end, and the end is that of an undisturbed run."""
    quietly(make_shards, world.load(), str(out))
    found: list[str] = []
    quietly(lambda: found.extend(problems(str(out))))
    assert digests(out) == whole and not found, found
    left = [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.parent.name == "work"]
    assert not left, f"left behind: {left}"


def quietly(function: Callable[..., Any], *arguments: Any) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        function(*arguments)


def kill_command(world: World, out: Path, rng: random.Random) -> bool:
    """The command, anywhere in its first second: while it looks, computes, writes or seals."""
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(make_shards, world.load(), str(out)))
    process.start()
    time.sleep(rng.random() * 1.2)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def kill_at_rename(world: World, out: Path, rng: random.Random) -> bool:
    """The command, directly before or after a file gets its final name, or when its temporary one has been written."""
    name = rng.choice(["replace", "fsync", "link"])
    return _run_with_a_trap(world.load(), out, os, name, rng.randrange(1, 10), after=rng.random() < 0.5)


def kill_in_parquet(world: World, out: Path, rng: random.Random) -> bool:
    """The command, while a part file or the manifest is being encoded."""
    return _run_with_a_trap(world.load(), out, pq, "write_table", rng.randrange(1, 5), after=rng.random() < 0.5)


def kill_worker(world: World, out: Path, rng: random.Random) -> bool:
    """One of two workers that holds a claim. Half of the time the command dies too: no worker may survive it."""
    command = [
        "-m",
        "pipeline",
        "generate",
        "--recipe",
        str(world.recipe),
        "--out",
        str(out),
        "--workers",
        "2",
    ]
    process = launch(*command, stdout=DEVNULL, stderr=DEVNULL)
    store = RunDir(out).store
    victims: list[int] = []
    while process.poll() is None and not victims:
        time.sleep(rng.random() * 0.2)
        claims = [claim for shard in look(store).running if (claim := read_claim(store, shard))]
        victims = [claim.pid for claim in claims if b"spawn_main" in _command_line(claim.pid)]
    killed = False
    for victim in victims[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            killed = True
    if rng.random() < 0.5:
        time.sleep(rng.random())
        process.kill()
    process.wait(PATIENCE)
    wait_for(lambda: not any(b"spawn_main" in _command_line(victim) for victim in victims))  # no orphans
    return killed


KILLS: dict[str, Kill] = {
    "command, at any moment": kill_command,
    "command, around a rename": kill_at_rename,
    "command, in a Parquet file": kill_in_parquet,
    "one of two workers": kill_worker,
}


def _run_with_a_trap(recipe: Recipe, out: Path, module: Any, name: str, count: int, *, after: bool) -> bool:
    """Run the command in a fork that kills itself before or after the ``count``-th call of ``module.name``."""

    def run() -> None:
        calls = 0
        original = getattr(module, name)

        def trap(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **named)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, trap)
        quietly(make_shards, recipe, str(out))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
