"""X-Omni's network: official outputs on tiny weights, and the properties that hold for every size."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from gvu.models.xomni.decoder import FlowDecoder, XOmniFluxTransformer, pack, position_ids, unpack
from gvu.models.xomni.language import XOmniConfig, XOmniForCausalLM, rollout_cache
from gvu.models.xomni.vision import ProjectorConfig, VisionTokenizer, VitConfig

SHARED = Path(os.environ.get("GVU_SHARED", Path(__file__).resolve().parents[2] / "shared"))
GOLDEN = SHARED / "golden" / "xomni_tiny"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden values: {GOLDEN} absent (set GVU_SHARED)")


def read(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def load(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def close(got, want, atol=1e-4):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def golden_lm(**kwargs):
    model = XOmniForCausalLM(XOmniConfig(**read("lm_config"), **kwargs)).eval()
    model.load_state_dict(load("lm"), strict=True)
    return model


def tiny_lm(seed=0, **kwargs):
    torch.manual_seed(seed)
    numbers = {
        "vocab_size": 50, "mm_vocab_size": 28, "image_vocab_size": 24, "hidden_size": 48, "intermediate_size": 64,
        "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "num_mm_adap_layers": 2,
        "num_mm_head_layers": 1, "max_position_embeddings": 128, "initializer_range": 0.3,
    }  # fmt: skip
    return XOmniForCausalLM(XOmniConfig(**(numbers | kwargs))).eval()


def padded_batch():
    """Text prompts of 6, 4 and 1 tokens, left-padded, each followed by <SOM> and five codes."""
    torch.manual_seed(1)
    text, codes = torch.randint(0, 50, (3, 6)), torch.randint(50, 74, (3, 5))
    ids = torch.cat([text, torch.full((3, 1), 74), codes], 1)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, :5] = 0
    return ids, mask


def tiny_vision(**kwargs):
    torch.manual_seed(0)
    vit = VitConfig(
        **({"img_size": 64, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2} | kwargs)
    )
    projector = ProjectorConfig(z_channels=32, codebook_size=40, codebook_dim=12, conv_layers=1, norm_groups=8)
    return VisionTokenizer(vit, projector).eval()


def tiny_decoder(seed=0):
    torch.manual_seed(seed)
    transformer = XOmniFluxTransformer(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6), siglip_channels=20,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    return FlowDecoder(transformer, vae, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)).eval()


# --- official values ---------------------------------------------------------------------------------------------


@needs_golden
@torch.no_grad()
def test_golden_vision():
    config, want = read("vq_config"), load("vq_expected")
    model = VisionTokenizer(VitConfig(**config["vit"]), ProjectorConfig(**config["projector"])).eval()
    model.vit.load_state_dict(load("siglip_vit"), strict=True)
    model.projector.load_state_dict(load("vq_projector"), strict=True)
    close(model.features(want["pixels"]), want["features"])
    codes = model.encode(want["pixels"])
    assert torch.equal(codes, want["token_ids"].flatten(1))
    close(model.latents(codes, tuple(want["token_ids"].shape[1:])), want["latents"].flatten(2).transpose(1, 2))


@needs_golden
@torch.no_grad()
def test_golden_image_logits_at_real_positions():
    model, want = golden_lm(), load("lm_expected")
    real = want["gen_attention_mask"].bool()
    hidden, _ = model.hidden(want["gen_ids"], want["gen_attention_mask"], want["gen_position_ids"])
    close(model.image_logits(hidden)[real], want["gen_logits"][real])
    implied, _ = model.hidden(want["gen_ids"], want["gen_attention_mask"])
    close(model.image_logits(implied)[real], want["gen_logits"][real])


@needs_golden
@torch.no_grad()
def test_golden_image_logits_at_padding_under_eager_attention():
    """SDPA gives a position that may attend to nothing zeros, eager a mean over everything, as upstream had it."""
    model, want = golden_lm(attn_implementation="eager"), load("lm_expected")
    hidden, _ = model.hidden(want["gen_ids"], want["gen_attention_mask"])
    close(model.image_logits(hidden), want["gen_logits"])


@needs_golden
@torch.no_grad()
@pytest.mark.parametrize("text_only", [False, True])
def test_golden_text_logits_and_reward(text_only):
    model, want = golden_lm(), load("lm_expected")
    ids, start = want["und_ids"], int(want["prompt_start"])
    hidden, image = model.hidden(ids, text_only=text_only)
    got, expected = model.text_logits(hidden), want["und_logits"]
    close(got[~image], expected[~image])
    if not text_only:
        close(got, expected)
    logp = got[:, start - 1 : -1].double().log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)
    torch.testing.assert_close(logp.mean(-1).exp(), want["reward"], rtol=1e-6, atol=0)


@needs_golden
@torch.no_grad()
@pytest.mark.parametrize("key", ["velocity", "velocity_without_siglip"])
def test_golden_velocity(key):
    model, want = XOmniFluxTransformer(**read("flux_config")).eval(), load("flux_expected")
    model.load_state_dict(load("flux_siglip"), strict=True)
    got = model(
        hidden_states=want["latents"],
        encoder_hidden_states=want["prompt_embeds"],
        pooled_projections=want["pooled"],
        timestep=want["timestep"],
        img_ids=want["img_ids"],
        txt_ids=want["txt_ids"],
        siglip_latents=want["siglip_latents"] if key == "velocity" else None,
    ).sample
    close(got, want[key])
    assert torch.equal(position_ids((4, 6), torch.device("cpu")), want["img_ids"])


# --- language model ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_steps_equal_the_full_pass(attention):
    model, (ids, mask) = tiny_lm(attn_implementation=attention), padded_batch()
    full, _ = model.hidden(ids, mask)
    for cache in (DynamicCache(config=model.config), rollout_cache(model.config, ids.shape[1])):
        steps = [model.hidden(ids[:, :7], mask[:, :7], past_key_values=cache).hidden]
        for i in range(7, ids.shape[1]):
            image_only = None if i % 2 else True
            step = model.hidden(ids[:, i : i + 1], mask[:, : i + 1], past_key_values=cache, image_only=image_only)
            steps.append(step.hidden)
        close(torch.cat(steps, 1)[mask.bool()], full[mask.bool()], 5e-5)


@torch.no_grad()
def test_cached_chunks_of_text_after_an_image_equal_the_full_pass():
    model, (ids, mask) = tiny_lm(), padded_batch()
    ids, mask = torch.cat([ids, ids[:, :4]], 1), torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1)
    full, image = model.hidden(ids, mask)
    assert torch.equal(image, ids >= 50)
    cache = rollout_cache(model.config, 40)
    model.hidden(ids[:, :9], mask[:, :9], past_key_values=cache)
    tail, _ = model.hidden(ids[:, 9:-1], mask[:, :-1], past_key_values=cache)
    close(tail, full[:, 9:-1], 5e-5)
    last, _ = model.hidden(ids[:, -1:], mask, past_key_values=cache)  # a single text token
    close(last, full[:, -1:], 5e-5)


@torch.no_grad()
def test_rollout_cache_expands_to_a_group_and_refuses_to_overflow():
    model, (ids, mask) = tiny_lm(), padded_batch()
    cache = rollout_cache(model.config, ids.shape[1])
    model.hidden(ids[:, :-1], mask[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    ids, mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    step, _ = model.hidden(ids[:, -1:], mask, past_key_values=cache)
    close(step, model.hidden(ids, mask).hidden[:, -1:], 5e-5)
    with pytest.raises(ValueError, match="do not fit a cache"):
        model.hidden(ids[:, -1:], torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache)


@torch.no_grad()
def test_left_padding_changes_nothing():
    model, (ids, mask) = tiny_lm(), padded_batch()
    batched, _ = model.hidden(ids, mask)
    other, _ = model.hidden(ids.masked_fill(mask == 0, 3), mask)
    for row in range(3):
        length = int(mask[row].sum())
        alone, _ = model.hidden(ids[row : row + 1, -length:])
        close(batched[row, -length:], alone[0], 5e-5)
        close(other[row, -length:], alone[0], 5e-5)
    assert torch.isfinite(batched).all()


@torch.no_grad()
def test_modal_layers_touch_image_positions_only():
    model, (ids, _) = tiny_lm(), padded_batch()
    text, before = ids[:, :6], model.hidden(ids)[0]
    alone = model.hidden(text)[0]
    for layer in (*model.model.layers[:2], *model.model.layers[-1:]):
        for parameter in layer.parameters():
            parameter.add_(0.1)
    after = model.hidden(ids)[0]
    close(model.hidden(text)[0], alone, 0)
    assert not torch.allclose(after[:, 7:], before[:, 7:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_follows_the_greedy_loop(cache):
    model, (ids, mask) = tiny_lm(), padded_batch()
    ids, mask = ids[:, :7], mask[:, :7]
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, vocabulary="image", cache_implementation=cache,
        pad_token_id=0, disable_compile=True,
    )  # fmt: skip
    for _ in range(5):
        hidden, _ = model.hidden(ids, mask)
        ids = torch.cat([ids, model.image_logits(hidden[:, -1:]).argmax(-1) + 50], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(got, ids)


@torch.no_grad()
def test_forward_gives_logits_over_all_ids():
    model, (ids, mask) = tiny_lm(), padded_batch()
    hidden, _ = model.hidden(ids, mask)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (3, 12, 50 + 28)
    close(logits[..., :50], model.text_logits(hidden), 0)
    close(logits[..., 50:74], model.image_logits(hidden), 1e-6)
    close(model(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits, logits[:, -2:], 1e-6)
    image = model(input_ids=ids, attention_mask=mask, vocabulary="image").logits
    assert image.shape == logits.shape
    assert image.softmax(-1)[..., 50:74].sum(-1).allclose(torch.ones(3, 12))


@torch.no_grad()
def test_loss_scores_each_label_under_its_own_law():
    model, (ids, _) = tiny_lm(), padded_batch()
    hidden, _ = model.hidden(ids)
    labels = ids.clone()
    labels[0, :4] = -100
    text = model.text_logits(hidden)[:, :5].log_softmax(-1).gather(-1, ids[:, 1:6, None]).squeeze(-1)
    text[0, :3] = 0  # ignored labels; <SOM> at position 6 never counts
    image = model.image_logits(hidden)[:, 6:11].log_softmax(-1).gather(-1, ids[:, 7:, None] - 50).squeeze(-1)
    close(model(input_ids=ids, labels=labels).loss, -(text.sum() + image.sum()) / (12 + 15), 5e-5)


def test_slices_of_positions_carry_gradients_and_checkpointing_keeps_them():
    model, (ids, mask) = tiny_lm(), padded_batch()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable()  # its name up to transformers 6
        model.zero_grad()
        hidden, _ = model.hidden(ids, mask)
        model.image_logits(hidden[:, 6:-1]).float().log_softmax(-1)[..., 0].sum().backward()
        grads.append(model.model.layers[3].mlp.up_proj.weight.grad.clone())
    assert grads[0].abs().sum() > 0
    close(grads[1], grads[0], 5e-5)


def test_lora_trains_and_switches_off():
    base, (ids, mask) = tiny_lm(), padded_batch()
    with torch.no_grad():
        want = base.hidden(ids, mask).hidden
    target = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM", init_lora_weights=False))
    hidden = model.hidden(ids, mask).hidden
    hidden.sum().backward()
    named = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(named) == 5 * 7 * 2
    assert all("lora_" in name for name in named)
    assert not torch.allclose(hidden, want, atol=1e-3)
    with torch.no_grad(), model.disable_adapter():
        close(model.hidden(ids, mask).hidden, want, 0)
    assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, vocabulary="text").shape == (3, 14)


@torch.no_grad()
def test_bf16_autocast_stays_close():
    model, (ids, mask) = tiny_lm(initializer_range=0.05), padded_batch()
    real = mask.bool()
    want = model.image_logits(model.hidden(ids, mask).hidden).log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.image_logits(model.hidden(ids, mask).hidden).float().log_softmax(-1)
        cache = rollout_cache(model.config, 12)
        model.hidden(ids[:, :-1], mask[:, :-1], past_key_values=cache)
        step = model.image_logits(model.hidden(ids[:, -1:], mask, past_key_values=cache).hidden).float()
    close(got[real], want[real], 0.05)
    close(step[:, 0].log_softmax(-1), want[:, -1], 0.05)


@torch.no_grad()
def test_save_and_load(tmp_path):
    model, (ids, mask) = tiny_lm(), padded_batch()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for loader in (XOmniForCausalLM, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path).eval()
        assert isinstance(again, XOmniForCausalLM)
        assert again.config.num_mm_adap_layers == 2
        close(again.hidden(ids, mask).hidden, model.hidden(ids, mask).hidden, 0)


def test_bad_language_inputs_get_a_sentence():
    model, (ids, mask) = tiny_lm(), padded_batch()
    with pytest.raises(ValueError, match="attention_mask covers 11"):
        model.hidden(ids, mask[:, 1:])
    with pytest.raises(ValueError, match="exactly one"):
        model.hidden()
    with pytest.raises(ValueError, match="needs image_mask"):
        model.hidden(inputs_embeds=model.model.embed(ids))
    with pytest.raises(ValueError, match="text_only"):
        model.hidden(ids, past_key_values=DynamicCache(), text_only=True)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        XOmniConfig(num_hidden_layers=4, num_mm_adap_layers=3, num_mm_head_layers=2)


@torch.no_grad()
def test_embeddings_instead_of_ids():
    model, (ids, mask) = tiny_lm(), padded_batch()
    embeds = model.model.embed(ids)
    close(
        model.hidden(inputs_embeds=embeds, image_mask=ids >= 50, attention_mask=mask)[0], model.hidden(ids, mask)[0], 0
    )


# --- vision ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 72), (8, 96), (128, 64)])
def test_any_grid_goes_through_the_tokenizer(height, width):
    model = tiny_vision()
    pixels = torch.rand(2, 3, height, width) * 2 - 1
    grid = model.grid(pixels)
    assert grid == (height // 8, width // 8)
    codes = model.encode(pixels)
    assert codes.dtype == torch.long
    assert codes.shape == (2, grid[0] * grid[1])
    assert model.latents(codes, grid).shape == (2, grid[0] * grid[1], 32)
    assert torch.equal(model.encode(pixels[1:]), codes[1:])


@torch.no_grad()
def test_codes_are_nearest_on_the_sphere_and_decode_is_raw():
    model = tiny_vision()
    model.projector.quantize.embedding.weight.mul_(torch.rand(40, 1) * 5 + 0.1)
    features = model.features(torch.rand(1, 3, 64, 64))
    z, book = model.projector.project(features)[0], model.projector.quantize.embedding.weight
    distance = torch.cdist(torch.nn.functional.normalize(z, dim=-1), torch.nn.functional.normalize(book, dim=-1))
    codes = model.projector.encode(features)
    assert torch.equal(codes[0], distance.argmin(-1))
    close(model.latents(codes, (8, 8)), model.projector.expand(book[codes], (8, 8)), 0)


def test_training_pass_matches_inference_and_reaches_every_code():
    model = tiny_vision().train()
    pixels = torch.rand(2, 3, 40, 64) * 2 - 1
    latents, codes, loss = model.quantize(model.features(pixels), (5, 8), entropy=0.1)
    assert torch.equal(codes, model.encode(pixels))
    close(latents, model.latents(codes, (5, 8)), 5e-5)
    (latents.square().mean() + loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (model.projector.quantize.embedding.weight.grad.abs().sum(-1) > 0).all()
    assert model.vit.patch_embed.proj.weight.grad.abs().sum() > 0


def test_bad_images_get_a_sentence():
    model = tiny_vision()
    with pytest.raises(ValueError, match="multiples of the patch, 8"):
        model.encode(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match="do not fill a grid"):
        model.latents(torch.zeros(1, 63, dtype=torch.long), (8, 8))


# --- decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_decode_depends_on_its_own_seed_only(cfg):
    decoder = tiny_decoder()
    latents, seeds = torch.randn(3, 15, 20), [5, 6, 5]
    pixels = decoder.decode(latents, (3, 5), steps=3, cfg=cfg, seeds=seeds)
    assert pixels.shape == (3, 3, 24, 40)
    assert decoder.pixels_per_token == 8
    assert 0 <= pixels.min() < pixels.max() <= 1
    for row in range(3):
        alone = decoder.decode(latents[row : row + 1], (3, 5), steps=3, cfg=cfg, seeds=seeds[row : row + 1])
        close(alone[0], pixels[row], 5e-5)
    same = decoder.decode(latents[[0, 0, 0]], (3, 5), steps=3, cfg=cfg, seeds=seeds)
    close(same[0], same[2], 5e-5)
    assert not torch.allclose(same[0], same[1], atol=1e-3)


@torch.no_grad()
def test_guidance_is_taken_from_the_unconditional_velocity():
    decoder, latents, grid = tiny_decoder(), torch.randn(1, 6, 20), (2, 3)
    x, sigma = decoder.noise([7], grid), torch.ones(1)
    cond = decoder.velocity(x, sigma, latents, grid)
    uncond = decoder.velocity(x, sigma, None, grid)
    assert not torch.allclose(cond, uncond, atol=1e-4)
    want = decoder.vae_decode(x - (uncond + 2.5 * (cond - uncond)), grid)
    close(decoder.decode(latents, grid, steps=1, cfg=2.5, seeds=[7]), want, 5e-5)


def test_text_conditions_come_in_pairs():
    decoder, latents = tiny_decoder(), torch.randn(2, 4, 20)
    text = {"prompt_embeds": torch.randn(2, 3, 12), "pooled": torch.randn(2, 10)}
    plain = decoder.decode(latents, (2, 2), steps=2, cfg=1, seeds=[0, 1])
    assert not torch.allclose(decoder.decode(latents, (2, 2), steps=2, cfg=1, seeds=[0, 1], **text), plain, atol=1e-4)
    with pytest.raises(ValueError, match="empty_embeds"):
        decoder.decode(latents, (2, 2), steps=2, cfg=2, seeds=[0, 1], **text)
    with pytest.raises(ValueError, match="both or neither"):
        decoder.decode(latents, (2, 2), steps=2, cfg=1, seeds=[0, 1], pooled=text["pooled"])
    with pytest.raises(ValueError, match="do not fit"):
        decoder.decode(latents, (2, 2), steps=2, cfg=1, seeds=[0])


def test_packing_noise_and_schedule_are_flux_s():
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift  # slow to import

    latents = torch.randn(2, 4, 6, 10)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpack(pack(latents), (3, 5)), latents)
    drawn = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(9))
    decoder = tiny_decoder()
    assert torch.equal(decoder.noise([9], (3, 5)), pack(drawn))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=calculate_shift(36 * 20))
    assert decoder.sigmas(4, (36, 20)) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_velocity_trains_the_transformer():
    decoder, grid = tiny_decoder(), (2, 3)
    with torch.no_grad():
        data = decoder.vae_encode(torch.rand(2, 3, 16, 24))
    noise, sigma = torch.randn_like(data), torch.rand(2)
    noisy = (1 - sigma)[:, None, None] * data + sigma[:, None, None] * noise
    loss = (decoder.velocity(noisy, sigma, torch.randn(2, 6, 20), grid) - (noise - data)).square().mean()
    loss.backward()
    assert decoder.transformer.siglip_embed.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in decoder.vae.parameters())


@torch.no_grad()
def test_transformer_save_and_load_and_autocast(tmp_path):
    decoder, latents, grid = tiny_decoder(), torch.randn(2, 6, 20), (2, 3)
    decoder.transformer.save_pretrained(tmp_path)
    again = XOmniFluxTransformer.from_pretrained(tmp_path).eval()
    x, sigma = decoder.noise([0, 1], grid), torch.full((2,), 0.4)
    want = decoder.velocity(x, sigma, latents, grid)
    close(FlowDecoder(again, decoder.vae, decoder.scheduler).velocity(x, sigma, latents, grid), want, 0)
    with torch.autocast("cpu", torch.bfloat16):
        close(decoder.velocity(x, sigma, latents, grid).float(), want, 0.05)
