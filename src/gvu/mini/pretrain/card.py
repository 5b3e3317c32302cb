"""The model card of an embedded checkpoint, written from what was measured and from the recipe itself.

`card(name, figures, config_of(model))` is the text of `assets/NAME/README.md`; `figures` is what stage `measure` gives.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gvu.mini.pretrain import STEPS, detect, pictures, shapes
from gvu.mini.pretrain.language import LANGUAGE, LAST_STAGE, Stage, trajectory
from gvu.mini.vocabulary import COLORS, OBJECTS
from gvu.models.base import UnifiedModel
from gvu.plan import count

Figures = Mapping[str, Any]
TRAINERS: dict[str, Callable[..., Any]] = {
    "vae": pictures.train_vae,
    "vision": pictures.train_vision,
    "decoder": pictures.train_decoder,
    "detector": detect.train_detector,
    "polish": detect.polish_detector,
}
"""Stage that sees pictures only -> the function whose `seed` argument it runs with."""
WHAT = {
    "mini": "The normal base: it reads well and draws worse. GvU starts here.",
    "mini-weak": "Trained to read, with few drawing examples: it draws badly.",
}


def config_of(model: UnifiedModel, steps: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What the card says of the recipe: steps and seed of every stage, parameters of every part of a loaded model.

    Args:
        model: an X-Omni without an adapter.
        steps: of each stage, where they were not the shipped ones.
    """
    whole: Any = model
    seeds = {stage: inspect.signature(run).parameters["seed"].default for stage, run in TRAINERS.items()}
    parts = {
        "language model": whole.language,
        "vision tower (ViT)": whole.vision.vit,
        "tokenizer (projector, codebook)": whole.vision.projector,
        "flow transformer": whole.decoder.transformer,
        "VAE": whole.decoder.vae,
    }
    return {
        "steps": {**STEPS, **(steps or {})},
        "seeds": seeds,
        "parameters": {name: count(part) for name, part in parts.items()},
    }


def card(name: str, figures: Figures, config: Figures) -> str:
    """The model card in Markdown.

    Args:
        name: `mini` or `mini-weak`.
        figures: per checkpoint name the reports of `geneval-mini`, `geneval++-mini` and `understanding`, and under
            `detector` what `detect.measure` gives: the result of stage `measure`.
        config: what `config_of` gives.
    """
    parts = (_head(name), _parts(config), _data(), _training(name, config), _quality(figures[name]))
    return "\n".join([*parts, _detector(figures["detector"]), _use(name)])


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _head(name: str) -> str:
    return f"""---
license: apache-2.0
library_name: gvu
tags: [unified-multimodal-model, x-omni, text-to-image, toy]
---
# X-Omni-Mini: `{name}`

{WHAT[name]}

A unified multimodal model of X-Omni's architecture (arXiv 2507.22058), small enough for a laptop: one language model
draws images token by token and reads them. It comes with the Python package `gvu`. It was trained from nothing, on
pictures of a world that the package draws itself. No weights and no data of anybody else are in it.
"""


def _parts(config: Figures) -> str:
    sizes: Mapping[str, int] = config["parameters"]
    rows = [[part, f"{size:,}"] for part, size in sizes.items()]
    rows.append(["all", f"{sum(sizes.values()):,}"])
    rows_, columns = shapes.GRID
    language = shapes.LANGUAGE
    return f"""## Parts

{_table(["part", "parameters"], rows)}
{language["num_hidden_layers"]} layers of width {language["hidden_size"]}, the first {language["num_mm_adap_layers"]} \
and the last {language["num_mm_head_layers"]} for image tokens only; {rows_}x{columns} image tokens out of \
{shapes.CODES} codes for {shapes.VIT.img_size}x{shapes.VIT.img_size} pixels. The flow decoder reads the image tokens \
alone; there is no text encoder. `mini` and `mini-weak` share everything but the language model. Weights are bf16.
"""


def _data() -> str:
    return f"""## Data

Scenes of {len(OBJECTS)} objects with GenEval's names, drawn by the package's own vector icons, in GenEval's
{len(COLORS)} colours, with one to seven objects. Picture parts are trained on random scenes. The language model is
trained on scenes and captions of GenEval's six kinds, and on coloured counts ("a photo of three red cups").
Compositions of the two test sets, GenEval-Mini and GenEval++-Mini, never occur as captions, in whatever order they are
put. Every batch is drawn anew from (seed, step).
"""


def _training(name: str, config: Figures) -> str:
    steps: Mapping[str, int] = config["steps"]
    rows = [[stage, f"{steps[stage]:,}", config["seeds"][stage]] for stage in TRAINERS]
    head = ["stage", "steps", "seed", "peak rate", "drawing", "reading", "odds"]
    stages = [_stage(stage, LANGUAGE[stage], steps[stage]) for stage in trajectory(LAST_STAGE[name])]
    return f"""## Training

{_table(["stage", "steps", "seed"], rows)}
The language model, with examples of each direction a step and the odds of the captions:

{_table(head, stages)}
A checkpoint that draws badly saw few drawing examples; nothing was frozen or mislabelled.
Recipe: `gvu mini pretrain all --out DIR`.
"""


def _stage(name: str, stage: Stage, until: int) -> list[object]:
    odds = _odds(stage.weights)
    if stage.draw_weights is not None:
        odds = f"drawing: {_odds(stage.draw_weights)}; reading: {odds}"
    return [name, f"{stage.start:,}-{until:,}", stage.seed, f"{stage.lr:g}", stage.draw, stage.read, odds]


def _odds(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{tag} {weight:g}" for tag, weight in weights.items())


def _interval(part: Figures) -> str:
    return f"{part['value']:.3f} [{part['low']:.3f}, {part['high']:.3f}]"


def _scores(report: Figures) -> Iterator[list[str]]:
    for tag, part in report["tags"].items():
        yield [tag, _interval(part)]
    yield ["**overall**", _interval(report["overall"])]


def _quality(figures: Figures) -> str:
    drawing = [
        f"### Drawing: {benchmark}\n\n{_table(['tag', 'right [95% interval]'], list(_scores(figures[benchmark])))}"
        for benchmark in ("geneval-mini", "geneval++-mini")
    ]
    reading = _table(["tag", "chosen [95% interval]"], list(_scores(figures["understanding"]["mean"])))
    return "\n".join([
        "## Measured quality\n\nPrompts held out of all training, plain sampling at temperature 1, judged by the",
        "package's detector and GenEval's rules; overall: unweighted mean of the tags; intervals resample prompts.\n",
        *drawing,
        "### Reading\n\nShare of real renders of which the true caption is more probable, per token, than each of five",
        f"minimal edits (object, colour, number, relation).\n\n{reading}",
    ])  # fmt: skip


def _detector(figures: Figures) -> str:
    rows = [[tag, *(f"{figures[view]['verified'][tag]:.3f}" for view in ("clean", "reconstructed"))]
            for tag in figures["clean"]["verified"]]  # fmt: skip
    return f"""### The judge

Share of true prompts that detector and rules verify, on renders and on the same through tokenizer and decoder:

{_table(["tag", "clean", "reconstructed"], rows)}"""


def _use(name: str) -> str:
    return f"""## Use and limits

Meant for: tests, teaching, and trying training methods before they are run on a real model. `gvu.load("{name}")`.
Not meant for: drawing anything else. It knows {len(OBJECTS)} objects, {len(COLORS)} colours, its own caption grammar
and one picture size; it has never seen a photograph. What helps here may not help a large model: effects on it are a
reason to try, not evidence. The detector is a small network that is sometimes wrong (above), and a policy trained
against this model's own reading can learn pictures that it reads well and people do not.

Licence: Apache-2.0. Object and colour names and the wording of captions follow GenEval (MIT).
"""
