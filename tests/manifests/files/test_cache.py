"""The cache folder: one for all rooms, wherever the user has it; and its lock."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from manifests import UserError
from manifests.files.cache import cache_folder, lock

from ...patience import PATIENCE


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DAD_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/heads"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/dad/heads"),
        ({"HOME": "/c"}, "/c/.cache/dad/heads"),
        ({"DAD_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/dad/heads"),
    ],
)
def test_the_first_that_is_set(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DAD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("heads") == Path(expected)


NOBODY = """
import os
from manifests import UserError
from manifests.files.cache import cache_folder
for name in ("HOME", "DAD_CACHE", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
os.setuid(54321)
try:
    cache_folder("tars")
except UserError as error:
    print(error)
os.environ["DAD_CACHE"] = "/scratch"
print(cache_folder("tars"))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a home")
def test_a_folder_that_everybody_may_write_to_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is trusted. A group may share one."""
    monkeypatch.setenv("DAD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "indexes").mkdir(parents=True)
    for place in (tmp_path / "cache", tmp_path / "cache" / "indexes"):
        place.chmod(0o777)
        with pytest.raises(
            UserError, match=rf"^{place}: everybody may write to this cache; chmod o-w it, or set DAD_CACHE"
        ):
            cache_folder("indexes")
        place.chmod(0o775)
    assert cache_folder("indexes") == tmp_path / "cache" / "indexes"


def test_a_user_without_a_home(forked: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """A user without a home learns which variable to set; with it, no home is needed."""
    told = forked(NOBODY)
    assert told.stdout.splitlines() == [
        "this user has no home folder to keep a cache in; set DAD_CACHE to a folder on a local disk", "/scratch/tars"
    ], told.stderr  # fmt: skip


def test_a_forked_process_holds_no_lock_of_its_parent(tmp_path: Path) -> None:
    """A lock that a thread holds while loader processes are forked can be taken later, by a thread or a child."""
    go_on, held = threading.Event(), threading.Event()

    def hold() -> None:
        with lock(tmp_path, "a"):
            held.set()
            go_on.wait(PATIENCE)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        with lock(tmp_path, "a"):  # waits for the parent's thread
            os._exit(0)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    go_on.set()
    holder.join()
    deadline = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert ended == (child, 0)
    with lock(tmp_path, "a"):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from manifests.files.cache import lock
with lock(Path(sys.argv[1]), "a"):
    seen = Path(sys.argv[1]) / "inside"
    seen.touch(exist_ok=False)
    time.sleep(0.2)
    seen.unlink()
"""


def test_one_holder_at_a_time(forked: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """Three processes that want one lock follow each other; a fourth that is killed holding it stops nobody."""
    from concurrent.futures import ThreadPoolExecutor

    killed = forked(HOLDER.replace("time.sleep(0.2)", "seen.unlink(); import os; os.kill(os.getpid(), 9)"), tmp_path)
    assert killed.returncode == -9
    with ThreadPoolExecutor(3) as pool:
        assert [told.returncode for told in pool.map(lambda _: forked(HOLDER, tmp_path), range(3))] == [0, 0, 0]
