"""X-Omni's image decoder: a FLUX transformer that also sees the token latents, a VAE and an Euler sampler.

One image token is one transformer position: 2x2 VAE latents, so (VAE factor x 2) pixels a side (released: 16; mini: 8).

Shape suffixes: S samples, A image tokens (row-major over the grid), Z token-latent width, C packed channels (4 x VAE
latent channels), T text tokens, E text width, H/W pixels. `grid` is (rows, columns) of tokens.

Sources: X-Omni (arXiv 2507.22058); FLUX.1 in diffusers; flow matching (arXiv 2210.02747).
"""

from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

Grid = tuple[int, int]


class XOmniFluxTransformer(FluxTransformer2DModel):
    """FLUX with `siglip_embed`: the token latents join the image stream after the last double block.

    Parameter names are the released checkpoint's. Where its configuration lacks `siglip_channels`, pass it to
    `from_pretrained`.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        siglip_channels: int = 1536,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        self.siglip_embed = nn.Linear(siglip_channels, self.inner_dim, bias=False)

    def forward(self, *args: Any, siglip_latents: Tensor | None = None, **kwargs: Any) -> Any:
        """diffusers' FLUX forward; `siglip_latents` (S, A, Z) are the token latents, None leaves them out.

        The sum uses FLUX's ControlNet residuals (nothing after all double blocks but the last), which, unlike a hook,
        keep no state and work under checkpointing and compilation; ControlNets therefore cannot be used beside it.
        """
        if siglip_latents is not None:
            residuals = [0.0] * (len(self.transformer_blocks) - 1) + [self.siglip_embed(siglip_latents)]
            kwargs["controlnet_block_samples"] = residuals
        return super().forward(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class TextCondition:
    """What FLUX's text encoders make of one prompt per sample."""

    embeds: Tensor  # (S, T, E) T5 states
    pooled: Tensor  # (S, pooled width) CLIP vector


def pack(latents_S_c_h_w: Tensor) -> Tensor:
    """VAE latents (S, c, 2 rows, 2 columns) to FLUX's positions (S, A, C): each 2x2 square becomes 4c channels."""
    return F.pixel_unshuffle(latents_S_c_h_w, 2).flatten(2).transpose(1, 2)


def unpack(packed_S_A_C: Tensor, grid: Grid) -> Tensor:
    """Inverse of `pack`."""
    return F.pixel_shuffle(packed_S_A_C.transpose(1, 2).unflatten(2, grid), 2)


def position_ids(grid: Grid, device: torch.device) -> Tensor:
    """(A, 3) FLUX image positions: 0, row, column."""
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
    return torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)


class FlowDecoder(nn.Module):
    """Token latents to pixels. Text encoders are not part of it: give their outputs, or none (zeros then)."""

    def __init__(
        self, transformer: XOmniFluxTransformer, vae: AutoencoderKL, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        if transformer.config["in_channels"] != 4 * vae.config["latent_channels"]:
            raise ValueError(
                f"transformer takes {transformer.config['in_channels']} channels, "
                f"but 2x2 latents of this VAE have {4 * vae.config['latent_channels']}"
            )
        self.transformer, self.vae, self.scheduler = transformer, vae, scheduler

    @property
    def pixels_per_token(self) -> int:
        """Side in pixels of one image token."""
        return 2 ** len(self.vae.config["block_out_channels"])  # VAE factor 2^(levels - 1), times 2 for packing

    def no_text(self, samples: int) -> TextCondition:
        """The condition without text encoders: one zero token and a zero pooled vector."""
        config, reference = self.transformer.config, self.transformer.siglip_embed.weight
        return TextCondition(
            embeds=reference.new_zeros(samples, 1, config["joint_attention_dim"]),
            pooled=reference.new_zeros(samples, config["pooled_projection_dim"]),
        )

    def velocity(
        self,
        noisy_S_A_C: Tensor,
        sigma_S: Tensor,
        latents_S_A_Z: Tensor | None,
        grid: Grid,
        *,
        prompt_embeds: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Predicted noise minus data (S, A, C) at x = (1 - sigma) data + sigma noise; differentiable.

        `noisy_S_A_C` packed VAE latents; `sigma_S` in [0, 1]; `latents_S_A_Z` token latents or None;
        `prompt_embeds` (S, T, E) and `pooled` (S, width) come together or not at all (ValueError).
        """
        text = self._text(prompt_embeds, pooled, noisy_S_A_C.shape[0])
        dtype, device = self.transformer.dtype, noisy_S_A_C.device
        embedded = self.transformer.config[
            "guidance_embeds"
        ]  # released sampler: 1 where the network asks for a guidance
        return self.transformer(
            hidden_states=noisy_S_A_C.to(dtype),
            encoder_hidden_states=text.embeds.to(dtype),
            pooled_projections=text.pooled.to(dtype),
            timestep=sigma_S.to(dtype),
            img_ids=position_ids(grid, device),
            txt_ids=torch.zeros(text.embeds.shape[1], 3, device=device),
            guidance=torch.ones(noisy_S_A_C.shape[0], device=device) if embedded else None,
            siglip_latents=None if latents_S_A_Z is None else latents_S_A_Z.to(dtype),
            return_dict=False,
        )[0]

    def _text(self, embeds: Tensor | None, pooled: Tensor | None, samples: int) -> TextCondition:
        if (embeds is None) != (pooled is None):
            raise ValueError("prompt_embeds and pooled belong together: give both or neither")
        if embeds is None or pooled is None:
            return self.no_text(samples)
        return TextCondition(embeds=embeds, pooled=pooled)

    @torch.no_grad()
    def decode(
        self,
        latents_S_A_Z: Tensor,
        grid: Grid,
        *,
        steps: int,
        cfg: float,
        seeds: list[int],
        prompt_embeds: Tensor | None = None,
        pooled: Tensor | None = None,
        empty_embeds: Tensor | None = None,
        empty_pooled: Tensor | None = None,
    ) -> Tensor:
        """Token latents (S, A, Z) on `grid` to pixels (S, 3, H, W), float32 in [0, 1].

        The noise of sample s depends on `seeds[s]` and the grid only. `cfg` is true guidance, u + cfg (c - u), where u
        drops the token latents and reads the empty prompt; at 1 u is not computed. Guidance of text needs
        `empty_embeds` and `empty_pooled`, the empty prompt's (S, ...) condition. Raises ValueError where counts differ.
        """
        if len(seeds) != latents_S_A_Z.shape[0] or latents_S_A_Z.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"latents {tuple(latents_S_A_Z.shape)} do not fit {len(seeds)} seeds and grid {grid}")
        text = self._text(prompt_embeds, pooled, len(seeds))
        if cfg != 1:
            if prompt_embeds is not None and (empty_embeds is None or empty_pooled is None):
                raise ValueError("cfg other than 1 with a prompt needs empty_embeds and empty_pooled")
            empty = self._text(empty_embeds, empty_pooled, len(seeds))
            latents_S_A_Z = torch.cat([latents_S_A_Z, torch.zeros_like(latents_S_A_Z)])
            text = TextCondition(
                embeds=torch.cat([text.embeds, empty.embeds]), pooled=torch.cat([text.pooled, empty.pooled])
            )
        packed_S_A_C = self._integrate(self.noise(seeds, grid), latents_S_A_Z, text, grid, steps, cfg)
        return self.vae_decode(packed_S_A_C, grid)

    def _integrate(
        self, x_S_A_C: Tensor, latents_N_A_Z: Tensor, text: TextCondition, grid: Grid, steps: int, cfg: float
    ) -> Tensor:
        """Euler from noise to data in fp32; N is S, or 2S with the guidance half behind."""
        sigmas = self.sigmas(steps, grid)
        for now, after in pairwise(sigmas):
            both_N_A_C = x_S_A_C if cfg == 1 else torch.cat([x_S_A_C, x_S_A_C])
            sigma_N = x_S_A_C.new_full((both_N_A_C.shape[0],), now)
            v = self.velocity(
                both_N_A_C, sigma_N, latents_N_A_Z, grid, prompt_embeds=text.embeds, pooled=text.pooled
            ).float()
            if cfg != 1:
                cond, uncond = v.chunk(2)
                v = uncond + cfg * (cond - uncond)
            x_S_A_C = x_S_A_C + (after - now) * v
        return x_S_A_C

    def noise(self, seeds: list[int], grid: Grid) -> Tensor:
        """(S, A, C) standard normal noise, one CPU generator per seed; drawn in FLUX's order, unpacked."""
        shape = (1, self.vae.config["latent_channels"], 2 * grid[0], 2 * grid[1])
        drawn = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
        return pack(torch.cat(drawn)).to(self.transformer.device)

    def sigmas(self, steps: int, grid: Grid) -> list[float]:
        """The `steps` + 1 noise levels from 1 to 0, shifted by the token count as in FLUX (`scheduler`'s config)."""
        config = self.scheduler.config
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        low, high = config["base_shift"], config["max_shift"]
        mu = low + (high - low) * (grid[0] * grid[1] - few) / (many - few)
        scheduler = copy(self.scheduler)  # its own: set_timesteps changes it
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
        return cast(Tensor, scheduler.sigmas).tolist()

    def vae_encode(self, pixels_S_3_H_W: Tensor) -> Tensor:
        """Pixels (S, 3, H, W) in [0, 1] to packed, scaled VAE latents (S, A, C): the posterior's mean."""
        posterior = self.vae.encode((2 * pixels_S_3_H_W - 1).to(self.vae.dtype), return_dict=False)[0]
        return pack((posterior.mode() - self._shift()) * self.vae.config["scaling_factor"])

    def vae_decode(self, packed_S_A_C: Tensor, grid: Grid) -> Tensor:
        """Packed, scaled VAE latents (S, A, C) to pixels (S, 3, H, W), float32, clamped to [0, 1]."""
        latents = unpack(packed_S_A_C, grid) / self.vae.config["scaling_factor"] + self._shift()
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _shift(self) -> float:
        """The VAE's latent shift; its configuration writes none as None."""
        return self.vae.config["shift_factor"] or 0.0
