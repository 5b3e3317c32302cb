"""Recipe of the embedded checkpoints: `gvu mini pretrain STAGE --out DIR`, in the order of `STAGES`, or `all`.

Every stage reads what the stages before it left in DIR, resumes from its own checkpoint there, and uses a GPU where
there is one.
`pack` writes the shipped folders from DIR (in bf16); `measure` prints the model card's figures.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gvu.errors import GvuError

STEPS = {
    "vae": 1000,
    "vision": 2200,
    "decoder": 1100,
    "detector": 1500,
    "polish": 1000,
    "branch": 400,
    "reader": 900,
    "weak": 320,
    "mini": 400,
}
"""The step that each stage ends at, as shipped; `reader` starts at 400, the others at 0."""
STAGES = (*STEPS, "pack", "measure")


def main(args: argparse.Namespace) -> int:
    """Run one stage (or `all`); `args` has stage, out, steps, resume."""
    stages = STAGES if args.stage == "all" else (args.stage,)
    unknown = [s for s in stages if s not in STAGES]
    if unknown:
        raise GvuError(f"unknown stage {unknown[0]!r}: expected all or one of {', '.join(STAGES)}")
    for stage in stages:
        _check_fresh(args.out / stage, args.resume)
        runners()[stage](args.out, args.steps or STEPS.get(stage, 0))
    return 0


def _check_fresh(folder: Path, resume: bool) -> None:
    if (folder / "state.json").is_file() and not resume:
        done = json.loads((folder / "state.json").read_text())["step"]
        raise GvuError(
            f"{str(folder)!r} holds a checkpoint at step {done}; add --resume to go on from it, or give another --out"
        )


def runners() -> dict[str, Callable[[Path, int], object]]:
    """Stage name -> function of (folder, steps)."""
    from gvu.mini.pretrain import pack, pictures
    from gvu.mini.pretrain.language import LANGUAGE, train_language
    from gvu.runtime import keep_memory

    keep_memory()
    language = {name: partial(_language, train_language, name) for name in LANGUAGE}
    return {
        "vae": pictures.train_vae,
        "vision": pictures.train_vision,
        "decoder": pictures.train_decoder,
        "detector": pack.train_detector,
        "polish": pack.polish_detector,
        **language,
        "pack": lambda folder, _: pack.pack(folder),
        "measure": lambda _folder, _steps: pack.measure(),
    }


def _language(train: Callable[[Path, str, int], object], name: str, folder: Path, steps: int) -> object:
    return train(folder, name, steps)
