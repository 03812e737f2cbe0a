"""The learning rate rises linearly, then falls along a cosine to zero."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from manifests import UserError
from trainer.optimizer import Optimizer, create_optimizer, learning_rate


def test_warmup_is_linear_and_the_end_is_zero() -> None:
    rates = [learning_rate(step, peak=2.0, warmup=4, total=20) for step in range(21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[12] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[20] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates[3:]))


def test_without_warmup_it_starts_at_the_peak() -> None:
    assert learning_rate(0, peak=1.0, warmup=0, total=10) == 1.0


def test_settings_that_an_optimizer_refuses_are_told() -> None:
    with pytest.raises(
        UserError, match=r"^optimizer.name: sgd does not work here: Nesterov momentum requires a momentum"
    ):
        create_optimizer(torch.nn.Linear(2, 2), Optimizer(name="sgd", momentum=0))
