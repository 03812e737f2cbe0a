"""Every method: its loss is the formula written out by hand, and its forward passes are those that it states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from trainer.images.mixing import Mixing
from trainer.methods import DAD, METHODS, NAMES, Method, Step
from trainer.methods.advprop import AdvProp
from trainer.methods.ard import ARD
from trainer.methods.method import Images, total
from trainer.methods.rslad import RSLAD

from .conftest import BATCH, batch_of, count_images, learner_of, settings, step_of, student_of, totals_of

T, A, S = 3.0, 0.7, 0.1  # temperature, weight, smoothing
MIXED = {"plain images": [], "mixup": ["augmentation.mixup=0.8"], "cutmix": ["augmentation.cutmix=1"]}
Rows = list[list[float]]


def with_settings(kind: type[Method]) -> Method:
    """A method with temperature, weight and smoothing of the tests, where it has them."""
    named = {"temperature": T, "weight": A, "smoothing": S}
    return kind(**{name: value for name, value in named.items() if hasattr(kind(), name)})


@dataclass
class Seen:
    """What a method asked of its step, in order."""

    groups: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # set of batch norms, images
    outputs: list[Rows] = field(default_factory=list)
    attacks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)  # x, y, made
    teacher: Callable[[torch.Tensor], torch.Tensor] | None = None

    def ask(self, x: torch.Tensor) -> Rows:
        """The live teacher's logits."""
        assert self.teacher is not None
        return self.teacher(x).tolist()  # type: ignore[no-any-return]


def watched(step: Step) -> tuple[Step, Seen]:
    """The step, and what will be asked of it."""
    seen = Seen(teacher=step.frozen["teacher"])

    def student(*groups: torch.Tensor, norms: int = 0) -> tuple[torch.Tensor, ...]:
        logits = step.student(*groups, norms=norms)
        seen.groups += [(norms, x) for x in groups]
        seen.outputs += [output.tolist() for output in logits]
        return logits

    def attack(x: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
        made = step.attack(x, y, **options)
        seen.attacks.append((x, y, made))
        return made

    return replace(step, student=student, attack=attack), seen


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp((v - max(logits)) / temperature) for v in logits]
    return [p / sum(powers) for p in powers]


def blended(rows: Rows, mixing: Mixing | None) -> Rows:
    """lambda times each row plus 1 - lambda times its partner's."""
    if mixing is None:
        return rows
    pairs = zip(mixing.weight.tolist(), mixing.partner.tolist(), strict=True)
    return [[w * a + (1 - w) * b for a, b in zip(rows[i], rows[j], strict=True)] for i, (w, j) in enumerate(pairs)]


def ce(outputs: Rows, images: Images, part: slice = slice(None)) -> float:
    """Sum over samples of the cross-entropy with blended, smoothed labels."""
    classes = range(len(outputs[0]))
    hot = [[(1 - S) * (k == y) + S / len(classes) for k in classes] for y in images.labels.tolist()]
    rows = zip(outputs, blended(hot, images.mixing)[part], strict=True)
    return -sum(p * math.log(q) for row, label in rows for p, q in zip(label, softmax(row), strict=True))


def kl(outputs: Rows, teacher: Rows, mixing: Mixing | None, t: float = T) -> float:
    """t^2 times the sum over samples of KL(blended softened teacher || softened student)."""
    soft = blended([softmax(row, t) for row in teacher], mixing)
    rows = zip(outputs, soft, strict=True)
    return t**2 * sum(
        p * math.log(p / q) for row, label in rows for p, q in zip(label, softmax(row, t), strict=True) if p
    )


def expected_loss(name: str, seen: Seen, clean: Images, dad: Images | None) -> float:
    """The sum that is to be divided by the samples of a stream; here both streams have as many."""
    out = seen.outputs
    stored = clean.logits.tolist()
    if name in ("plain", "at"):
        return ce(out[0], clean)
    if name == "kd":
        return ce(out[0], clean) + A * kl(out[0], stored, clean.mixing)
    if name == "kd_live":
        return ce(out[0], clean) + A * kl(out[0], seen.ask(clean.x), None)
    if name in ("advprop", "dat"):
        return ce(out[0], clean) + ce(out[1], clean)
    if name == "fast_advprop":
        return ce(out[0], clean, slice(2, None)) + ce(out[1], clean, slice(2))
    assert dad is not None
    if name == "dad":
        on_clean = kl(out[0], stored, clean.mixing)
        return ce(out[0], clean) + A * (on_clean + kl(out[1], dad.logits.tolist(), dad.mixing))
    if name == "dad_images":
        return ce(out[0], clean) + ce(out[1], dad)
    if name == "dat_dad":
        on_both = kl(out[0], stored, clean.mixing) + kl(out[1], dad.logits.tolist(), dad.mixing)
        return ce(out[0], clean) + A * (on_both + ce(out[2], clean))
    if name in ("ard", "rslad"):
        assert dad.partner is not None
        beside = dad.partner.tolist()  # the labels of the clean images of the same keys
        if name == "ard":
            return ce(out[0], clean) + A * kl(out[1], beside, dad.mixing)
        return 5 / 6 * kl(out[1], beside, dad.mixing, 1.0) + 1 / 6 * kl(out[0], stored, clean.mixing, 1.0)
    if name == "dad_live":
        return ce(out[0], clean) + A * (kl(out[0], seen.ask(clean.x), None) + kl(out[1], seen.ask(dad.x), None))
    raise AssertionError(f"write out the formula of {name} here")


SHOWN = {  # what the student sees, in order: (set of batch norms, images)
    "at": lambda x, dad, made: [(0, made)],
    "advprop": lambda x, dad, made: [(0, x), (1, made)],
    "fast_advprop": lambda x, dad, made: [(0, x[2:]), (1, made)],
    "dat": lambda x, dad, made: [(0, x), (0, made)],
    "dad": lambda x, dad, made: [(0, x), (0, dad)],
    "dad_images": lambda x, dad, made: [(0, x), (0, dad)],
    "ard": lambda x, dad, made: [(0, x), (0, dad)],
    "rslad": lambda x, dad, made: [(0, x), (0, dad)],
    "dat_dad": lambda x, dad, made: [(0, x), (0, dad), (0, made)],
    "dad_live": lambda x, dad, made: [(0, x), (0, dad)],
}


@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("kind", METHODS, ids=NAMES)
def test_the_loss_is_the_formula(kind: type[Method], mixed: str) -> None:
    """From the logits that the student gave, in Python's floats; images and labels blended alike."""
    method = with_settings(kind)
    learner, _ = learner_of(student_of())
    recipe = settings(method, *MIXED[mixed])
    batch = batch_of(method.needs.streams)
    step, seen = watched(step_of(learner, batch, recipe))
    loss = total(method.terms(step), totals_of(batch))
    clean, dad = step.images["clean"], step.images.get("dad")
    assert (clean.mixing is None) == (mixed == "plain images")
    assert loss.item() == pytest.approx(expected_loss(method.name, seen, clean, dad) / BATCH, rel=1e-5)

    made = seen.attacks[0][2] if seen.attacks else None
    shown = SHOWN.get(method.name, lambda x, dad, made: [(0, x)])(clean.x, dad.x if dad else None, made)
    assert [norms for norms, _ in seen.groups] == [norms for norms, _ in shown]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(seen.groups, shown, strict=True))
    for x, y, _ in seen.attacks:  # which climbs away from the labels that the loss has, without smoothing
        hot = blended([[float(k == label) for k in range(5)] for label in clean.labels.tolist()], clean.mixing)
        assert torch.equal(x, clean.x[: len(x)])
        aims = y.tolist() if y.ndim == 2 else [[float(k == label) for k in range(5)] for label in y.tolist()]
        assert aims == [pytest.approx(row) for row in hot[: len(x)]]


@pytest.mark.parametrize(
    "method", [*(kind() for kind in METHODS), AdvProp(steps=1)], ids=lambda method: f"{method.name} {method.passes}"
)
def test_passes_are_those_that_are_stated(method: Method) -> None:
    """Forward passes of student, teacher and discretizer per clean image, with as many DAD images as clean ones.

    All weights learn, those of frozen models do not.
    """
    student = student_of()
    learner, models = learner_of(student)
    batch = batch_of(method.needs.streams)
    step = step_of(learner, batch, settings(method))
    seen, asked = count_images(student), {name: count_images(model) for name, model in models.items()}
    total(method.terms(step), totals_of(batch)).backward()
    assert sum(seen) / BATCH == pytest.approx(method.passes.forward)
    assert sum(asked["teacher"]) / BATCH == method.passes.teacher
    assert sum(asked["discretizer"]) / BATCH == method.passes.discretizer
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in student.parameters())
    assert all(weight.grad is None for model in models.values() for weight in model.parameters())
    assert {name for name, images in asked.items() if images} == method.needs.models


def test_a_training_pass_is_the_unit_of_cost() -> None:
    """An attack pass is two thirds of it: AdvProp with five steps is 2 + 10/3."""
    assert AdvProp().passes.times_plain == pytest.approx(2 + 5 * 2 / 3)


def test_ard_with_the_labels_of_its_own_images_is_dad_without_its_clean_term() -> None:
    """And RSLAD with equal weights is then DAD without its cross-entropy."""
    learner, _ = learner_of(student_of().eval())
    batch = batch_of()
    batch["dad"].partner = batch["dad"].logits
    terms = {}
    for method in (DAD(temperature=1, weight=A), ARD(temperature=1, weight=A), RSLAD(balance=0.5)):
        step = step_of(learner, batch, settings(method))
        terms[method.name] = {name: total({name: term}, totals_of(batch)) for name, term in method.terms(step).items()}
    dad, ard, rslad = terms["dad"], terms["ard"], terms["rslad"]
    assert ard.keys() == {"ce", "kl_dad"} and all(torch.allclose(ard[name], dad[name]) for name in ard)
    assert rslad.keys() == {"kl_clean", "kl_dad"} and all(torch.allclose(A / 0.5 * rslad[n], dad[n]) for n in rslad)


def test_rslad_reads_no_labels() -> None:
    learner, _ = learner_of(student_of().eval())
    batch = batch_of()
    losses = []
    for _ in range(2):
        losses.append(total(RSLAD().terms(step_of(learner, batch, settings(RSLAD()))), totals_of(batch)))
        for some in batch.values():
            some.labels = some.labels.flip(0)
    assert torch.equal(*losses)
