"""`gvu score`: how probable a model finds a prompt, given an image."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvu.cli.common import add_model_options, load_model, print_json
from gvu.errors import GvuError

if TYPE_CHECKING:
    from rich.text import Text


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "score", help="score an image against a prompt", description="The reward of an image, token by token."
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    parser.add_argument("prompt", metavar="PROMPT", help="what it should show")
    parser.add_argument("--via", choices=("pixels",), default="pixels", help="how a file is read (pixels)")
    parser.add_argument("--instruction", help="the question that the prompt answers (the model's training default)")
    parser.add_argument("--json", action="store_true", help="report in JSON")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the image, score, print."""
    if not args.prompt.strip():
        raise GvuError("the prompt is empty; write what the image should show")
    from gvu.images import load_image

    image_3_H_W = load_image(args.image)
    model = load_model(args)
    from gvu.api import score

    extra = {"instruction": args.instruction} if args.instruction else {}
    result = score(model, image_3_H_W[None], [args.prompt], via=args.via, **extra)
    reward, tokens, logp = float(result.reward[0]), result.tokens[0], [float(v) for v in result.logp[0]]
    if args.json:
        rows = [{"token": t, "logp": v, "p": math.exp(v)} for t, v in zip(tokens, logp, strict=True)]
        print_json({"image": str(args.image), "prompt": args.prompt, "reward": reward, "tokens": rows})
    else:
        show(reward, tokens, logp)
    return 0


def show(reward: float, tokens: list[str], logp: list[float]) -> None:
    """The prompt with each token on the colour of its probability, then one line per token, then the reward."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    chances = [math.exp(v) for v in logp]
    console.print(Text("").join(shade(t, p) for t, p in zip(tokens, chances, strict=True)))
    width = max((len(t.strip()) for t in tokens), default=0)
    for token, value, chance in zip(tokens, logp, chances, strict=True):
        console.print(Text(f"{token.strip():<{width}}  {chance:.4f}  {value:8.3f} nat"))
    console.print(Text(f"reward {reward:.4f}", style="bold"))


def shade(token: str, chance: float) -> "Text":
    """A token on a background from red (improbable) over yellow to green (certain)."""
    from rich.text import Text

    red, green = round(220 * min(1.0, 2 - 2 * chance)), round(180 * min(1.0, 2 * chance))
    return Text(token, style=f"black on rgb({red},{green},70)")
