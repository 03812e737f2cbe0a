"""A new method is one file and one line: here the file is this one, and the line is added for the time of a test."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field

from manifests import recipe_dataclass
from trainer import methods
from trainer.loop import Hooks, train
from trainer.methods import METHODS, NAMES, Needs, Passes, Step, Term
from trainer.methods.plain import Plain
from trainer.recipe import load
from trainer.run import Training
from trainer.step import Losses

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
        return method.terms(step_of(learner, batch, settings(method)))["ce"].values

    torch.testing.assert_close(values(NoisyLabels(noise=0)), values(Plain()))
    assert not torch.allclose(values(NoisyLabels()), values(Plain()))
    assert torch.equal(values(NoisyLabels()), values(NoisyLabels()))


def test_it_trains_and_resumes_to_the_bit(tiny_run: Path, tmp_path: Path) -> None:
    """Through the trainer's own loop, given as the recipe's method: nothing else has to know of it."""
    base = [f"shards={tiny_run}", "student=test_resnet", "epochs=2", "batch=10", "validation=null"]
    recipe = load("demo", [*base, "precision=fp32", "threads=1", "checkpoint_minutes=0"])
    recipe = replace(recipe, method=NoisyLabels())

    def stop(run: Training, _losses: Losses) -> None:
        if run.steps_done == 8:
            raise InterruptedError

    whole = train(recipe, str(tmp_path / "whole")).load_last()
    with pytest.raises(InterruptedError):
        train(recipe, str(tmp_path / "stopped"), Hooks(after_step=stop))
    ended = train(recipe, str(tmp_path / "stopped")).load_last()
    assert whole is not None and ended is not None
    assert all(torch.equal(value, ended["student"][name]) for name, value in whole["student"].items())


def test_registering_it_takes_one_line() -> None:
    """The package names a method in its import and in `METHODS`; names, union and tables are made of that tuple."""
    lines = inspect.getsource(methods).splitlines()
    for kind in METHODS:
        naming = [line.strip() for line in lines if kind.__name__ in (word.strip(",") for word in line.split())]
        imports = [line for line in naming if line.startswith("from .")]
        others = [line for line in naming if line not in imports and not line.startswith("__all__")]
        assert (len(imports), others) == (1, [f"{kind.__name__},"]), naming
    assert NAMES == tuple(kind().name for kind in METHODS) and len(set(NAMES)) == len(NAMES)


def test_no_other_file_branches_on_a_methods_name() -> None:
    """Outside its own file a method's name is compared with nothing; what differs between methods, the method says."""
    room = Path(methods.__file__).parents[1]
    for path in room.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                values = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                assert not set(map(str, values)) & set(NAMES) - {"dad"}, f"{path}:{node.lineno}"
