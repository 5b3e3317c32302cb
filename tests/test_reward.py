"""Rewards against values worked out by hand, and the scorer on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gvu.config import RewardConfig
from gvu.errors import GvuError
from gvu.models.base import Reading, Rollout, TextScore
from gvu.models.xomni.adapter import XOmni
from gvu.reward import (
    EDITS,
    Scorer,
    content_weights,
    contrastive,
    edited_texts,
    geometric_mean,
    join,
    mean_logp,
    weighted_logp,
)  # fmt: skip
from gvu.sampling import Sampling

TEXTS = ["a red car", "a photo of two small dogs", "a cup", "of the"]
METADATA = {
    "tag": "colors",
    "include": [{"class": "car", "count": 1, "color": "red"}],
    "prompt": "a photo of a red car",
}


@pytest.fixture(scope="module")
def model() -> XOmni:
    return XOmni.tiny(0)


@pytest.fixture(scope="module")
def rollout(model: XOmni) -> Rollout:
    return model.rollout(model.encode_prompts(TEXTS), 1, Sampling(), [1, 2, 3, 4])


@pytest.fixture(scope="module")
def reading(model: XOmni, rollout: Rollout) -> Reading:
    return model.read_tokens(rollout)


def close(got: Tensor, want: Tensor | list[float], atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want), atol=atol, rtol=0)


def text_score(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Log-probs of given probabilities and their mask; rows are padded with nonsense under a false mask."""
    length = max(map(len, rows))
    logp = torch.tensor([[math.log(p) for p in row] + [0.0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return logp, mask


def test_the_papers_reward_is_the_geometric_mean() -> None:
    logp, mask = text_score([[0.5, 0.125], [0.2], [0.9, 0.9, 0.3]])
    close(geometric_mean(logp, mask), [0.25, 0.2, 0.243 ** (1 / 3)])
    close(mean_logp(logp, mask), [math.log(0.25), math.log(0.2), math.log(0.243) / 3])


def test_long_prompts_do_not_underflow() -> None:
    logp, mask = text_score([[1e-3] * 400, [2e-3] * 400])
    assert float(logp[0].exp().prod()) == 0.0  # what a product of probabilities gives
    close(geometric_mean(logp, mask), [1e-3, 2e-3], 1e-8)


def test_weights_are_a_weighted_mean() -> None:
    logp, mask = text_score([[0.5, 0.1, 0.2], [0.3, 0.4]])
    weight = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]])
    close(weighted_logp(logp, weight), [(math.log(0.5) + 3 * math.log(0.2)) / 4, math.log(0.4)])
    close(weighted_logp(logp, mask.float()), mean_logp(logp, mask))
    close(weighted_logp(logp, torch.zeros(2, 3)), [0.0, 0.0])


def test_content_weights_pass_over_function_words() -> None:
    tokens = [["a", " photo", " of", " Two", " dogs"], ["of", "the"], [" a", " red", " car"]]
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 3 + [False] * 2])
    want = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]).float()
    assert torch.equal(content_weights(tokens, mask), want)


def test_contrastive_is_the_log_share_of_the_true_text() -> None:
    true, edited = torch.tensor([-3.0, -400.0]), torch.tensor([[-4.0, -5.0], [-400.0, -400.0]])
    share = math.exp(-3) / (math.exp(-3) + math.exp(-4) + math.exp(-5))
    close(contrastive(true, edited), [math.log(share), math.log(1 / 3)], 1e-4)


def test_edits_are_minimal_fixed_and_never_the_prompt() -> None:
    text = METADATA["prompt"]
    edits = edited_texts(str(text), METADATA)
    assert edits == edited_texts(str(text), METADATA)
    assert len(edits) == EDITS
    assert text not in edits
    with pytest.raises(GvuError, match="needs GenEval metadata"):
        edited_texts("a red car", None)


def test_joined_scores_are_padded_to_the_longest() -> None:
    parts = [TextScore(logp_S_T=torch.full((n, t), -1.0), mask_S_T=torch.ones(n, t, dtype=torch.bool),
                       ids_S_T=torch.full((n, t), 7)) for n, t in ((2, 3), (1, 5))]  # fmt: skip
    whole = join(parts)
    assert whole.mask_S_T.sum(1).tolist() == [3, 3, 5]
    assert whole.logp_S_T.sum(1).tolist() == [-3, -3, -5]
    assert whole.ids_S_T.shape == (3, 5)


def plain(model: XOmni, reading: Reading, texts: list[str]) -> TextScore:
    with torch.no_grad():
        return model.text_logp(reading, texts, RewardConfig().instruction)


@pytest.mark.parametrize("kind", ["geometric_mean", "mean_logp"])
def test_scorer_gives_the_plain_rewards(model: XOmni, reading: Reading, kind: str) -> None:
    score = plain(model, reading, TEXTS)
    want = torch.stack([row[keep].mean() for row, keep in zip(score.logp_S_T, score.mask_S_T, strict=True)])
    got = Scorer(model, RewardConfig(kind=kind))(reading, TEXTS).reward_S  # type: ignore[arg-type]
    close(got, want.exp() if kind == "geometric_mean" else want)
    assert not got.requires_grad


def test_scorer_weighs_content_tokens(model: XOmni, reading: Reading) -> None:
    """The tiny tokenizer's tokens are bytes: `a`, `s` and blanks are function "words", other letters are content."""
    score = plain(model, reading, TEXTS)
    got = Scorer(model, RewardConfig(kind="content"))(reading, TEXTS).reward_S
    keep = torch.tensor([c not in " as" for c in TEXTS[0]])
    close(got[0], score.logp_S_T[0, : len(keep)][keep].mean(), 1e-5)


def test_pmi_weighs_by_what_language_alone_does_not_know(model: XOmni, reading: Reading) -> None:
    blind = blind_reading(model, len(TEXTS))
    weight = (1 - plain(model, blind, TEXTS).logp_S_T.exp()) * plain(model, reading, TEXTS).mask_S_T
    logp = plain(model, reading, TEXTS).logp_S_T
    want = (logp * weight).sum(1) / weight.sum(1)
    got = Scorer(model, RewardConfig(kind="pmi"))(reading, TEXTS).reward_S
    close(got, want, 1e-5)
    assert float((got - mean_logp(logp, plain(model, reading, TEXTS).mask_S_T)).abs().max()) > 1e-4


def blind_reading(model: XOmni, rows: int) -> Reading:
    """The picture of noise that stands for "no image", `rows` times: the only picture that the pmi reward encodes."""
    seen = list[Reading]()

    class Spy(XOmni):
        def read_pixels(self, pixels_S_3_H_W: Tensor) -> Reading:
            seen.append(super().read_pixels(pixels_S_3_H_W))
            return seen[-1]

    spy = Spy(model.parts)
    codes = Reading(content_S=torch.zeros(1, 16, dtype=torch.long), grid=(4, 4))
    Scorer(spy, RewardConfig(kind="pmi"))(codes, ["a dog"])
    assert len(seen) == 1
    return replace(seen[0], content_S=seen[0].content_S.expand(rows, -1))


def test_pmi_weights_do_not_depend_on_the_images(model: XOmni, reading: Reading) -> None:
    scorer = Scorer(model, RewardConfig(kind="pmi"))
    flipped = replace(reading, content_S=reading.content_S.flip(0))
    ratio = [scorer._surprise(plain(model, r, TEXTS), r, TEXTS) for r in (reading, flipped)]
    close(ratio[0], ratio[1])


def test_scorer_contrasts_with_edited_prompts(model: XOmni, reading: Reading) -> None:
    text, one = str(METADATA["prompt"]), reading.rows(slice(0, 1))
    texts = [text, *edited_texts(text, METADATA)]
    sums = plain(model, replace(one, content_S=one.content_S.expand(len(texts), -1)), texts).logp_S_T.sum(1)
    got = Scorer(model, RewardConfig(kind="contrastive"))(one, [text], [METADATA]).reward_S
    close(got, sums.log_softmax(0)[:1], 1e-4)
    with pytest.raises(GvuError, match="needs GenEval metadata"):
        Scorer(model, RewardConfig(kind="contrastive"))(one, [text])


@pytest.mark.parametrize("kind", ["geometric_mean", "content", "pmi"])
def test_micro_batches_change_nothing(model: XOmni, reading: Reading, kind: str) -> None:
    whole, ones, threes = (
        Scorer(model, RewardConfig(kind=kind, micro_batch=n))(reading, TEXTS)  # type: ignore[arg-type]
        for n in (64, 1, 3)
    )
    for part in (ones, threes):
        close(part.reward_S, whole.reward_S, 1e-5)
        close(part.text.logp_S_T, whole.text.logp_S_T, 1e-5)
        assert torch.equal(part.text.mask_S_T, whole.text.mask_S_T)


def test_the_reward_is_the_probability_of_the_whole_prompt(model: XOmni, reading: Reading) -> None:
    """R ** T is the probability of the text: the definition in the paper's equation, from the token probabilities."""
    scores = Scorer(model, RewardConfig())(reading, TEXTS)
    for reward, logp, mask in zip(scores.reward_S, scores.text.logp_S_T, scores.text.mask_S_T, strict=True):
        product = float(logp[mask].double().exp().prod())
        assert float(reward) ** int(mask.sum()) == pytest.approx(product, rel=1e-3)
