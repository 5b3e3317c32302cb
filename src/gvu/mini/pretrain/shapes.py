"""Sizes of X-Omni-Mini's parts. The classes are the released model's; only these numbers are small."""

from typing import Any

from gvu.models.xomni.vision import ProjectorConfig, VitConfig

GRID = (8, 8)
CODES = 1024
VIT = VitConfig(img_size=64, patch_size=8, width=128, layers=4, heads=4, mlp_ratio=3.0)
PROJECTOR = ProjectorConfig(z_channels=128, codebook_size=CODES, codebook_dim=32, conv_layers=1, norm_groups=16)
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 48), "layers_per_block": 1, "latent_channels": 8, "norm_num_groups": 8,
    "sample_size": 64, "scaling_factor": 1.0, "shift_factor": 0.0, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 32, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12), "siglip_channels": 128,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "hidden_act": "silu", "num_mm_adap_layers": 1, "num_mm_head_layers": 1,
    "mm_special_tokens": ["<SOM>", "<EOM>", "<IMAGE>"], "use_sliding_window": False,
}  # fmt: skip
