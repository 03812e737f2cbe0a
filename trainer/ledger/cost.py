"""``python -m trainer.ledger.cost``: measure the cost of every method relative to plain training (paper, table 7)."""

from __future__ import annotations

import click
import torch
from torch import nn

from manifests import RunDir, RunInfo, UserError
from manifests.command import ProjectGroup, set_option
from manifests.devices import choose_device, use_bf16
from manifests.recipe import make_recipe, nearest

from ..methods.parts.frozen import as_quantizer, load_model, to_frozen, without_gradient
from ..options import choice_options, chosen
from ..recipe import Recipe, load
from ..student import check_name
from .ledger import IGNORED, Models, measure, table, whole_bursts


@click.group(
    cls=ProjectGroup,
    invoke_without_command=True,
    subcommand_metavar="",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@choice_options
@click.option(
    "--random",
    metavar="NAME",
    help="Replace the run's models by this timm model as teacher and a VQGAN f8-16384, both untrained.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Steps of one measurement; raised to two whole rounds of the loader's workers.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Measurements of each method; the table shows medians.",
)
@set_option
def main(
    recipe: str | None,
    student: str | None,
    shards: str | None,
    random: str | None,
    steps: int,
    repeats: int,
    overrides: tuple[str, ...],
) -> None:
    """Measure the cost of every training method relative to plain training, data loading included."""
    recipe, named = chosen(recipe, student, shards)
    settings = load(recipe, [*named, *overrides])
    check_name(settings.student)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    info = RunDir(settings.shards).info()
    models = load_models(settings, info, random, device)
    click.echo(_header(settings, info, random, device))
    steps = whole_bursts(steps, settings.workers)
    timings, generation = measure(settings, models, device, steps=steps, repeats=repeats)
    counts = info.counts or {}
    verified, rejected = counts.get("verified", 0), counts.get("rejected", 0)
    ledger = table(timings, generation, settings, verified / (verified + rejected))
    click.echo(f"each method {repeats} times {steps} steps, in turn\n\n{ledger}")


def load_models(recipe: Recipe, info: RunInfo, random: str | None, device: torch.device) -> Models:
    """The models that made a run, or untrained ones, which cost the same.

    random: a timm model's name for the untrained teacher; None: the run's models.
    Raises UserError when the run's models are missing, or timm does not know the name.
    """
    from pipeline.method import attack, discretizer

    if random is None:
        phi, q = (load_model(info, name, device, recipe.models) for name in ("teacher", "discretizer"))
    else:
        phi = to_frozen(_untrained_teacher(random, len(info.classes)), device)
        q = to_frozen(discretizer.VQGAN(discretizer.VQGANConfig()), device)
    frozen = {"teacher": without_gradient(phi), "discretizer": as_quantizer(q)}
    settings = make_recipe(attack.AttackSettings, info.recipe["attack"], "run.json")
    discretize = frozen["discretizer"]

    views, batch = info.recipe["views"]["count"], info.recipe["batch"]

    def generate(x: torch.Tensor, y: torch.Tensor) -> None:
        for images, labels in zip(x.split(batch), y.split(batch), strict=True):
            made = attack.attack(images, labels, phi, discretize, settings, torch.zeros_like(images))
            asked_about = [images, made.adversarial] * (1 if views == 1 else 1 + views)
            if info.recipe["output"].get("attacked_loss"):
                asked_about.append(made.perturbed)
            with torch.no_grad():
                for shown in asked_about:
                    phi(shown)

    return Models(frozen, generate)


def _untrained_teacher(name: str, classes: int) -> nn.Module:
    import timm

    from pipeline.method.teacher import TeacherModel

    if not timm.is_model(name):
        raise UserError(f"--random: timm knows no model {name!r}{nearest(name, timm.list_models())}")
    model = timm.create_model(name, num_classes=classes)
    data = timm.data.resolve_data_config(model=model)
    return TeacherModel(model, size=data["input_size"][-1], mean=data["mean"], std=data["std"])


def _header(recipe: Recipe, info: RunInfo, random: str | None, device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    numbers = "bf16" if use_bf16(recipe.precision, device) else "fp32"
    models = f"untrained {random} and VQGAN f8-16384" if random else "the run's teacher and discretizer"
    side = recipe.input or info.recipe["canvas"]
    batch = f"batch {recipe.batch}" + (f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else "")
    without = ", ".join(name for name in IGNORED if getattr(recipe, name))
    left_out = f"; without the recipe's {without}" if without else ""
    loading = f"{recipe.workers} loader workers"
    return f"{where}; {recipe.student} at {side} px, {batch}, {numbers}, {loading}; {models}{left_out}"


if __name__ == "__main__":
    main(prog_name="python -m trainer.ledger.cost")
