"""Stages `branch`, `reader`, `weak`, `mini`: the language model learns to draw (caption -> codes) and to read (codes ->
caption).

Each stage goes on from the weights of another, with a fresh optimizer. `branch` shows both directions, `reader` almost
only reading, and so does `weak` (the result is `mini-weak`); `mini` shows both again. Nothing is frozen and no label is
noisy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from gvu.geneval import Clause, Metadata
from gvu.mini.icons import NATURAL
from gvu.mini.pretrain import shapes
from gvu.mini.pretrain.fit import FitConfig, Prefetch, device, fit, learning_rate, start_from
from gvu.mini.pretrain.pictures import load_vision, pixels
from gvu.mini.pretrain.words import INSTRUCTION, save_tokenizer
from gvu.mini.render import scene_for
from gvu.mini.splits import sample_train
from gvu.mini.vocabulary import COLORS, OBJECTS, number, plural
from gvu.models.xomni.checkpoint import token_id
from gvu.models.xomni.language import XOmniConfig, XOmniForCausalLM
from gvu.models.xomni.vision import VisionTokenizer

UNCONDITIONAL = 0.05


EARLY = {"single_object": 1, "two_object": 2, "counting": 2, "colors": 2, "position": 3, "color_attr": 3}
READ = {**EARLY, "counting": 3, "colors": 1, "position": 16, "color_attr": 4, "color_count": 4}
DRAW = {
    "single_object": 1, "two_object": 3, "counting": 4, "colors": 4, "position": 8, "color_attr": 4, "color_count": 3,
}  # fmt: skip
"""Odds of the captions' tags; `color_count` are "a photo of three red cups" captions. From plain counting captions
alone, of which some counts of each object are held out, the model learns which counts remain instead of counting."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the trajectory.

    Attributes:
        after: the stage whose weights it starts from; None is random weights.
        start: its first step; batches depend on (seed, step). How many steps there are is in `pretrain.STEPS`.
        horizon: the step at which its learning rate's cosine ends.
        warmup: steps, counted from 0, over which the learning rate rises to its peak.
        draw, read: drawing and reading examples a step.
        weights: odds of the captions' tags.
        draw_weights: of the drawing examples' captions, where these differ.
        seed: of the batches.
        lr: peak learning rate.
    """

    after: str | None
    start: int = 0
    horizon: int
    draw: int
    read: int
    weights: Mapping[str, float]
    draw_weights: Mapping[str, float] | None = None
    seed: int
    lr: float = 2e-3
    warmup: int = 100


LANGUAGE = {
    "branch": Stage(after=None, horizon=1800, draw=24, read=80, weights=EARLY, seed=14),
    "reader": Stage(after="branch", start=400, horizon=900, draw=2, read=96, weights=READ, seed=14),
    "weak": Stage(after="reader", horizon=320, draw=4, read=96, weights=READ, seed=17, lr=1e-3),
    "mini": Stage(
        after="weak", horizon=400, warmup=20, draw=30, read=70, weights=READ, draw_weights=DRAW, seed=22, lr=1e-3
    ),
}
"""The trajectory as shipped: `mini` goes on from `mini-weak`."""
LAST_STAGE = {"mini": "mini", "mini-weak": "weak"}
"""Checkpoint -> the stage whose result it is."""


def trajectory(name: str) -> list[str]:
    """The stages that lead to a stage, itself included, in order."""
    after = LANGUAGE[name].after
    return [*(trajectory(after) if after else []), name]


def config_for(tokenizer: PreTrainedTokenizerFast) -> XOmniConfig:
    """The mini language model's configuration; its text vocabulary is what the tokenizer has before `<MM-Token-0>`."""
    return XOmniConfig(
        **shapes.LANGUAGE,
        vocab_size=token_id(tokenizer, "<MM-Token-0>"),
        mm_vocab_size=shapes.CODES + 16,
        image_vocab_size=shapes.CODES,
        eos_token_id=token_id(tokenizer, str(tokenizer.eos_token)),
        pad_token_id=token_id(tokenizer, str(tokenizer.pad_token)),
        bos_token_id=None,
    )


class Layout:
    """Token ids around the codes, the same as the adapter's."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.encode = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
        rows, columns = shapes.GRID
        self.frame = self.encode(f"<SOM>{rows} {columns}<IMAGE>")
        content = f"<SOM>{rows} {columns}<IMAGE><EOM>\n{INSTRUCTION}"
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        ids = self.encode(chat)
        cut = ids.index(token_id(tokenizer, "<IMAGE>")) + 1
        self.before, self.after = ids[:cut], ids[cut:]
        marks = (str(tokenizer.eos_token), str(tokenizer.pad_token), "<MM-Token-0>")
        self.end, self.pad, self.base = (token_id(tokenizer, mark) for mark in marks)

    def draw(self, texts: Sequence[str | None], codes_S_A: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, labels) of drawing examples, right-padded; a None text is the unconditional twin."""
        heads = [([] if t is None else self.encode(t)) + self.frame for t in texts]
        return self._rows(heads, codes_S_A, [[] for _ in texts], label_codes=True)

    def read(self, texts: Sequence[str], codes_S_A: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, labels) of reading examples; labels are the caption and the end of turn."""
        return self._rows(
            [self.before] * len(texts), codes_S_A, [self.encode(t) + [self.end] for t in texts], label_codes=False
        )

    def _rows(
        self, heads: list[list[int]], codes_S_A: Tensor, tails: list[list[int]], label_codes: bool
    ) -> tuple[Tensor, Tensor]:
        images = (codes_S_A + self.base).tolist()
        middle = [] if label_codes else self.after
        rows = [h + i + middle + t for h, i, t in zip(heads, images, tails, strict=True)]
        hidden = [len(r) - len(t) - (len(i) if label_codes else 0) for r, i, t in zip(rows, images, tails, strict=True)]
        length = max(map(len, rows))
        ids = torch.tensor([r + [self.pad] * (length - len(r)) for r in rows])
        labels = [[-100] * k + r[k:] + [-100] * (length - len(r)) for r, k in zip(rows, hidden, strict=True)]
        return ids, torch.tensor(labels)


def sample_caption(rng: np.random.Generator, weights: Mapping[str, float]) -> Metadata:
    """Metadata of one training scene; coloured counts never take the natural colour, which would show a plain
    counting scene."""
    total = sum(weights.values())
    if rng.random() >= weights.get("color_count", 0.0) / total:
        return sample_train(rng, {k: v for k, v in weights.items() if k != "color_count"})
    name, count = OBJECTS[rng.integers(len(OBJECTS))], int(rng.integers(2, 5))
    colors = [c for c in COLORS if c != NATURAL[name]]
    clause: Clause = {"class": name, "count": count, "color": colors[rng.integers(len(colors))]}
    prompt = f"a photo of {number(count)} {clause['color']} {plural(name)}"
    return {"tag": "color_count", "include": [clause], "prompt": prompt}


def batch_of(seed: tuple[int, ...], count: int, weights: Mapping[str, float]) -> tuple[list[str], Tensor]:
    """Captions and pictures of `count` training scenes, a function of the seed."""
    rng = np.random.default_rng(seed)
    metadata = [sample_caption(rng, weights) for _ in range(count)]
    return [m["prompt"] for m in metadata], pixels([scene_for(m, rng) for m in metadata])


def examples(stage: Stage, step: int) -> tuple[list[str], Tensor]:
    """Captions and pictures of a step. Its first `draw` are to be drawn, its last `read` to be read; where both have
    the same odds, the two overlap."""
    if stage.draw_weights is None:
        return batch_of((stage.seed, step), max(stage.draw, stage.read), stage.weights)
    drawn, drawn_pixels = batch_of((stage.seed, step, 0), stage.draw, stage.draw_weights)
    read, read_pixels = batch_of((stage.seed, step, 1), stage.read, stage.weights)
    return drawn + read, torch.cat([drawn_pixels, read_pixels])


class Drawing:
    """Loss of a step: mean nats per code when drawing plus mean nats per caption token when reading."""

    def __init__(self, model: XOmniForCausalLM, vision: VisionTokenizer, layout: Layout, stage: Stage) -> None:
        self.model, self.vision, self.layout, self.stage = model, vision.eval(), layout, stage
        self.batch = Prefetch(lambda step: examples(stage, step))

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step and its two parts."""
        stage, (texts, images) = self.stage, self.batch(step)
        with torch.no_grad():
            codes = self.vision.encode(images.to(device())).cpu()
        dropped = np.random.default_rng((stage.seed, step, 1)).random(len(texts)) < UNCONDITIONAL
        captions = [None if d else t for t, d in zip(texts, dropped, strict=True)]
        draw = self._nats(*self.layout.draw(captions[: stage.draw], codes[: stage.draw]), text_only=False)
        read = self._nats(*self.layout.read(texts[-stage.read :], codes[-stage.read :]), text_only=True)
        return draw + read, {"draw": float(draw.detach()), "read": float(read.detach())}

    def _nats(self, ids: Tensor, labels: Tensor, text_only: bool) -> Tensor:
        ids, labels = ids.to(device()), labels.to(device())
        hidden = self.model.hidden(ids, text_only=text_only).hidden[:, :-1]
        kept = labels[:, 1:] >= 0
        head = self.model.text_logits if text_only else self.model.image_logits
        target = labels[:, 1:][kept] - (0 if text_only else self.layout.base)
        return F.cross_entropy(head(hidden[kept]).float(), target)


def tokenizer_at(folder: Path) -> PreTrainedTokenizerFast:
    """The stage's tokenizer, made when it is not there yet."""
    home = folder / "tokenizer"
    return PreTrainedTokenizerFast.from_pretrained(home) if home.exists() else save_tokenizer(home)


def train_language(folder: Path, name: str, steps: int, vision: VisionTokenizer | None = None) -> nn.Module:
    """The stage `name` of the trajectory; `vision` is stage `vision`'s tokenizer, loaded if not given."""
    stage, home, tokenizer = LANGUAGE[name], folder / name, tokenizer_at(folder)
    if stage.after is not None:
        start_from(folder / stage.after, home, stage.start)
    torch.manual_seed(stage.seed)
    model = XOmniForCausalLM.untrained(config_for(tokenizer)).to(device())  # pyright: ignore[reportArgumentType]
    loss = Drawing(model, (vision or load_vision(folder)).to(device()), Layout(tokenizer), stage)
    plan = FitConfig(steps=steps, lr=stage.lr, warmup=stage.warmup, optimizer="muon")
    scheduled = replace(plan, steps=stage.horizon)
    fit(model, loss, plan, home, rate=lambda step: learning_rate(scheduled, step))
    return model
