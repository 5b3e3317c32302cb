"""Checks of the understanding branch: text log-probs, token and pixel paths, answers."""

from dataclasses import replace
from typing import Any

import torch

from gvu.errors import GvuError
from gvu.models.base import TextScore
from gvu.testing.common import (
    INSTRUCTION,
    TEXTS,
    Tiny,
    adapted,
    drawn,
    near,
)


@torch.no_grad()
def text_logp_is_token_by_token(tiny: Tiny) -> None:
    """One teacher-forced pass gives what one forward pass per token gives, each seeing only the tokens before it."""
    model = tiny(0)
    rollout = drawn(model)
    reading = model.read_tokens(rollout)
    whole = model.text_logp(reading, TEXTS, INSTRUCTION)
    for s, text in enumerate(TEXTS):
        pieces = model.text_tokens(text)
        assert int(whole.mask_S_T[s].sum()) == len(pieces)
        for j in range(len(pieces)):
            part = model.text_logp(reading.rows(slice(s, s + 1)), ["".join(pieces[: j + 1])], INSTRUCTION)
            near(part.logp_S_T[0, -1], whole.logp_S_T[s, j], 1e-4)


def _check_padding(score: TextScore) -> None:
    assert score.logp_S_T.shape == score.mask_S_T.shape == score.ids_S_T.shape
    assert score.mask_S_T.dtype == torch.bool
    assert bool((score.logp_S_T[~score.mask_S_T] == 0).all())
    assert bool((score.logp_S_T[score.mask_S_T] < 0).all())
    lengths = score.mask_S_T.sum(1)
    assert bool((score.mask_S_T == (torch.arange(score.mask_S_T.shape[1]) < lengths[:, None])).all())


@torch.no_grad()
def text_logp_ignores_the_batch(tiny: Tiny) -> None:
    """Scores of a text do not depend on the others; they do depend on the image and on the instruction."""
    model = tiny(0)
    reading = model.read_tokens(drawn(model))
    together = model.text_logp(reading, TEXTS, INSTRUCTION)
    _check_padding(together)
    for s, text in enumerate(TEXTS):
        alone = model.text_logp(reading.rows(slice(s, s + 1)), [text], INSTRUCTION).logp_S_T[0]
        near(alone, together.logp_S_T[s, : len(alone)], 1e-5)
    shuffled = replace(reading, content_S=reading.content_S.flip(0))
    other = model.text_logp(shuffled, TEXTS, INSTRUCTION).logp_S_T
    assert float((other[0] - together.logp_S_T[0]).abs().max()) > 1e-4, "the image is not read"
    asked = model.text_logp(reading, TEXTS, "What is this?").logp_S_T
    assert float((asked - together.logp_S_T).abs().max()) > 1e-4, "the instruction is not read"


@torch.no_grad()
def tokens_read_as_pixels(tiny: Tiny) -> None:
    """Where both are declared: the codes found in pixels score as the same codes drawn do; `read` takes both paths."""
    model = tiny(0)
    if not {"tokens", "pixels"} <= model.capabilities.reads:
        return
    rollout = drawn(model)
    pixels = model.read_pixels(model.decode(rollout))
    near(model.read(rollout, "pixels").content_S, pixels.content_S, 0)
    codes = replace(rollout, codes_S_A=pixels.content_S)
    assert pixels.content_S.shape == rollout.codes_S_A.shape
    a, b = (model.text_logp(r, TEXTS, INSTRUCTION).logp_S_T for r in (pixels, model.read(codes, "tokens")))
    near(a, b, 1e-6)


@torch.no_grad()
def pixels_are_read_per_image(tiny: Tiny) -> None:
    """A picture reads the same alone and in a batch, and at any size."""
    model = tiny(0)
    pixels = torch.rand(3, 3, *model.decode(drawn(model)).shape[-2:], generator=torch.Generator().manual_seed(3))
    reading = model.read_pixels(pixels)
    assert len(reading) == 3
    for s in range(3):
        near(model.read_pixels(pixels[s : s + 1]).content_S[0], reading.content_S[s], 1e-5)
    odd = model.read_pixels(torch.rand(1, 3, 37, 53, generator=torch.Generator().manual_seed(4)))
    assert odd.content_S.shape[1:] == reading.content_S.shape[1:]


def unknown_paths_are_refused(tiny: Tiny) -> None:
    """Reading by a path that is not declared is a GvuError."""
    model = tiny(0)
    path: Any = "smell"
    try:
        model.read(drawn(model), path)
    except GvuError:
        return
    raise AssertionError("an undeclared path was accepted")


def answers_ignore_the_batch(tiny: Tiny) -> None:
    """Greedy answers are strings, one per image, the same alone and in a batch, with and without an adapter."""
    for model in (tiny(0), adapted(tiny)):
        reading = model.read_tokens(drawn(model))
        answers = model.answer(reading, "What is in the image?", max_new_tokens=6)
        alone = [
            model.answer(reading.rows(slice(s, s + 1)), "What is in the image?", max_new_tokens=6)[0] for s in range(3)
        ]
        assert answers == alone
