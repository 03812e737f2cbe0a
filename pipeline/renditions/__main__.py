"""``python -m pipeline.renditions``: the demo's images. Users need only ``compose``; the rest made the assets."""

from __future__ import annotations

from pathlib import Path

import click

from manifests.command import ProjectGroup


@click.group(cls=ProjectGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compose the Renditions demo, or rebuild its committed assets."""


@main.command()
@click.option(
    "--out",
    default="data/renditions",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder to write the image sets to.",
)
def compose(out: Path) -> None:
    """Compose the image sets (train, val, v2, renditions, sketches) from the glyphs."""
    from .compose import compose as compose_sets

    compose_sets(out)


@main.command()
def glyphs() -> None:
    """Rebuild assets/glyphs.tar and NOTICE from the icon packages (needs npm and the extra [assets])."""
    from .glyphs import build_glyphs

    for style, count in build_glyphs().items():
        click.echo(f"{style}: {count} glyphs")


@main.command()
@click.option("--steps", default=4500, show_default=True)
@click.option("--batch", default=128, show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def train_teacher(steps: int, batch: int, lr: float, seed: int, threads: int) -> None:
    """Train the CLIP teacher; writes assets/teacher/open_clip_model.safetensors."""
    import torch

    from .train_teacher import train_teacher as train

    torch.set_num_threads(threads)
    train(steps=steps, batch=batch, lr=lr, seed=seed)


@main.command()
@click.option("--steps", default=4000, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--adversarial-from", default=1600, show_default=True, help="Step at which the adversarial loss starts.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def train_discretizer(steps: int, batch: int, lr: float, adversarial_from: int, seed: int, threads: int) -> None:
    """Train the VQGAN; writes assets/vqgan.safetensors."""
    import torch

    from .train_discretizer import train_discretizer as train

    torch.set_num_threads(threads)
    train(steps=steps, batch=batch, lr=lr, seed=seed, adversarial_from=adversarial_from)


@main.command()
@click.option("--data", default="data/renditions", show_default=True, metavar="DIR")
def evaluate(data: str) -> None:
    """Print the teacher's top-1 on every set, on the images and on their discretizations, as in the model card."""
    from .evaluate import evaluation_table

    click.echo(evaluation_table(data))


if __name__ == "__main__":
    main(prog_name="python -m pipeline.renditions")
