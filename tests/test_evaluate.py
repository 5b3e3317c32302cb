"""Benchmark runs and probes on a model that draws true scenes for some prompts: seeds, batches, report, comparison."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from torch import Tensor

from gvu.errors import GvuError
from gvu.evaluation import Report, evaluate
from gvu.geneval import Detection
from gvu.mini.detector import Detector, DetectorConfig, truth
from gvu.mini.grammar import SAMPLERS, Metadata
from gvu.mini.render import Scene, render, scene_for
from gvu.mini.splits import geneval_mini, genevalpp_mini
from gvu.models.base import Capabilities, Prompts, Reading, Rollout, TextScore, UnifiedModel
from gvu.probes import pair_order, probe_prompts, ranks, reward_knowledge, spearman, understanding
from gvu.progress import Progress
from gvu.sampling import Sampling, derive_seed

BLANK = Scene(objects=())
KNOWN: dict[str, Metadata] = {m["prompt"]: m for m in [*genevalpp_mini(), *geneval_mini()]}
PICTURES: dict[bytes, Scene] = {}
"""What is in every picture drawn here, by its pixels: the detector below looks it up."""


def picture(scene: Scene) -> Tensor:
    image = torch.from_numpy(render(scene)).permute(2, 0, 1).float() / 255
    PICTURES[image.numpy().tobytes()] = scene
    return image


def true_picture(prompt: str, seed: int) -> Tensor:
    return picture(scene_for(KNOWN[prompt], np.random.default_rng(seed)))


class Oracle(Detector):
    """Detects exactly what was drawn."""

    def detect(self, pixels_S_3_64_64: Tensor, *, floor: float = 0.05) -> list[list[Detection]]:
        return [truth(PICTURES[x.numpy().tobytes()].objects) for x in pixels_S_3_64_64]


SMALL = DetectorConfig(stem=4, width=4, blocks=1)
ORACLE = Oracle(SMALL)


class Fake(UnifiedModel):
    """Draws a true scene if the seed is a multiple of `every`, else an empty picture; finds `truths` more probable."""

    capabilities = Capabilities(policy="ar", reads=frozenset({"tokens", "pixels"}), shared_parameters=False, cfg="none",
                                codebook=2, grids=((1, 1),))  # fmt: skip
    device = torch.device("cpu")

    def __init__(self, every: int = 2, favour: float = 0.0, truths: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.language = torch.nn.Linear(1, 1)
        self.every, self.favour, self.truths = every, favour, truths
        self.sizes: list[int] = []
        self.steps: list[int | None] = []

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: object = "cpu") -> Self:
        raise NotImplementedError

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        return cls()

    def encode_prompts(self, texts: Sequence[str], grid: tuple[int, int] | None = None) -> Prompts:
        ids = torch.zeros(len(texts), 1, dtype=torch.long)
        return Prompts(texts=tuple(texts), grid=(1, 1), ids_P_L=ids, mask_P_L=ids + 1, uncond_ids_P_L=ids,
                       uncond_mask_P_L=ids + 1)  # fmt: skip

    def rollout(self, prompts: Prompts, n: int, sampling: Sampling, seeds: Sequence[int]) -> Rollout:
        grown = prompts.expand(n)
        assert len(seeds) == len(grown.texts)
        self.sizes.append(len(seeds))
        codes = torch.tensor([[int(s % self.every == 0)] for s in seeds])
        return Rollout(prompts=grown, codes_S_A=codes, logp_S_A=codes * 0.0, entropy_S_A=codes * 0.0, sampling=sampling,
                       seeds=tuple(seeds))  # fmt: skip

    def policy_logp(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def decode(self, rollout: Rollout, *, steps: int | None = None, cfg: float | None = None) -> Tensor:
        self.steps.append(steps)
        drawn = zip(rollout.prompts.texts, rollout.seeds, rollout.codes_S_A[:, 0].tolist(), strict=True)
        return torch.stack([true_picture(text, seed) if right else picture(BLANK) for text, seed, right in drawn])

    def read_pixels(self, pixels_S_3_H_W: Tensor) -> Reading:
        filled = (pixels_S_3_H_W - pixels_S_3_H_W[:, :, :1, :1]).abs().sum((1, 2, 3)) > 0
        return Reading(content_S=filled.long(), grid=(1, 1))

    def read_tokens(self, rollout: Rollout) -> Reading:
        return Reading(content_S=1 - rollout.codes_S_A[:, 0], grid=(1, 1))  # the wrong way round

    def text_logp(self, reading: Reading, texts: Sequence[str], instruction: str) -> TextScore:
        """-2 nat a word, the reading's content added to each, `favour` more on the first word of a true caption."""
        assert len(reading) == len(texts)
        longest = max(len(t.split()) for t in texts)
        logp, mask = torch.full((len(texts), longest), 9.0), torch.zeros(len(texts), longest, dtype=torch.bool)
        for s, text in enumerate(texts):
            words = len(text.split())
            logp[s, :words] = -2.0 + reading.content_S[s]
            logp[s, 0] += self.favour * (text in self.truths)
            mask[s, :words] = True
        return TextScore(logp_S_T=logp, mask_S_T=mask, ids_S_T=mask.long())

    def answer(self, reading: Reading, question: str, *, max_new_tokens: int = 64) -> list[str]:
        raise NotImplementedError

    def text_tokens(self, text: str) -> list[str]:
        return text.split()

    def lora_targets(self, scope: str) -> str:
        return ".*"


@pytest.mark.parametrize("benchmark", ["geneval-mini", "geneval++-mini"])
def test_true_drawings_are_right_and_empty_ones_wrong(benchmark: str) -> None:
    report = evaluate(Fake(every=1), benchmark, detector=ORACLE, batch=100)
    assert report.overall.value == 1.0
    assert all(not row.reason for row in report.rows)
    half = evaluate(Fake(every=2), benchmark, detector=ORACLE, batch=100)
    assert [row.correct for row in half.rows] == [row.seed % 2 == 0 for row in half.rows]
    assert all(bool(row.reason) != row.correct for row in half.rows)
    assert half.overall.value == pytest.approx(np.mean([t.value for t in half.tags.values()]))
    assert half.overall.low < half.overall.value < half.overall.high


def test_seeds_are_derived_and_results_do_not_depend_on_the_batch() -> None:
    models = [Fake(), Fake(), Fake()]
    reports = [evaluate(m, "geneval-mini", images_per_prompt=2, batch=b, seed=7, detector=ORACLE, decoder_steps=3)
               for m, b in zip(models, (64, 7, 1000), strict=True)]  # fmt: skip
    assert reports[0] == reports[1] == reports[2]
    rows = reports[0].rows
    assert [row.seed for row in rows] == [derive_seed(7, i, k) for i in range(288) for k in range(2)]
    assert [row.prompt for row in rows[::2]] == [m["prompt"] for m in geneval_mini()]
    assert len({row.seed for row in rows}) == 576
    assert (max(models[0].sizes), max(models[1].sizes), models[2].sizes) == (64, 7, [576])
    assert set(models[0].steps) == {3}


def test_report_goes_to_json_and_back_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(Fake(), "geneval++-mini", sampling=Sampling(temperature=0.9), detector=ORACLE)
    data = json.loads(json.dumps(report.as_dict()))
    assert (data["benchmark"], data["law"], data["seed"]) == ("geneval++-mini", "cond,T=0.9", 1234)
    assert data["overall"]["value"] == report.overall.value
    assert len(data["rows"]) == 140
    assert Report.from_dict(data) == report
    assert report.as_dict(rows=False) == {k: v for k, v in report.as_dict().items() if k != "rows"}
    lines = report.table().splitlines()
    assert len(lines) == 1 + 7 + 1 + 1
    assert f"{report.overall.value:.3f} [" in lines[-2]
    with pytest.raises(GvuError, match="not a benchmark report"):
        Report.from_dict({"rows": []})


def test_compare_is_paired_and_refuses_other_runs() -> None:
    report = evaluate(Fake(every=3), "geneval-mini", detector=ORACLE)
    better = evaluate(Fake(every=1), "geneval-mini", detector=ORACLE)
    gain = better.compare(report)
    assert gain.overall.value == pytest.approx(1 - report.overall.value)
    assert gain.overall.low > 0
    assert gain.tags["position"].value == pytest.approx(1 - report.tags["position"].value)
    assert report.compare(report).overall.high == 0
    other_judge = Oracle(SMALL)
    torch.nn.init.ones_(other_judge.out.weight)
    others = {
        "benchmark": evaluate(Fake(), "geneval++-mini", detector=ORACLE),
        "seed": evaluate(Fake(), "geneval-mini", detector=ORACLE, seed=1),
        "images_per_prompt": evaluate(Fake(), "geneval-mini", detector=ORACLE, images_per_prompt=2),
        "detector_sha256": evaluate(Fake(), "geneval-mini", detector=other_judge),
    }
    for name, other in others.items():
        with pytest.raises(GvuError, match=f"whose {name} differs"):
            report.compare(other)


def test_progress_is_a_function_or_a_display() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(Fake(), "geneval++-mini", batch=60, detector=ORACLE, progress=lambda *counts: seen.append(counts))
    assert seen == [(60, 140), (120, 140), (140, 140)]
    with Progress("eval", 0, quiet=True) as display:
        evaluate(Fake(), "geneval++-mini", batch=60, detector=ORACLE, progress=display)
    assert (display.done, display.total) == (140, 140)


def test_evaluate_refuses_what_it_cannot_do() -> None:
    with pytest.raises(GvuError, match="unknown benchmark 'geneval'; there are geneval-mini"):
        evaluate(Fake(), "geneval", detector=ORACLE)  # type: ignore[arg-type]
    with pytest.raises(GvuError, match="at least 1, got 0 and 64"):
        evaluate(Fake(), "geneval-mini", images_per_prompt=0, detector=ORACLE)


def test_probe_prompts_take_turns() -> None:
    assert [m["tag"] for m in probe_prompts(6)] == list(SAMPLERS)
    assert len({m["prompt"] for m in probe_prompts(None)}) == 288
    with pytest.raises(GvuError, match="1 to 288"):
        probe_prompts(289)


def test_understanding_is_a_strict_forced_choice() -> None:
    truths = frozenset(m["prompt"] for m in probe_prompts(24))
    knows = understanding(Fake(favour=0.5, truths=truths), n=24)
    assert knows.mean.overall.value > 0.8  # some edits are other prompts' truths, and then they tie
    assert knows.mean.overall.n_prompts == 24
    assert knows.sum.overall.value < knows.mean.overall.value  # by the sum a caption with fewer words wins
    assert understanding(Fake(), n=24).mean.overall.value == 0  # all captions tie: no choice is won
    assert understanding(Fake(favour=-0.5, truths=truths), n=24).mean.overall.value == 0
    assert understanding(Fake(favour=0.5, truths=truths), n=24, batch=5) == knows


def test_reward_knowledge_orders_pairs_by_path() -> None:
    """The pixel path favours filled pictures, which are the right ones; the token path the empty ones."""
    report = reward_knowledge(Fake(), n_prompts=12, n_images=6, detector=ORACLE, batch=18)
    pixels, tokens = report.order["pixels"], report.order["tokens"]
    assert pixels is not None
    assert tokens is not None
    assert (pixels.overall.value, tokens.overall.value) == (1.0, 0.0)
    assert report.spearman is not None
    assert report.spearman < -0.5
    assert report.spearman_pooled == pytest.approx(-1.0)
    assert report.accuracy.overall.n_images == 72
    one = reward_knowledge(Fake(), "tokens", n_prompts=12, n_images=6, detector=ORACLE)
    assert one.spearman is None
    assert one.order == {"tokens": tokens}
    assert reward_knowledge(Fake(every=1), n_prompts=6, n_images=2, detector=ORACLE).order["tokens"] is None
    with pytest.raises(GvuError, match="at least 2 images"):
        reward_knowledge(Fake(), n_prompts=6, n_images=1, detector=ORACLE)
    with pytest.raises(GvuError, match="asked for via"):
        reward_knowledge(Fake(), ("token",), n_prompts=6, n_images=2, detector=ORACLE)  # type: ignore[arg-type]


def test_ranks_pairs_and_correlation_with_ties() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 5.0])) == pytest.approx(-0.5)
    assert spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 0
    assert sorted(pair_order(np.array([True, False, False]), np.array([0.5, 0.5, 0.2]))) == [0.5, 1.0]
    assert pair_order(np.array([True, True]), np.array([0.1, 0.2])) == []
