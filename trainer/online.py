"""Training schemes that make their adversarial images, or ask their teacher, anew in every step: what DAD is compared with (table 7).

Pure functions from models and a batch to a loss, beside `objectives`. Images are [B, 3, H, W] in [0, 1], labels [B], and every random
number comes from the generator. Costs are stated in passes an image: a *training pass* is a forward pass and the gradients of inputs and
weights; an *attack pass* is a forward pass and the gradient of the input alone, about two thirds of it. The paper counts both as one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from .objectives import plain_loss, student_loss

Teacher = Callable[[torch.Tensor], torch.Tensor]  # images -> logits [B, classes]
Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images -> (images, codes)


def no_discretizer(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves pixels as they are."""
    return images, images.new_empty(0)


def adversarial_images(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    eps: float,
    alpha: float,
    norm: str = "linf",
    random_start: float = 1.0,
    discretizer: Quantizer = no_discretizer,
) -> torch.Tensor:
    """Images that a model in training is attacked with: the attack of stage 1 with the student as its teacher. ``steps`` attack passes.

    eps, alpha: radius and step, in units of pixel values. random_start: probability of starting at a random point of the ball (Linf)
    or sphere (L2). The model is in eval mode meanwhile, so that batch norm's running statistics do not follow half-made images.
    """
    from pipeline.attack import AttackSettings, attack

    settings = AttackSettings(norm=norm, eps=eps, alpha=alpha, steps=steps)  # type: ignore[arg-type]
    if norm == "linf":
        noise = (2 * torch.rand(x.shape, generator=generator, device=generator.device) - 1) * eps
    else:
        noise = torch.randn(x.shape, generator=generator, device=generator.device)
        noise *= eps / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    starts = torch.rand(len(x), 1, 1, 1, generator=generator, device=generator.device) < random_start
    was_training = model.training
    model.eval()
    try:
        return attack(x, y, model, discretizer, settings, (noise * starts).to(x.device, non_blocking=True)).adversarial
    finally:
        model.train(was_training)


def adversarial_training_loss(
    student: nn.Module, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator, *, steps: int = 10
) -> torch.Tensor:
    """AT (Madry et al., 2018): CE on PGD images alone. ``steps`` attack passes and 1 training pass; the paper counts AT-10 as 11."""
    adversarial = adversarial_images(student, x, y, generator, steps=steps, eps=4 / 255, alpha=1 / 255)
    return plain_loss(student(adversarial), y)


def advprop_loss(
    student: nn.Module, auxiliary: nn.Module, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator, *, steps: int = 5
) -> torch.Tensor:
    """AdvProp (Xie et al., 2020): CE on every clean image, and CE on its PGD image through auxiliary batch norms.

    ``steps`` attack passes and 2 training passes; the paper counts AdvProp-5 as 7, and Fast AdvProp as this with one step, 3.
    auxiliary: from `with_auxiliary_norms`.
    """
    adversarial = adversarial_images(auxiliary, x, y, generator, steps=steps, eps=4 / 255, alpha=1 / 255)
    return plain_loss(student(x), y) + plain_loss(auxiliary(adversarial), y)


def fast_advprop_loss(
    student: nn.Module, auxiliary: nn.Module, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator, *, share: float = 0.2
) -> torch.Tensor:
    """Fast AdvProp (Mei et al., 2022), decoupled: one part of the batch is trained on clean, the other on one-step attacks only.

    share: of the attacked part; 4 to 1 in the published configuration, which also takes eps = alpha = 1/255. 1 training pass, and
    ``share`` attack passes. (The published code adds the weights' gradient of the attack pass to the update; left out here.)
    """
    attacked = max(1, round(share * len(x)))
    adversarial = adversarial_images(auxiliary, x[:attacked], y[:attacked], generator, steps=1, eps=1 / 255, alpha=1 / 255)
    clean_loss = plain_loss(student(x[attacked:]), y[attacked:])
    adversarial_loss = plain_loss(auxiliary(adversarial), y[:attacked])
    return (1 - attacked / len(x)) * clean_loss + attacked / len(x) * adversarial_loss


def dat_loss(
    student: nn.Module,
    discretizer: Quantizer,
    x: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator,
    *,
    steps: int = 1,
    eps: float = 0.1,
    alpha: float = 0.1,
) -> torch.Tensor:
    """DAT (Mao et al., 2022): CE(x) + CE(x''), x'' discretized and adversarial to the student itself.

    ``steps`` attack passes, 2 passes of the discretizer and 2 training passes; the paper counts DAT-1 as 3.5.
    """
    adversarial = adversarial_images(
        student, x, y, generator, steps=steps, eps=eps, alpha=alpha, norm="l2", random_start=0.8, discretizer=discretizer
    )
    return plain_loss(student(x), y) + plain_loss(student(adversarial), y)


def live_kd_loss(
    student: nn.Module, teacher: Teacher, x: torch.Tensor, y: torch.Tensor, *, temperature: float, weight: float
) -> torch.Tensor:
    """KD (paper eq. 7) with the teacher asked in every step: 1 training pass and 1 forward pass of the teacher."""
    with torch.no_grad():
        logits = teacher(x)
    return student_loss("kd", y, [student(x)], [logits], temperature=temperature, weight=weight)[0]


def live_dad_loss(
    student: nn.Module,
    teacher: Teacher,
    x: torch.Tensor,
    y: torch.Tensor,
    dad: torch.Tensor,
    *,
    temperature: float,
    weight: float,
) -> torch.Tensor:
    """DAD (eq. 9) as the authors' code trains it: stored images, but the teacher asked about both halves in every step.

    With v DAD images ``dad`` for each clean one: 1 + v training passes and 1 + v forward passes of the teacher.
    """
    images = torch.cat([x, dad])
    with torch.no_grad():
        teacher_logits = teacher(images).split([len(x), len(dad)])
    outputs = student(images).split([len(x), len(dad)])
    return student_loss("dad", y, outputs, teacher_logits, temperature=temperature, weight=weight)[0]


def with_auxiliary_norms(student: nn.Module) -> nn.Module:
    """The same student with batch norms of its own: every other weight is shared, so that training either trains both (AdvProp)."""
    norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    own = {id(weight) for norm in norms for weight in norm.parameters()}
    shared = {id(weight): weight for weight in student.parameters() if id(weight) not in own}
    return copy.deepcopy(student, memo=dict(shared))
