"""The parser. Command modules add their own options; nothing heavy is imported until a command runs."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gvu.cli import evaluate, generate, mini, score, train, version
from gvu.errors import GvuError

COMMANDS = (train, generate, score, evaluate, mini, version)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `GvuError`s and whose closing text may be made on demand."""

    closing: Callable[[], str] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Bad usage in one sentence.

        Raises:
            GvuError: always.
        """
        raise GvuError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        """The help text, with `closing` at the end."""
        return super().format_help() + (f"\n{self.closing()}\n" if self.closing else "")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="gvu", description="Models that learn to draw by reading their own pictures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments; overrides of `gvu train` may stand before, between and after its options.

    Raises:
        GvuError: the arguments make no sense.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (args.command != "train" or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args
