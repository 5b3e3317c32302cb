"""The main result: what a training does to GenEval-Mini and GenEval++-Mini, for several seeds.

    python benchmarks/lift.py                                       # the default config, seeds 0 1 2
    python benchmarks/lift.py --recipe recipes/mini_paper.yaml      # another recipe
    python benchmarks/lift.py --seeds 0 --model mini-weak steps=60  # overrides as in `gvu train`

Each seed is a `gvu train` of its own (its own process, so that peak memory is its own) in OUT/NAME/seedK. A seed whose
folder holds a finished run of the same configuration is not run again; an unfinished run is moved aside.
"""

# ruff: noqa: T201

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from timing import machine, table, write_json

from gvu.config import TrainConfig, load_config, to_yaml
from gvu.errors import GvuError
from gvu.models.registry import load
from gvu.probes import spearman, understanding

BENCHMARKS = ("geneval-mini", "geneval++-mini")
ENDS = 10
"""Steps averaged at either end of the reward curve."""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5% points of Student's t for 1 to 15 degrees of freedom."""
Results = dict[str, Any]


def t_interval(values: Sequence[float]) -> Results:
    """Mean over seeds with Student's 95% interval; None for the ends where there is one seed only."""
    mean = fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "n": len(values)}
    half = T_975[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def wanted(args: argparse.Namespace, seed: int) -> TrainConfig:
    """The configuration of one seed's run: the recipe's, measured on both benchmarks before and after."""
    ours = [f"seed={seed}", f"output={home(args) / f'seed{seed}'}", f"eval.benchmarks={','.join(BENCHMARKS)}",
            "eval.before_after=true", *([f"model.name={args.model}"] if args.model else [])]  # fmt: skip
    return load_config(TrainConfig, file=args.recipe, overrides=[*args.overrides, *ours])


def home(args: argparse.Namespace) -> Path:
    """The folder of this recipe's runs."""
    return args.out / (args.name or (args.recipe.stem if args.recipe else "default"))


def finished(folder: Path, config: TrainConfig) -> bool:
    """Whether the folder holds a whole run of this configuration.

    Raises:
        GvuError: it holds a whole run of another configuration.
    """
    summary = folder / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["interrupted"]:
        return False
    if load_config(TrainConfig, file=folder / "config.yaml") != config:
        raise GvuError(f"{str(folder)!r} holds a run of another configuration; give another --name or --out")
    return True


def ensure(config: TrainConfig) -> Path:
    """The folder of the finished run, trained now if need be."""
    folder = Path(config.output)
    if finished(folder, config):
        print(f"{folder} is finished; not run again")
        return folder
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.unfinished-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"an unfinished run is kept in {aside}")
    settings = folder.with_name(f"{folder.name}.yaml")
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(to_yaml(config), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "gvu.cli", "train", "--config", str(settings)], check=True)  # noqa: S603
    return folder


def understood(model_name: str, adapter: Path | None, cache: Path) -> float:
    """Forced choice won by mean log-prob on all probe prompts, measured once per file `cache`."""
    if not cache.is_file():
        model = load(model_name, adapter=None if adapter is None else str(adapter))
        write_json(cache, understanding(model).as_dict())
    return float(json.loads(cache.read_text())["mean"]["overall"]["value"])


def course(samples: Sequence[float]) -> Results:
    """How the reward of the sample prompts, always the same, went."""
    rising = spearman(np.array(samples), np.arange(len(samples)))
    return {
        "samples' reward first": samples[0],
        "samples' reward last": samples[-1],
        "samples' reward with step (rank corr.)": rising,
    }


def result(config: TrainConfig, folder: Path) -> Results:
    """The figures of one finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    rewards = [row["reward"] for row in steps]
    samples = [row["samples/reward"] for row in rows if "samples/reward" in row]
    base = folder.parent / f"understanding-{Path(config.model.name).name}.json"
    return {
        "seed": config.seed,
        "benchmarks": {
            name: {
                "before": pair["before"]["overall"],
                "after": pair["after"]["overall"],
                "difference": pair["difference"]["overall"],
                "tags": {tag: part["value"] for tag, part in pair["difference"]["tags"].items()},
            }
            for name, pair in summary["benchmarks"].items()
        },
        "minutes": summary["seconds"] / 60,
        "minutes of steps": sum(row["seconds"] for row in steps) / 60,
        "peak memory GB": max(row["peak_memory_gb"] for row in steps),
        "reward first": fmean(rewards[:ENDS]),
        "reward last": fmean(rewards[-ENDS:]),
        **(course(samples) if samples else {}),
        "kl last": fmean(row["kl"] for row in steps[-ENDS:]),
        "understanding before": understood(config.model.name, None, base),
        "understanding after": understood(config.model.name, folder / "adapter", folder / "understanding.json"),
    }


def show(runs: Sequence[Results]) -> None:
    """One table per benchmark and one for the rest, a line per seed."""
    for name in BENCHMARKS:
        parts = [(run["seed"], run["benchmarks"][name]) for run in runs]
        rows = [[s, p["before"]["value"], p["after"]["value"], p["difference"]["value"], span(p["difference"])]
                for s, p in parts]  # fmt: skip
        print(table(name, ["seed", "before", "after", "difference", "95% interval (paired)"], rows))
    names = [name for name in runs[0] if name not in ("seed", "benchmarks")]
    rows = [[run["seed"], *(run[name] for name in names)] for run in runs]
    print(table("the runs", ["seed", *names], rows))


def span(interval: Results) -> str:
    """An interval's ends."""
    low, high = interval["low"], interval["high"]
    return "-" if low is None else f"[{low:+.3f}, {high:+.3f}]"


def over_seeds(runs: Sequence[Results]) -> Results:
    """Means over seeds with t-intervals."""
    gains = {name: [run["benchmarks"][name]["difference"]["value"] for run in runs] for name in BENCHMARKS}
    reading = [run["understanding after"] - run["understanding before"] for run in runs]
    return {name: t_interval(values) for name, values in {**gains, "understanding": reading}.items()}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as in `gvu train`")
    options.add_argument("--recipe", type=Path, metavar="FILE", help="settings in YAML (the defaults)")
    options.add_argument("--model", metavar="NAME", help="the model (the recipe's)")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    options.add_argument("--out", type=Path, default=Path("runs/lift"), metavar="DIR", help="(runs/lift)")
    options.add_argument("--name", help="subfolder of OUT (the recipe's name, or default)")
    options.add_argument("--json", type=Path, metavar="FILE", help="(OUT/NAME/lift.json)")
    return options


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, measure, print, write."""
    args = parser().parse_intermixed_args(argv)
    runs: list[Results] = []
    for seed in args.seeds:
        config = wanted(args, seed)
        runs.append(result(config, ensure(config)))
        show(runs)
    total = over_seeds(runs)
    rows = [[name, t["mean"], span(t), t["n"]] for name, t in total.items()]
    print(table("mean difference over seeds", ["", "mean", "95% interval (t)", "seeds"], rows))
    about = machine(recipe=str(args.recipe or "default"), overrides=args.overrides, torch_version=torch.__version__)
    write_json(args.json or home(args) / "lift.json", {"machine": about, "seeds": runs, "mean": total})


if __name__ == "__main__":
    main()
