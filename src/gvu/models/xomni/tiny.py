"""A random X-Omni small enough to be made in a test: all parts, 4x4 image tokens, byte-level tokenizer."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gvu.models.xomni.checkpoint import Parts, token_id
from gvu.models.xomni.decoder import FlowDecoder, XOmniFluxTransformer
from gvu.models.xomni.language import XOmniConfig, XOmniForCausalLM
from gvu.models.xomni.vision import ProjectorConfig, VisionTokenizer, VitConfig

CODES, GRID = 32, (4, 4)
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(codes: int) -> PreTrainedTokenizerFast:
    """One token per byte, then the chat tokens, `codes` image tokens and the three image marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokens = [*CHAT, *(f"<MM-Token-{k}>" for k in range(codes)), "<SOM>", "<EOM>", "<IMAGE>"]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_language(tokenizer: PreTrainedTokenizerFast) -> XOmniForCausalLM:
    """Three layers of width 32."""
    config = XOmniConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        num_mm_adap_layers=1,
        num_mm_head_layers=1,
        vocab_size=token_id(tokenizer, "<MM-Token-0>"),
        mm_vocab_size=CODES + 8,
        image_vocab_size=CODES,
        initializer_range=0.2,
        pad_token_id=token_id(tokenizer, str(tokenizer.pad_token)),
        eos_token_id=token_id(tokenizer, str(tokenizer.eos_token)),
        bos_token_id=None,
    )
    return XOmniForCausalLM.untrained(config).eval()


def tiny_decoder() -> FlowDecoder:
    """Flow decoder of width 16 over a VAE of width 8; 8 pixels per token."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        block_out_channels=(8, 8, 8),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = XOmniFluxTransformer(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
        siglip_channels=32,
    )
    return FlowDecoder(transformer, vae, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)).eval()


def tiny_parts(seed: int) -> Parts:
    """All parts from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer(CODES)
        vit = VitConfig(img_size=32, patch_size=8, width=32, layers=1, heads=2, mlp_ratio=2.0)
        projector = ProjectorConfig(z_channels=32, codebook_size=CODES, codebook_dim=8, conv_layers=1, norm_groups=8)
        decoder = tiny_decoder()
        return Parts(
            language=tiny_language(tokenizer),
            tokenizer=tokenizer,
            vision=VisionTokenizer(vit, projector).eval(),
            decoder=lambda: decoder,
            grid=GRID,
            decoder_steps=2,
        )
