"""Train the demo's teacher: a small CLIP, by image-text contrast with class names in random prompts.

``python -m pipeline.renditions train-teacher`` writes ``assets/teacher/open_clip_model.safetensors``. The loss
contrasts every image with a prompt of each class, not only with the captions of its batch, because plain in-batch
contrast learns too slowly at this scale. The reverse direction (prompt to the images of its class) is the usual CLIP
term with several positives (UniCL, eq. 2-4).
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from .clip import TEACHER_DIR, TEMPLATES, write_clip_dir
from .sampling import GlyphSampler
from .styles import CLASSES, TEACHER, display_name


def contrastive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Symmetric contrast of images [B, D] with a prompt per class [C, D], unit vectors; labels [B] name the matches."""
    logits = scale * image_features @ text_features.t()  # [B, C]
    positives = F.one_hot(labels, logits.shape[1]).bool()
    present = positives.any(0)
    log_prob = logits.log_softmax(0)  # over the images of the batch
    text_to_image = -(log_prob * positives).sum(0)[present] / positives.sum(0)[present]
    return F.cross_entropy(logits, labels, label_smoothing=0.05) + 0.25 * text_to_image.mean()


def train_teacher(out: Path = TEACHER_DIR, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """Train for ``steps`` batches and write the weights (float16 safetensors) beside the config."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    write_clip_dir(out)
    model = open_clip.create_model(f"local-dir:{out}", load_weights=False).to(memory_format=torch.channels_last)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}", bpe_path=str(out / "bpe.txt.gz"))
    normalise = torch.tensor([0.5, 0.25])
    sampler = GlyphSampler(TEACHER, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    model.train()
    started, running = time.time(), 0.0
    for step in (bar := tqdm(range(steps), desc="teacher", unit="step", mininterval=10)):
        images, labels = sampler.batch(batch, strength=1.0)
        tokens = tokenizer([rng.choice(TEMPLATES).format(display_name(name)) for name in CLASSES])
        images = ((images - normalise[0]) / normalise[1]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            image_features = model.encode_image(images, normalize=True)
            text_features = model.encode_text(tokens, normalize=True)
        loss = contrastive_loss(image_features.float(), text_features.float(), model.logit_scale.exp(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # exp(4.6052) = 100, CLIP's limit
        running = 0.98 * running + 0.02 * loss.item()
        if step % 200 == 199:
            scale, minutes = model.logit_scale.exp().item(), (time.time() - started) / 60
            bar.write(f"step {step + 1} loss {running:.3f} scale {scale:.1f} {minutes:.1f} min")
            save_weights(model, out)
    save_weights(model, out)


def save_weights(model: torch.nn.Module, out: Path) -> None:
    weights = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, out / "open_clip_model.safetensors")
