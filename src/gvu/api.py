"""The notebook interface: load a model, draw with it, score images by its reading.

>>> import gvu
>>> model = gvu.load("mini")
>>> images = model.generate(["a photo of a red car"], n=2, seed=0)
>>> images.pixels.shape
torch.Size([2, 3, 64, 64])
>>> gvu.score(model, images.pixels, ["a photo of a red car"] * 2).reward.shape
torch.Size([2])
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gvu.config import RewardConfig
from gvu.errors import GvuError
from gvu.models.base import Images, UnifiedModel
from gvu.models.registry import load
from gvu.reward import Scorer

__all__ = ["Images", "Score", "load", "score"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well images match texts, by the model's own reading.

    Attributes:
        reward: (S,) geometric mean of the text's token probabilities.
        logp: per image, log-probs in nats of the text's tokens.
        tokens: per image, those tokens as strings.
    """

    reward: Tensor
    logp: list[Tensor]
    tokens: list[list[str]]


def score(
    model: UnifiedModel,
    images: Tensor | Images,
    prompts: Sequence[str],
    *,
    instruction: str = RewardConfig().instruction,
    via: str = "pixels",
) -> Score:
    """Probability of each prompt given its image.

    Args:
        images: pixels (S, 3, H, W) in [0, 1], or what `generate` returned (then `via="tokens"` reads the drawn codes).
        prompts: S texts, one per image.
    """
    pixels = images.pixels if isinstance(images, Images) else images
    if len(prompts) != len(pixels):
        raise GvuError(f"{len(pixels)} images but {len(prompts)} prompts; give one prompt per image")
    if via == "tokens":
        if not isinstance(images, Images):
            raise GvuError("via='tokens' reads drawn codes; pass what generate() returned, or use via='pixels'")
        reading = model.read_tokens(images.rollout)
    else:
        reading = model.read_pixels(pixels)
    scores = Scorer(model, RewardConfig(instruction=instruction))(reading, list(prompts))
    logp = [row[keep] for row, keep in zip(scores.text.logp_S_T, scores.text.mask_S_T, strict=True)]
    return Score(reward=scores.reward_S, logp=logp, tokens=[model.text_tokens(p) for p in prompts])
