"""The command line `gvu`. A `GvuError` ends it with one sentence and exit code 2, Ctrl-C with 130."""

import os
import sys
from collections.abc import Sequence

from gvu.cli.parser import parse
from gvu.errors import GvuError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        args = parse(sys.argv[1:] if argv is None else list(argv))
        code = args.run(args)
        sys.stdout.flush()
        return code
    except GvuError as error:
        print("gvu:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gvu: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `gvu eval ... | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
