"""Stable Diffusion in the discretizer's place: a real pipeline of diffusers with small random parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manifests import UserError
from pipeline.method.diffusion import DiffusionConfig, load_diffusion
from pipeline.method.teacher import weights_fingerprint

SIDE = 32


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without diffusers the message says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"discretizer\.kind: diffusion needs the extra.*\[diffusion\]"):
        load_diffusion(DiffusionConfig(), "anything")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of diffusers' layout, tiny and untrained."""
    diffusers = pytest.importorskip("diffusers", reason="the extra [diffusion] is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra [diffusion] is not installed")
    path = tmp_path_factory.mktemp("diffusion")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefg", *(f"{letter}</w>" for letter in "abcdefg")]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path, model_max_length=77)
    diffusers.StableDiffusionImg2ImgPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
    ).save_pretrained(path / "model", safe_serialization=True)  # fmt: skip
    return path / "model"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_an_image_is_redrawn_the_same_in_any_batch(folder: Path, images: torch.Tensor) -> None:
    """Images in [0, 1] come back changed, in [0, 1], without codes; alone or among others, today or tomorrow."""
    model = load_diffusion(DiffusionConfig(inference_steps=4, strength=0.5), str(folder))
    drawn, codes = model(images)
    assert drawn.shape == images.shape and codes.shape == (3, 0, 0) and drawn.min() >= 0 and drawn.max() <= 1
    assert (drawn - images).abs().mean() > 0.01
    torch.testing.assert_close(model(images[1:2])[0], drawn[1:2], atol=1e-4, rtol=1e-4)
    assert torch.equal(model(images)[0], drawn)


def test_strength_decides_how_far(folder: Path, images: torch.Tensor) -> None:
    near, far = (
        load_diffusion(DiffusionConfig(inference_steps=10, strength=s), str(folder))(images)[0] for s in (0.1, 1.0)
    )
    assert not torch.allclose(near, far, atol=0.01)


def test_a_run_with_it(folder: Path, world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A whole run: shards without codes, changed codes unknown, a fingerprint of the diffusion model."""
    from manifests import RunDir
    from pipeline.generate import make_shards

    recipe = world.load(
        "discretizer.kind=diffusion",
        f"discretizer.weights={folder}",
        "discretizer.diffusion.inference_steps=4",
        "output.codes=false",
    )
    make_shards(recipe, str(tmp_path / "run"))
    table, _ = RunDir(tmp_path / "run").manifest()
    assert table.num_rows == 36 and set(table.column("codes_changed").to_pylist()) == {None}
    assert len(RunDir(tmp_path / "run").info().fingerprints["discretizer"]) == 16


def test_less_than_one_step(folder: Path) -> None:
    with pytest.raises(UserError, match=r"strength 0\.3 of 2 inference_steps is less than one step"):
        load_diffusion(DiffusionConfig(inference_steps=2), str(folder))


def test_no_such_model(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra [diffusion] is not installed")
    with pytest.raises(UserError, match=r"discretizer\.weights: cannot load .*nowhere") as caught:
        load_diffusion(DiffusionConfig(), str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_the_fingerprint_sees_scheduler_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Settings count like weights: another schedule, or another token for the prompt's word, is another discretizer."""

    def change(part: str, edit: Callable[[dict[str, Any]], object]) -> str:
        copy = Path(shutil.copytree(folder, tmp_path / part.replace("/", "-")))
        tree = json.loads((copy / part).read_text())
        edit(tree)
        (copy / part).write_text(json.dumps(tree))
        return weights_fingerprint(load_diffusion(DiffusionConfig(prompt="a"), str(copy)))

    tokenizer = (
        "tokenizer/tokenizer.json" if (folder / "tokenizer" / "tokenizer.json").exists() else "tokenizer/vocab.json"
    )

    def swap(tree: dict[str, Any]) -> None:
        vocabulary = tree.get("model", {}).get("vocab", tree)
        vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]

    moved = change("model_index.json", lambda tree: tree)
    assert moved == weights_fingerprint(load_diffusion(DiffusionConfig(prompt="a"), str(folder)))
    scheduler = change("scheduler/scheduler_config.json", lambda tree: tree.update(beta_end=0.5))
    scaling = change("vae/config.json", lambda tree: tree.update(scaling_factor=0.5))
    assert len({moved, scheduler, scaling, change(tokenizer, swap)}) == 4
