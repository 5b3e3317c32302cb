"""`gvu mini`: the embedded world and its models."""

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

from gvu.cli.common import at_least, png_path
from gvu.errors import GvuError


def add(commands: Any) -> None:
    """Add the command and its own commands to the parser."""
    parser = commands.add_parser("mini", help="the embedded world and its models", description="X-Omni-Mini.")
    below = parser.add_subparsers(dest="mini_command", required=True, metavar="COMMAND")
    _add_pretrain(below)
    card = below.add_parser("card", help="print a model card")
    card.add_argument("name", nargs="?", default="mini", metavar="NAME", help="embedded model (mini)")
    card.set_defaults(run=run_card)
    world = below.add_parser("world", help="draw true scenes of training prompts into a PNG grid")
    world.add_argument("-n", type=at_least(1), default=24, help="how many (24)")
    world.add_argument("--seed", type=at_least(0), default=0, help="which (0)")
    world.add_argument("--out", type=png_path, default=Path("world.png"), metavar="PNG", help="the file (world.png)")
    world.set_defaults(run=run_world)


def _add_pretrain(below: Any) -> None:
    parser = below.add_parser("pretrain", help="train the embedded checkpoints from nothing, stage by stage")
    parser.add_argument("stage", metavar="STAGE", help="which stage")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where checkpoints go")
    parser.add_argument("--steps", type=at_least(1), metavar="N", help="optimizer steps (the stage's own)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR")
    parser.set_defaults(run=run_pretrain)


def run_pretrain(args: argparse.Namespace) -> int:
    """Run one stage of the recipe."""
    from gvu.mini.pretrain import main

    return main(args) or 0


def run_card(args: argparse.Namespace) -> int:
    """Print the model card."""
    card = resources.files("gvu") / "assets" / args.name / "README.md"
    if not card.is_file():
        raise GvuError(f"there is no embedded model {args.name!r}; the embedded models are mini and mini-weak")
    print(card.read_text(encoding="utf-8"), end="")
    return 0


def run_world(args: argparse.Namespace) -> int:
    """Draw scenes of which training prompts are true."""
    import numpy as np
    import torch

    from gvu.images import save_grid
    from gvu.mini.render import render, scene_for
    from gvu.prompts import load_prompts

    prompts = load_prompts("mini-train", args.n, seed=args.seed)
    rng = np.random.default_rng(args.seed)
    scenes = np.stack([render(scene_for(prompt.metadata or {}, rng)) for prompt in prompts])
    save_grid(args.out, torch.from_numpy(scenes).permute(0, 3, 1, 2) / 255.0, [prompt.text for prompt in prompts])
    print(f"{len(prompts)} scenes in {args.out}")
    return 0
