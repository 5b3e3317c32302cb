"""Checks of LoRA, gradients and teachers."""

import torch
from torch import nn

from gvu.errors import GvuError
from gvu.models.base import LoraSpec, UnifiedModel
from gvu.testing.common import (
    FORBIDDEN,
    Tiny,
    adapted,
    differ,
    drawn,
    near,
    outputs,
    same,
    stir,
)


def _networks(model: UnifiedModel) -> list[nn.Module]:
    return [v for v in vars(model).values() if isinstance(v, nn.Module)]


def gradients_reach_lora_only(tiny: Tiny) -> None:
    """Drawing sends gradient to every LoRA parameter and to nothing else: no tokenizer, decoder, embedding or head."""
    model = adapted(tiny)
    rollout = drawn(model, 2)
    model.read_pixels(model.decode(rollout))  # networks that are loaded late are here now
    model.policy_logp(rollout)[0].sum().backward()
    trained = model.trainable()
    assert trained, "nothing is trained"
    assert all("lora_" in name and not FORBIDDEN.search(name) for name in trained)
    for name, p in trained.items():
        assert p.grad is not None, f"{name} gets no gradient"
        assert float(p.grad.abs().sum()) > 0, f"{name} gets no gradient"
        assert bool(p.grad.isfinite().all()), name
    for p in (p for module in _networks(model) for p in module.parameters()):
        assert any(p is t for t in trained.values()) or (p.grad is None and not p.requires_grad)


def lora_scopes_differ(tiny: Tiny) -> None:
    """`attention` and `mlp` are disjoint and together `all`; a fresh adapter is the identity; seeds make it."""
    names = dict[str, set[str]]()
    for scope in ("all", "attention", "mlp"):
        model = tiny(0)
        rollout = drawn(model)
        before = outputs(model, rollout)
        model.add_lora(LoraSpec(r=2, scope=scope, dropout=0.5), seed=3)
        same(outputs(model, rollout), before, 1e-6)
        names[scope] = set(model.trainable())
        assert not any(m.training for m in model.language.modules()), "dropout must be off outside the update"
    assert names["attention"]
    assert names["mlp"]
    assert not names["attention"] & names["mlp"]
    assert names["attention"] | names["mlp"] == names["all"]
    one, two = tiny(0), tiny(0)
    one.add_lora(LoraSpec(), seed=3)
    two.add_lora(LoraSpec(), seed=3)
    assert all(torch.equal(p, two.trainable()[n]) for n, p in one.trainable().items())


def batches_change_nothing(tiny: Tiny) -> None:
    """Replayed log-probs and their gradients are those of single rows, summed."""
    model = adapted(tiny)
    rollout, trained = drawn(model, 2), list(model.trainable().values())
    logp = model.policy_logp(rollout)[0]
    whole = torch.autograd.grad(logp.sum(), trained)
    total = [torch.zeros_like(p) for p in trained]
    for s in range(len(rollout)):
        row = model.policy_logp(rollout.rows(slice(s, s + 1)))[0]
        near(row[0], logp[s].detach(), 1e-5)
        for t, g in zip(total, torch.autograd.grad(row.sum(), trained), strict=True):
            t += g
    for t, w in zip(total, whole, strict=True):
        torch.testing.assert_close(t, w, atol=1e-4, rtol=1e-3)


def teachers_are_what_they_say(tiny: Tiny) -> None:
    """Inside `frozen` the model is the base, inside `current` itself; afterwards all is as before."""
    base, model = tiny(0), adapted(tiny)
    rollout = drawn(base)
    bare, own, trained = outputs(base, rollout), outputs(model, rollout), set(model.trainable())
    differ(own, bare)
    with model.teacher("frozen"):
        same(outputs(model, rollout), bare, 1e-6)
    with model.teacher("current"):
        same(outputs(model, rollout), own, 0)
    same(outputs(model, rollout), own, 0)
    assert set(model.trainable()) == trained
    with base.teacher("frozen"):  # without an adapter every teacher is the model
        same(outputs(base, rollout), bare, 0)


def ema_is_the_average(tiny: Tiny) -> None:
    """The EMA teacher's weights are decay * old + (1 - decay) * new, after every update."""
    model, decay = adapted(tiny), 0.75
    rollout = drawn(model)
    try:
        with model.teacher("ema"):
            raise AssertionError("an EMA teacher without weights was accepted")
    except GvuError:
        pass
    model.update_ema(decay)
    wanted = {n: p.detach().clone() for n, p in model.trainable().items()}
    for _ in range(2):
        stir(model)
        model.update_ema(decay)
        wanted = {n: decay * wanted[n] + (1 - decay) * p.detach() for n, p in model.trainable().items()}
    own = outputs(model, rollout)
    with model.teacher("ema"):
        for n, p in model.trainable().items():
            near(p.detach(), wanted[n], 1e-6)
        differ(outputs(model, rollout), own)
    same(outputs(model, rollout), own, 0)


def folding_in_is_temporary(tiny: Tiny) -> None:
    """Inside `merged` the weights alone do what the adapter does, within 1e-4 nat; afterwards nothing has moved."""
    model = adapted(tiny)
    rollout = drawn(model)
    own, before = outputs(model, rollout), {n: p.detach().clone() for n, p in model.language.named_parameters()}
    trained = set(model.trainable())
    with model.merged():
        same(outputs(model, rollout), own, 1e-4)
        near(drawn(model).logp_S_A, rollout.logp_S_A, 1e-4)
    same(outputs(model, rollout), own, 0)
    assert all(torch.equal(p, before[n]) for n, p in model.language.named_parameters())
    assert set(model.trainable()) == trained
