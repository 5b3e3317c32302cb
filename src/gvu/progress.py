"""Progress of long work: a live display in a terminal, plain lines elsewhere.

with Progress("train", steps, spark="reward") as progress:
    for step in range(steps):
        progress.update({"reward": 0.5, "kl": 0.01}, items=64)
"""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
WINDOW = 20
"""Steps over which speed and the time left are measured."""
SPARK_WIDTH = 60


class Progress:
    """Shows step, metrics, images/s, time left and the course of one metric.

    Attributes:
        total: steps in all; whoever does the work may set it when it is known.
        done: steps finished so far.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        spark: str | None = None,
        unit: str = "images",
        every: int = 0,
        file: TextIO | None = None,
        quiet: bool = False,
    ) -> None:
        """Start counting.

        Args:
            title: what is being done.
            total: steps in all.
            spark: the metric that is drawn as a sparkline.
            unit: what `items` of `update` counts.
            every: without a terminal, print a line every so many steps; 0 prints about twenty in all.
            file: where to print; standard output by default.
            quiet: print nothing (for tests and for other processes than the first).
        """
        self.title, self.total, self.done = title, total, 0
        self._spark, self._unit, self._quiet = spark, unit, quiet
        self._given_every = every
        self._console = Console(file=file or sys.stdout)
        self._metrics: dict[str, float] = {}
        self._course: list[float] = []
        self._start = time.monotonic()
        self._marks: deque[tuple[float, int, int]] = deque([(self._start, 0, 0)], WINDOW + 1)
        self._live: Live | None = None

    def update(self, metrics: Mapping[str, float] | None = None, *, advance: int = 1, items: int = 0) -> None:
        """Count `advance` steps that handled `items` units, and show their metrics."""
        self.done += advance
        self._metrics |= metrics or {}
        self._marks.append((time.monotonic(), self.done, self._marks[-1][2] + items))
        if self._spark is not None and self._spark in (metrics or {}):
            self._course.append(self._metrics[self._spark])
        if self._live is not None:
            self._live.update(self.render())
        elif not self._quiet and self._due(advance):
            self._line(self.line())

    def _due(self, advance: int) -> bool:
        every = self._given_every or max(1, self.total // 20)
        return self.done % every < advance or self.done == self.total

    def note(self, text: str) -> None:
        """Print a line that stays, above the display."""
        if self._live is not None:
            self._live.console.print(Text(text))
        elif not self._quiet:
            self._line(text)

    def line(self) -> str:
        """The state as one plain line."""
        return "  ".join([f"{self.title} {self.done}/{self.total}", *(f"{k} {v}" for k, v in self._facts())])

    def render(self) -> RenderableType:
        """The state as a live display: bar, facts, sparkline."""
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"{self.title} {self.done}/{self.total}", style="bold"),
            ProgressBar(total=max(1, self.total), completed=self.done, width=40),
        )
        facts = Text("  ").join(Text.assemble((f"{k} ", "dim"), v) for k, v in self._facts())
        course = Text(sparkline(self._course, SPARK_WIDTH), style="cyan")
        return Group(bar, facts, course) if self._course else Group(bar, facts)

    def _facts(self) -> list[tuple[str, str]]:
        facts = [(name, f"{value:.4g}") for name, value in self._metrics.items()]
        (t0, steps0, items0), (t1, steps1, items1) = self._marks[0], self._marks[-1]
        seconds = max(t1 - t0, 1e-9)
        if items1 > items0:
            facts.append((f"{self._unit}/s", f"{(items1 - items0) / seconds:.1f}"))
        if steps1 > steps0:
            facts.append(("ETA", duration((self.total - self.done) * seconds / (steps1 - steps0))))
        return facts

    def _line(self, text: str) -> None:
        print(text, file=self._console.file, flush=True)

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self.render(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def sparkline(values: list[float], width: int) -> str:
    """Values as bars between their least and greatest, averaged down to `width`; values not finite are gaps."""
    if len(values) > width:
        cuts = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(_bar((v - low) / span if span else 0.5) if math.isfinite(v) else " " for v in values)


def _bar(share: float) -> str:
    return BARS[min(len(BARS) - 1, int(share * len(BARS)))]


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 2h10m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
