"""`gvu version`: what is installed."""

import argparse
import platform
from importlib import metadata
from typing import Any

PACKAGES = ("gvu", "torch", "transformers", "peft", "diffusers")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("version", help="print versions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print versions, told by the installed metadata (nothing is imported)."""
    del args
    for package in PACKAGES:
        try:
            print(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            print(package, "not installed")
    print("python", platform.python_version())
    return 0
