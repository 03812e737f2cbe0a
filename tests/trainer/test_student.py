"""Students from given weights take what fits, but no head of other classes; a stranger's code never runs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from manifests import UserError
from trainer.checkpoint import StudentDir, describe
from trainer.export import export
from trainer.optimizer import Optimizer, create_optimizer
from trainer.recipe import load
from trainer.run import prepare
from trainer.student import Student, create_student, to_device, try_out

NAME = "test_vit"


def checkpoint(path: Path, classes: int, side: int = 160) -> Path:
    torch.manual_seed(1)
    torch.save(create_student(NAME, classes, side).model.state_dict(), path)
    return path


def test_a_checkpoint_of_the_same_classes_is_taken_whole(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "w.pth", classes=5)
    state = create_student(NAME, 5, 160, pretrained=str(path)).model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in torch.load(path, weights_only=True).items())


def test_a_head_of_other_classes_is_left_out_and_positions_are_resized(tmp_path: Path) -> None:
    """As for a ViT from ImageNet-21k: 21,841 classes there, ours here, and another input size."""
    path = checkpoint(tmp_path / "w.pth", classes=7)
    student = create_student(NAME, 5, 64, pretrained=str(path))
    old, new = torch.load(path, weights_only=True), student.model.state_dict()
    assert new["head.weight"].shape[0] == 5
    assert torch.equal(new["blocks.0.attn.qkv.weight"], old["blocks.0.attn.qkv.weight"])
    assert new["pos_embed"].shape[1] < old["pos_embed"].shape[1]
    assert student(torch.rand(2, 3, 64, 64)).shape == (2, 5)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(UserError, match="pickled code"):
        create_student(NAME, 5, 64, pretrained=str(path))


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(create_student("test_resnet", 5, 64).model.state_dict(), path)
    with pytest.raises(UserError, match=r"student: test_vit cannot be built"):
        create_student(NAME, 5, 64, pretrained=str(path))


def test_an_unknown_tag_gets_the_nearest_known() -> None:
    with pytest.raises(UserError, match=r"pretrained: 'augreg_in22k' is neither a file nor a tag of .*'augreg_in21k'"):
        create_student("vit_base_patch16_224", 5, 224, pretrained="augreg_in22k")


def test_an_option_that_the_model_lacks_is_a_user_error() -> None:
    with pytest.raises(UserError, match="vgg11 cannot be built"):
        create_student("vgg11", 5, 64, drop_path=0.1)


def test_layer_decay_gives_lower_layers_lower_rates() -> None:
    model = create_student(NAME, 5, 64).model
    groups = create_optimizer(model, Optimizer(name="adamw", layer_decay=0.5)).param_groups
    rate = {id(weight): group["lr_scale"] for group in groups for weight in group["params"]}
    assert rate[id(model.head.weight)] == 1
    assert (
        rate[id(model.patch_embed.proj.weight)]
        < rate[id(model.blocks[0].attn.qkv.weight)]
        < rate[id(model.head.weight)]
    )


def test_positions_and_biases_take_no_weight_decay() -> None:
    model = create_student(NAME, 5, 64).model
    groups = create_optimizer(model, Optimizer(name="adamw", weight_decay=0.1)).param_groups
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    assert decay[id(model.pos_embed)] == decay[id(model.head.bias)] == 0
    assert decay[id(model.head.weight)] == 0.1


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_optimizers_of_the_paper_step(name: str) -> None:
    student = create_student("test_resnet", 5, 32)
    optimizer = create_optimizer(student.model, Optimizer(name=name, lr=0.01))
    before = student.model.fc.weight.detach().clone()
    student(torch.rand(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, student.model.fc.weight)


def test_a_student_is_loaded_with_the_normalisation_that_it_was_trained_with(tmp_path: Path) -> None:
    """Weights of another tag (here MAE's numbers) may want another one than the model's default tag."""
    fresh = create_student(NAME, 5, 64)
    trained = Student(fresh.model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()
    assert not torch.equal(trained.mean, fresh.mean)
    directory = StudentDir(tmp_path / "student")
    directory.begin(
        describe(load("demo", [f"student={NAME}"]), trained, [f"class {n}" for n in range(5)], 64, "shards")
    )
    directory.save_best(trained)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(directory.load_student()(images), trained(images))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["student=inception_v3"], r"it cannot learn from 2 images of 32 x 32 pixels at a time \("),
        (
            ["accumulate=5", "forward=separate"],
            r"it cannot learn from 1 image of 32 x 32 pixels at a time \(Expected more than 1 value",
        ),
        (["optimizer.name=fusedadamw"], "optimizer.name: fusedadamw does not work here: CUDA required"),
        (["optimizer.name=adahessian"], "optimizer.name: adahessian needs second derivatives"),
    ],
)
def test_what_would_fail_later_is_said_before_anything_is_written(
    tiny_run: Path, tmp_path: Path, settings: list[str], said: str
) -> None:
    base = [f"shards={tiny_run}", "student=test_resnet", "validation=null", "batch=8", "threads=1", *settings]
    with pytest.raises(UserError, match=said):
        prepare(load("demo", base), str(tmp_path / "student"))
    assert not (tmp_path / "student").exists()


def test_trying_a_student_out_leaves_it_as_it_was() -> None:
    student = create_student("test_resnet", 5, 32)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    try_out(student, 2, 32, torch.device("cpu"), bf16=False)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_tied_weights_are_written(tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory, as those of timm's CoaT do."""
    torch.manual_seed(0)
    student = create_student("coat_lite_tiny", 5, 64)
    tensors = student.model.state_dict()
    assert len({value.data_ptr() for value in tensors.values()}) < len(tensors)
    directory = StudentDir(tmp_path / "student")
    directory.begin(
        describe(load("demo", ["student=coat_lite_tiny"]), student, [str(n) for n in range(5)], 64, "shards")
    )
    directory.save_best(student)
    assert export(directory, str(tmp_path / "out"))
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(directory.load_student()(images), student.eval()(images))


def test_weights_of_three_dimensions_move_too() -> None:
    student = to_device(create_student("lambda_resnet26t", 5, 64), torch.device("cpu"))
    assert {weight.dim() for weight in student.parameters()} >= {4, 5}
    assert student.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 5)
