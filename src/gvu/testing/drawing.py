"""Checks of the drawing branch: rollout, replay, padding, groups, decoding."""

from dataclasses import replace

import torch

from gvu.sampling import Sampling
from gvu.testing.common import (
    INSTRUCTION,
    LAWS,
    TEXTS,
    Tiny,
    drawn,
    near,
    refused,
)


@torch.no_grad()
def replay_equals_rollout(tiny: Tiny) -> None:
    """One pass over the drawn codes gives the rollout's log-probs and entropies, under every law."""
    model = tiny(0)
    for law in LAWS:
        rollout = drawn(model, 2, law)
        logp, entropy = model.policy_logp(rollout)
        near(logp, rollout.logp_S_A, 1e-5)
        near(entropy, rollout.entropy_S_A, 1e-4)
        assert bool(logp.isfinite().all())
        assert bool((logp <= 1e-6).all())


@torch.no_grad()
def replay_equals_rollout_guided(tiny: Tiny) -> None:
    """The same under classifier-free guidance, where the model has it; guidance changes the law."""
    model = tiny(0)
    if model.capabilities.cfg == "none":
        return
    for law in LAWS:
        rollout = drawn(model, 2, replace(law, cfg=3.0))
        near(model.policy_logp(rollout)[0], rollout.logp_S_A, 1e-4)
        plain = model.policy_logp(replace(rollout, sampling=replace(law, cfg=1.0)))[0]
        assert float((plain - rollout.logp_S_A).abs().max()) > 1e-2


def padding_changes_nothing(tiny: Tiny) -> None:
    """A prompt alone and beside longer ones: identical codes, equal log-probs."""
    model = tiny(0)
    for law in (Sampling(), Sampling(cfg=2.0)) if model.capabilities.cfg != "none" else (Sampling(),):
        together = drawn(model, 1, law)
        assert int(together.prompts.mask_P_L.sum(1).unique().numel()) > 1, "the prompts need different lengths"
        for row, text in enumerate(TEXTS):
            alone = model.rollout(model.encode_prompts([text]), 1, law, [100 + row])
            assert torch.equal(alone.codes_S_A[0], together.codes_S_A[row])
            near(alone.logp_S_A[0], together.logp_S_A[row], 1e-5)
            near(model.policy_logp(alone)[0][0], together.logp_S_A[row], 1e-5)


def groups_are_samples(tiny: Tiny) -> None:
    """n images at once are the n images drawn one at a time with the same seeds."""
    model, rows = tiny(0), 3
    together = drawn(model, rows)
    assert together.prompts.texts == tuple(t for t in TEXTS for _ in range(rows))
    assert len(together) == len(TEXTS) * rows
    assert not torch.equal(together.codes_S_A[0], together.codes_S_A[1]), "samples of one prompt must differ"
    for s, text in enumerate(together.prompts.texts):
        single = model.rollout(model.encode_prompts([text]), 1, Sampling(), [together.seeds[s]])
        assert torch.equal(single.codes_S_A[0], together.codes_S_A[s])
        near(single.logp_S_A[0], together.logp_S_A[s], 1e-5)


def codes_fit_the_codebook(tiny: Tiny) -> None:
    """Codes are (S, A) whole numbers in [0, V) on the default grid; greedy drawing is the same for every seed."""
    model = tiny(0)
    rows, columns = model.capabilities.grids[0]
    rollout = drawn(model, 2)
    assert rollout.codes_S_A.shape == rollout.logp_S_A.shape == rollout.entropy_S_A.shape == (6, rows * columns)
    assert not rollout.codes_S_A.is_floating_point()
    assert 0 <= int(rollout.codes_S_A.min()) <= int(rollout.codes_S_A.max()) < model.capabilities.codebook
    greedy = drawn(model, 2, Sampling(temperature=0.0)).codes_S_A
    assert torch.equal(greedy[0::2], greedy[1::2])


def seeds_are_the_only_chance(tiny: Tiny) -> None:
    """Drawing and decoding neither use nor move the global random state; other seeds draw other images."""
    model = tiny(0)
    torch.manual_seed(1)
    first = drawn(model)
    pixels, state = model.decode(first), torch.get_rng_state()
    torch.manual_seed(2)
    second = drawn(model)
    assert torch.equal(first.codes_S_A, second.codes_S_A)
    assert torch.equal(pixels, model.decode(second))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    other = model.rollout(model.encode_prompts(TEXTS), 1, Sampling(), [1, 2, 3])
    assert not torch.equal(first.codes_S_A, other.codes_S_A)


def decode_is_per_sample(tiny: Tiny) -> None:
    """Pixels are (S, 3, H, W) floats in [0, 1]; a sample's depend on its codes and its seed, not on its batch."""
    model = tiny(0)
    rollout = drawn(model)
    pixels = model.decode(rollout)
    assert pixels.shape[:2] == (3, 3)
    assert pixels.dtype == torch.float32
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    for s in range(3):
        near(model.decode(rollout.rows(slice(s, s + 1)))[0], pixels[s], 1e-5)
    reseeded = model.decode(replace(rollout, seeds=(rollout.seeds[0], 5, 6)))
    near(reseeded[0], pixels[0], 1e-5)
    assert float((reseeded[1:] - pixels[1:]).abs().max()) > 1e-4, "decoding noise must come from the seeds"


def long_prompts_are_refused(tiny: Tiny) -> None:
    """A prompt beyond the context is a GvuError, for drawing and for reading."""
    model, text = tiny(0), "a dog and " * 3000
    reading = model.read_tokens(drawn(model, texts=TEXTS[:1]))
    uses = (lambda: model.encode_prompts([text]), lambda: model.text_logp(reading, [text], INSTRUCTION))
    assert all(len(str(refused(use))) < 300 for use in uses), "one sentence, not the whole prompt"
