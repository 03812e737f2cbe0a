"""The online schemes compute what their papers say, at the number of passes that their docstrings state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from shards import seeded_generator
from trainer.methods.advprop import advprop_loss, fast_advprop_loss
from trainer.methods.at import adversarial_training_loss
from trainer.methods.attacks import adversarial_images
from trainer.methods.dat import dat_loss
from trainer.methods.live import live_dad_loss, live_kd_loss
from trainer.methods.losses import plain_loss, student_loss
from trainer.methods.norms import with_auxiliary_norms
from trainer.student import create_student

CLASSES, SIDE, BATCH = 5, 16, 10
SCALE = {"temperature": 4.0, "weight": 0.5}


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(0)
    return create_student("test_resnet", CLASSES, SIDE).train()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(BATCH, 3, SIDE, SIDE, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def count_images(model: nn.Module) -> list[int]:
    """Grows by the batch size of every forward pass."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    return seen


def coarse(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A discretizer with eight levels a channel."""
    return (images * 7).round() / 7, torch.zeros(0)


def test_attacked_images_stay_in_the_ball_and_raise_the_loss(
    student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = batch
    adversarial = adversarial_images(student, x, y, seeded_generator(0), steps=5, eps=0.1, alpha=0.05)
    assert (adversarial - x).abs().max() <= 0.1 + 1e-6 and adversarial.min() >= 0 and adversarial.max() <= 1
    student.eval()
    assert plain_loss(student(adversarial), y) > plain_loss(student(x), y)


def test_attacking_leaves_weights_statistics_and_mode_alone(
    student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    adversarial_images(student, *batch, seeded_generator(0), steps=2, eps=0.1, alpha=0.05)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.training and all(weight.grad is None for weight in student.parameters())


def test_numbers_come_from_the_generator_alone(student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    options = {"steps": 1, "eps": 0.1, "alpha": 0.05, "norm": "l2", "random_start": 0.8}
    torch.manual_seed(1)
    first = adversarial_images(student, *batch, seeded_generator(0), **options)  # type: ignore[arg-type]
    torch.manual_seed(2)
    assert torch.equal(first, adversarial_images(student, *batch, seeded_generator(0), **options))  # type: ignore[arg-type]
    assert not torch.equal(first, adversarial_images(student, *batch, seeded_generator(1), **options))  # type: ignore[arg-type]


def test_auxiliary_norms_are_all_that_is_not_shared(
    student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    auxiliary = with_auxiliary_norms(student)
    norms = {name for name, module in student.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert norms
    for (name, own), other in zip(student.named_parameters(), auxiliary.parameters(), strict=True):
        assert (own is other) == (name.rpartition(".")[0] not in norms), name
    statistics = {name: value.clone() for name, value in student.named_buffers()}
    plain_loss(auxiliary(batch[0]), batch[1]).backward()
    assert all(torch.equal(value, statistics[name]) for name, value in student.named_buffers())
    assert student.model.fc.weight.grad is not None


@pytest.mark.parametrize(
    ("loss", "passes", "auxiliary_passes"),
    [
        (lambda s, a, x, y, g: adversarial_training_loss(s, x, y, g, steps=10), 11, 0),
        (lambda s, a, x, y, g: advprop_loss(s, a, x, y, g, steps=5), 1, 6),
        (lambda s, a, x, y, g: advprop_loss(s, a, x, y, g, steps=1), 1, 2),
        (lambda s, a, x, y, g: fast_advprop_loss(s, a, x, y, g), 0.8, 0.4),
        (lambda s, a, x, y, g: dat_loss(s, coarse, x, y, g), 3, 0),
        (lambda s, a, x, y, g: live_kd_loss(s, a, x, y, **SCALE), 1, 1),
        (lambda s, a, x, y, g: live_dad_loss(s, a, x, y, x[:5], **SCALE), 1.5, 1.5),
    ],
    ids=["AT-10", "AdvProp-5", "AdvProp-1", "Fast AdvProp", "DAT-1", "KD live", "DAD live"],
)
def test_passes_are_those_of_the_docstring(
    student: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    loss: Callable[..., torch.Tensor],
    passes: float,
    auxiliary_passes: float,
) -> None:
    """Forward passes an image, of the student and of its twin with norms of its own (or the teacher); and a loss that trains."""
    auxiliary = with_auxiliary_norms(student)
    seen, seen_auxiliary = count_images(student), count_images(auxiliary)
    loss(student, auxiliary, *batch, seeded_generator(0)).backward()
    assert (sum(seen) / BATCH, sum(seen_auxiliary) / BATCH) == (passes, auxiliary_passes)
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in student.parameters())


def test_dat_trains_on_both_halves_of_stage_ones_attack(
    student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = batch
    student.eval()  # so that the order of the forward passes does not matter
    length = {"eps": 2.0, "alpha": 2.0}  # enough to move pixels across the levels
    options = {"steps": 1, **length, "norm": "l2", "random_start": 0.8, "discretizer": coarse}
    adversarial = adversarial_images(student, x, y, seeded_generator(0), **options)  # type: ignore[arg-type]
    assert torch.equal(adversarial, coarse(adversarial)[0]) and not torch.equal(adversarial, coarse(x)[0])
    expected = plain_loss(student(x), y) + plain_loss(student(adversarial), y)
    torch.testing.assert_close(dat_loss(student, coarse, x, y, seeded_generator(0), **length), expected)


def test_a_live_teacher_gives_the_loss_of_its_stored_logits(
    student: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = batch
    torch.manual_seed(5)
    teacher = create_student("test_resnet", CLASSES, SIDE).eval()
    student.eval()
    with torch.no_grad():
        stored = [teacher(x), teacher(x[:5].flip(3))]
    outputs = [student(x), student(x[:5].flip(3))]
    live = live_dad_loss(student, teacher, x, y, x[:5].flip(3), **SCALE)
    torch.testing.assert_close(live, student_loss("dad", y, outputs, stored, **SCALE)[0])
    torch.testing.assert_close(
        live_kd_loss(student, teacher, x, y, **SCALE), student_loss("kd", y, outputs[:1], stored[:1], **SCALE)[0]
    )
    assert all(weight.grad is None for weight in teacher.parameters())


def test_only_functions_reach_for_the_method(python: Callable[..., object], tmp_path: Path) -> None:
    """Importing the schemes and the ledger loads nothing of stage 1."""
    told = python(
        "import sys, trainer.methods.attacks, trainer.ledger.ledger, trainer.cost\nprint([m for m in sys.modules if m.startswith('pipeline')])"
    )
    assert told.stdout == "[]\n", told.stderr  # type: ignore[attr-defined]
