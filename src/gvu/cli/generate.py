"""`gvu generate`: draw prompts into a PNG grid."""

import argparse
from pathlib import Path
from typing import Any

from gvu.cli.common import add_model_options, at_least, load_model, png_path
from gvu.errors import GvuError

SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "cfg": 1.0}
"""Sampling options and their defaults: the fields of `gvu.sampling.Sampling`."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("generate", help="draw prompts", description="Draw prompts into one PNG grid.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    parser.add_argument("-n", type=at_least(1), default=4, help="images of each prompt (4)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="the same seed draws the same images (0)")
    parser.add_argument("--out", type=png_path, default=Path("grid.png"), metavar="PNG", help="the file (grid.png)")
    parser.add_argument("--steps", type=at_least(1), help="flow steps of the decoder (the model's own)")
    for name, default in SAMPLING.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, metavar="X", help=f"sampling ({default})")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw and save."""
    if any(not prompt.strip() for prompt in args.prompts):
        raise GvuError("the prompt is empty; write what to draw, for example 'a photo of a dog'")
    from gvu.images import save_grid
    from gvu.sampling import Sampling

    sampling = Sampling(**{name: getattr(args, name) for name in SAMPLING})
    model = load_model(args)
    images = model.generate(args.prompts, n=args.n, seed=args.seed, sampling=sampling, steps=args.steps)
    captions = [prompt for prompt in args.prompts for _ in range(args.n)]
    save_grid(args.out, images.pixels, captions, columns=min(args.n, 8) if args.n > 1 else None)
    print(f"{len(captions)} image{'s' * (len(captions) > 1)} in {args.out}")
    return 0
