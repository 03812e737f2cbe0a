"""A stranger's model folder runs no Python; a stranger's run starts no download that the user does not name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manifests import RunDir, UserError
from pipeline.method.diffusion import diffusion_folder
from pipeline.method.discretizer import discretizer_of_run
from pipeline.method.open_clip_config import read_config
from pipeline.method.open_clip_models import load_open_clip
from pipeline.method.teacher import teacher_of_run

EVIL = "def _make(): pass\nimport pathlib\npathlib.Path(MARKER).touch()\nclass Evil: pass\n"


@pytest.fixture
def folder(world, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    """A copy of the teacher's folder with what transformers would run if it were asked to trust the folder."""
    path = tmp_path / "clip"
    shutil.copytree(world.clip, path)
    (path / "tokenization_evil.py").write_text(EVIL.replace("MARKER", repr(str(tmp_path / "pwned"))))
    auto_map = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (path / "tokenizer_config.json").write_text(json.dumps(auto_map))
    (path / "config.json").write_text(
        json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "tokenization_evil.Evil"}})
    )
    return path


def change(folder: Path, part: str | None, **settings: Any) -> None:
    path = folder / "open_clip_config.json"
    tree = json.loads(path.read_text())
    (tree["model_cfg"] if part is None else tree["model_cfg"][part]).update(settings)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("text_cfg", {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}),
        ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}),
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}),
        ("text_cfg", {"tokenizer_kwargs": ["trust_remote_code"]}),
        ("text_cfg", {"hf_tokenizer_name": "bert-base-uncased"}),
        ("text_cfg", {"hf_model_name": "FOLDER"}),
        ("text_cfg", {"hf_proj_type": "mlp"}),
        ("text_cfg", {"tokenizer_mode": "clips"}),
        ("text_cfg", {"act_kwargs": {"out": 1}}),
        ("vision_cfg", {"timm_model_name": "hf-hub:a/b"}),
        ("vision_cfg", {"timm_model_name": "local-dir:FOLDER"}),
        ("vision_cfg", {"timm_model_name": ["resnet18"]}),
        ("vision_cfg", {"hf_model_name": "x"}),
        (None, {"multimodal_cfg": {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}}),
        (None, {"output_dict": True}),
        (None, {"text_cfg": "x"}),
    ],
)
def test_a_config_that_reaches_further_is_refused(folder: Path, part: str | None, settings: dict[str, Any]) -> None:
    """Each setting that leads out of open_clip's own towers is refused in one line that names file and setting."""
    settings = json.loads(json.dumps(settings).replace("FOLDER", str(folder)))
    change(folder, part, **settings)
    with pytest.raises(UserError, match=r"teacher\.model: .*open_clip_config\.json: ") as caught:
        load_open_clip(f"local-dir:{folder}", None)
    assert "\n" not in str(caught.value) and not (folder.parent / "pwned").exists()


def test_what_native_towers_need_is_taken(folder: Path) -> None:
    """Every setting of open_clip's own models passes, but for tokenizers and text towers of transformers."""
    import open_clip

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        assert read_config(folder, hugging_face=True) == config
        if not any(key.startswith("hf_") for key in config["text_cfg"]):
            assert read_config(folder) == config


def test_a_tokenizer_of_the_hub_is_one_that_open_clip_names(folder: Path) -> None:
    """The Hub's models may use the tokenizers of open_clip's own, and never ask transformers to trust a repository."""
    change(folder, "text_cfg", hf_tokenizer_name="timm/ViT-B-16-SigLIP", tokenizer_kwargs={"clean": "canonicalize"})
    assert read_config(folder, hugging_face=True)["text_cfg"]["hf_tokenizer_name"] == "timm/ViT-B-16-SigLIP"
    change(folder, "text_cfg", hf_tokenizer_name="evil/tokenizer")
    with pytest.raises(UserError, match="'evil/tokenizer' is used by none of open_clip's own models"):
        read_config(folder, hugging_face=True)
    change(folder, "text_cfg", hf_tokenizer_name="roberta-base", tokenizer_kwargs={"trust_remote_code": True})
    with pytest.raises(UserError, match=r"tokenizer_kwargs\.trust_remote_code"):
        read_config(folder, hugging_face=True)


@pytest.fixture
def strange(finished_run: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run"
    shutil.copytree(finished_run, path)
    return path


def rename(path: Path, part: str, **settings: Any) -> None:
    """Name another model in a run, as its maker could: run.json, parts and manifest agree."""
    run = RunDir(path)
    old = run.info()
    recipe = old.recipe | {part: old.recipe[part] | settings}
    named = {f"{part}.{field}": value for field, value in settings.items() if f"{part}.{field}" in old.identity}
    info = replace(old, recipe=recipe, identity=old.identity | named)
    for shard in range(info.shards):
        table, record = run.part(shard)
        tars = {tar.name.partition("/")[0]: (run.store.read(tar.name), tar.samples) for tar in record.tars}
        run.commit(shard, table.to_pylist(), tars, source=record.source, run=info.fingerprint)
    run.seal(info, range(info.shards))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"model": "hf-hub:stranger/model"}, "teacher.model=hf-hub:stranger/model"),
        ({"model": "ViT-B-32", "weights": "openai"}, "teacher.weights=openai"),
        ({"kind": "timm", "model": "resnet18", "weights": "pretrained"}, "teacher.weights=pretrained"),
    ],
)
def test_a_download_named_by_a_run_needs_the_command(strange: Path, cli, settings: dict[str, str], field: str) -> None:  # type: ignore[no-untyped-def]
    """verify and the cost ledger ask for --set; given it, they go on to the model itself."""
    rename(strange, "teacher", **settings)
    told = cli("verify", strange)
    assert told.status == 2 and f"error: {strange}/run.json" in told.err and f"--set {field}" in told.err
    with pytest.raises(UserError, match="would be downloaded because this file names it"):
        teacher_of_run(RunDir(strange).info())


def test_verify_says_which_teacher_it_loads(world, strange: Path, cli) -> None:  # type: ignore[no-untyped-def]
    told = cli("verify", strange, "--samples", "1")
    assert f"note: {strange}/run.json names the teacher: open_clip local-dir:{world.clip}; it is loaded now" in told.err


def test_a_discretizer_of_the_hub_needs_the_command(strange: Path) -> None:
    rename(strange, "discretizer", kind="diffusion", weights="stranger/diffusion")
    with pytest.raises(UserError, match=r"--set discretizer\.weights=stranger/diffusion"):
        discretizer_of_run(RunDir(strange).info())


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
}


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["pipeline", "Evil"]},
        {"_class_name": "DiffusionPipeline"},
        {"unet": ["os", "system"]},
        {"unet": ["evil", "UNet2DConditionModel"]},
        {"vae": ["diffusers", "UNet2DConditionModel"]},
        {"scheduler": ["diffusers.evil", "PNDMScheduler"]},
        {"safety_checker": ["evil", "X"]},
        {"other": ["diffusers", "AutoencoderKL"]},
        {"tokenizer": ["transformers", "AutoTokenizer"]},
    ],
)
def test_a_diffusion_folder_imports_only_stable_diffusion(tmp_path: Path, index: dict[str, Any]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    assert diffusion_folder(str(tmp_path)) == tmp_path
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX | index))
    with pytest.raises(UserError, match=r"discretizer\.weights: .*model_index\.json"):
        diffusion_folder(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["pipeline.py", "unet/evil.py", "text_encoder/adapter_config.json", "tokenizer/tokenizer_config.json"]
)
def test_a_diffusion_folder_with_code(tmp_path: Path, name: str) -> None:
    """A Python file, an adapter that leads to another model, and a part that asks for remote code."""
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    with pytest.raises(UserError, match="may run code"):
        diffusion_folder(str(tmp_path))
