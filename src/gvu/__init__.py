"""GvU: unified multimodal models learn to draw by their own reading (arXiv 2603.06043).

    model = gvu.load("mini")
    images = model.generate(["a photo of a red car"], n=4, seed=0)
    gvu.score(model, images, images.prompts).reward
    gvu.train(gvu.TrainConfig(steps=20))

Names are imported when first used, so that `gvu --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; see __getattr__
    from gvu.api import Images, Score, load, score
    from gvu.config import TrainConfig, load_config
    from gvu.errors import GvuError
    from gvu.evaluation import evaluate
    from gvu.sampling import Sampling
    from gvu.trainer import TrainSummary, train

__version__ = "0.1.0"

_HOME = {
    "load": "gvu.api", "score": "gvu.api", "Images": "gvu.api", "Score": "gvu.api",
    "train": "gvu.trainer", "TrainSummary": "gvu.trainer", "TrainConfig": "gvu.config", "load_config": "gvu.config",
    "Sampling": "gvu.sampling", "evaluate": "gvu.evaluation", "GvuError": "gvu.errors",
}  # fmt: skip
__all__ = ["GvuError", "Images", "Sampling", "Score", "TrainConfig", "TrainSummary", "evaluate", "load", "load_config",
           "score", "train"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gvu' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
