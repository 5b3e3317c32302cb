"""The law of image codes against brute force and against transformers' warpers; drawing from it; seeds."""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gvu.errors import GvuError
from gvu.sampling import Sampling, derive_seed, draw, entropy, guide, log_law, support, uniforms

CODES = 40


def logits(rows: int = 200, scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, CODES, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def warped(scores: Tensor, *warpers) -> Tensor:
    for warper in warpers:
        scores = warper(None, scores)
    return scores


def brute_law(row: list[float], s: Sampling) -> list[float]:
    """Probabilities of one row, in plain Python, by the definitions in `Sampling`."""
    weight = [math.exp(x / s.temperature) for x in row]
    p = [w / sum(weight) for w in weight]
    order = sorted(range(len(p)), key=lambda v: -p[v])
    kept = order[: s.top_k] if s.top_k else order
    mass, smallest = 0.0, list[int]()
    for v in kept:
        if mass >= s.top_p * sum(p[w] for w in kept):
            break
        smallest.append(v)
        mass += p[v]
    inside = {v for v in smallest if p[v] >= s.min_p * max(p)}
    total = sum(p[v] for v in inside)
    return [p[v] / total if v in inside else 0.0 for v in range(len(p))]


LAWS = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((0.7, 1.0, 1.6), (0, 1, 7), (0.6, 1.0), (0.0, 0.05))
]


@pytest.mark.parametrize("sampling", LAWS, ids=lambda s: s.law)
def test_law_is_the_definition(sampling: Sampling) -> None:
    x = logits(20)
    want = torch.tensor([brute_law(row, sampling) for row in x.tolist()])
    close(log_law(x, sampling).exp(), want, 1e-5)


@pytest.mark.parametrize("k", [1, 5, 39, 40, 400])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    kept = warped(logits(), TopKLogitsWarper(k)) > -math.inf
    assert torch.equal(support(logits().log_softmax(-1), Sampling(top_k=k)), kept)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 0.95, 0.999])
def test_top_p_keeps_what_transformers_keeps(p: float) -> None:
    kept = warped(logits(), TopPLogitsWarper(p)) > -math.inf
    assert torch.equal(support(logits().log_softmax(-1), Sampling(top_p=p)), kept)


@pytest.mark.parametrize("m", [0.01, 0.03, 0.2, 0.9])
def test_min_p_keeps_what_transformers_keeps(m: float) -> None:
    kept = warped(logits(), MinPLogitsWarper(m)) > -math.inf
    assert torch.equal(support(logits().log_softmax(-1), Sampling(min_p=m)), kept)


def test_all_together_are_transformers_law() -> None:
    x = logits()
    scores = warped(x / 0.8, TopKLogitsWarper(12), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05))
    law = log_law(x, Sampling(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05))
    assert torch.equal(law > -math.inf, scores > -math.inf)
    close(law.exp(), scores.softmax(-1))


def test_replayed_codes_stay_in_the_support() -> None:
    x, rarest = logits(), logits().argmin(-1)
    law = log_law(x, Sampling(top_k=3), keep=rarest)
    assert bool((law > -math.inf).sum(-1).eq(4).all())
    assert bool(law.gather(1, rarest[:, None]).isfinite().all())
    close(law.exp().sum(-1), torch.ones(len(x)))
    inside = x.argmax(-1)
    close(log_law(x, Sampling(top_k=3), keep=inside), log_law(x, Sampling(top_k=3)))


def test_truncation_passes_gradients_inside_only() -> None:
    x = logits(1).requires_grad_()
    law = log_law(x, Sampling(top_k=4))
    law[0, x.argmax()].backward()
    inside = support(x.detach().log_softmax(-1), Sampling(top_k=4))
    assert x.grad is not None
    assert bool((x.grad[inside].abs() > 1e-4).all())
    assert bool((x.grad[~inside].abs() < 1e-7).all())


def test_half_precision_logits_make_an_exact_law() -> None:
    x = logits().bfloat16()
    law = log_law(x, Sampling())
    assert law.dtype == torch.float32
    close(law, x.float().log_softmax(-1), 0)


def test_greedy_is_the_argmax() -> None:
    x = logits()
    law = log_law(x, Sampling(temperature=0.0))
    assert torch.equal(law.exp(), torch.nn.functional.one_hot(x.argmax(-1), CODES).float())
    assert torch.equal(draw(law, torch.rand(len(x))), x.argmax(-1))
    close(entropy(law), torch.zeros(len(x)))


def test_guidance_is_log_softmax_u_plus_s_c_minus_u() -> None:
    cond, uncond = logits(seed=1), logits(seed=2)
    c, u = cond.log_softmax(-1), uncond.log_softmax(-1)
    close(guide(cond, uncond, 3.0), u + 3 * (c - u), 1e-5)
    close(guide(cond, uncond, 1.0), c, 1e-5)
    close(guide(cond, uncond, 0.0), u, 1e-5)
    close(guide(cond + 5, uncond - 7, 3.0), guide(cond, uncond, 3.0), 1e-4)


def test_entropy_is_that_of_the_law() -> None:
    law = log_law(logits(), Sampling())
    close(entropy(law), torch.distributions.Categorical(logits=law).entropy(), 1e-5)
    close(entropy(torch.zeros(3, 8).log_softmax(-1)), torch.full((3,), math.log(8)))
    three = log_law(torch.zeros(1, 8) - torch.arange(8) * 1e-4, Sampling(top_k=3))
    close(entropy(three), torch.tensor([math.log(3)]), 1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.4, top_p=0.9), Sampling(top_k=6, min_p=0.02)])
def test_draws_follow_the_law(sampling: Sampling) -> None:
    law, n = log_law(logits(1, 1.0, seed=5), sampling), 40_000
    codes = draw(law.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(0)))
    p, count = law[0].exp(), codes.bincount(minlength=CODES)
    assert bool((count[p == 0] == 0).all())
    inside = p > 0
    chi2 = float(((count - n * p)[inside] ** 2 / (n * p[inside])).sum())
    freedom = int(inside.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_extreme_uniforms_stay_in_the_support() -> None:
    law = log_law(logits(500, 6.0), Sampling(top_p=0.7))
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    for value in (torch.tensor(0.0), below_one, torch.tensor(0.5)):
        codes = draw(law, value.expand(500))
        assert bool((law.gather(1, codes[:, None]) > -math.inf).all())
    first = torch.tensor([[-math.inf, -math.inf, 0.0, -math.inf]])
    assert [int(draw(first, u[None])) for u in (torch.tensor(0.0), below_one)] == [2, 2]


def test_a_draw_does_not_depend_on_its_batch() -> None:
    law, uniform = log_law(logits(), Sampling()), torch.rand(200, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([draw(law[s : s + 1], uniform[s : s + 1]) for s in range(200)])
    assert torch.equal(draw(law, uniform), alone)
    cdf = law.exp().cumsum(-1)
    want = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1)
    assert torch.equal(alone, want)


def test_uniforms_come_from_their_own_seeds() -> None:
    three = uniforms((5, 6, 7), 9, torch.device("cpu"))
    assert three.shape == (3, 9)
    assert 0 <= float(three.min()) <= float(three.max()) < 1
    assert torch.equal(three[1:2], uniforms([6], 9, torch.device("cpu")))
    assert not torch.equal(three[0], three[1])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    uniforms((derive_seed(1, 2),), 3, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())


def test_derived_seeds_are_splitmix64_and_stable() -> None:
    """splitmix64 from state 0 begins with 0xE220A8397B1DCDAF (reference implementation); we drop its last bit."""
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert (derive_seed(1, 2, 3), derive_seed(3, 2, 1), derive_seed()) == (7510213797696614745, 7716143592125757362, 0)


def test_derived_seeds_do_not_collide() -> None:
    parts = list(itertools.product(range(20), range(20), range(20)))
    seeds = {derive_seed(*p) for p in parts} | {derive_seed(a, b) for a, b, _ in parts}
    assert len(seeds) == 8000 + 400
    assert all(0 <= s < 2**63 for s in seeds)
    bits = [sum(s >> k & 1 for s in seeds) / len(seeds) for k in range(63)]
    assert max(abs(b - 0.5) for b in bits) < 0.03
    large = random.Random(0).getrandbits(200)
    assert derive_seed(large) == derive_seed(large % 2**64)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 1}, {"cfg": -1}]
)
def test_a_law_out_of_range_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(GvuError, match="out of range"):
        Sampling(**bad)  # type: ignore[arg-type]


def test_laws_have_names() -> None:
    assert Sampling().law == "cond"
    assert Sampling(cfg=3.0, temperature=0.9, min_p=0.03).law == "cfg(3.0),T=0.9,min_p=0.03"
    assert [Sampling(**k).truncated for k in ({}, {"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}, {"cfg": 2.0})] == [
        False, True, True, True, False,
    ]  # fmt: skip
