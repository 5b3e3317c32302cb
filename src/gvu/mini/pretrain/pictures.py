"""Stages that see only pictures: the VAE, the tokenizer (ViT and codebook) and the flow decoder of X-Omni-Mini."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors.torch import load_file
from torch import Tensor, nn

from gvu.mini.pretrain import shapes
from gvu.mini.pretrain.fit import FitConfig, Prefetch, device, fit
from gvu.mini.render import Scene, random_scene, render
from gvu.models.xomni.decoder import FlowDecoder, XOmniFluxTransformer
from gvu.models.xomni.vision import VisionTokenizer


def scenes(seed: int, step: int, count: int) -> list[Scene]:
    """`count` random scenes that depend on (seed, step) only."""
    rng = np.random.default_rng((seed, step))
    return [random_scene(rng) for _ in range(count)]


def pixels(batch: Sequence[Scene]) -> Tensor:
    """Pictures (S, 3, 64, 64) in [-1, 1]."""
    images = np.stack([render(s) for s in batch])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def pictures(seed: int, count: int) -> Prefetch[Tensor]:
    """Batches of random pictures by step."""
    return Prefetch(lambda step: pixels(scenes(seed, step, count)))


def train_vae(folder: Path, steps: int, seed: int = 11, batch: int = 24) -> AutoencoderKL:
    """Stage `vae`: a small AutoencoderKL (4x down, 8 channels), L1 + L2 on pixels and a light KL."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**shapes.VAE).to(device(), memory_format=torch.channels_last)  # pyright: ignore
    stream = pictures(seed, batch)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        x = stream(step).to(device(), memory_format=torch.channels_last)
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        posterior = cast(AutoencoderKLOutput, vae.encode(x)).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise).to(x)
        y = cast(DecoderOutput, vae.decode(z)).sample.float()
        l2, l1 = F.mse_loss(y, x), F.l1_loss(y, x)
        return l1 + l2 + 1e-4 * posterior.kl().mean() / 2048, {"l1": float(l1.detach()), "mse": float(l2.detach())}

    fit(vae, loss, FitConfig(steps=steps, lr=2e-3), folder / "vae")
    return vae


class TokenizerTrainer(nn.Module):
    """The tokenizer under training with the scaffold that turns latents into pixels; the scaffold is not shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = VisionTokenizer(shapes.VIT, shapes.PROJECTOR)
        width, patch = shapes.VIT.width, shapes.VIT.patch_size
        layer = nn.TransformerEncoderLayer(width, 4, 3 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.place = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.scaffold = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.paint = nn.Linear(width, 3 * patch * patch)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels to (reconstruction, codes, quantiser loss)."""
        features = self.tokenizer.features(x)
        q = self.tokenizer.quantize(features, shapes.GRID, temperature=0.1, entropy=0.02)
        patches = self.paint(self.scaffold(q.latents + self.place)).transpose(1, 2)
        return F.fold(patches.float(), 64, shapes.VIT.patch_size, stride=shapes.VIT.patch_size), q.codes, q.loss


class DeadCodes:
    """Moves codes that nothing was assigned to for `patience` steps onto current features, as VQ recipes do."""

    def __init__(self, trainer: TokenizerTrainer, patience: int = 50) -> None:
        self.trainer, self.patience = trainer, patience
        self.idle = torch.zeros(shapes.CODES, dtype=torch.long)

    def seen(self, codes: Tensor) -> None:
        """Count one step."""
        self.idle += 1
        self.idle[codes.unique().cpu()] = 0

    @torch.no_grad()
    def revive(self, x: Tensor, seed: int) -> int:
        """Replace idle codes by features of `x`; returns how many."""
        dead = (self.idle > self.patience).nonzero().flatten()
        if len(dead) == 0:
            return 0
        tokenizer = self.trainer.tokenizer
        z = F.normalize(tokenizer.projector.project(tokenizer.features(x)).flatten(0, 1).float(), dim=-1)
        far = (1 - tokenizer.projector.quantize.similarity(z).amax(-1)).clamp_min(1e-6)
        pick = torch.multinomial(far.cpu(), min(len(dead), len(far)), generator=torch.Generator().manual_seed(seed))
        tokenizer.projector.quantize.embedding.weight[dead[: len(pick)]] = z[pick]
        self.idle[dead] = 0
        return len(pick)


def train_vision(folder: Path, steps: int, seed: int = 12, batch: int = 48) -> VisionTokenizer:
    """Stage `vision`: ViT and codebook by reconstruction of random scenes."""
    torch.manual_seed(seed)
    trainer = TokenizerTrainer().to(device())
    stream, dead = pictures(seed, batch), DeadCodes(trainer)
    last: list[Tensor] = []

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        x = stream(step).to(device())
        y, codes, quantiser = trainer(x)
        dead.seen(codes)
        last[:] = [x]
        l1, l2 = F.l1_loss(y, x), F.mse_loss(y, x)
        metrics = {
            "l1": float(l1.detach()),
            "mse": float(l2.detach()),
            "vq": float(quantiser.detach()),
            "codes": float(len(codes.unique())),
        }
        return l1 + 2 * l2 + 0.25 * quantiser, metrics

    def after(step: int) -> None:
        if step % 20 == 19 and step < steps * 0.6:
            dead.revive(last[0], step)

    fit(trainer, loss, FitConfig(steps=steps, lr=1.5e-3), folder / "vision", after_step=after)
    return trainer.tokenizer


class DecoderTrainer:
    """Flow-matching loss of the decoder: tokenizer and VAE are done and stay as they are."""

    def __init__(self, decoder: FlowDecoder, tokenizer: VisionTokenizer, seed: int, batch: int) -> None:
        self.decoder, self.tokenizer, self.seed = decoder, tokenizer.eval(), seed
        self.stream = pictures(seed, batch)

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step."""
        x = self.stream(step).to(device())
        noise = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        with torch.no_grad():
            latents = self.tokenizer.latents(self.tokenizer.encode(x), shapes.GRID).float()
            data = self.decoder.vae_encode((x + 1) / 2).float()
        dropped = torch.rand(len(x), 1, 1, generator=noise).to(x) < 0.1
        sigma = torch.sigmoid(0.6 + 1.2 * torch.randn(len(x), generator=noise)).to(x)
        white = torch.randn(data.shape, generator=noise).to(x)
        noisy = data + sigma[:, None, None] * (white - data)
        v = self.decoder.velocity(noisy, sigma, latents.masked_fill(dropped, 0.0), shapes.GRID)
        loss = F.mse_loss(v.float(), white - data)
        return loss, {"flow": float(loss.detach())}


def scale_latents(vae: AutoencoderKL, seed: int = 16) -> None:
    """Set the VAE's `shift_factor` and `scaling_factor` so that its latents have mean 0 and deviation 1 on random
    scenes."""
    x = pixels(scenes(seed, 0, 256)).to(device())
    with torch.no_grad():
        z = cast(AutoencoderKLOutput, vae.encode(x)).latent_dist.mean
    vae.register_to_config(shift_factor=round(float(z.mean()), 5), scaling_factor=round(1.0 / float(z.std()), 5))


def make_decoder(vae: AutoencoderKL) -> FlowDecoder:
    """An untrained flow decoder over a trained VAE."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FlowDecoder(XOmniFluxTransformer(**shapes.FLUX), vae, scheduler)


def train_decoder(folder: Path, steps: int, seed: int = 13, batch: int = 48) -> FlowDecoder:
    """Stage `decoder`: rectified flow from noise to VAE latents given the token latents of stage `vision`."""
    torch.manual_seed(seed)
    vae, tokenizer = load_vae(folder).to(device()), load_vision(folder).to(device())  # pyright: ignore
    scale_latents(vae)
    decoder = make_decoder(vae).to(device())
    vae.requires_grad_(False)
    loss = DecoderTrainer(decoder, tokenizer, seed, batch)
    fit(decoder.transformer, loss, FitConfig(steps=steps, lr=2e-3, warmup=100, optimizer="muon"), folder / "decoder")
    return decoder


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE as stage `vae` left it."""
    vae = AutoencoderKL(**shapes.VAE)
    vae.load_state_dict(load_file(folder / "vae" / "model.safetensors"))
    return vae.eval()


def load_vision(folder: Path) -> VisionTokenizer:
    """The tokenizer as stage `vision` left it, without its scaffold."""
    trainer = TokenizerTrainer()
    trainer.load_state_dict(load_file(folder / "vision" / "model.safetensors"))
    return trainer.tokenizer.eval()
