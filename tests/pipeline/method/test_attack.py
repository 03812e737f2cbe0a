"""The attack against the paper's equations written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipeline.method.attack import AttackSettings, attack, draw_noise, loss_gradient, project, step, verified


class SmallClassifier(nn.Module):
    """A smooth classifier of 8x8 images, 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.conv(images).tanh().flatten(1))
        return logits


def levels(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A quantizer: eight levels a pixel; its code is the level of the first channel."""
    codes = (images * 7).round()
    return codes / 7, codes[:, 0].long()


def mirror(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A differentiable 'discretizer': a gradient that went through it would come out mirrored."""
    assert not torch.is_grad_enabled() and not images.requires_grad
    return 0.25 + images.flip(-1) / 2, (images[:, 0] > 0.5).long()


def by_hand(x: torch.Tensor, y: int, model: nn.Module, discretizer, settings: AttackSettings, noise: torch.Tensor):  # type: ignore[no-untyped-def]
    """Paper eq. 9 for one image: x̂ = Q(x); K steps of ascent in the ball around x̂; x'' = Q(x̂_K)."""
    with torch.no_grad():
        center = discretizer(x[None])[0][0]
    current = torch.minimum(torch.maximum(center + noise, torch.tensor(0.0)), torch.tensor(1.0))
    for _ in range(settings.steps):
        point = current.clone().requires_grad_(True)
        loss = -model(point[None])[0].log_softmax(0)[y]
        loss.backward()
        gradient = point.grad
        assert gradient is not None
        if settings.norm == "l2":
            moved = current + settings.alpha * gradient / gradient.pow(2).sum().sqrt()
            delta = moved - center
            length = delta.pow(2).sum().sqrt()
            if length > settings.eps:
                delta = delta * (settings.eps / length)
        else:
            moved = current + settings.alpha * torch.where(gradient > 0, 1.0, -1.0)
            delta = torch.where(
                (moved - center).abs() > settings.eps, settings.eps * (moved - center).sign(), moved - center
            )
        current = torch.minimum(torch.maximum(center + delta, torch.tensor(0.0)), torch.tensor(1.0))
    with torch.no_grad():
        return center, current, discretizer(current[None])[0][0]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return SmallClassifier()


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 8, 8, generator=generator), torch.randint(0, 4, (6,), generator=generator)


@pytest.mark.parametrize("discretizer", [levels, mirror])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_equals_the_equations_by_hand(model, batch, norm, steps, discretizer):  # type: ignore[no-untyped-def]
    """Every image of a batch equals the loop written for one image, with the gradient taken at Q(x), not through Q."""
    x, y = batch
    settings = AttackSettings(
        norm=norm, eps=0.3 if norm == "l2" else 0.03, alpha=0.2 if norm == "l2" else 0.02, steps=steps
    )
    noise = draw_noise([f"key{i}" for i in range(6)], (3, 8, 8), settings, seed=0)
    assert (noise.flatten(1).norm(dim=1) > 0).any() and (noise.flatten(1).norm(dim=1) == 0).any()
    made = attack(x, y, model, discretizer, settings, noise)
    for i in range(6):
        center, current, adversarial = by_hand(x[i], int(y[i]), model, discretizer, settings, noise[i])
        torch.testing.assert_close(made.discrete[i], center)
        torch.testing.assert_close(made.perturbed[i], current, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(made.adversarial[i], adversarial, atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            assert torch.equal(made.codes[i], discretizer(made.perturbed[i : i + 1])[1][0])
            assert torch.equal(made.codes_discrete[i], discretizer(x[i : i + 1])[1][0])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_perturbation_stays_in_the_ball(model, batch, norm):  # type: ignore[no-untyped-def]
    """Without clamping (far from 0 and 1), |x_K - Q(x)| reaches eps and no more, though the steps are longer."""
    x, y = 0.4 + 0.2 * batch[0], batch[1]
    settings = AttackSettings(norm=norm, eps=0.1, alpha=0.07, steps=4, random_start=1.0)
    noise = draw_noise([str(i) for i in range(6)], (3, 8, 8), settings, seed=0)
    made = attack(x, y, model, levels, settings, noise)
    delta = (made.perturbed - made.discrete).flatten(1)
    lengths = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    assert (lengths <= 0.1 * (1 + 1e-5)).all() and (lengths > 0.099).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projection(norm: str) -> None:
    """Points inside the ball stay; others move to its nearest point, whatever the other images of the batch."""
    settings = AttackSettings(norm=norm, eps=0.5)  # type: ignore[arg-type]
    delta = torch.zeros(2, 3, 4, 4)
    delta[0, 0, 0, 0], delta[0, 1, 2, 3] = 0.3, -0.3
    delta[1, 0, 0, 0], delta[1, 1, 2, 3] = 3.0, -4.0
    projected = project(delta, settings)
    assert torch.equal(projected[0], delta[0])
    expected = (0.3, -0.4) if norm == "l2" else (0.5, -0.5)
    assert (projected[1, 0, 0, 0].item(), projected[1, 1, 2, 3].item()) == pytest.approx(expected)
    assert projected[1].count_nonzero() == 2


def test_pixels_stay_in_range(model, batch):  # type: ignore[no-untyped-def]
    """However large eps is, what goes into Q is an image in [0, 1]."""
    settings = AttackSettings(eps=50.0, alpha=50.0, steps=2, random_start=1.0)
    made = attack(*batch, model, levels, settings, draw_noise(list("abcdef"), (3, 8, 8), settings, 0))
    assert made.perturbed.min() == 0 and made.perturbed.max() == 1


def test_attack_raises_the_loss(model, batch):  # type: ignore[no-untyped-def]
    """A step goes up: the loss of every image is higher after a small one than before."""
    x, y = batch
    settings = AttackSettings(eps=0.1, alpha=0.1, steps=1, random_start=0.0)
    made = attack(x, y, model, levels, settings, torch.zeros_like(x))
    before, after = (
        torch.nn.functional.cross_entropy(model(images), y, reduction="none")
        for images in (made.discrete, made.perturbed)
    )
    assert (after > before).all()


def test_one_image_does_not_depend_on_its_batch(model, batch):  # type: ignore[no-untyped-def]
    """The gradient of the summed loss: an image attacked alone comes out as in company."""
    x, y = batch
    together = loss_gradient(x, y, model)
    for i in range(6):
        torch.testing.assert_close(
            loss_gradient(x[i : i + 1], y[i : i + 1], model)[0], together[i], atol=1e-7, rtol=1e-5
        )


def test_no_gradient_reaches_weights_or_callers(models):  # type: ignore[no-untyped-def]
    """With the real CLIP and VQGAN: weights collect no gradients, the images that come out are free of any graph."""
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = AttackSettings(eps=1.0, alpha=1.0, random_start=1.0)
    made = attack(
        x,
        torch.tensor([0, 3]),
        models.teacher,
        models.discretizer,
        settings,
        draw_noise("ab", (3, 32, 32), settings, 0),
    )
    weights = [*models.teacher_model.parameters(), *models.discretizer_model.parameters()]
    assert all(weight.grad is None for weight in weights)
    assert not any(image.requires_grad for image in (made.discrete, made.perturbed, made.adversarial))
    torch.testing.assert_close(made.adversarial, models.discretizer_model(made.perturbed)[0].detach())


@pytest.mark.parametrize("lead", [0.0, 10.0, 18.0, 25.0, 40.0, 80.0])
def test_a_confident_teacher_is_attacked_as_well(model, batch, lead: float) -> None:  # type: ignore[no-untyped-def]
    """At any lead of the label, in nats, the gradient is the float64 cross-entropy's; an L2 step has length alpha."""
    x, y = batch
    bonus = lead * torch.nn.functional.one_hot(y, 4)
    found = loss_gradient(x, y, lambda images: model(images) + bonus)
    exact = copy.deepcopy(model).double()
    point = x.double().requires_grad_()
    z = exact(point) + bonus
    margin = torch.stack(
        [row[torch.arange(4) != label].logsumexp(0) - row[label] for row, label in zip(z, y, strict=True)]
    )
    (gradient,) = torch.autograd.grad(torch.nn.functional.softplus(margin, threshold=1000).sum(), point)
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found / largest, gradient / largest, rtol=1e-4, atol=1e-5)
    lengths = step(found, AttackSettings(alpha=0.2)).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((6,), 0.2))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_flat_teacher_moves_nothing(norm: str) -> None:
    """Where the gradient is zero, the image stays Q(x): no division by zero."""
    x = torch.rand(2, 3, 8, 8)
    settings = AttackSettings(norm=norm, steps=2, random_start=0.0)  # type: ignore[arg-type]
    made = attack(
        x, torch.tensor([0, 1]), lambda images: images.flatten(1)[:, :4] * 0.0, levels, settings, torch.zeros_like(x)
    )
    torch.testing.assert_close(made.perturbed, made.discrete)


def test_no_room_to_move() -> None:
    """eps = 0: nothing moves, nothing is NaN."""
    settings = AttackSettings(eps=0.0, random_start=1.0)
    noise = draw_noise(["a", "b"], (3, 8, 8), settings, 0)
    assert torch.equal(noise, torch.zeros_like(noise))
    assert torch.equal(project(step(torch.randn(2, 3, 8, 8), settings), settings), torch.zeros(2, 3, 8, 8))


def test_noise_lies_on_the_sphere() -> None:
    """L2: every random start has length eps, all directions occur. Linf: it lies in the ball."""
    settings = AttackSettings(eps=0.7, random_start=1.0)
    noise = draw_noise([str(i) for i in range(200)], (3, 8, 8), settings, 0)
    torch.testing.assert_close(noise.flatten(1).norm(dim=1), torch.full((200,), 0.7))
    assert noise.flatten(1).mean(0).norm() < 0.1  # 0.7 / sqrt(200) = 0.05
    cube = draw_noise([str(i) for i in range(50)], (3, 8, 8), AttackSettings(norm="linf", eps=0.7, random_start=1.0), 0)
    assert 0.69 < cube.abs().max() <= 0.7 and abs(cube.mean()) < 0.02


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_noise_depends_on_seed_and_key_alone(norm: str) -> None:
    """The same sample gets the same start in any batch, order or process; another key or seed gets another."""
    settings = AttackSettings(norm=norm, random_start=1.0)  # type: ignore[arg-type]
    keys = ["a", "b", "c", "d"]
    noise = dict(zip(keys, draw_noise(keys, (3, 4, 4), settings, seed=5), strict=True))
    torch.manual_seed(99)
    for order in (["d", "b"], ["c"], ["b", "a", "d", "c"]):
        for key, again in zip(order, draw_noise(order, (3, 4, 4), settings, seed=5), strict=True):
            assert torch.equal(noise[key], again)
    assert not torch.equal(noise["a"], noise["b"])
    assert not torch.equal(noise["a"], draw_noise(["a"], (3, 4, 4), settings, seed=6)[0])


@pytest.mark.parametrize(
    ("p0", "low", "high"), [(0.8, 0.77, 0.83), (0.25, 0.22, 0.28), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
)
def test_share_of_random_starts(p0: float, low: float, high: float) -> None:
    """Of 2000 samples a share p0 starts at a random point (standard error 0.009), the others at Q(x)."""
    noise = draw_noise([f"k{i}" for i in range(2000)], (3, 2, 2), AttackSettings(random_start=p0), seed=0)
    assert low <= (noise.flatten(1).norm(dim=1) > 0).float().mean().item() <= high


def test_a_wrong_image_is_rejected(models, world, finished_run):  # type: ignore[no-untyped-def]
    """Verified exactly where the teacher's top-1 is the label: swapping labels rejects images that were verified."""
    from shards import ShardDataset

    dataset = ShardDataset(str(finished_run), "dad")
    images = torch.stack([dataset[i].image for i in range(len(dataset))]).float() / 255  # type: ignore[arg-type]
    labels = torch.tensor([dataset[i].label for i in range(len(dataset))])
    logits = models.teacher(images)
    assert verified(logits, labels).all()
    assert not verified(logits, (labels + 1) % 5).any()
    assert verified(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 0])).tolist() == [False, True]


def test_a_tie_with_the_label_counts_as_the_label() -> None:
    """Classes of one name have equal logits; argmax would never say the second. What is no number is not right."""
    logits = torch.tensor([[1.0, 5.0, 5.0], [5.0, 1.0, 5.0], [1.0, torch.nan, 0.0], [torch.nan, 5.0, 1.0]])
    assert verified(logits, torch.tensor([2, 1, 0, 1])).tolist() == [True, False, False, False]
