"""X-Omni's image tokenizer: a SigLIP-style ViT and an IBQ projector, with the released checkpoints' state-dict keys.

pixels --ViT--> features --quant_conv, nearest code--> codes --codebook, post_quant_conv, post_conv--> latents.

Shape suffixes: S samples, A image tokens (row-major over the token grid), N = S x A, Z feature width, D code width,
V codebook size, H/W pixel height and width. `grid` is always (rows, columns) of tokens.

Sources: X-Omni (arXiv 2507.22058); IBQ, index backpropagation quantisation (arXiv 2412.02692).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Shape of the ViT. Released model: 2048, 16, 1536, 40, 16, 4.0."""

    img_size: int = 2048  # side in pixels of the square image whose patches the position table covers
    patch_size: int = 16  # pixels per token side
    width: int = 1536  # feature channels
    layers: int = 40  # transformer blocks
    heads: int = 16  # attention heads
    mlp_ratio: float = 4.0  # hidden width of the MLP over `width`, rounded down


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Shape of the IBQ projector. The defaults are the released model's."""

    z_channels: int = 1536  # channels of the ViT features and of the decoded latents
    codebook_size: int = 16384  # number of codes V
    codebook_dim: int = 2048  # channels of one code
    conv_layers: int = 2  # residual blocks after the codebook
    norm_groups: int = 32  # groups of the residual blocks' GroupNorm; divides z_channels


class Quantized(NamedTuple):
    """What a training pass through the quantiser gives."""

    latents: Tensor  # (S, A, Z) decoded latents, differentiable
    codes: Tensor  # (S, A) long
    loss: Tensor  # scalar, weighted sum of the quantiser's terms


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each one."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, pixels_S_3_H_W: Tensor) -> Tensor:
        """Pixels (S, 3, H, W) to patches (S, Z, rows, columns)."""
        return self.proj(pixels_S_3_H_W)


class Attention(nn.Module):
    """Full self-attention over the tokens of one image."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_S_A_Z: Tensor) -> Tensor:
        """(S, A, Z) to (S, A, Z)."""
        q, k, v = self.qkv(x_S_A_Z).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, int(config.width * config.mlp_ratio))
        self.fc2 = nn.Linear(int(config.width * config.mlp_ratio), config.width)

    def forward(self, x_S_A_Z: Tensor) -> Tensor:
        """(S, A, Z) to (S, A, Z)."""
        return self.fc2(F.gelu(self.fc1(x_S_A_Z)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config)

    def forward(self, x_S_A_Z: Tensor) -> Tensor:
        """(S, A, Z) to (S, A, Z)."""
        x_S_A_Z = x_S_A_Z + self.attn(self.norm1(x_S_A_Z))
        return x_S_A_Z + self.mlp(self.norm2(x_S_A_Z))


class SiglipViT(nn.Module):
    """SigLIP-2 image encoder without final norm or pooling; timm's parameter names; any size divisible by the patch."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.side = config.img_size // config.patch_size
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.side**2, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def grid(self, pixels_S_3_H_W: Tensor) -> Grid:
        """Token grid (rows, columns) of an image batch; ValueError if a side is not a multiple of the patch."""
        height, width = pixels_S_3_H_W.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"image of {height}x{width} pixels: both sides must be multiples of the patch, {patch}")
        return height // patch, width // patch

    def positions(self, grid: Grid) -> Tensor:
        """(1, A, Z) position table, resized bilinearly to the token grid."""
        if grid == (self.side, self.side):
            return self.pos_embed
        table = self.pos_embed.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        return F.interpolate(table.float(), size=grid, mode="bilinear").flatten(2).transpose(1, 2).type_as(table)

    def forward(self, pixels_S_3_H_W: Tensor) -> Tensor:
        """Pixels (S, 3, H, W) in [-1, 1] to features (S, A, Z)."""
        grid = self.grid(pixels_S_3_H_W)
        x_S_A_Z = self.patch_embed(pixels_S_3_H_W).flatten(2).transpose(1, 2) + self.positions(grid)
        for block in self.blocks:
            x_S_A_Z = block(x_S_A_Z)
        return x_S_A_Z


class IndexQuantizer(nn.Module):
    """IBQ codebook: nearest code on the unit sphere, raw codebook row on decode."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def similarity(self, z_N_D: Tensor) -> Tensor:
        """(N, V) cosine of every vector with every code, in fp32 even under autocast."""
        with torch.autocast(z_N_D.device.type, enabled=False):
            return F.normalize(z_N_D.float(), dim=-1) @ F.normalize(self.embedding.weight.float(), dim=-1).T

    def lookup(self, z_N_D: Tensor) -> Tensor:
        """(N,) index of the nearest code."""
        return self.similarity(z_N_D).argmax(-1)

    def forward(
        self, z_N_D: Tensor, *, temperature: float, commitment: float, entropy: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise with index backpropagation (IBQ section 3.2): codes carry a softmax gradient to *all* codebook rows.

        Returns the code vectors (N, D), the codes (N,) and the loss; the terms are described in `VQProjector.forward`.
        """
        cosine_N_V = self.similarity(z_N_D)
        codes_N = cosine_N_V.argmax(-1)
        soft_N_V = ((2 * cosine_N_V - 2) / temperature).softmax(-1)  # minus the squared distance on the sphere
        hard_N_V = F.one_hot(codes_N, cosine_N_V.shape[-1]).type_as(soft_N_V)
        with torch.autocast(z_N_D.device.type, enabled=False):
            through_N_D = (hard_N_V - soft_N_V.detach() + soft_N_V) @ self.embedding.weight.float()
        unit_N_D, chosen_N_D = F.normalize(z_N_D.float(), dim=-1), self.embedding(codes_N).float()
        loss = F.mse_loss(through_N_D, unit_N_D) + F.mse_loss(unit_N_D, chosen_N_D.detach())
        loss = loss + commitment * F.mse_loss(chosen_N_D, unit_N_D.detach())
        if entropy:
            loss = loss + entropy * entropy_penalty(soft_N_V)
        return through_N_D.type_as(z_N_D), codes_N, loss


def entropy_penalty(soft_N_V: Tensor) -> Tensor:
    """Mean entropy of each assignment minus entropy of the mean assignment, in nats: sharp rows, even use of codes."""
    mean_V = soft_N_V.mean(0)
    per_row = -(soft_N_V * soft_N_V.clamp_min(1e-12).log()).sum(-1).mean()
    return per_row + (mean_V * mean_V.clamp_min(1e-12).log()).sum()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and GELU, around a skip."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        width, groups = config.z_channels, config.norm_groups
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_S_Z_H_W: Tensor) -> Tensor:
        """(S, Z, rows, columns) to the same shape."""
        hidden = self.conv1(F.gelu(self.norm1(x_S_Z_H_W)))
        return x_S_Z_H_W + self.conv2(F.gelu(self.norm2(hidden)))


class VQProjector(nn.Module):
    """Features to codes and codes to latents. Key names are the released projector's."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.quantize = IndexQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.post_conv = nn.Sequential(*(ResidualBlock(config) for _ in range(config.conv_layers)))

    def project(self, features_S_A_Z: Tensor) -> Tensor:
        """(S, A, D) vectors to be quantised: `quant_conv` is 1x1, so the grid does not matter."""
        return self.quant_conv(features_S_A_Z.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)

    def encode(self, features_S_A_Z: Tensor) -> Tensor:
        """Features (S, A, Z) to codes (S, A), long."""
        z_S_A_D = self.project(features_S_A_Z)
        return self.quantize.lookup(z_S_A_D.flatten(0, 1)).view(z_S_A_D.shape[:2])

    def decode(self, codes_S_A: Tensor, grid: Grid) -> Tensor:
        """Codes (S, A) on `grid` to latents (S, A, Z); ValueError if A is not rows * columns."""
        return self.expand(self.quantize.embedding(codes_S_A), grid)

    def expand(self, entries_S_A_D: Tensor, grid: Grid) -> Tensor:
        """Code vectors (S, A, D) on `grid` to latents (S, A, Z)."""
        if entries_S_A_D.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"{entries_S_A_D.shape[1]} tokens do not fill a grid of {grid[0]}x{grid[1]}")
        image = entries_S_A_D.transpose(1, 2).unflatten(2, grid)
        return self.post_conv(self.post_quant_conv(image)).flatten(2).transpose(1, 2)

    def forward(
        self,
        features_S_A_Z: Tensor,
        grid: Grid,
        *,
        temperature: float = 2.0,
        commitment: float = 0.25,
        entropy: float = 0.0,
    ) -> Quantized:
        """Training pass: hard codes forward, softmax gradient to all codes backward.

        loss = |e_st - z|^2 + |sg(e) - z|^2 + commitment |e - sg(z)|^2 + entropy (mean row entropy - entropy of mean),
        z the unit feature, e the chosen row, e_st the row with the straight-through index; squares are means. In eval
        mode and in training mode the forward values are those of `decode(encode(features))`. `temperature` divides the
        squared distance in the softmax (released model: 2.0; smaller is sharper and trains small codebooks better).
        """
        z_S_A_D = self.project(features_S_A_Z)
        entries_N_D, codes_N, loss = self.quantize(
            z_S_A_D.flatten(0, 1), temperature=temperature, commitment=commitment, entropy=entropy
        )
        latents_S_A_Z = self.expand(entries_N_D.view(z_S_A_D.shape), grid)
        return Quantized(latents_S_A_Z, codes_N.view(z_S_A_D.shape[:2]), loss)


class VisionTokenizer(nn.Module):
    """The ViT (`vit`) and the projector (`projector`) together: images to codes, codes to the decoder's latents."""

    def __init__(self, vit: VitConfig, projector: ProjectorConfig) -> None:
        super().__init__()
        if vit.width != projector.z_channels:
            raise ValueError(f"ViT width {vit.width} differs from the projector's z_channels {projector.z_channels}")
        self.vit = SiglipViT(vit)
        self.projector = VQProjector(projector)

    def grid(self, pixels_S_3_H_W: Tensor) -> Grid:
        """Token grid (rows, columns) of an image batch."""
        return self.vit.grid(pixels_S_3_H_W)

    def features(self, pixels_S_3_H_W: Tensor) -> Tensor:
        """Pixels (S, 3, H, W) in [-1, 1] to ViT features (S, A, Z)."""
        return self.vit(pixels_S_3_H_W)

    def encode(self, pixels_S_3_H_W: Tensor) -> Tensor:
        """Pixels (S, 3, H, W) in [-1, 1] to codes (S, A), long, row-major over the token grid."""
        return self.projector.encode(self.features(pixels_S_3_H_W))

    def latents(self, codes_S_A: Tensor, grid: Grid) -> Tensor:
        """Codes (S, A) on `grid` to the flow decoder's condition (S, A, Z)."""
        return self.projector.decode(codes_S_A, grid)

    def quantize(
        self,
        features_S_A_Z: Tensor,
        grid: Grid,
        *,
        temperature: float = 2.0,
        commitment: float = 0.25,
        entropy: float = 0.0,
    ) -> Quantized:
        """Training pass from features to (latents, codes, loss); see `VQProjector.forward`."""
        return self.projector(features_S_A_Z, grid, temperature=temperature, commitment=commitment, entropy=entropy)
