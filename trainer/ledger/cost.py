"""``python -m trainer.ledger.ledger.cost``: what DAD costs beside plain training, live teachers and adversarial training (paper, table 7)."""

from __future__ import annotations

from collections.abc import Sequence

import click
import torch
from torch import nn

from manifests import RunDir, RunInfo, UserError
from manifests.command import ProjectGroup, set_option
from manifests.devices import choose_device, use_bf16
from manifests.recipe import make_recipe, nearest

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
    help="Instead of the run's models, this timm model as teacher and a VQGAN f8-16384, untrained.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Steps of one measurement, at least: two rounds of the loader's workers.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Measurements of each scheme; medians count.",
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
    """Measure every way of training in turn, as ratios to plain training, loading included."""
    recipe, named = chosen(recipe, student, shards)
    of_run = [override for override in overrides if override.startswith(("teacher.", "discretizer."))]
    settings = load(recipe, [*named, *(override for override in overrides if override not in of_run)])
    check_name(settings.student)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    info = RunDir(settings.shards).info()
    models = load_models(info, random, device, of_run)
    click.echo(_header(settings, info, random, device))
    steps = whole_bursts(steps, settings.workers)
    timings, generation = measure(settings, models, device, steps=steps, repeats=repeats)
    click.echo(f"each scheme {repeats} times {steps} steps, in turn\n\n{table(timings, generation, settings.epochs)}")


def load_models(info: RunInfo, random: str | None, device: torch.device, overrides: Sequence[str] = ()) -> Models:
    """The models that made a run, or untrained ones, which cost the same. overrides: of the run's models, as `teacher.model=…`.

    Raises UserError when the run's models are not where it says, or would be downloads that the command does not name.
    """
    from pipeline.method import attack, discretizer, teacher

    phi: nn.Module
    q: nn.Module
    if random is not None:
        phi, q = _untrained_teacher(random, len(info.classes)), discretizer.VQGAN(discretizer.VQGANConfig()).eval()
    else:
        phi = teacher.teacher_of_run(info, overrides)
        q = discretizer.discretizer_of_run(info, overrides)
    for model in (phi, q):
        model.to(device).to(memory_format=torch.channels_last)
    settings = make_recipe(attack.AttackSettings, info.recipe["attack"], "run.json")

    def discretize(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, codes = q(images.contiguous(memory_format=torch.channels_last))
        return images.float(), codes

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

    return Models(phi, discretize, generate)


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
    return f"{where}; {recipe.student} at {side} px, {batch}, {numbers}, {recipe.workers} loader workers; {models}{left_out}"


if __name__ == "__main__":
    main(prog_name="python -m trainer.ledger.ledger.cost")
