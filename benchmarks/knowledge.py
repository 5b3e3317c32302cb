"""How well the reward knows: does a model's own reading order its drawings of one prompt as the detector does?

`python benchmarks/knowledge.py` draws held-out prompts several times and prints, per tag and for both ways of reading,
the share of (right, wrong) pairs of drawings of one prompt that the reward orders correctly (0.5 is chance), and the
rank correlation of the two ways' rewards within a prompt. Intervals are 95% bootstrap intervals over prompts.
"""

# ruff: noqa: T201

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from timing import machine, table, write_json

from gvu.geneval import Interval, Report, aggregate
from gvu.models.base import UnifiedModel, Via
from gvu.models.registry import load
from gvu.probes import caption_scores, probe_prompts, reward_knowledge, spearman
from gvu.sampling import Sampling, derive_seed

PATHS: tuple[Via, ...] = ("tokens", "pixels")
AT_ONCE = 8
"""Prompts drawn together."""


@torch.no_grad()
def correlation(model: UnifiedModel, prompts: int, images: int, seed: int, steps: int | None) -> Report:
    """Rank correlation of the two rewards within a prompt: per tag, and `overall` as the mean over all prompts."""
    metadata = probe_prompts(prompts)
    rows: list[tuple[str, int, float]] = []
    for start in range(0, prompts, AT_ONCE):
        part = metadata[start : start + AT_ONCE]
        seeds = [derive_seed(seed, start + p, i) for p in range(len(part)) for i in range(images)]
        rollout = model.rollout(model.encode_prompts([m["prompt"] for m in part]), images, Sampling(), seeds)
        texts = [[text] for text in rollout.prompts.texts]
        with model.teacher("frozen"):
            both = [
                caption_scores(model, model.read(rollout, path, steps=steps), texts)["mean"].view(-1, images)
                for path in PATHS
            ]
        pairs = zip(*(np.asarray(reward, np.float64) for reward in both), strict=True)
        rows += [(m["tag"], start + p, spearman(a, b)) for p, (m, (a, b)) in enumerate(zip(part, pairs, strict=True))]
    return Report(aggregate(("all", p, rho) for _, p, rho in rows).overall, aggregate(rows).tags)


def lines(columns: Sequence[Report | None]) -> Iterator[list[str]]:
    """A line per tag and one overall; "-" where a tag has no pair."""
    tags = list(dict.fromkeys(tag for report in columns if report for tag in report.tags))
    for tag in tags:
        yield [tag, *(_cell(report.tags.get(tag) if report else None) for report in columns)]
    yield ["overall", *(_cell(report.overall if report else None) for report in columns)]


def _cell(interval: Interval | None) -> str:
    return "-" if interval is None else str(interval)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="mini", help="an embedded model or a checkpoint folder (mini)")
    options.add_argument("--adapter", metavar="DIR", help="a trained adapter: draw by it, read by the frozen base")
    options.add_argument("--prompts", type=int, default=96, help="held-out prompts, tags taking turns (96)")
    options.add_argument("--images", type=int, default=8, help="drawings of each (8)")
    options.add_argument("--decoder-steps", type=int, metavar="N", help="flow steps (the model's own number)")
    options.add_argument("--seed", type=int, default=77, help="(77)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return options


def main(argv: list[str] | None = None) -> None:
    """Draw, judge, print."""
    args = parser().parse_args(argv)
    model = load(args.model, adapter=args.adapter)
    drawn = {"n_prompts": args.prompts, "n_images": args.images, "seed": args.seed}
    known = reward_knowledge(model, PATHS, **drawn, decoder_steps=args.decoder_steps)
    both = correlation(model, args.prompts, args.images, args.seed, args.decoder_steps)
    title = f"{args.model}: {args.prompts} prompts x {args.images} drawings, mean [95% interval]"
    head = ["tag", "share right", *(f"pairs in order, {path}" for path in PATHS), "rank correlation"]
    print(table(title, head, list(lines([known.accuracy, *(known.order[path] for path in PATHS), both]))))
    counts = {path: report.overall.n_images if (report := known.order[path]) else 0 for path in PATHS}
    print(
        f"(right, wrong) pairs: {counts['tokens']}; correlation over all drawings at once {known.spearman_pooled:.3f}"
    )
    print("overall: unweighted mean of the tags; of the correlation, mean over prompts")
    about = machine(model=args.model, prompts=args.prompts, images=args.images, seed=args.seed,
                    decoder_steps=args.decoder_steps)  # fmt: skip
    write_json(args.json, {"machine": about, **known.as_dict(), "correlation": asdict(both)})


if __name__ == "__main__":
    main()
