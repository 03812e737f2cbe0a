"""The teacher against the definitions written out by hand, and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from manifests import UserError
from pipeline.method.teacher import OPENAI_MEAN, Teacher, TeacherModel, load_teacher, weights_fingerprint
from shards.sources.classes import ClassList, load_classes


@pytest.fixture(scope="module")
def classes(world) -> ClassList:  # type: ignore[no-untyped-def]
    return load_classes(world.clip / "prompts.yaml")


@pytest.fixture(scope="module")
def teacher(world, classes: ClassList) -> TeacherModel:  # type: ignore[no-untyped-def]
    return load_teacher(settings(world.clip), classes)


@pytest.fixture
def clip_copy(world, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    return Path(shutil.copytree(world.clip, tmp_path / "clip"))


def settings(folder: Path, **fields: Any) -> Teacher:
    return Teacher(kind="open_clip", model=f"local-dir:{folder}", **fields)


def head_by_hand(folder: Path, names: tuple[str, ...], templates: tuple[str, ...], **tokenizer: Any) -> torch.Tensor:
    """For each class the mean of its unit text embeddings over all templates, made a unit vector: [D, classes]."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}", **tokenizer)
    columns = []
    for name in names:
        total = torch.zeros(16)
        for template in templates:
            with torch.no_grad():
                embedding = model.encode_text(tokenize([template.replace("{}", name)]))[0]
            total += embedding / embedding.pow(2).sum().sqrt()
        columns.append(total / total.pow(2).sum().sqrt())
    return torch.stack(columns, 1)


def test_zero_shot_head(world, teacher: TeacherModel, classes: ClassList) -> None:  # type: ignore[no-untyped-def]
    """The head is CLIP's prompt ensemble, in the order of the class list."""
    torch.testing.assert_close(
        teacher.head, head_by_hand(world.clip, classes.names, classes.templates), atol=1e-5, rtol=1e-4
    )


def test_classes_of_one_name_tie_to_the_bit(world, classes: ClassList) -> None:  # type: ignore[no-untyped-def]
    """Case and spaces do not count for the text tower. The others keep their logits."""
    names = (*classes.names, f" {classes.names[1].upper()}")
    twice = load_teacher(settings(world.clip), replace(classes, names=names, folders=(*classes.folders, "n99")))
    once = load_teacher(settings(world.clip), classes)
    x = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, alone = twice(x), once(x)
    assert torch.equal(logits[:, 1], logits[:, -1]) and twice.twins == [0, 1, 2, 3, 4, 1] and once.twins is None
    torch.testing.assert_close(logits[:, :-1], alone)


def test_logits(world, teacher: TeacherModel, classes: ClassList) -> None:  # type: ignore[no-untyped-def]
    """Logits are scale x cosine between the embedded, normalised image and each class's text."""
    import open_clip

    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = open_clip.create_model(f"local-dir:{world.clip}").eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        features = model.encode_image((images - mean) / std)
        head = head_by_hand(world.clip, classes.names, classes.templates)
        expected = model.logit_scale.exp() * (features / features.norm(dim=1, keepdim=True)) @ head
        logits = teacher(images)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert logits.shape == (4, 5) and logits.dtype == torch.float32


def test_resize_is_inside(teacher: TeacherModel) -> None:
    """Images of any size are accepted; the resize is antialiased bicubic, and gradients reach the larger image."""
    images = torch.rand(2, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.interpolate(images, size=(32, 32), mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), teacher(small))
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(teacher(images).sum(), images)
    assert gradient.shape == images.shape and (gradient.abs().flatten(2).sum(2) > 0).all()


def test_head_is_float32_under_autocast(teacher: TeacherModel) -> None:
    """Under bf16 the logits differ only by what the features lose, and come out as float32."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = teacher(images)
        features = torch.nn.functional.normalize(
            teacher.model.encode_image((images - teacher.mean) / teacher.std).float(), dim=1
        )
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, teacher.scale * features @ teacher.head)


def test_own_tokenizer_merges(clip_copy: Path, classes: ClassList, teacher: TeacherModel) -> None:
    """A ``bpe.txt.gz`` beside the weights is the tokenizer that is used."""
    bpe = clip_copy / "bpe.txt.gz"
    with gzip.open(bpe, "wt") as file:
        file.write("#version: test\na n\no f</w>\nt h\nth e</w>")
    head = load_teacher(settings(clip_copy), classes).head
    assert not torch.allclose(head, teacher.head, atol=1e-3)
    torch.testing.assert_close(
        head, head_by_hand(clip_copy, classes.names, classes.templates, bpe_path=str(bpe)), atol=1e-5, rtol=1e-4
    )


def test_models_with_a_text_tower_of_their_own(world, classes: ClassList, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """CoCa, EVA, SigLIP: random weights need no tokenizer and no projection; a bias of all logits changes nothing."""
    import open_clip

    config = json.loads((world.clip / "open_clip_config.json").read_text())
    tower = {"custom_text": True, "init_logit_bias": -10}
    (tmp_path / "tiny-siglip.json").write_text(
        json.dumps(config["model_cfg"] | tower | {"text_cfg": {"hf_tokenizer_name": "no/where"}})
    )
    open_clip.add_model_config(tmp_path / "tiny-siglip.json")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    random = load_teacher(Teacher(kind="open_clip", model="tiny-siglip", weights="random"), classes)
    assert random(images).shape == (2, 5)
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config | {"model_cfg": config["model_cfg"] | tower}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (tmp_path / "prompt.yaml").write_text(yaml.safe_dump({"templates": ["a {}"]}))
    made = load_teacher(settings(folder, templates=str(tmp_path / "prompt.yaml")), classes)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([f"a {name}" for name in classes.names])
    expected, _ = model.get_logits((images - made.mean) / made.std, tokens)
    torch.testing.assert_close(made(images).softmax(1), expected.softmax(1))


def test_a_file_is_normalised_by_kind(world, classes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Mean and deviation, which a file lacks, are those of open_clip's weights of the model, or else OpenAI's."""
    import open_clip
    from open_clip import pretrained

    config = json.loads((world.clip / "open_clip_config.json").read_text())
    (tmp_path / "tiny-other.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(tmp_path / "tiny-other.json")
    asked = Teacher(kind="open_clip", model="tiny-other", weights=str(world.clip / "open_clip_model.safetensors"))
    assert load_teacher(asked, classes).mean.flatten().tolist() == pytest.approx(OPENAI_MEAN)
    tags = {tag: {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)} for tag in ("one", "two")}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-other", tags)
    teacher = load_teacher(asked, classes)
    assert teacher.mean.flatten().tolist() == [0.5] * 3 and teacher.std.flatten().tolist() == [0.25] * 3


def test_templates_from_elsewhere(world, classes: ClassList, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """``templates: openai`` is the ensemble of 80; a file's templates replace the class list's."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    spelled = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    assert len(spelled) == 80
    few = ClassList(names=classes.names[:2], folders=classes.folders[:2], templates=())
    head = load_teacher(settings(world.clip, templates="openai"), few).head
    torch.testing.assert_close(head, head_by_hand(world.clip, few.names, spelled), atol=1e-5, rtol=1e-4)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"templates": ["my {} here"]}))
    head = load_teacher(settings(world.clip, templates=str(tmp_path / "mine.yaml")), few).head
    torch.testing.assert_close(head, head_by_hand(world.clip, few.names, ("my {} here",)), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match=r"teacher\.templates: .*has none"):
        load_teacher(settings(world.clip), few)


@pytest.mark.parametrize("template", ["a {} of {thing}", "{} and {}", "{} {", "a {} }"])
def test_a_template_with_other_braces(world, template: str, tmp_path: Path, classes: ClassList) -> None:  # type: ignore[no-untyped-def]
    """A template is a text with one {} in it; other braces are refused in one line, not as a stack trace."""
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump({"templates": [template]}))
    with pytest.raises(UserError, match=r"odd\.yaml"):
        load_teacher(settings(world.clip, templates=str(path)), classes)


def test_timm_classifier(classes: ClassList, tmp_path: Path) -> None:
    """A timm model is loaded with its weights, input size and normalisation; its logits stay as they are."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    teacher = load_teacher(Teacher(kind="timm", model="test_vit", weights=str(tmp_path / "vit.safetensors")), classes)
    config = timm.data.resolve_data_config(model=model)
    images = torch.rand(2, 3, 32, 32)
    large = torch.nn.functional.interpolate(images, size=config["input_size"][1:], mode="bicubic", antialias=True)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), model((large - mean) / std))


def test_timm_weights_that_do_not_fit(classes: ClassList, tmp_path: Path) -> None:
    """A classifier over another number of classes is refused in one line that names file and count."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    wanted = Teacher(kind="timm", model="test_vit", weights=str(tmp_path / "seven.safetensors"))
    with pytest.raises(UserError, match=r"seven\.safetensors: does not fit test_vit with 5 classes") as caught:
        load_teacher(wanted, classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": "ViT-L-41", "weights": "openai"},
            r"teacher\.model: open_clip knows no model 'ViT-L-41'; did you mean .*'ViT-L-14'",
        ),
        ({"model": "ViT-B-32"}, r"teacher\.weights: name a checkpoint file or a pretrained tag"),
        ({"model": "ViT-B-32", "weights": "openia"}, r"teacher\.weights: openia: no such file"),
        ({"model": "local-dir:nowhere"}, r"teacher\.model: nowhere: no such file or folder"),
        (
            {"kind": "timm", "model": "resnet181"},
            r"teacher\.model: timm knows no model 'resnet181'; did you mean .*'resnet1",
        ),
        ({"kind": "timm", "model": "resnet18"}, r"teacher\.weights: name a checkpoint"),
        ({"kind": "timm", "model": "test_vit", "weights": "gone.pt"}, r"teacher\.weights: gone\.pt: no such file"),
    ],
)
def test_unknown_names(classes: ClassList, fields: dict[str, str], message: str) -> None:
    """A misspelt model or tag and a missing file are refused, naming the field and the nearest valid name."""
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(Teacher(**fields), classes)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model(clip_copy: Path, classes: ClassList) -> None:
    """A local-dir without weights, with half of them, or with a broken or no config is refused, naming the folder."""
    weights, config = clip_copy / "open_clip_model.safetensors", clip_copy / "open_clip_config.json"
    whole = weights.read_bytes()
    cases: list[tuple[Path, bytes | None]] = [
        (weights, whole[:1000]),
        (weights, None),
        (config, b"{"),
        (config, b"{}"),
        (config, None),
    ]
    for path, content in cases:
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=str(clip_copy)) as caught:
            load_teacher(settings(clip_copy), classes)
        assert "\n" not in str(caught.value)
        path.write_bytes(before)


def test_weights_of_another_shape(clip_copy: Path, classes: ClassList) -> None:
    """Weights that do not fit the config are refused; open_clip's own list of mismatches comes as one line."""
    config = json.loads((clip_copy / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 2
    (clip_copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="teacher: cannot load") as caught:
        load_teacher(settings(clip_copy), classes)
    assert "\n" not in str(caught.value)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_pickled_code_beside_the_config_is_not_run(clip_copy: Path, classes: ClassList, tmp_path: Path) -> None:
    """A local-dir whose weights are a pickle with an object in it is refused, and the object's code does not run."""
    target = tmp_path / "pwned"
    (clip_copy / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": {}, "callbacks": Trap(target)}, clip_copy / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="teacher: cannot load"):
        load_teacher(settings(clip_copy), classes)
    assert not target.exists()


def test_fingerprint_sees_every_weight(world, classes: ClassList, teacher: TeacherModel) -> None:  # type: ignore[no-untyped-def]
    """Equal weights have equal fingerprints; a changed weight, normalisation or name gives another.

    The head itself does not count, because its last bits depend on the processor; its inputs count.
    """
    other = load_teacher(settings(world.clip), classes)
    before = weights_fingerprint(teacher)
    assert weights_fingerprint(other) == before
    for tensor in (other.model.visual.ln_post.bias, other.mean):
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0].add_(1e-3)
            assert weights_fingerprint(other) != before
            tensor.copy_(kept)
    assert weights_fingerprint(other) == before
    assert other.head is not None
    other.head += 1e-7
    assert weights_fingerprint(other) == before
    renamed = replace(classes, names=("other", *classes.names[1:]))
    assert weights_fingerprint(load_teacher(settings(world.clip), renamed)) != before
