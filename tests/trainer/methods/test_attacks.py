"""Attacks on the student: where their images lie, what they leave alone, and where their random numbers come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shards import seeded_generator
from trainer.methods.dat import DAT
from trainer.methods.parts.attacks import adversarial_images

from .conftest import CLASSES, Coarse, batch_of, learner_of, settings, step_of, student_of

L2 = {"norm": "l2", "random_start": 0.8}


@pytest.fixture
def student() -> nn.Module:
    return student_of()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1] and their labels."""
    clean = batch_of()["clean"]
    return clean.images.float() / 255, clean.labels


@pytest.mark.parametrize("steps", [1, 5])
def test_attacked_images_stay_in_the_ball_and_raise_the_loss(
    student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], steps: int
) -> None:
    x, y = batch
    adversarial = adversarial_images(student, x, y, seeded_generator(0), steps=steps, eps=0.1, alpha=0.05)
    assert (adversarial - x).abs().max() <= 0.1 + 1e-6 and adversarial.min() >= 0 and adversarial.max() <= 1
    student.eval()
    with torch.no_grad():
        assert F.cross_entropy(student(adversarial), y) > F.cross_entropy(student(x), y)


def test_an_l2_attack_stays_in_its_ball(student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x = 0.3 + 0.4 * batch[0]  # away from black and white, so that nothing is clamped
    adversarial = adversarial_images(student, x, batch[1], seeded_generator(0), steps=3, eps=0.5, alpha=0.4, **L2)  # type: ignore[arg-type]
    lengths = (adversarial - x).flatten(1).norm(dim=1)
    assert lengths.max() <= 0.5 + 1e-5 and lengths.min() > 0.1


@pytest.mark.parametrize(("norm", "share"), [("linf", 1.0), ("l2", 0.8)])
def test_random_starts_lie_in_the_ball_or_on_the_sphere(student: nn.Module, norm: str, share: float) -> None:
    """Without a step the start comes out: uniform in the Linf ball; on the L2 sphere for 8 of 10 images."""
    x = torch.full((200, 3, 4, 4), 0.5)
    y = torch.zeros(200, dtype=torch.long)
    start = adversarial_images(
        student, x, y, seeded_generator(0), steps=0, eps=0.1, alpha=0.1, norm=norm, random_start=share
    )
    delta = (start - x).flatten(1)
    if norm == "linf":
        assert 0.09 < delta.abs().max() <= 0.1 and abs(delta.mean().item()) < 0.002
    else:
        lengths = delta.norm(dim=1)
        moved = lengths > 0
        torch.testing.assert_close(lengths[moved], torch.full_like(lengths[moved], 0.1))
        assert 0.7 < moved.float().mean() < 0.9


def test_attacking_leaves_weights_statistics_and_mode_alone(
    student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """In eval mode; an attack in train mode, as DAT's published code has it, moves the running statistics alone."""
    before = {name: value.clone() for name, value in student.state_dict().items()}
    adversarial_images(student, *batch, seeded_generator(0), steps=2, eps=0.1, alpha=0.05)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.training and all(weight.grad is None for weight in student.parameters())
    adversarial_images(student, *batch, seeded_generator(0), steps=2, eps=0.1, alpha=0.05, training=True)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.rpartition(".")[2] in STATISTICS for name in changed)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def test_numbers_come_from_the_generator_alone(student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    options = {"steps": 1, "eps": 0.1, "alpha": 0.05, **L2}
    torch.manual_seed(1)
    first = adversarial_images(student, *batch, seeded_generator(0), **options)  # type: ignore[arg-type]
    torch.manual_seed(2)
    assert torch.equal(first, adversarial_images(student, *batch, seeded_generator(0), **options))  # type: ignore[arg-type]
    assert not torch.equal(first, adversarial_images(student, *batch, seeded_generator(1), **options))  # type: ignore[arg-type]


def test_an_attack_on_mixed_labels_follows_the_gradient_of_their_cross_entropy(
    student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """One L2 step without a random start, against autograd; one-hot distributions attack as the labels do."""
    x, y = 0.3 + 0.4 * batch[0], batch[1]
    mixed = 0.7 * F.one_hot(y, CLASSES) + 0.3 * F.one_hot(y.roll(1), CLASSES)
    options = {"steps": 1, "eps": 0.5, "alpha": 0.5, "norm": "l2", "random_start": 0.0}
    made = adversarial_images(student, x, mixed, seeded_generator(0), **options)  # type: ignore[arg-type]
    student.eval()
    leaf = x.clone().requires_grad_()
    loss = -(mixed * student(leaf).log_softmax(1)).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(made, x + 0.5 * direction, rtol=1e-4, atol=1e-5)
    sure = [
        adversarial_images(student, x, aim, seeded_generator(0), **options)  # type: ignore[arg-type]
        for aim in (y, F.one_hot(y, CLASSES).float())
    ]
    torch.testing.assert_close(sure[0], sure[1], rtol=1e-4, atol=1e-5)


def test_dat_trains_on_stage_ones_attack(student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """x'' is discrete, is not Q(x), and is what one L2 step of stage 1 makes of it with the student as its teacher."""
    method = DAT(eps=2.0, alpha=2.0, attacked="eval")  # enough to move pixels across the levels
    learner, _ = learner_of(student)
    step = step_of(learner, batch_of(("clean",)), settings(method))
    coarse = learner.frozen["discretizer"]
    options = {"steps": 1, "eps": 2.0, "alpha": 2.0, **L2, "discretizer": coarse}
    x = step.images["clean"].x
    adversarial = adversarial_images(student, x, batch[1], seeded_generator("method"), **options)  # type: ignore[arg-type]
    assert torch.equal(adversarial, Coarse()(adversarial)[0]) and not torch.equal(adversarial, Coarse()(x)[0])
    seen: list[torch.Tensor] = []
    student.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    method.terms(step)
    assert torch.equal(seen[-1], torch.cat([x, adversarial]))


def test_only_functions_reach_for_the_method(python: Callable[..., object], tmp_path: Path) -> None:
    """Importing the methods and the ledger loads nothing of stage 1."""
    told = python(
        "import sys, trainer.methods.parts.attacks, trainer.methods.parts.frozen, trainer.ledger.cost\n"
        "print([m for m in sys.modules if m.startswith('pipeline')])"
    )
    assert told.stdout == "[]\n", told.stderr  # type: ignore[attr-defined]
