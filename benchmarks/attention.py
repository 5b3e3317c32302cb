"""gvu's attention for small models on CPUs against torch's fused kernel, forward and backward, at the mini's size.

`python benchmarks/attention.py`
"""

# ruff: noqa: T201

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import interleave, machine, table, write_json
from torch import Tensor

from gvu.models.attention import products
from gvu.runtime import keep_memory

SIZES = {"samples": 64, "heads": 4, "kv_heads": 2, "width": 48, "length": 93}
"""X-Omni-Mini's attention in a training step of 8 prompts x 8 images."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, key heads shared by it."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with repeated keys, as transformers calls it where it cannot share them."""
    times = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(times, 1) for t in (key, value))
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two batched products and a softmax."""
    return products(query, key, value, None, query.shape[-1] ** -0.5, causal=True)


CANDIDATES: dict[str, tuple[Attend, torch.dtype]] = {
    "gvu bf16": (ours, torch.bfloat16),
    "sdpa bf16": (fused, torch.bfloat16),
    "sdpa bf16, keys repeated": (repeated, torch.bfloat16),
    "sdpa fp32": (fused, torch.float32),
    "gvu fp32": (ours, torch.float32),
}


def inputs(args: argparse.Namespace, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value, the same numbers for every candidate."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(args.samples, heads, args.length, args.width) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def both_ways(attend: Attend, parts: list[Tensor]) -> None:
    """One forward and one backward pass."""
    for part in parts:
        part.grad = None
    attend(*parts).sum().backward()


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (SIZES | {"rounds": 15}).items():
        options.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"({default})")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return options


def main(argv: list[str] | None = None) -> None:
    """Time, compare, print."""
    args = parser().parse_args(argv)
    keep_memory()
    given = {name: inputs(args, dtype) for name, (_, dtype) in CANDIDATES.items()}
    exact = ours(*inputs(args, torch.float32)).detach()
    gaps = {n: float((attend(*given[n]).detach().float() - exact).abs().max()) for n, (attend, _) in CANDIDATES.items()}
    times = interleave({n: partial(both_ways, attend, given[n]) for n, (attend, _) in CANDIDATES.items()}, args.rounds)
    rows = [[n, t.median * 1e3, t.best * 1e3, times["gvu bf16"].ratio(t), gaps[n]] for n, t in times.items()]
    about = machine(sizes={name: getattr(args, name) for name in SIZES})
    head = ["candidate", "median ms", "best ms", "x gvu bf16", "max |gap|"]
    print(table("causal attention, forward + backward", head, rows))
    print(about)
    write_json(args.json, {"machine": about, "gap": gaps, "seconds": {n: t.as_dict() for n, t in times.items()}})


if __name__ == "__main__":
    main()
