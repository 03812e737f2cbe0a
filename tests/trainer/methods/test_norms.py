"""AdvProp's second set of batch norms: what goes through it, where it is kept, and where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.checkpoint import BEST
from trainer.export import WEIGHTS, export
from trainer.loop import Hooks, train
from trainer.methods.advprop import AdvProp
from trainer.methods.method import total
from trainer.methods.parts.norms import AUXILIARY, add_norms, through
from trainer.methods.plain import Plain
from trainer.recipe import load
from trainer.run import Training

from ..conftest import CLASSES
from .conftest import batch_of, learner_of, settings, step_of, student_of, totals_of

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def of_set(student: nn.Module, auxiliary: bool) -> dict[str, torch.Tensor]:
    """Copies of the running statistics of one set."""
    named = student.state_dict().items()
    chosen = {name: value for name, value in named if name.rpartition(".")[2] in STATISTICS}
    return {name: value.clone() for name, value in chosen.items() if (AUXILIARY in name) == auxiliary}


def student_with_two() -> nn.Module:
    student = student_of()
    add_norms(student, 2)
    return student


def run_terms(student: nn.Module, method: AdvProp | Plain) -> torch.Tensor:
    """One training pass of a method, without an update."""
    learner, _ = learner_of(student)
    batch = batch_of(("clean",))
    return total(method.terms(step_of(learner, batch, settings(method))), totals_of(batch))


def test_the_main_statistics_are_those_of_clean_images_alone() -> None:
    """To the bit: neither the attack nor the adversarial images move them. The auxiliary ones have seen one batch."""
    student, plain = student_with_two(), student_of()
    run_terms(student, AdvProp())
    run_terms(plain, Plain())
    main, alone = of_set(student, auxiliary=False), of_set(plain, auxiliary=False)
    assert main.keys() == alone.keys() and all(torch.equal(value, alone[name]) for name, value in main.items())
    counts = [value for name, value in of_set(student, auxiliary=True).items() if name.endswith("tracked")]
    assert counts and all(count == 1 for count in counts)


@pytest.mark.parametrize(("auxiliary", "changes"), [(True, True), (False, False)])
def test_the_attack_goes_through_the_auxiliary_running_statistics(auxiliary: bool, changes: bool) -> None:
    made = []
    for disturbed in (False, True):
        student = student_with_two()
        for name, value in student.state_dict().items():
            if disturbed and name.endswith("running_mean") and (AUXILIARY in name) == auxiliary:
                value.copy_(torch.linspace(-1, 1, len(value)))
        learner, _ = learner_of(student)
        step = step_of(learner, batch_of(("clean",)), settings(AdvProp()))
        clean = step.images["clean"]
        made.append(step.attack(clean.x, clean.labels, steps=3, eps=0.1, alpha=0.05, norms=1))
    assert torch.equal(made[0], made[1]) != changes


def test_equal_norms_and_no_attack_give_twice_plain_training() -> None:
    student = student_with_two()
    loss, plain = run_terms(student, AdvProp(eps=0.0)), run_terms(student_of(), Plain())
    assert loss.item() == pytest.approx(2 * plain.item(), rel=1e-6)


def test_all_but_the_norms_is_shared() -> None:
    """The auxiliary path trains every shared weight and the auxiliary norms, none of the main ones."""
    student = student_with_two()
    with through(student, 1):
        student(torch.rand(4, 3, 16, 16)).sum().backward()
    norms = {name for name, module in student.named_modules() if AUXILIARY in module._modules}
    for name, weight in student.named_parameters():
        assert (weight.grad is None) == (name.rpartition(".")[0] in norms), name
    assert norms


def test_a_student_without_batch_norms_stays_as_it_is() -> None:
    student = student_of("test_vit", 32)
    before = list(student.state_dict())
    add_norms(student, 2)
    assert list(student.state_dict()) == before


def test_the_second_set_is_learned_averaged_and_saved_and_not_published(tiny_run: Path, tmp_path: Path) -> None:
    """Optimizer, average and checkpoint hold it; best weights and export load strictly into timm's own model."""
    base = [f"shards={tiny_run}", "student=test_resnet", "method.name=advprop", "epochs=1", "batch=10"]
    recipe = load("demo", [*base, "validation=null", "precision=fp32", "threads=1"])
    runs: list[Training] = []
    directory = train(recipe, str(tmp_path / "student"), Hooks(after_epoch=runs.append))
    (run,) = runs
    learned = {id(weight) for group in run.learner.optimizer.param_groups for weight in group["params"]}
    own = {name: weight for name, weight in run.student.named_parameters() if AUXILIARY in name}
    assert own and all(id(weight) in learned for weight in own.values())
    state = directory.load_last()
    assert state is not None
    for part in ("student", "average"):
        for name in own:
            twin = name.replace(f".{AUXILIARY}.0", "")
            assert not torch.equal(state[part][name], state[part][twin]), (part, name)
    for path in (tmp_path / "student" / BEST, tmp_path / "out" / WEIGHTS):
        if path.name == WEIGHTS:
            export(directory, str(tmp_path / "out"))
        weights = load_file(path)
        timm.create_model("test_resnet", num_classes=CLASSES).load_state_dict(weights, strict=True)
        averaged = {name.removeprefix("model."): value for name, value in state["average"].items()}
        assert all(torch.equal(value, averaged[name]) for name, value in weights.items())
