"""Teachers from published kinds of files, with random weights: OpenAI's archives, open_clip's and timm's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from manifests import UserError
from pipeline.method.teacher import Teacher, TeacherModel, load_teacher, weights_fingerprint
from shards.sources.classes import ClassList

CLASSES = ClassList(
    names=("wolf", "ant", "bee"), folders=("n9", "n1", "n5"), templates=("a photo of a {}.", "art of the {}.")
)
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model name that open_clip knows, and the same with QuickGELU, both much smaller than its own."""
    import open_clip

    folder = tmp_path_factory.mktemp("configs")
    (folder / "small-clip.json").write_text(json.dumps(SMALL))
    (folder / "small-clip-quickgelu.json").write_text(json.dumps(SMALL | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    return "small-clip"


@pytest.fixture(scope="module")
def state(small: str) -> dict[str, torch.Tensor]:
    """Random weights of half precision, large enough that the activation function matters."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(small, precision="fp16")
    weights = model.state_dict()
    weights |= {name: 8 * value for name, value in weights.items() if name.endswith("c_fc.weight")}
    return {name: value.half() for name, value in weights.items() if name != "attn_mask"}


def openai_archive(path: Path, state: dict[str, torch.Tensor]) -> None:
    """A TorchScript archive as OpenAI publishes CLIP: parameters as a tree of modules, and three numbers."""
    root = nn.Module()
    for name, value in state.items():
        node = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, nn.Module())
            node = getattr(node, parent)
        node.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(number))
    torch.jit.save(torch.jit.script(root), str(path))


def load(small: str, weights: Path | str, **fields: Any) -> TeacherModel:
    return load_teacher(Teacher(kind="open_clip", model=small, weights=str(weights), **fields), CLASSES)


def logits(teacher: TeacherModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = teacher(IMAGES)
    return found


@pytest.mark.filterwarnings("ignore")
def test_openai_s_own_archive(small: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """It is read without running its code, with QuickGELU: its logits are those of a `-quickgelu` model."""
    openai_archive(tmp_path / "archive.pt", state)
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    found = load(small, tmp_path / "archive.pt")
    assert next(found.model.parameters()).dtype == torch.float32
    expected = logits(load(f"{small}-quickgelu", tmp_path / "state.pt"))
    assert torch.equal(logits(found), expected)
    assert torch.equal(logits(load(f"{small}-quickgelu", tmp_path / "state.safetensors")), expected)
    assert torch.equal(logits(load(f"{small}-quickgelu", tmp_path / "archive.pt")), expected)
    other = logits(load(small, tmp_path / "state.pt"))
    assert (other - expected).abs().max() > 1e-3  # the activation matters: the test would see the wrong one


@pytest.mark.filterwarnings("ignore")
def test_an_archive_of_another_model(small: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Weights that are missing, or of another shape, are refused in one line that names the file and the model."""
    fewer = {name: value for name, value in state.items() if not name.startswith("visual.transformer.resblocks.1")}
    other = state | {"visual.proj": torch.zeros(32, 8, dtype=torch.float16)}
    for weights in (fewer, other):
        openai_archive(tmp_path / "archive.pt", weights)
        with pytest.raises(UserError, match=r"teacher\.weights: .*archive\.pt: does not fit small-clip") as caught:
            load(small, tmp_path / "archive.pt")
        assert "\n" not in str(caught.value)
    whole = (tmp_path / "archive.pt").read_bytes()
    (tmp_path / "archive.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"archive\.pt"):
        load(small, tmp_path / "archive.pt")


def test_random_weights_need_no_file(small: str) -> None:
    """`random`: the same every time, over any number of classes, without embedding a text."""
    many = ClassList(names=tuple(map(str, range(1000))), folders=tuple(map(str, range(1000))), templates=())
    first, second = (load_teacher(Teacher(model=small, weights="random"), many) for _ in range(2))
    assert torch.equal(logits(first), logits(second)) and logits(first).shape == (4, 1000)
    assert weights_fingerprint(first) == weights_fingerprint(second)
    torch.testing.assert_close(first.head.norm(dim=0), torch.ones(1000))  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3).eval()


@pytest.mark.parametrize("layout", ["bare", "state_dict", "model", "parallel", "safetensors"])
def test_timm_checkpoints(classifier: nn.Module, tmp_path: Path, layout: str) -> None:
    """Layouts of training scripts: below `state_dict` (DistributedDataParallel's too) or `model`, bare, safetensors."""
    weights = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    parallel = {f"module.{name}": value for name, value in weights.items()}
    path = tmp_path / ("teacher.safetensors" if layout == "safetensors" else "teacher.pth.tar")
    if layout == "safetensors":
        save_file(weights, path)
    else:
        trees: dict[str, Any] = {
            "bare": weights,
            "state_dict": {"state_dict": weights, "epoch": 90, "best_acc1": torch.tensor(76.0), "arch": "test_vit"},
            "model": {"model": weights, "optimizer": {"state": {}}, "scaler": None},
            "parallel": {"state_dict": parallel, "epoch": 90},
        }
        torch.save(trees[layout], path)
    teacher = load_teacher(Teacher(kind="timm", model="test_vit", weights=str(path)), CLASSES)
    size, mean, std = teacher.size, teacher.mean, teacher.std
    large = torch.nn.functional.interpolate(IMAGES, size=(size, size), mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(logits(teacher), classifier((large - mean) / std))


def test_timm_s_own_weights_of_other_classes() -> None:
    """`pretrained` with another number of classes would leave a random head: refused before anything is downloaded."""
    with pytest.raises(
        UserError, match=r"teacher\.weights: timm's resnet18 was trained on 1000 classes, the class list has 3"
    ):
        load_teacher(Teacher(kind="timm", model="resnet18", weights="pretrained"), CLASSES)


def test_timm_random() -> None:
    first, second = (load_teacher(Teacher(kind="timm", model="test_vit", weights="random"), CLASSES) for _ in range(2))
    assert torch.equal(logits(first), logits(second)) and logits(first).shape == (4, 3)


@pytest.mark.parametrize(
    "name", ["imagenet-clip-l14", "imagenet-clip-rn101", "imagenet-clip-finetuned", "imagenet-checkpoint"]
)
def test_the_paper_s_recipes_are_sound(name: str) -> None:
    """Their teachers, tags, class lists and VQGAN are known to the libraries, so that only weights are missing."""
    import open_clip
    import timm

    from pipeline.recipe import load as load_recipe
    from shards.sources.classes import find_classes

    recipe = load_recipe(name)
    classes, _ = find_classes(recipe.source.classes)
    assert len(classes.names) == 1000 and recipe.canvas % recipe.discretizer.config.downsampling == 0
    assert (recipe.attack.eps, recipe.attack.alpha, recipe.attack.steps, recipe.attack.random_start) == (
        0.1,
        0.1,
        1,
        0.8,
    )
    teacher = recipe.teacher
    if teacher.kind == "open_clip":
        assert (
            teacher.weights in open_clip.list_pretrained_tags_by_model(teacher.model) and teacher.templates == "openai"
        )
    else:
        assert timm.is_model(teacher.model)
    if teacher.weights == "pretrained":
        assert timm.get_pretrained_cfg(teacher.model).num_classes == 1000
