"""Fixtures for every room: a small world with real models, finished runs, commands, disks, an object store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from manifests.signals import SIGNALS

from .chaos.faulty_store import FaultyProxy, faulty_store
from .fake_runs import write_noise_run
from .hub import write_hub  # noqa: F401  # a fixture
from .processes import launch, run
from .world import CLASSES, World, build_world, digests, write_tar

__all__ = ["World", "build_world", "digests", "write_tar"]  # beside the fixtures

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes and fetched tars of the tests do not land in the user's cache folder."""
    os.environ["DAD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _keep_signals() -> Iterator[None]:
    """The command line installs handlers of signals; a test must not leave them behind."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """See `build_world`."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def models(world: World):  # type: ignore[no-untyped-def]
    """The loaded teacher and discretizer of the world's recipe."""
    from pipeline.job.models import load_models
    from shards.sources.classes import load_classes

    return load_models(world.load(), load_classes(world.clip / "prompts.yaml"))


@pytest.fixture(scope="session")
def finished_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed run of the world's recipe. For reading only: copy it (`run_copy`) before damaging it."""
    from pipeline.generate import make_shards

    out = tmp_path_factory.mktemp("runs") / "finished"
    make_shards(world.load(), str(out))
    return out


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@dataclass(frozen=True)
class Told:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a user error: status 2, nothing else on stderr, no stack trace."""
        lines = self.err.splitlines()
        assert self.status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (
            self.status,
            self.err,
            self.out,
        )
        return lines[0]


@pytest.fixture
def cli() -> Callable[..., Told]:
    """``python -m pipeline ARGS`` in this process; an exception that is no UserError fails the test."""
    from click.testing import CliRunner

    from pipeline.__main__ import main

    def run(*arguments: str | Path) -> Told:
        result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="python -m pipeline")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Told(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``python -m pipeline ARGS`` as a real process that ends with the test; options are those of `launch`."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        processes.append(launch("-m", "pipeline", *arguments, **options))
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a Python program in a fresh interpreter at the project's root. `forked` is quicker."""
    return lambda program, *arguments, **env: run("-c", program, *arguments, env=os.environ | env, fresh=True)


@pytest.fixture
def forked() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a Python program in a process that has the libraries loaded, at the project's root."""
    return lambda program, *arguments, **env: run("-c", program, *arguments, env=os.environ | env)


@pytest.fixture(scope="session")
def run_digests() -> Callable[[Path], dict[str, str]]:
    """`digests`, for tests that compare runs to the byte."""
    return digests


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A real small file system: ``small_disk("size=64k")`` mounts a tmpfs; ``remount,ro`` and the like change it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        told = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True, check=False
        )
        if told.returncode:
            pytest.skip(f"needs to mount a tmpfs, which is not permitted here: {told.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="session")
def object_store() -> Iterator[FaultyProxy]:
    """A real S3 server on loopback with the bucket ``s3://bucket``. The environment leads processes there.

    ``object_store.faults`` makes it fail; see `tests.chaos.faulty_store`.
    """
    pytest.importorskip("s3fs", reason="needs s3fs: pip install --editable '.[test]'")
    pytest.importorskip("moto.server", reason="needs moto[server]: pip install --editable '.[test]'")
    from manifests import Store

    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    keys["AWS_MAX_ATTEMPTS"] = "2"  # of botocore, with long pauses; s3fs tries five times around it
    with faulty_store() as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in (keys | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        Store("s3://bucket").fs.mkdir("bucket")
        yield proxy


@pytest.fixture
def faults(object_store: FaultyProxy) -> Iterator[dict[str, float]]:
    """Set probabilities here to make the object store fail during one test."""
    yield object_store.faults
    object_store.faults.clear()


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """`write_run`: a sealed run made without any model."""
    return write_run


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed run of 5 shards and 53 samples without any model. For reading only."""
    return write_run(tmp_path_factory.mktemp("plain") / "run")


def write_run(out: Path | str, *arguments: Any, **options: Any) -> Path:
    """`write_noise_run` with the classes of the world."""
    return write_noise_run(out, CLASSES, *arguments, **options)
