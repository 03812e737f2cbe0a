"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019): blend images and labels by the same weights.

Partners come from the same stream: clean images are mixed with clean ones, DAD images with DAD ones. The paper's code
mixes over the concatenated batch instead, where every clean image is mixed with an adversarial one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Mixing:
    """How each of B images is blended with a partner of its batch."""

    partner: torch.Tensor  # int64 [B]
    weight: torch.Tensor  # float32 [B], lambda: the share of the image itself, the rest is its partner
    box: torch.Tensor  # int64 [B, 4], top, bottom, left, right of CutMix's window in pixels; empty for Mixup

    def to(self, device: torch.device) -> Mixing:
        return Mixing(*(part.to(device, non_blocking=True) for part in (self.partner, self.weight, self.box)))


def draw_mixing(batch: int, side: int, *, mixup: float, cutmix: float, generator: torch.Generator) -> Mixing | None:
    """Draw a partner and a lambda for each of ``batch`` images of ``side`` pixels; None when both alphas are 0.

    mixup, cutmix: alpha of the Beta(alpha, alpha) distribution of lambda. If both are set, each image takes one of them
    at even odds. CutMix's lambda is corrected to the area of the window after clipping it at the border.
    """
    if not mixup and not cutmix:
        return None
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    cut = rng.random(batch) < (0.5 if mixup and cutmix else float(bool(cutmix)))
    weight = np.where(cut, rng.beta(cutmix or 1, cutmix or 1, batch), rng.beta(mixup or 1, mixup or 1, batch))
    reach = np.where(cut, side * np.sqrt(1 - weight) / 2, 0)[:, None]  # half the side of the window
    centre = rng.integers(0, side, (batch, 2))
    low, high = ((centre + sign * reach).round().clip(0, side).astype(np.int64) for sign in (-1, 1))
    area = (high - low).prod(1) / side**2
    return Mixing(
        partner=torch.from_numpy(rng.permutation(batch)),
        weight=torch.from_numpy(np.where(cut, 1 - area, weight)).float(),
        box=torch.from_numpy(np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)),
    )


def mix_images(images: torch.Tensor, mixing: Mixing | None) -> torch.Tensor:
    """Blend float images [B, 3, H, W] with their partners. mixing: None leaves them as they are."""
    if mixing is None:
        return images
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    top, bottom, left, right = mixing.box.view(-1, 4, 1, 1).unbind(1)  # [B, 1, 1] each
    inside = ((rows >= top) & (rows < bottom)).mT & (columns >= left) & (columns < right)  # [B, H, W]
    mixup = (mixing.box[:, 0] == mixing.box[:, 1])[:, None, None]
    keep = torch.where(mixup, mixing.weight[:, None, None], (~inside).float())[:, None]
    return keep * images + (1 - keep) * images[mixing.partner]


def mix_log_probabilities(log_probabilities: torch.Tensor, mixing: Mixing | None) -> torch.Tensor:
    """log(lambda p1 + (1 - lambda) p2) of log-probabilities [B, classes]."""
    if mixing is None:
        return log_probabilities
    weight = mixing.weight[:, None]
    return torch.logaddexp(log_probabilities + weight.log(), log_probabilities[mixing.partner] + torch.log1p(-weight))
