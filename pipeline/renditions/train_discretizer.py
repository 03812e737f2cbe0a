"""Train the demo's VQGAN: reconstruction + codebook + commitment + adversarial loss (Esser et al., CVPR 2021, eq. 4-7).

``python -m pipeline.renditions train-discretizer`` writes ``assets/vqgan.safetensors``. The original's perceptual loss
(VGG) is left out, because its weights cannot ship. Codes that no latent chose for a while restart at a random latent,
so that all codes are used.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from tqdm import tqdm

from ..method.discretizer import VQGAN, VQGANConfig, nearest_code
from .glyphs import ASSETS
from .sampling import GlyphSampler
from .styles import TEACHER

CONFIG = VQGANConfig(
    ch=32,
    ch_mult=(1, 2, 4),
    num_res_blocks=1,
    attn_resolutions=(),
    resolution=64,
    z_channels=4,
    embed_dim=4,
    n_embed=1024,
)
COMMITMENT = 0.25  # beta of eq. 4
ADVERSARIAL = 0.1  # times the adaptive weight of eq. 7
RESTART_EVERY = 100  # steps between two restarts of unused codes


def train_discretizer(
    out: Path = ASSETS / "vqgan.safetensors", *, steps: int, batch: int, lr: float, seed: int, adversarial_from: int
) -> None:
    """Train for ``steps`` batches, adversarially from step ``adversarial_from`` on. Writes float16 safetensors."""
    torch.manual_seed(seed)
    vqgan = VQGAN(CONFIG)
    discriminator = NLayerDiscriminator(input_nc=3, ndf=32, n_layers=2).apply(weights_init)
    optimizer = torch.optim.AdamW(vqgan.parameters(), lr=lr, betas=(0.5, 0.9), weight_decay=0.0)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=lr / 2, betas=(0.5, 0.9), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    sampler = GlyphSampler(TEACHER, seed)
    generator = torch.Generator().manual_seed(seed)
    used = torch.zeros(CONFIG.n_embed, dtype=torch.bool)
    started = time.time()
    running: dict[str, float] = {}
    for step in (bar := tqdm(range(steps), desc="vqgan", unit="step", mininterval=10)):
        images, _ = sampler.batch(batch, strength=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vqgan.latents(images).float()  # [B, D, h, w]
            tokens = latents.permute(0, 2, 3, 1).reshape(-1, CONFIG.embed_dim)
            if step == 0:
                _restart(vqgan, ~used, tokens, generator)
            codes = nearest_code(tokens.detach(), vqgan.codebook)
            quantized = vqgan.codebook[codes].view(batch, *latents.shape[2:], -1).permute(0, 3, 1, 2)
            straight_through = latents + (quantized - latents).detach()
            reconstruction = vqgan.decode_latents(straight_through)
        loss_rec = (reconstruction - images).abs().mean()
        loss_code = F.mse_loss(quantized, latents.detach()) + COMMITMENT * F.mse_loss(latents, quantized.detach())
        loss = loss_rec + loss_code
        losses = {"rec": loss_rec, "code": loss_code}
        if step >= adversarial_from:
            with torch.autocast("cpu", torch.bfloat16):
                loss_adv = -discriminator(2 * reconstruction - 1).float().mean()
            last = vqgan.decoder.conv_out.weight
            (grad_rec,) = torch.autograd.grad(loss_rec, last, retain_graph=True)
            (grad_adv,) = torch.autograd.grad(loss_adv, last, retain_graph=True)
            weight = (grad_rec.norm() / (grad_adv.norm() + 1e-4)).clamp(max=1e4)
            loss = loss + ADVERSARIAL * weight * loss_adv
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step >= adversarial_from - 200:  # the discriminator gets a head start
            with torch.autocast("cpu", torch.bfloat16):
                real = discriminator(2 * images - 1).float()
                fake = discriminator(2 * reconstruction.detach() - 1).float()
            losses["disc"] = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            optimizer_d.zero_grad()
            losses["disc"].backward()
            optimizer_d.step()
        used[codes] = True
        if step % RESTART_EVERY == RESTART_EVERY - 1:
            losses["dead"] = (~used).float().sum()
            if step < steps * 0.8:
                _restart(vqgan, ~used, tokens.detach(), generator)
            used.zero_()
        for name, value in losses.items():
            running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
        if step % 200 == 199:
            report = " ".join(f"{name} {value:.4f}" for name, value in running.items())
            bar.write(f"step {step + 1} {report} {(time.time() - started) / 60:.1f} min")
            _save(vqgan, out)
    _save(vqgan, out)


@torch.no_grad()
def _restart(vqgan: VQGAN, dead: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> None:
    chosen = torch.randint(len(tokens), (int(dead.sum()),), generator=generator)
    vqgan.codebook[dead] = tokens.detach()[chosen]


def _save(vqgan: VQGAN, out: Path) -> None:
    save_file({name: value.half().contiguous() for name, value in vqgan.state_dict().items()}, out)
