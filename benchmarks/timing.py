"""What the benchmarks share: interleaved timing, tables, the machine.

A shared machine slows down and speeds up by itself. So that no candidate is timed in a bad minute, every round runs all
candidates once, in an order that rotates; medians are over rounds, and ratios are medians of the rounds' own ratios.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

Task = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one candidate, one per round."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle round."""
        return median(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """How many times longer `other` takes: the median over rounds, each against its own round."""
        return median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"median": self.median, "best": self.best, "rounds": list(self.seconds)}


def interleave(tasks: Mapping[str, Task], rounds: int) -> dict[str, Timing]:
    """Time every task once a round, after one round that is not counted."""
    names, seconds = list(tasks), {name: list[float]() for name in tasks}
    for task in tasks.values():
        task()
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            seconds[name].append(once(tasks[name]))
    return {name: Timing(seconds=tuple(values)) for name, values in seconds.items()}


def once(task: Task) -> float:
    """Seconds of one call; waits for the GPU where there is one."""
    began = time.perf_counter()
    task()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def machine(**more: object) -> dict[str, Any]:
    """What a timing depends on besides the code."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "load": load, "gpu": gpu,
            "torch": torch.__version__, "system": platform.platform(), **more}  # fmt: skip


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned plain text; floats get four figures."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([title, lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]]) + "\n"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Write the results, if a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
