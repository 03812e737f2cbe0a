"""The price of storing only the top k logits (`ViewSettings.topk`): errors of distillation loss and gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
import numpy as np
import torch
import torch.nn.functional as F

from manifests import UserError
from manifests.progress import progress

from .codec import encode_array
from .dataset import ShardDataset
from .views import expand, shorten

SAMPLES = 1000
STUDENTS = ("untrained", "half-way", "near")  # stages on the way to the teacher


def soft_labels_of(url: str) -> np.ndarray:
    """float16 logits [N, classes] of up to `SAMPLES` clean images of a run.

    Raises UserError if the run stores the top k itself.
    """
    dataset = ShardDataset(url, "clean")
    places = np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset)), dtype=int)
    with progress(len(places), "reading", "label", quick=True) as bar:
        rows = []
        for place in places.tolist():
            logits = dataset.read(place).logits
            if logits.dtype != np.float16:
                why = "stores shortened labels, so their loss cannot be measured"
                raise UserError(f"{url}: {why}; name a run of full logits")
            rows.append(logits.reshape(-1, logits.shape[-1])[0])  # of several views, the first
            bar.update()
    return np.stack(rows)


def clip_like(rows: int = 200, classes: int = 1000) -> np.ndarray:
    """float16 logits [rows, classes] like a zero-shot CLIP's: 100 times cosines of -0.05 to 0.35.

    Classes come in groups of similar names, which have similar logits.
    """
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(rows, classes // 20)).repeat(20, axis=1)
    return (17 + 2.0 * groups + 1.5 * rng.normal(size=(rows, classes)) + 8 * (np.arange(classes) == 7)).astype(
        np.float16
    )


def students_of(teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits [N, classes] of `STUDENTS`: one knows nothing, one is half-way to the teacher, one comes near."""
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0), dtype=teacher.dtype)
    noise *= teacher.std(dim=1, keepdim=True) / 2
    return dict(zip(STUDENTS, (torch.zeros_like(teacher), teacher / 2 + noise, teacher + noise), strict=True))


def kl_and_gradient(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[float, torch.Tensor]:
    """KL(teacher || student) at a temperature, mean over rows, and its gradient by the student's logits (q - p)."""
    log_q, log_p = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item(), log_q.exp() - log_p.exp()


def shortening_errors(logits: np.ndarray, k: int, temperature: float) -> Mapping[str, tuple[float, float]]:
    """For each student: relative error of the KL, and cosine between the gradients of shortened and full labels."""
    records = shorten(logits, k, (temperature,))
    whole, short = (
        torch.from_numpy(z.astype(np.float64)) for z in (logits, expand(records, logits.shape[1], temperature))
    )
    found = {}
    for name, student in students_of(whole).items():
        (exact, way), (value, other) = (kl_and_gradient(student, teacher, temperature) for teacher in (whole, short))
        found[name] = (value / exact - 1, F.cosine_similarity(way.flatten(), other.flatten(), dim=0).item())
    return found


def show(url: str | None, ks: Sequence[int], temperature: float) -> None:
    """Print the table of ``python -m shards topk``. url: a run; None: an imitated zero-shot CLIP."""
    logits = clip_like() if url is None else soft_labels_of(url)
    if wrong := [k for k in ks if not 0 < k < logits.shape[1]]:
        raise UserError(f"--k: {wrong[0]}: there are {logits.shape[1]} classes; from 1 to {logits.shape[1] - 1}")
    what = "a teacher like a zero-shot CLIP over ImageNet's classes" if url is None else url
    click.echo(f"{what}: {len(logits)} labels of {logits.shape[1]} classes, T = {temperature:g}; ", nl=False)
    click.echo("error of the KL, cosine of the gradients\n")
    full = len(encode_array(logits[0]))
    click.echo("| k | bytes per label | mass of the rest | " + " | ".join(STUDENTS) + " |\n|---|---|---|---|---|---|")
    for k in ks:
        records = shorten(logits, k, (temperature,))
        size = len(encode_array(records[:1]))
        z = logits.astype(np.float64) / temperature
        rest = np.exp(records["rest"][:, 0] - np.logaddexp.reduce(z, axis=1)).mean()
        cells = [f"{error:+.0%}, {cosine:.2f}" for error, cosine in shortening_errors(logits, k, temperature).values()]
        click.echo(f"| {k} | {size} ({size / full:.2f} of all) | {rest:.0%} | {' | '.join(cells)} |")
