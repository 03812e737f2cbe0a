"""A new method is one file and one line: label smoothing with noise, written here, trains without other changes."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field

from manifests import recipe_dataclass
from trainer import methods
from trainer.checkpoint import STUDENT_INFO, StudentDir
from trainer.methods import METHODS, NAMES, Needs, Passes, Step, Term
from trainer.methods.plain import Plain

from .conftest import batch_of, learner_of, settings, step_of, student_of


@recipe_dataclass
class NoisyLabels:
    """Cross-entropy with labels that are smoothed by noise: each sample's share of the other classes is drawn anew."""

    name: Literal["noisy_labels"] = "noisy_labels"
    noise: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Largest share that is spread over all classes."""

    title: ClassVar[str] = "noisy labels"
    needs: ClassVar[Needs] = Needs()

    @property
    def passes(self) -> Passes:
        return Passes()

    def terms(self, step: Step) -> dict[str, Term]:
        clean = step.images["clean"]
        (output,) = step.student(clean.x)
        share = self.noise * torch.rand(len(clean), 1, generator=step.generator, device=step.generator.device)
        labels = (1 - share) * F.one_hot(clean.labels, output.shape[1]) + share / output.shape[1]
        return {"ce": Term(F.cross_entropy(output, labels, reduction="none"), clean.stream)}


def test_it_gives_terms_of_a_step() -> None:
    """Without noise it is plain training; with noise its numbers come from the step's generator."""
    learner, _ = learner_of(student_of())
    batch = batch_of(("clean",))

    def values(method: NoisyLabels | Plain) -> torch.Tensor:
        return method.terms(step_of(learner, batch, settings(Plain())))["ce"].values

    torch.testing.assert_close(values(NoisyLabels(noise=0)), values(Plain()))
    assert not torch.allclose(values(NoisyLabels()), values(Plain()))
    assert torch.equal(values(NoisyLabels()), values(NoisyLabels()))


FILE = """from typing import Annotated, ClassVar, Literal
import torch
import torch.nn.functional as F
from pydantic import Field
from manifests import recipe_dataclass
from .method import Needs, Passes, Step, Term

"""

PROGRAM = """
import sys, torch
from trainer.loop import Hooks, train
from trainer.recipe import load
from trainer.tables.methods import methods_table

def stop(run, losses):
    if run.steps_done == 8:
        raise InterruptedError

run, out = sys.argv[1:]
base = [f"shards={run}", "student=test_resnet", "epochs=2", "batch=10", "validation=null", "precision=fp32"]
recipe = load("demo", [*base, "threads=1", "device=cpu", "method.name=noisy_labels", "method.noise=0.3"])
whole = train(recipe, f"{out}/whole").load_last()
try:
    train(recipe, f"{out}/stopped", Hooks(after_step=stop))
except InterruptedError:
    print("stopped")
ended = train(recipe, f"{out}/stopped").load_last()
same = all(torch.equal(value, ended["student"][name]) for name, value in whole["student"].items())
print("same" if same else "other")
print(methods_table())
"""


@pytest.mark.slow
def test_it_trains_resumes_and_is_listed_after_one_file_and_one_line(tiny_run: Path, tmp_path: Path) -> None:
    """In a copy of the project: the file, its import and its place in `METHODS`; nothing else knows of it."""
    project = tmp_path / "project"
    for room in ("manifests", "shards", "trainer"):
        shutil.copytree(ROOT / room, project / room, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "trainer/methods/noisy_labels.py").write_text(FILE + inspect.getsource(NoisyLabels))
    front = project / "trainer/methods/__init__.py"
    text = front.read_text().replace("from .plain import Plain\n", f"from .plain import Plain\n{IMPORT}\n")
    front.write_text(text.replace("    Plain,\n", "    Plain,\n    NoisyLabels,\n"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_run), str(tmp_path)],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "stopped" in lines and "same" in lines
    assert [line for line in lines if line.startswith("noisy_labels  ") and "noisy labels" in line]
    info = StudentDir(tmp_path / "whole").store.read(STUDENT_INFO)
    assert json.loads(info)["identity"]["method.noise"] == 0.3


IMPORT = "from .noisy_labels import NoisyLabels"
ROOT = Path(methods.__file__).parents[2]


def test_registering_it_takes_one_line() -> None:
    """The package names a method in its import and in `METHODS`; names, union and tables are made of that tuple."""
    lines = inspect.getsource(methods).splitlines()
    for kind in METHODS:
        naming = [line.strip() for line in lines if kind.__name__ in (word.strip(",") for word in line.split())]
        imports = [line for line in naming if line.startswith("from .")]
        others = [line for line in naming if line not in imports and not line.startswith("__all__")]
        assert (len(imports), others) == (1, [f"{kind.__name__},"]), naming
    assert tuple(kind().name for kind in METHODS) == NAMES and len(set(NAMES)) == len(NAMES)


def test_no_other_file_branches_on_a_methods_name() -> None:
    """Outside its own file a method's name is compared with nothing; what differs between methods, the method says."""
    room = Path(methods.__file__).parents[1]
    for path in room.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                values = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                assert not set(map(str, values)) & set(NAMES) - {"dad"}, f"{path}:{node.lineno}"
