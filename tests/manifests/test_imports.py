"""Who may import whom (DESIGN.md), checked in the source of every module and in a fresh interpreter."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("pipeline", "shards", "manifests", "trainer")
HEAVY = ("open_clip", "timm", "taming", "torchvision")
METHOD = ("pipeline.method",)


@dataclass(frozen=True)
class Import:
    """One import of a module: who, what, on which line, and whether only when a function runs."""

    path: Path
    line: int
    module: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def imports(room: str) -> list[Import]:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"{room}: no modules found"
    return [found for path in files for found in _walk(path, ast.parse(path.read_text()), lazy=False)]


def _walk(path: Path, node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    """Every import below a node, also of strings given to import_module and __import__."""
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.Import):
            yield from (Import(path, child.lineno, name.name, inside) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _base(path, child)
            yield from (Import(path, child.lineno, f"{base}.{name.name}", inside) for name in child.names)
        elif isinstance(child, ast.Call) and getattr(child.func, "attr", getattr(child.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            argument = child.args[0] if child.args else None
            assert isinstance(argument, ast.Constant), f"{path}:{child.lineno}: an import that cannot be checked"
            yield Import(path, child.lineno, str(argument.value), inside)
        yield from _walk(path, child, lazy=inside)


def _base(path: Path, node: ast.ImportFrom) -> str:
    """The absolute name of the module that a ``from … import`` reads from."""
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parent.parts
    parts = package[: len(package) - (node.level - 1)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def within(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of the packages, or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(room: str, rule: Callable[[Import], bool]) -> list[str]:
    return [str(found) for found in imports(room) if rule(found)]


def test_the_walker_sees_what_it_should(tmp_path: Path) -> None:
    """The check itself: plain, relative, lazy and spelled-out imports are all found."""
    path = ROOT / "pipeline" / "renditions" / "imaginary.py"
    source = (
        "import timm.data\nfrom ..attack import attack\nfrom . import clip\n"
        "def f():\n    from trainer import loop\n__import__('taming')\n"
    )
    found = {(i.module, i.lazy) for i in _walk(path, ast.parse(source), lazy=False)}
    assert found == {
        ("timm.data", False), ("pipeline.attack.attack", False), ("pipeline.renditions.clip", False),
        ("trainer.loop", True), ("taming", False),
    }  # fmt: skip
    assert within("trainer.loop", "trainer") and not within("trainers", "trainer")


def test_manifests_needs_no_other_room() -> None:
    assert forbidden("manifests", lambda i: within(i.module, "pipeline", "trainer", "shards")) == []


def test_shards_needs_manifests_alone() -> None:
    assert forbidden("shards", lambda i: within(i.module, "pipeline", "trainer")) == []


@pytest.mark.parametrize("room", ["shards", "manifests"])
def test_the_contract_needs_no_model_library(room: str) -> None:
    """Not even lazily: a reader of published shards need not install them. Only the benchmark uses ImageFolder."""
    compared = ROOT / "shards" / "benchmark.py"
    assert forbidden(room, lambda i: within(i.module, *HEAVY) and not (i.lazy and i.path == compared)) == []


def test_pipeline_never_imports_trainer() -> None:
    assert forbidden("pipeline", lambda i: within(i.module, "trainer")) == []


def test_trainer_reaches_for_the_method_alone_and_lazily() -> None:
    """The trainer imports only attack, discretizer and teacher of pipeline, and only inside functions."""
    assert (
        forbidden("trainer", lambda i: within(i.module, "pipeline") and not (i.lazy and within(i.module, *METHOD)))
        == []
    )


def test_no_room_imports_tests() -> None:
    for room in ROOMS:
        assert forbidden(room, lambda i: within(i.module, "tests", "conftest", "pytest")) == []


def test_front_doors_hold_what_they_promise() -> None:
    """Every room's ``__init__`` names what is for others, and what it exports is there."""
    import importlib

    for room in ROOMS:
        module = importlib.import_module(room)
        assert module.__doc__ and len(module.__doc__) > 100
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name) and f"`{name}`" in module.__doc__, f"{room}.{name}"


def test_reading_shards_loads_no_model_library(python: Callable[..., Any], plain_run: Path) -> None:
    """Importing the contract and reading a sample loads no open_clip, timm, taming or torchvision."""
    program = (
        "import sys, shards, manifests\n"
        "sample = shards.ShardDataset(sys.argv[1], 'dad')[0]\n"
        f"heavy = {(*HEAVY, 'pipeline', 'trainer', 'matplotlib')}\n"
        "print([name for name in heavy if name in sys.modules], sample.image.shape[0])"
    )
    told = python(program, plain_run)
    assert told.stdout == "[] 3\n", told.stderr


def test_reading_shards_works_where_they_are_not_installed(python: Callable[..., Any], plain_run: Path) -> None:
    """The same with these libraries made impossible to import."""
    program = (
        "import sys\n"
        f"for name in {HEAVY}: sys.modules[name] = None\n"
        "import shards, manifests\n"
        "for name in ('clean', 'dad'):\n"
        "    for i in range(len(dataset := shards.ShardDataset(sys.argv[1], name))): dataset[i]\n"
        "batches = shards.TrainingReader(sys.argv[1], batch_size=8).batches(0)\n"
        "print(sum(len(part.keys) for batch in batches for part in batch.values()))"
    )
    told = python(program, plain_run)
    assert told.returncode == 0 and int(told.stdout) > 70, told.stderr


def test_help_and_refusals_do_not_wait_for_models(python: Callable[..., Any]) -> None:
    """`python -m pipeline --help` answers without loading a model library."""
    program = (
        "import sys\nfrom click.testing import CliRunner\nfrom pipeline.__main__ import main\n"
        "result = CliRunner().invoke(main, ['generate', '--set', 'nothing=1'])\n"
        f"print(result.exit_code, [name for name in {HEAVY} if name in sys.modules])"
    )
    told = python(program)
    assert told.stdout == "2 []\n", told.stderr
