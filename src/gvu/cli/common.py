"""What several commands share: model options, checks of output paths, tables and JSON."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gvu.errors import GvuError

if TYPE_CHECKING:
    from gvu.models.base import UnifiedModel


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --adapter, --device."""
    parser.add_argument("--model", default="mini", metavar="NAME", help="embedded model or checkpoint folder (mini)")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter to put on the model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def load_model(args: argparse.Namespace) -> "UnifiedModel":
    """The model that the options name."""
    from gvu.models.registry import load

    return load(args.model, adapter=args.adapter, device=args.device)


def at_least(low: int) -> Any:
    """An argparse type: a whole number from `low` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is below {low}")
        return value

    return number


def png_path(text: str) -> Path:
    """An argparse type: a .png file that can be written where it is wanted."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    return path


def print_json(data: Mapping[str, Any]) -> None:
    """Data as indented JSON on standard output."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_table(title: str, data: Mapping[str, Any]) -> None:
    """Nested data as a table of two columns, keys dotted."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", title=title, show_header=False, title_justify="left")
    for name, value in _leaves(data, ""):
        table.add_row(Text(name), Text(f"{value:.4g}" if isinstance(value, float) else str(value)))
    Console().print(table)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Data as a JSON file.

    Raises:
        GvuError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise GvuError(f"cannot write {str(path)!r}: {error.strerror}") from None


def _leaves(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            yield prefix + name, value
