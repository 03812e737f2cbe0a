"""Augmentation: every number comes from the generator it is given, and each change does what its field says."""

from __future__ import annotations

import pytest
import torch

from shards import TrainingReader, seeded_generator
from trainer.images.augmentation import MEAN_COLOUR, Augment, Augmentation

from ..conftest import SIDE

NOTHING = {"flip": 0.0, "crop": 1.0, "colour": 0.0, "grey": 0.0}
EVERYTHING = {"flip": 0.5, "crop": 0.5, "colour": 0.4, "grey": 0.2, "randaugment": 2, "magnitude": 20, "erase": 0.5}


def images(count: int = 16, side: int = SIDE) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def augmented(settings: dict[str, float], side: int = SIDE, seed: int = 0) -> torch.Tensor:
    return Augment(Augmentation(**{**NOTHING, **settings}), side)(images(), seeded_generator(seed))  # type: ignore[arg-type]


def test_with_everything_off_images_stay_as_they_are() -> None:
    assert torch.equal(augmented({}), images())


@pytest.mark.parametrize("name", ["flip", "crop", "colour", "grey", "randaugment", "erase"])
def test_numbers_come_from_the_given_generator_alone(name: str) -> None:
    """Whatever the global generator holds, the same images come out, and it is left as it was."""
    settings = {name: EVERYTHING[name], "magnitude": 20}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = augmented(settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(augmented(settings), first)
    assert not torch.equal(augmented(settings, seed=1), first)
    assert not torch.equal(first, images())


def test_loader_workers_do_not_change_augmented_batches(tiny_run: object) -> None:
    reader = TrainingReader(str(tiny_run), batch_size=8)
    augment = Augment(Augmentation(**EVERYTHING), SIDE)  # type: ignore[arg-type]
    alone, two = (list(reader.batches(0, workers=workers, transform=augment)) for workers in (0, 2))
    assert all(torch.equal(a[stream].images, b[stream].images) for a, b in zip(alone, two, strict=True) for stream in a)


@pytest.mark.parametrize("crop", [0.5, 1.0])
def test_images_are_brought_to_the_size_of_the_input(crop: float) -> None:
    out = augmented({"crop": crop}, side=24)
    assert out.shape == (16, 3, 24, 24) and out.dtype == torch.uint8


def test_erasing_paints_a_rectangle_in_the_mean_colour() -> None:
    erased = augmented({"erase": 1.0})
    colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1)
    for before, after in zip(images(), erased, strict=True):
        changed = (before != after).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        inside = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (inside == colour).all()
        assert 0.01 < inside[0].numel() / SIDE**2 < 0.4


def test_randaugment_of_more_magnitude_changes_more() -> None:
    change = [(augmented({"randaugment": 2, "magnitude": m}).float() - images().float()).abs().mean() for m in (1, 30)]
    assert change[1] > change[0]


def test_an_image_is_changed_by_its_own_generator_whatever_its_neighbours() -> None:
    """Alone or in a batch: what matters is the state of the generator when its turn comes."""
    augment = Augment(Augmentation(**EVERYTHING), SIDE)  # type: ignore[arg-type]
    alone = [augment(image[None], seeded_generator("key", n))[0] for n, image in enumerate(images())]
    assert torch.equal(alone[3], augment(images()[3:4], seeded_generator("key", 3))[0])
    first_of_many = augment(images()[3:6], seeded_generator("key", 3))[0]
    assert torch.equal(alone[3], first_of_many)


def test_crops_lie_inside_and_are_no_smaller_than_the_recipe_says() -> None:
    """A ramp from left to right: the crop's first and last columns tell where it was cut."""
    ramp = torch.arange(0, 256, 2, dtype=torch.uint8).expand(1, 3, 128, 128)
    augment = Augment(Augmentation(**{**NOTHING, "crop": 0.5}), 128)  # type: ignore[arg-type]
    widths = []
    for seed in range(200):
        row = augment(ramp, seeded_generator(seed))[0, 0, 0].float()
        widths.append(((row[-1] - row[0]) / 2 + 1).item())
    assert min(widths) > 62 and max(widths) <= 128 and max(widths) - min(widths) > 50
