"""Speed on one model in one run, each baseline interleaved with ours on the same work.

    python benchmarks/speed.py                              # all parts, the embedded model
    python benchmarks/speed.py --parts reward rollout       # only these
    python benchmarks/speed.py --model tiny --rounds 2      # a quick look that everything runs

reward    one teacher-forced pass over all images, against one full forward per prompt token and image (the authors'
          way); in fp32 the two must agree to 1e-4 nat.
rollout   our decode loop against transformers' `generate()` on the same network with its KV cache, and (on few samples)
          without a cache; a LoRA adapter is on, as in training; under greedy decoding the codes must be the same.
phases    seconds per phase of real training steps, reading tokens and reading pixels.
growth    seconds of a step over images per prompt, image tokens, prompt tokens.
"""

# ruff: noqa: T201

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from timing import interleave, machine, once, table, write_json
from torch import Tensor

import gvu
from gvu.config import OptimConfig, RewardConfig, RolloutConfig, TrainConfig
from gvu.models.base import LoraSpec, Reading, Rollout
from gvu.models.xomni.adapter import XOmni
from gvu.probes import probe_prompts
from gvu.prompts import load_prompts
from gvu.reward import Scorer
from gvu.runtime import Precision, in_bf16, keep_memory
from gvu.sampling import Sampling, derive_seed, entropy
from gvu.trainer import Trainer

INSTRUCTION = RewardConfig().instruction
GROUPS = (2, 4, 8, 16)
GRIDS = ((4, 4), (6, 6), (8, 8), (12, 12))
LENGTHS = (8, 16, 32, 64, 128)
Results = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all parts work on.

    Attributes:
        model: with a LoRA adapter on that is not the identity.
        texts: the P prompts.
        group: images per prompt G.
        rounds: how often everything is timed.
        bf16: whether matrix products run in bf16, as in training.
    """

    model: XOmni
    texts: tuple[str, ...]
    group: int
    rounds: int
    bf16: bool

    @property
    def grid(self) -> tuple[int, int]:
        """The model's own token grid."""
        return self.model.capabilities.grids[0]

    def autocast(self) -> AbstractContextManager[Any]:
        """As the trainer's."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    def draw(self, sampling: Sampling, texts: Sequence[str], n: int, grid: tuple[int, int] | None = None) -> Rollout:
        """`n` images of each text."""
        seeds = [derive_seed(5, p, k) for p in range(len(texts)) for k in range(n)]
        return self.model.rollout(self.model.encode_prompts(texts, grid or self.grid), n, sampling, seeds)


def load(name: str) -> XOmni:
    """The model with an adapter that does something, as in the middle of a training."""
    model = XOmni.tiny(0) if name == "tiny" else gvu.load(name)
    assert isinstance(model, XOmni)
    model.add_lora(LoraSpec(), seed=0)
    generator = torch.Generator().manual_seed(0)
    for p in model.trainable().values():
        p.data += 0.01 * torch.randn(p.shape, generator=generator).to(p)
    return model


# --- reward ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_by_token(model: XOmni, reading: Reading, texts: Sequence[str], keep: int) -> list[Tensor]:
    """Log-probs (T,) per image by one forward per prompt token and image; `keep` as transformers' `logits_to_keep`."""
    before, after = model._turn(reading.grid, INSTRUCTION)
    rows = list[Tensor]()
    for codes, text in zip(reading.content_S.tolist(), texts, strict=True):
        head = before + [c + model.config.vocab_size for c in codes] + after
        answer, logps = list(model.tokenizer(text, add_special_tokens=False)["input_ids"]), list[Tensor]()
        for j, token in enumerate(answer):
            ids = torch.tensor([head + answer[:j]], device=model.device)
            logits = model.language(ids, logits_to_keep=keep).logits[0, -1, : model.config.vocab_size]
            logps.append(torch.log_softmax(logits.float(), -1)[token])
        rows.append(torch.stack(logps))
    return rows


def largest_gap(model: XOmni, reading: Reading, texts: Sequence[str]) -> float:
    """Largest difference in nats between our pass and the loop, over all tokens."""
    fast = Scorer(model, RewardConfig()).text(reading, texts)
    slow = token_by_token(model, reading, texts, 1)
    return max(float((fast.logp_S_T[s, : len(row)] - row).abs().max()) for s, row in enumerate(slow))


def reward(bench: Bench) -> Results:
    """Our pass against the loops: in fp32 (values compared), in bf16 if asked for, and on a few longer prompts."""
    longer = [long_text(bench.model, 64)] * 2
    exact = replace(bench, bf16=False)
    half = {"bf16": reward_case(bench, bench.texts, bench.group)} if bench.bf16 else {}
    return {
        "fp32": reward_case(exact, bench.texts, bench.group),
        **half,
        "fp32, long prompts": reward_case(exact, longer, 4),
    }


@torch.no_grad()
def reward_case(bench: Bench, texts: Sequence[str], n: int) -> Results:
    """One row of `reward`, read by the frozen teacher."""
    rollout = bench.draw(Sampling(), texts, n)
    reading, all_texts = bench.model.read_tokens(rollout), rollout.prompts.texts
    scorer = Scorer(bench.model, RewardConfig())
    with bench.model.teacher("frozen"), bench.autocast():
        gap = largest_gap(bench.model, reading, all_texts)
        times = interleave({
            "one pass (ours)": partial(scorer.text, reading, all_texts),
            "loop as released": partial(token_by_token, bench.model, reading, all_texts, 0),
            "loop, last logits only": partial(token_by_token, bench.model, reading, all_texts, 1),
        }, min(bench.rounds, 3))  # fmt: skip
    ours, tokens = times["one pass (ours)"], sum(len(bench.model.text_tokens(t)) for t in texts) / len(texts)
    rows = [[name, t.median, t.best, len(all_texts) / t.median, ours.ratio(t)] for name, t in times.items()]
    title = f"reward of {len(all_texts)} images, {tokens:.0f} prompt tokens each, {precision(bench)}"
    print(table(title, ["", "median s", "best s", "images/s", "x ours"], rows))
    print(f"max |difference|: {gap:.2e} nat over all tokens\n")
    assert bench.bf16 or gap < 1e-4, "our pass and the loop disagree"
    return {"images": len(all_texts), "tokens": tokens, "gap": gap, **summary(times, ours)}


# --- rollout ---------------------------------------------------------------------------------------------------------


def generate(bench: Bench, texts: Sequence[str], n: int, **options: Any) -> Tensor:
    """Codes (S, A) by transformers' `generate()`, with the options that make it fastest.

    Only image codes can be drawn (`vocabulary`), so no end token can come and no minimum length need be watched.
    """
    return generated(bench, texts, n, **options)[0]


def generated(bench: Bench, texts: Sequence[str], n: int, **options: Any) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Codes (S, A), and the scores (S, vocabulary) of each step where `output_scores` is asked for."""
    model, prompts = bench.model, bench.model.encode_prompts(texts, bench.grid).expand(n)
    count, law = bench.grid[0] * bench.grid[1], {"do_sample": True, "top_k": 0, "use_cache": True}
    out = model.language.generate(
        prompts.ids_P_L,
        attention_mask=prompts.mask_P_L,
        vocabulary="image",
        max_new_tokens=count,
        pad_token_id=model.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        **{**law, **options},
    )
    codes = out.sequences[:, prompts.ids_P_L.shape[1] :] - model.config.vocab_size
    assert codes.shape == (len(texts) * n, count)
    return codes, out.scores


def generate_with_logp(bench: Bench, texts: Sequence[str], n: int) -> tuple[Tensor, Tensor, Tensor]:
    """What our rollout returns, by `generate()`: codes, their log-probs and the entropies, each (S, A)."""
    codes, scores = generated(bench, texts, n, output_scores=True)
    assert scores is not None
    config = bench.model.config
    image = slice(config.vocab_size, config.vocab_size + config.image_vocab_size)
    logp = torch.stack([torch.log_softmax(step[:, image].float(), -1) for step in scores], 1)
    return codes, logp.gather(-1, codes.unsqueeze(-1)).squeeze(-1), entropy(logp)


def within(bench: Bench, task: Callable[[], object], *, merged: bool) -> None:
    """Run a task as the trainer does: autocast outside, the adapter folded in if asked for."""
    with bench.autocast():
        if merged:
            with bench.model.merged():
                task()
        else:
            task()


def peft_merged(bench: Bench, task: Callable[[], object]) -> None:
    """Run a task with the adapter folded in by PEFT's own `merge_adapter`, and taken out again after it."""
    language: Any = bench.model.language
    language.merge_adapter()
    try:
        with bench.autocast():
            task()
    finally:
        language.unmerge_adapter()


@torch.no_grad()
def same_codes(bench: Bench) -> float:
    """Share of greedy codes that both ways agree on, in fp32."""
    ours = bench.draw(Sampling(temperature=0.0), bench.texts, 1).codes_S_A
    return float((ours == generate(bench, bench.texts, 1, do_sample=False, top_k=None)).float().mean())


@torch.no_grad()
def rollout(bench: Bench) -> Results:
    """Our loop against `generate()`, with the adapter's matrices beside the weights, and folded into them.

    Our steps always run on folded weights: under "adapter on" the engine folds them itself, the prefill does not.

    Same work means codes, log-probs and entropies: the row "+ log-probs". The other rows of `generate()` return codes
    alone; the last one borrows our `model.merged()`.
    """
    agree = same_codes(bench)
    ours = partial(bench.draw, Sampling(), bench.texts, bench.group)
    theirs = partial(generate, bench, bench.texts, bench.group)
    whole = partial(generate_with_logp, bench, bench.texts, bench.group)
    times = interleave({
        "ours, merged": partial(within, bench, ours, merged=True),
        "ours, adapter on": partial(within, bench, ours, merged=False),
        "generate(), adapter on": partial(within, bench, theirs, merged=False),
        "generate(), PEFT's merge": partial(peft_merged, bench, theirs),
        "generate() + log-probs, PEFT's merge": partial(peft_merged, bench, whole),
        "generate(), our merge": partial(within, bench, theirs, merged=True),
    }, bench.rounds)  # fmt: skip
    samples = len(bench.texts) * bench.group
    first = times["ours, merged"]
    rows = [[n, t.median, t.best, samples / t.median, first.ratio(t)] for n, t in times.items()]
    title = f"rollout of {samples} images of {bench.grid[0]}x{bench.grid[1]} tokens, {precision(bench)}"
    print(table(title, ["", "median s", "best s", "images/s", "x ours"], rows))
    like = times["ours, adapter on"].ratio(times["generate(), adapter on"])
    print(f"adapter on, both: generate() takes {like:.3g} times ours; same greedy codes in fp32: {agree:.1%}\n")
    assert agree > 0.99, "the two do not draw from the same law"
    return {"samples": samples, "agree": agree, "ratio with adapter on": like, **summary(times, first),
            "no cache": without_cache(bench)}  # fmt: skip


def without_cache(bench: Bench) -> Results:
    """The same on two images only, against generation that recomputes the whole sequence for every token."""
    texts = bench.texts[:2]
    tasks = {
        "ours, merged": partial(within, bench, partial(bench.draw, Sampling(), texts, 1), merged=True),
        "generate(), no cache": partial(
            within, bench, partial(generate, bench, texts, 1, use_cache=False), merged=False
        ),
    }
    times = interleave(tasks, min(bench.rounds, 3))
    first = times["ours, merged"]
    rows = [[n, t.median, t.best, first.ratio(t)] for n, t in times.items()]
    print(table(f"rollout of {len(texts)} images without KV cache", ["", "median s", "best s", "x ours"], rows))
    return {"samples": len(texts), **summary(times, first)}


# --- phases and growth -----------------------------------------------------------------------------------------------


def trainer(bench: Bench, via: Any) -> Trainer:
    """A trainer of the default method at this size; its batches are the mini world's training prompts."""
    size = RolloutConfig(prompts_per_step=len(bench.texts), num_generations=bench.group)
    reward_config = replace(RewardConfig(), via=via, decoder_steps=bench.model.parts.decoder_steps)
    config = TrainConfig(rollout=size, reward=reward_config, optim=OptimConfig(lr=0.0), precision=precision(bench))
    return Trainer(bench.model, load_prompts("mini-train", 200), config)


def phases(bench: Bench) -> Results:
    """Seconds per phase of whole steps (learning rate 0, so that the model stays what it is), both ways of reading."""
    trainers = {via: trainer(bench, via) for via in ("tokens", "pixels")}
    metrics: dict[str, list[dict[str, float]]] = {via: [] for via in trainers}
    for index in range(bench.rounds + 1):
        for via, one in trainers.items():
            metrics[via].append(one.step(index))
    keys = [k for k in metrics["pixels"][0] if k.startswith("seconds")]
    found = {via: {k: median(m[k] for m in ms[1:]) for k in keys} for via, ms in metrics.items()}
    rows = [[via, *found[via].values()] for via in found]
    title = f"median seconds per phase, {len(bench.texts)} prompts x {bench.group} images, {precision(bench)}"
    print(table(title, ["reads", *(k.replace("seconds/", "") for k in keys)], rows))
    return found


def one_step(bench: Bench, texts: Sequence[str], n: int, grid: tuple[int, int]) -> None:
    """A step's work without the optimizer: draw, read, reference, gradient; reads tokens, one micro-batch."""
    model = bench.model
    with torch.no_grad(), bench.autocast():
        with model.merged():
            drawn = bench.draw(Sampling(), texts, n, grid)
        with model.teacher("frozen"):
            Scorer(model, RewardConfig(micro_batch=len(drawn)))(model.read_tokens(drawn), drawn.prompts.texts)
            model.policy_logp(drawn)
    with bench.autocast():
        logp, _ = model.policy_logp(drawn)
    logp.mean().backward()
    for p in model.trainable().values():
        p.grad = None


def long_text(model: XOmni, length: int) -> str:
    """A prompt of about `length` tokens (never fewer)."""
    text = "a photo of a red car"
    while len(model.text_tokens(text)) < length:
        text += " and a blue bus"
    return text


def fits(bench: Bench, text: str, grid: tuple[int, int]) -> bool:
    """Whether prompt and image fit the context, to be drawn and to be read."""
    before, after = bench.model._turn(grid, INSTRUCTION)
    longest = len(before) + len(after) + grid[0] * grid[1] + len(bench.model.text_tokens(text))
    return longest <= bench.model.config.max_position_embeddings


def growth(bench: Bench) -> Results:
    """Seconds of a step over G, image tokens A and prompt tokens L; the rest stays as it is."""
    texts, n, found = bench.texts[: max(2, len(bench.texts) // 2)], max(2, bench.group // 2), Results()
    words = {len(bench.model.text_tokens(t)): t for t in (long_text(bench.model, length) for length in LENGTHS)}
    images, same = f"({len(texts) * n} images)", len(texts)
    sweeps: dict[str, dict[str, tuple[Sequence[str], int, tuple[int, int]]]] = {
        f"images per prompt G ({len(texts)} prompts)": {str(g): (texts, g, bench.grid) for g in GROUPS},
        f"image tokens A {images}": {f"{r * c} = {r}x{c}": (texts, n, (r, c)) for r, c in GRIDS},
        f"prompt tokens L {images}": {str(k): ([t] * same, n, bench.grid) for k, t in words.items()},
    }
    for title, sizes in sweeps.items():
        possible = {k: v for k, v in sizes.items() if all(fits(bench, t, v[2]) for t in v[0])}
        times = interleave({k: partial(one_step, bench, *v) for k, v in possible.items()}, min(bench.rounds, 3))
        least = next(iter(times.values()))
        rows = [[k, times[k].median, least.ratio(times[k])] if k in times else [k, None, None] for k in sizes]
        print(table(f"seconds of a step over {title}", ["", "median s", "x first"], rows))
        found[title] = {k: t.as_dict() for k, t in times.items()}
    return found


def precision(bench: Bench) -> Any:
    """The name of the precision."""
    return "bf16" if bench.bf16 else "fp32"


def summary(times: Any, ours: Any) -> Results:
    """Seconds, and how many times ours each takes."""
    seconds = {n: t.as_dict() for n, t in times.items()}
    return {"seconds": seconds, "ratio": {n: ours.ratio(t) for n, t in times.items()}}


Part = Callable[[Bench], Results]
PARTS: dict[str, Part] = {"reward": reward, "rollout": rollout, "phases": phases, "growth": growth}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="mini", help="tiny, an embedded model or a checkpoint folder (mini)")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (all)")
    options.add_argument("--prompts", type=int, default=8, help="prompts P (8)")
    options.add_argument("--group", type=int, default=8, help="images per prompt G (8)")
    options.add_argument("--rounds", type=int, default=5, help="how often each is timed (5)")
    options.add_argument(
        "--precision", choices=get_args(Precision), default="auto", help="of matrix products, as in training (auto)"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parser().parse_args(argv)
    keep_memory()
    texts = tuple(m["prompt"] for m in probe_prompts(args.prompts))
    model = load(args.model)
    bf16 = in_bf16(args.precision, model.device)
    bench = Bench(model=model, texts=texts, group=args.group, rounds=args.rounds, bf16=bf16)
    results: Results = {"machine": machine(model=args.model, precision=args.precision)}
    print(results["machine"], "\n")
    for part in args.parts:
        found: Results = {}
        spent = once(lambda part=part, found=found: found.update(PARTS[part](bench)))
        results[part] = {**found, "seconds spent": spent}
    write_json(args.json, results)


if __name__ == "__main__":
    main()
