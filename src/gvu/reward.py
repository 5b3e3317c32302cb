"""Rewards from the model's own reading: how probable it finds the prompt, token by token, given the image.

Everything stays in log space until the last step. Shape suffixes: S samples, T prompt tokens.
GvU (arXiv 2603.06043): R = (prod_j p(T_j | I, T_<j)) ^ (1/T) = exp(mean_j log p(T_j | I, T_<j)).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gvu.config import RewardConfig
from gvu.errors import GvuError
from gvu.geneval import Metadata
from gvu.models.base import Reading, TextScore, UnifiedModel
from gvu.sampling import derive_seed

FUNCTION_WORDS = frozenset(
    ["a", "an", "and", "at", "in", "is", "of", "on", "photo", "picture", "s", "es", "the", "this", "to", "with", ","]
) | {""}
"""Tokens that carry no content, stripped and in lower case; the empty one is a blank that stands alone."""
EDITS = 3


def geometric_mean(logp_S_T: Tensor, mask_S_T: Tensor) -> Tensor:
    """(S,) geometric mean of the token probabilities, the paper's reward."""
    return mean_logp(logp_S_T, mask_S_T).exp()


def mean_logp(logp_S_T: Tensor, mask_S_T: Tensor) -> Tensor:
    """(S,) mean log-prob in nats per token."""
    return (logp_S_T * mask_S_T).sum(1) / mask_S_T.sum(1).clamp_min(1)


def weighted_logp(logp_S_T: Tensor, weight_S_T: Tensor) -> Tensor:
    """(S,) weighted mean log-prob in nats; weights are not negative and 0 where masked."""
    return (logp_S_T * weight_S_T).sum(1) / weight_S_T.sum(1).clamp_min(1e-6)


def contrastive(true_S: Tensor, edited_S_K: Tensor) -> Tensor:
    """(S,) log of the probability share of the true text among itself and K edited ones, from summed log-probs."""
    return true_S - torch.logsumexp(torch.cat([true_S[:, None], edited_S_K], 1), 1)


def content_weights(tokens: Sequence[Sequence[str]], mask_S_T: Tensor) -> Tensor:
    """(S, T) 1 at tokens that carry content, 0 at function words and padding; all tokens where a text has no content
    word."""
    weight = torch.zeros_like(mask_S_T, dtype=torch.float32)
    for row, pieces in enumerate(tokens):
        for j, piece in enumerate(pieces):
            weight[row, j] = float(piece.strip().lower() not in FUNCTION_WORDS)
    empty = weight.sum(1, keepdim=True) == 0
    return torch.where(empty, mask_S_T.float(), weight)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the reading of S images says.

    Attributes:
        reward_S: the reward.
        text: log-probs per token of the prompt.
    """

    reward_S: Tensor
    text: TextScore


class Scorer:
    """The configured reward of a model's reading. Rows are scored `micro_batch` at a time, which does not change
    them."""

    def __init__(self, model: UnifiedModel, config: RewardConfig) -> None:
        self.model, self.config = model, config

    @torch.no_grad()
    def __call__(
        self, reading: Reading, texts: Sequence[str], metadata: Sequence[Mapping[str, Any] | None] | None = None
    ) -> Scores:
        """Score one text per image; `metadata` (GenEval fields) is needed by `contrastive` alone."""
        text = self.text(reading, texts)
        return Scores(reward_S=self._reward(text, reading, texts, metadata), text=text)

    def text(self, reading: Reading, texts: Sequence[str]) -> TextScore:
        """Log-probs of one text per image, all in one pass per micro-batch."""
        size, parts = self.config.micro_batch, list[TextScore]()
        for start in range(0, len(reading), size):
            rows = slice(start, start + size)
            parts.append(self.model.text_logp(reading.rows(rows), texts[rows], self.config.instruction))
        return join(parts)

    def _reward(
        self,
        text: TextScore,
        reading: Reading,
        texts: Sequence[str],
        metadata: Sequence[Mapping[str, Any] | None] | None,
    ) -> Tensor:
        kind, logp, mask = self.config.kind, text.logp_S_T, text.mask_S_T
        if kind == "geometric_mean":
            return geometric_mean(logp, mask)
        if kind == "mean_logp":
            return mean_logp(logp, mask)
        if kind == "content":
            return weighted_logp(logp, content_weights([self.model.text_tokens(t) for t in texts], mask).to(logp))
        if kind == "pmi":
            return weighted_logp(logp, self._surprise(text, reading, texts))
        return contrastive(logp.sum(1), self._edited(reading, texts, metadata))

    def _surprise(self, text: TextScore, reading: Reading, texts: Sequence[str]) -> Tensor:
        """(S, T) 1 - p(T_j | no image): tokens that language alone predicts count little. "No image" is a picture of
        noise."""
        rows, columns = reading.grid
        noise = torch.rand(
            1, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(derive_seed(0, rows, columns))
        )
        blind = self.model.read_pixels(noise)
        unique = sorted(set(texts))
        logp = self.text(
            Reading(content_S=blind.content_S.expand(len(unique), *blind.content_S.shape[1:]), grid=blind.grid), unique
        )
        index = torch.tensor([unique.index(t) for t in texts], device=logp.logp_S_T.device)
        return (1 - logp.logp_S_T[index].exp()) * text.mask_S_T

    def _edited(
        self, reading: Reading, texts: Sequence[str], metadata: Sequence[Mapping[str, Any] | None] | None
    ) -> Tensor:
        """(S, K) summed log-probs of K minimal edits of each text."""
        edits = [edited_texts(t, m) for t, m in zip(texts, metadata or [None] * len(texts), strict=True)]
        columns = [self.text(reading, [e[k] for e in edits]).logp_S_T.sum(1) for k in range(EDITS)]
        return torch.stack(columns, 1)


def edited_texts(text: str, metadata: Mapping[str, Any] | None) -> list[str]:
    """`EDITS` captions that differ from `text` in one object, colour, number or relation, the same ones every time."""
    if not metadata or "include" not in metadata:
        raise GvuError(
            f"the contrastive reward needs GenEval metadata to edit a prompt, and {text!r} has none; "
            "use a .jsonl file with `tag` and `include`, or another reward.kind"
        )
    from gvu.mini.grammar import minimal_edits

    rng = np.random.default_rng(list(text.encode()))
    edits = [m["prompt"] for m in minimal_edits(cast(Metadata, {**metadata, "prompt": text}), rng, n=EDITS)]
    return [edits[k % len(edits)] for k in range(EDITS)]


def join(parts: Sequence[TextScore]) -> TextScore:
    """Text scores of several batches as one, padded to the longest text."""
    length = max(p.logp_S_T.shape[1] for p in parts)

    def whole(name: str) -> Tensor:
        tensors = [getattr(p, name) for p in parts]
        return torch.cat([torch.nn.functional.pad(t, (0, length - t.shape[1])) for t in tensors])

    return TextScore(logp_S_T=whole("logp_S_T"), mask_S_T=whole("mask_S_T"), ids_S_T=whole("ids_S_T"))
