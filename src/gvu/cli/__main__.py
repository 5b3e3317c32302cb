"""`python -m gvu.cli` is `gvu`."""

import sys

from gvu.cli import main

sys.exit(main())
