"""How well a model draws: benchmark prompts, images with derived seeds, detector, rules, a report to compare.

The seed of image k of prompt i is `derive_seed(seed, i, k)`, so neither the batch size nor the other prompts matter.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch

from gvu.errors import GvuError
from gvu.geneval import Detection, Interval, Metadata, aggregate, paired_difference
from gvu.geneval import Report as Scores
from gvu.mini.detector import Detector, verdict
from gvu.mini.splits import geneval_mini, genevalpp_mini
from gvu.models.base import UnifiedModel
from gvu.progress import Progress
from gvu.sampling import Sampling, derive_seed

Benchmark = Literal["geneval-mini", "geneval++-mini"]
PROMPTS: dict[str, Callable[[], list[Metadata]]] = {"geneval-mini": geneval_mini, "geneval++-mini": genevalpp_mini}
"""The benchmarks and their held-out prompts."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of the benchmark.

    Attributes:
        prompt, tag: the prompt and its kind.
        prompt_id: its place in the benchmark.
        image: which of the prompt's images.
        correct: the rules' verdict.
        reason: why it is wrong, one line per failed clause.
        seed: what the image was drawn with.
    """

    prompt: str
    tag: str
    prompt_id: int
    image: int
    correct: bool
    reason: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the numbers depend on besides the model.

    Attributes:
        benchmark: its name.
        prompts_sha256: of its metadata.
        law: of the sampler.
        seed: that all images' seeds derive from.
        images_per_prompt: images of each prompt.
        decoder_steps: None is the model's own number.
        detector_sha256: of the judge.
    """

    benchmark: str
    prompts_sha256: str
    law: str
    seed: int
    images_per_prompt: int
    decoder_steps: int | None
    detector_sha256: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """A model's result on a benchmark.

    Attributes:
        scores: accuracy per tag and overall (unweighted mean of the tags), with 95% bootstrap intervals over prompts.
        rows: every image, by prompt and number.
        provenance: what the numbers depend on.
    """

    scores: Scores
    rows: tuple[Row, ...]
    provenance: Provenance

    @property
    def overall(self) -> Interval:
        """Unweighted mean of the tags."""
        return self.scores.overall

    @property
    def tags(self) -> dict[str, Interval]:
        """Accuracy per tag."""
        return self.scores.tags

    def as_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """Provenance, scores and (`rows`) every image, ready for JSON."""
        images = {"rows": [asdict(row) for row in self.rows]} if rows else {}
        return {**asdict(self.provenance), **asdict(self.scores), **images}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read back what `as_dict` gave.

        Raises:
            GvuError: the data are not such a report.
        """
        try:
            rows = tuple(Row(**row) for row in data["rows"])
            provenance = Provenance(**{name: data[name] for name in Provenance.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise GvuError(f"these data are not a benchmark report: {error}") from None
        return cls(scores=aggregate(_verdicts(rows)), rows=rows, provenance=provenance)

    def table(self) -> str:
        """Plain text: one line per tag, then overall, then what it was measured with."""
        p = self.provenance
        steps = "" if p.decoder_steps is None else f", {p.decoder_steps} decoder steps"
        return f"{p.benchmark}\n{table(self.scores)}\n{p.law}, seed {p.seed}{steps}, detector {p.detector_sha256[:8]}"

    def compare(self, other: "Report") -> Scores:
        """This report minus `other`, per tag and overall, with 95% intervals of the paired difference.

        Raises:
            GvuError: the two differ in benchmark, prompts, images, seeds or detector.
        """
        for name in ("benchmark", "prompts_sha256", "seed", "images_per_prompt", "detector_sha256"):
            mine, theirs = getattr(self.provenance, name), getattr(other.provenance, name)
            if mine != theirs:
                raise GvuError(f"cannot compare reports whose {name} differs: {mine} and {theirs}")
        if [row.seed for row in self.rows] != [row.seed for row in other.rows]:
            raise GvuError("cannot compare reports whose images have different seeds")
        return paired_difference(_verdicts(other.rows), _verdicts(self.rows))


def table(scores: Scores) -> str:
    """Intervals per tag and overall as aligned plain text."""
    width = max(map(len, [*scores.tags, "overall"]))
    rows = [*scores.tags.items(), ("overall", scores.overall)]
    return "\n".join(f"{name:<{width}}  {interval}  {interval.n_prompts} prompts" for name, interval in rows)


def evaluate(
    model: UnifiedModel,
    benchmark: Benchmark,
    *,
    images_per_prompt: int = 1,
    seed: int = 1234,
    sampling: Sampling | None = None,
    decoder_steps: int | None = None,
    batch: int = 64,
    progress: Progress | Callable[[int, int], None] | None = None,
    detector: Detector | None = None,
) -> Report:
    """Draw the benchmark's prompts and judge every image.

    Args:
        model: draws and decodes with its current parameters.
        benchmark: which prompts.
        images_per_prompt: images of each.
        seed: all images' seeds derive from it.
        sampling: the law that codes are drawn from; None is plain sampling at temperature 1.
        decoder_steps: of the pixel decoder; None is the model's own number.
        batch: most images at once.
        progress: a display, or a function of (images done, images in all).
        detector: None takes the package's own.

    Raises:
        GvuError: an unknown benchmark, no images or batches asked for, pictures that are not 64x64.
    """
    metadata, sampling = benchmark_prompts(benchmark), sampling or Sampling()
    if images_per_prompt < 1 or batch < 1:
        raise GvuError(f"images_per_prompt and batch must be at least 1, got {images_per_prompt} and {batch}")
    judge_of = detector or Detector.default()
    report = _reporter(progress, len(metadata) * images_per_prompt)
    rows: list[Row] = []
    for part in _parts(len(metadata), images_per_prompt, batch):
        seeds = [derive_seed(seed, i, k) for i, k in part]
        found = _draw(model, [metadata[i]["prompt"] for i, _ in part], sampling, seeds, decoder_steps, judge_of)
        rows += [_row(benchmark, i, metadata[i], k, f, s) for (i, k), f, s in zip(part, found, seeds, strict=True)]
        report(len(rows))
    provenance = Provenance(
        benchmark=benchmark, prompts_sha256=_sha256(metadata), law=sampling.law, seed=seed, decoder_steps=decoder_steps,
        images_per_prompt=images_per_prompt, detector_sha256=judge_of.digest,
    )  # fmt: skip
    return Report(scores=aggregate(_verdicts(rows)), rows=tuple(rows), provenance=provenance)


def benchmark_prompts(benchmark: str) -> list[Metadata]:
    """The held-out prompts of a benchmark.

    Raises:
        GvuError: there is no such benchmark.
    """
    if benchmark not in PROMPTS:
        raise GvuError(f"unknown benchmark {benchmark!r}; there are {', '.join(PROMPTS)}")
    return PROMPTS[benchmark]()


def _parts(prompts: int, images: int, batch: int) -> Iterator[list[tuple[int, int]]]:
    """(prompt, image) pairs in order, at most `batch` at once."""
    pairs = [(i, k) for i in range(prompts) for k in range(images)]
    return (pairs[start : start + batch] for start in range(0, len(pairs), batch))


@torch.no_grad()
def _draw(
    model: UnifiedModel,
    texts: Sequence[str],
    sampling: Sampling,
    seeds: Sequence[int],
    steps: int | None,
    detector: Detector,
) -> list[list[Detection]]:
    rollout = model.rollout(model.encode_prompts(texts), 1, sampling, seeds)
    return detector.detect(model.decode(rollout, steps=steps).float())


def _row(
    benchmark: Benchmark, index: int, metadata: Metadata, image: int, found: Sequence[Detection], seed: int
) -> Row:
    judged = verdict(metadata, found, plus=benchmark == "geneval++-mini")
    return Row(
        prompt=metadata["prompt"], tag=metadata["tag"], prompt_id=index, image=image, seed=seed,
        correct=judged.correct, reason=judged.reason,
    )  # fmt: skip


def _reporter(progress: Progress | Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """A function of the number of finished images, whatever kind of progress was given."""
    if progress is None:
        return lambda done: None
    if not isinstance(progress, Progress):
        return lambda done: progress(done, total)
    progress.total = total
    return lambda done: progress.update(advance=done - progress.done, items=done - progress.done)


def _verdicts(rows: Sequence[Row]) -> list[tuple[str, int, bool]]:
    return [(row.tag, row.prompt_id, row.correct) for row in rows]


def _sha256(metadata: Sequence[Metadata]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
