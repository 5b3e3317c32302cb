"""`gvu eval`: measure a model on a benchmark."""

import argparse
import sys
from pathlib import Path
from typing import Any

from gvu.cli.common import add_model_options, at_least, load_model, print_json, write_json

BENCHMARKS = ("geneval-mini", "geneval++-mini")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "eval", help="measure a model on a benchmark", description="Accuracy per tag and overall, with 95% intervals."
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, help="the test prompts")
    parser.add_argument("--images-per-prompt", type=at_least(1), default=1, metavar="N", help="images of each (1)")
    parser.add_argument("--seed", type=at_least(0), default=1234, help="seed of the images (1234)")
    parser.add_argument("--json", action="store_true", help="report in JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report there, in JSON")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw, judge, report."""
    model = load_model(args)
    from gvu.evaluation import evaluate
    from gvu.progress import Progress

    with Progress(args.benchmark, 0, file=sys.stderr if args.json else None) as progress:
        report = evaluate(
            model, args.benchmark, images_per_prompt=args.images_per_prompt, seed=args.seed, progress=progress
        )
    if args.out:
        write_json(args.out, report.as_dict())
    if args.json:
        print_json(report.as_dict())
    else:
        print(report.table())
    return 0
