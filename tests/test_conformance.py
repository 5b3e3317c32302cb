"""Every adapter against the conformance suite; X-Omni's reading and drawing against the authors' way, written out."""

import pytest
import torch

from gvu.models.registry import FAMILIES
from gvu.models.xomni.adapter import XOmni
from gvu.sampling import Sampling
from gvu.testing import CHECKS, Tiny
from gvu.testing.common import INSTRUCTION, TEXTS, drawn, near

FACTORIES = {name: family.tiny for name, family in FAMILIES.items()}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("tiny", FACTORIES.values(), ids=FACTORIES.keys())
def test_every_family(tiny: Tiny, check) -> None:
    check(tiny)


class Broken(XOmni):
    """Three faults: it scores the texts of other images, replays other rows, and trains its head."""

    def text_logp(self, reading, texts, instruction):
        return super().text_logp(reading, texts[::-1], instruction)

    def policy_logp(self, rollout):
        logp, entropy = super().policy_logp(rollout)
        return logp.roll(1, 0), entropy

    def lora_targets(self, scope):
        return r".*(mm_head|_proj)"


@pytest.mark.parametrize("name", ["replay_equals_rollout", "text_logp_is_token_by_token", "gradients_reach_lora_only"])
def test_the_suite_finds_faults(name: str) -> None:
    check = next(c for c in CHECKS if c.__name__ == name)
    with pytest.raises(AssertionError):
        check(Broken.tiny)


@torch.no_grad()
def test_text_logp_is_the_authors_loop() -> None:
    """One forward per token over a string of image tokens, as the release does it."""
    model = XOmni.tiny(0)
    rollout = drawn(model)
    fast = model.text_logp(model.read_tokens(rollout), TEXTS, INSTRUCTION)
    for s, text in enumerate(TEXTS):
        codes = "".join(f"<MM-Token-{c}>" for c in rollout.codes_S_A[s].tolist())
        turn = f"<|im_start|>user\n<SOM>4 4<IMAGE>{codes}<EOM>\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
        ids, answer = (model.tokenizer(x, add_special_tokens=False)["input_ids"] for x in (turn, text))
        assert fast.ids_S_T[s, : len(answer)].tolist() == answer
        for j, token in enumerate(answer):
            logits = model.language(torch.tensor([ids + answer[:j]])).logits[0, -1, : model.config.vocab_size]
            near(fast.logp_S_T[s, j], torch.log_softmax(logits, -1)[token], 1e-4)


@torch.no_grad()
def test_rollout_law_is_the_full_forward() -> None:
    """Log-probs and entropies of every drawn code, from a forward pass without cache over the whole string so far."""
    model = XOmni.tiny(0)
    for law in (Sampling(), Sampling(temperature=0.8, cfg=2.5)):
        rollout = drawn(model, 1, law, TEXTS[:1])
        codes = rollout.codes_S_A[0].tolist()
        for a, code in enumerate(codes):
            image = "".join(f"<MM-Token-{c}>" for c in codes[:a])
            cond, uncond = (image_law(model, f"{text}<SOM>4 4<IMAGE>{image}") for text in (TEXTS[0], ""))
            logp = torch.log_softmax((uncond + law.cfg * (cond - uncond)) / law.temperature, -1)
            near(rollout.logp_S_A[0, a], logp[code], 1e-4)
            near(rollout.entropy_S_A[0, a], torch.distributions.Categorical(logits=logp).entropy(), 1e-4)


def image_law(model: XOmni, text: str) -> torch.Tensor:
    """Log-probs (V,) of the next image code after a string."""
    ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]])
    start = model.config.vocab_size
    return torch.log_softmax(model.language(ids).logits[0, -1, start : start + model.config.image_vocab_size], -1)


def test_another_grid_is_drawn_and_read() -> None:
    model = XOmni.tiny(0)
    rollout = model.rollout(model.encode_prompts(TEXTS[:2], grid=(2, 3)), 1, Sampling(), [1, 2])
    assert rollout.codes_S_A.shape == (2, 6)
    assert model.decode(rollout).shape == (2, 3, 16, 24)
    assert model.read_tokens(rollout).grid == (2, 3)
    near(model.policy_logp(rollout)[0].detach(), rollout.logp_S_A, 1e-5)


def test_generate_keeps_a_prompts_images_whatever_follows() -> None:
    model = XOmni.tiny(0)
    one, more = model.generate("a red car", n=2, seed=3), model.generate(["a red car", "a cup"], n=2, seed=3)
    near(more.pixels[:2], one.pixels, 1e-5)
    assert more.prompts == ("a red car", "a red car", "a cup", "a cup")
    assert not torch.equal(one.rollout.codes_S_A, model.generate("a red car", n=2, seed=4).rollout.codes_S_A)
