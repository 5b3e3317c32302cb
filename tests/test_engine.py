"""The decode engine against full forward passes of the network, in the cases a rollout meets."""

import pytest
import torch
from transformers import DynamicCache

from gvu.errors import GvuError
from gvu.models.base import LoraSpec
from gvu.models.xomni.adapter import XOmni
from gvu.models.xomni.engine import BLOCK, Engine
from gvu.models.xomni.language import XOmniConfig, XOmniForCausalLM, rollout_cache
from gvu.sampling import Sampling, draw, guide, log_law, uniforms
from gvu.testing.common import TEXTS

TEXT, CODES, STEPS, REPEATS = 50, 24, BLOCK + 5, 3  # more steps than a block of the cache holds
VARIANTS = {
    "grouped queries": {},
    "kv heads == heads": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "another rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear rotary scaling": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
}


def language(**kwargs) -> XOmniForCausalLM:
    torch.manual_seed(0)
    numbers = {
        "vocab_size": TEXT, "mm_vocab_size": CODES + 4, "image_vocab_size": CODES, "hidden_size": 48,
        "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_mm_adap_layers": 2, "num_mm_head_layers": 1, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    model = XOmniForCausalLM(XOmniConfig(**(numbers | kwargs))).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones hide mistakes
            p.data += 0.2 * torch.randn_like(p)
    return model


def prompts(padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.cat([torch.randint(0, TEXT, (2, 6)), torch.full((2, 1), TEXT + CODES)], 1)
    mask = torch.ones_like(ids)
    mask[1, : 3 * padded] = 0
    return ids, mask


@torch.no_grad()
def both(model: torch.nn.Module, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (R, STEPS, V) by the engine and by one full forward pass over the same codes."""
    (ids, mask), codes = prompts(padded), torch.randint(0, CODES, (2 * REPEATS, STEPS))
    cache = rollout_cache(model.config, ids.shape[1])
    model.hidden(ids, mask, past_key_values=cache)
    engine = Engine(model, cache, mask, REPEATS, STEPS)
    stepped = torch.stack([engine.step(codes[:, a]) for a in range(STEPS)], 1)
    whole = torch.cat([ids.repeat_interleave(REPEATS, 0), codes + TEXT], 1)
    seen = torch.cat([mask.repeat_interleave(REPEATS, 0), torch.ones_like(codes)], 1)
    return stepped, model.image_logits(model.hidden(whole, seen).hidden[:, ids.shape[1] :])


@pytest.mark.parametrize("padded", [False, True], ids=["full rows", "left padding"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_engine_is_the_full_forward(variant, padded: bool) -> None:
    stepped, whole = both(language(**variant), padded)
    torch.testing.assert_close(stepped, whole, atol=1e-5, rtol=1e-5)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean difference of log-probs in nats."""
    return float((torch.log_softmax(a.float(), -1) - torch.log_softmax(b.float(), -1)).abs().mean())


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 network"])
@pytest.mark.parametrize("padded", [False, True], ids=["full rows", "left padding"])
def test_in_bf16_it_is_as_exact_as_the_full_forward(autocast: bool, padded: bool) -> None:
    model = language(initializer_range=0.1)
    _, exact = both(model, padded)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stepped, whole = both(model if autocast else model.bfloat16(), padded)
    assert stepped.dtype == torch.bfloat16
    assert gap(stepped, whole) < 2e-2
    assert gap(stepped, exact) < 1.2 * gap(whole, exact)


def adapted() -> XOmni:
    model = XOmni.tiny(0)
    model.add_lora(LoraSpec(r=4), seed=0)
    for p in model.trainable().values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model


@torch.no_grad()
def slowly(model: XOmni, sampling: Sampling, seeds: list[int], n: int) -> torch.Tensor:
    """Codes (S, A), each from a forward pass without cache over everything so far."""
    rows = model.encode_prompts(TEXTS).expand(n)
    uniform, codes = uniforms(seeds, 16, model.device), torch.empty(len(seeds), 0, dtype=torch.long)
    branches = [(rows.ids_P_L, rows.mask_P_L), (rows.uncond_ids_P_L, rows.uncond_mask_P_L)]
    for a in range(16):
        logits = []
        for ids, mask in branches:
            whole = torch.cat([ids, codes + model.config.vocab_size], 1)
            hidden = model.language.hidden(whole, torch.cat([mask, torch.ones_like(codes)], 1)).hidden[:, -1]
            logits.append(model.language.image_logits(hidden))
        law = log_law(guide(*logits, sampling.cfg) if sampling.cfg != 1 else logits[0], sampling)
        codes = torch.cat([codes, draw(law, uniform[:, a])[:, None]], 1)
    return codes


@pytest.mark.parametrize("law", [Sampling(), Sampling(cfg=2.5, temperature=0.9)], ids=lambda s: s.law)
@pytest.mark.parametrize("merged", [False, True], ids=["adapter on", "merged"])
def test_rollouts_draw_the_codes_of_the_slow_way(law: Sampling, merged: bool) -> None:
    model, seeds = adapted(), list(range(2 * len(TEXTS)))
    want = slowly(model, law, seeds, 2)
    if merged:
        with model.merged():
            drawn = model.rollout(model.encode_prompts(TEXTS), 2, law, seeds)
    else:
        drawn = model.rollout(model.encode_prompts(TEXTS), 2, law, seeds)
    assert torch.equal(drawn.codes_S_A, want)
    logp, entropy = model.policy_logp(drawn)
    tolerance = 1e-5 * max(1.0, law.cfg / law.temperature)  # guidance and temperature scale rounding as they do logits
    torch.testing.assert_close(logp, drawn.logp_S_A, atol=tolerance, rtol=0)
    torch.testing.assert_close(entropy, drawn.entropy_S_A, atol=tolerance, rtol=0)
    logp.sum().backward()  # the rollout's tensors can be trained on


def test_an_adapter_that_is_off_is_off() -> None:
    plain, model = XOmni.tiny(0), adapted()
    with model.teacher("frozen"):
        drawn = model.rollout(model.encode_prompts(TEXTS), 1, Sampling(), [3] * len(TEXTS))
    want = plain.rollout(plain.encode_prompts(TEXTS), 1, Sampling(), [3] * len(TEXTS))
    assert torch.equal(drawn.codes_S_A, want.codes_S_A)
    assert torch.equal(drawn.logp_S_A, want.logp_S_A)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}},
    ],
    ids=["sliding windows", "dynamic rotary"],
)
def test_networks_it_would_compute_wrongly_are_refused(kwargs) -> None:
    with pytest.raises(GvuError, match="full attention"):
        Engine(language(**kwargs), DynamicCache(), torch.ones(1, 3), 1, 4)
