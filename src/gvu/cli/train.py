"""`gvu train`: post-train a model by its own reading."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvu.cli.common import print_json, print_table

if TYPE_CHECKING:
    from gvu.config import TrainConfig

EXAMPLES = """examples:
  gvu train
  gvu train model=mini-weak optim.lr=3e-4 steps=60
  gvu train --config recipe.yaml --output runs/first prompts.source=prompts.txt
  gvu train --print-config > recipe.yaml"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("train", help="train a model on prompts", description=f"Train a model.\n\n{EXAMPLES}")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over the file's")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML")
    parser.add_argument("--output", metavar="DIR", help="the run's folder, short for output=DIR")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and stop")
    parser.add_argument("--dry-run", action="store_true", help="report parameters, memory and time, and stop")
    parser.add_argument("--json", action="store_true", help="report in JSON")
    parser.closing = _keys
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check all input, then train; 130 when it was interrupted (its checkpoint is saved)."""
    from gvu.config import TrainConfig, load_config, to_yaml

    config = load_config(TrainConfig, file=args.config, overrides=overrides(args))
    if args.print_config:
        print(to_yaml(config, comments=True), end="")
        return 0
    _check_input(config)
    from gvu.trainer import plan, train

    if args.dry_run:
        _report(args, "dry run", plan(config))
        return 0
    summary = train(config)
    _report(args, f"run {summary.output}", summary.as_dict())
    return 130 if summary.interrupted else 0


def overrides(args: argparse.Namespace) -> list[str]:
    """Overrides with the shorthands `model=X` and `--output X` written out."""
    long = [f"model.name={text[6:]}" if text.startswith("model=") else text for text in args.overrides]
    return long + ([f"output={args.output}"] if args.output is not None else [])


def _check_input(config: "TrainConfig") -> None:
    """What can be wrong before a model is loaded: the prompts, then the output folder. Writes nothing."""
    from gvu.prompts import load_prompts
    from gvu.run import output_path, refuse_existing

    load_prompts(config.prompts.source, config.prompts.limit, tag_weights=config.prompts.tag_weights)
    refuse_existing(output_path(config.output, config.model.name))


def _report(args: argparse.Namespace, title: str, data: dict[str, Any]) -> None:
    if args.json:
        print_json(data)
    else:
        print_table(title, data)


def _keys() -> str:
    """Every setting with its default and what it is for."""
    from gvu.config import TrainConfig, to_yaml

    return "settings, with their defaults:\n\n" + to_yaml(TrainConfig(), comments=True).rstrip()
