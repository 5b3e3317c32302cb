"""The one interface behind which every unified multimodal model stands.

Shape suffixes: P prompts, S samples (S = P * G, sample s belongs to prompt s // G), A actions (image tokens),
L prompt tokens of the generation prompt, T tokens of the scored text, V codebook entries.
The method (rollout, score, update) only ever talks to `UnifiedModel`; it never asks which model it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gvu.errors import GvuError, brief
from gvu.sampling import Sampling, derive_seed

Rows = slice | Tensor
"""A slice of rows, or their places as an integer tensor."""
Via = Literal["tokens", "pixels"]
Teacher = Literal["frozen", "current", "ema"]
T = TypeVar("T")


def _take(values: tuple[T, ...], index: Rows) -> tuple[T, ...]:
    return values[index] if isinstance(index, slice) else tuple(values[i] for i in index.tolist())


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a model can do; the method picks its path by these and by nothing else.

    Attributes:
        policy: how images are drawn: token by token (`ar`), by unmasking, or by a flow.
        reads: what the understanding branch can be given.
        shared_parameters: whether both branches run through the parameters that LoRA trains.
        cfg: form of classifier-free guidance, "none" where there is none.
        codebook: number of image codes V, 0 where actions are not discrete.
        grids: token grids (rows, columns) that the model was trained on; the first is the default.
    """

    policy: Literal["ar", "masked", "flow"]
    reads: frozenset[Via]
    shared_parameters: bool
    cfg: Literal["none", "log_softmax", "logits"]
    codebook: int
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Left-padded generation prompts and their unconditional twins.

    Attributes:
        texts: the P prompts as given.
        grid: token rows and columns of the image to draw.
        ids_P_L, mask_P_L: token ids and attention mask (1 = real).
        uncond_ids_P_L, uncond_mask_P_L: what classifier-free guidance contrasts with.
    """

    texts: tuple[str, ...]
    grid: tuple[int, int]
    ids_P_L: Tensor
    mask_P_L: Tensor
    uncond_ids_P_L: Tensor
    uncond_mask_P_L: Tensor

    def expand(self, n: int) -> "Prompts":
        """Every prompt repeated `n` times, so that row s is sample s."""
        grown = {
            k: getattr(self, k).repeat_interleave(n, 0)
            for k in ("ids_P_L", "mask_P_L", "uncond_ids_P_L", "uncond_mask_P_L")
        }
        return replace(self, texts=tuple(t for t in self.texts for _ in range(n)), **grown)

    def rows(self, index: Rows) -> "Prompts":
        """The prompts of some rows."""
        part = {k: getattr(self, k)[index] for k in ("ids_P_L", "mask_P_L", "uncond_ids_P_L", "uncond_mask_P_L")}
        return replace(self, texts=_take(self.texts, index), **part)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What the policy drew.

    Attributes:
        prompts: one row per sample (already expanded, S rows).
        codes_S_A: image codes in [0, V).
        logp_S_A: log-prob in nats of each code under `sampling`, the law it was drawn from.
        entropy_S_A: entropy in nats of that law at each action.
        sampling: the law.
        seeds: one integer per sample; drawing and decoding noise are derived from it.
    """

    prompts: Prompts
    codes_S_A: Tensor
    logp_S_A: Tensor
    entropy_S_A: Tensor
    sampling: Sampling
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    def rows(self, index: Rows) -> "Rollout":
        """The samples of some rows."""
        return replace(
            self,
            prompts=self.prompts.rows(index),
            codes_S_A=self.codes_S_A[index],
            logp_S_A=self.logp_S_A[index],
            entropy_S_A=self.entropy_S_A[index],
            seeds=_take(self.seeds, index),
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Images as the understanding branch takes them; opaque to the method, cacheable.

    Attributes:
        content_S: model-specific tensor, one row per image (X-Omni: image codes; Janus: pixels).
        grid: token rows and columns.
    """

    content_S: Tensor
    grid: tuple[int, int]

    def __len__(self) -> int:
        return len(self.content_S)

    def rows(self, index: Rows) -> "Reading":
        """The images of some rows."""
        return replace(self, content_S=self.content_S[index])


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """Probability of given texts, token by token.

    Attributes:
        logp_S_T: log-prob in nats of each text token given the image and the tokens before it, 0 where masked.
        mask_S_T: True at real tokens (right-padded).
        ids_S_T: the text's token ids.
    """

    logp_S_T: Tensor
    mask_S_T: Tensor
    ids_S_T: Tensor


@dataclass(frozen=True, kw_only=True)
class Images:
    """Drawn images.

    Attributes:
        pixels: (P * n, 3, H, W) in [0, 1]; image s belongs to prompt s // n.
        prompts: one text per image.
        rollout: codes, log-probs and seeds.
    """

    pixels: Tensor
    prompts: tuple[str, ...]
    rollout: Rollout


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank adapters on the shared language model (paper: r 8, alpha 32).

    Attributes:
        r: rank.
        alpha: scale numerator; the update is scaled by alpha / r.
        dropout: on the adapter's input; anything but 0 makes replayed log-probs differ from the rollout's.
        scope: which linear layers: `all` of the decoder layers', or only `attention`, or only `mlp`.
    """

    r: int = 8
    alpha: int = 32
    dropout: float = 0.0
    scope: Literal["all", "attention", "mlp"] = "all"


class UnifiedModel(ABC):
    """A model that both draws and reads images. Subclasses add the network; LoRA and teachers are the same for all."""

    capabilities: Capabilities
    device: torch.device
    language: nn.Module

    def __init__(self) -> None:
        self._ema: dict[str, Tensor] = {}  # the EMA teacher's weights, by parameter name

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """Load a checkpoint folder in the released layout."""

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int = 0) -> Self:
        """A random CPU model of the same classes, made in seconds, for tests."""

    def save_pretrained(self, path: str | Path) -> None:
        """Write a checkpoint folder that `from_pretrained` loads; GvuError while an adapter is on (merge it first)."""
        raise NotImplementedError

    @abstractmethod
    def encode_prompts(self, texts: Sequence[str], grid: tuple[int, int] | None = None) -> Prompts:
        """Left-padded generation prompts for images of `grid` tokens (default: the first of `capabilities.grids`)."""

    @abstractmethod
    def rollout(self, prompts: Prompts, n: int, sampling: Sampling, seeds: Sequence[int]) -> Rollout:
        """Draw `n` images for each prompt in one batch, without gradients; `seeds` has P * n entries."""

    @abstractmethod
    def policy_logp(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(logp_S_A, entropy_S_A) of the rollout's codes under its law and the current parameters, with gradients."""

    @abstractmethod
    def decode(self, rollout: Rollout, *, steps: int | None = None, cfg: float | None = None) -> Tensor:
        """Pixels (S, 3, H, W) in [0, 1], decoding noise seeded per sample."""

    @abstractmethod
    def read_pixels(self, pixels_S_3_H_W: Tensor) -> Reading:
        """Images in [0, 1] as the understanding branch takes them."""

    @abstractmethod
    def read_tokens(self, rollout: Rollout) -> Reading:
        """The rollout's own tokens as a reading, with no decoder between."""

    @abstractmethod
    def text_logp(self, reading: Reading, texts: Sequence[str], instruction: str) -> TextScore:
        """Log-probs of `texts` as the assistant's answer to `instruction` about each image: one teacher-forced pass."""

    @abstractmethod
    def answer(self, reading: Reading, question: str, *, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers of the understanding branch to a question about each image."""

    @abstractmethod
    def text_tokens(self, text: str) -> list[str]:
        """The pieces that `text_logp` scores, as readable strings."""

    @abstractmethod
    def lora_targets(self, scope: str) -> str:
        """Regular expression of the module names that LoRA adapts."""

    def generate(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        sampling: Sampling | None = None,
        steps: int | None = None,
    ) -> Images:
        """Draw `n` images for each prompt; the same seed gives the same image of a prompt at a place, whatever
        follows it."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or n < 1:
            raise GvuError(f"{len(texts)} prompts x {n} images: give at least one of each")
        seeds = [derive_seed(seed, p, k) for p in range(len(texts)) for k in range(n)]
        rollout = self.rollout(self.encode_prompts(texts), n, sampling or Sampling(), seeds)
        return Images(pixels=self.decode(rollout, steps=steps), prompts=rollout.prompts.texts, rollout=rollout)

    def read(self, rollout: Rollout, via: Via, *, steps: int | None = None) -> Reading:
        """The rollout as the understanding branch sees it: its own tokens, or pixels decoded and encoded again."""
        if via not in self.capabilities.reads:
            raise GvuError(f"this model cannot read via {via!r}; it reads via {sorted(self.capabilities.reads)}")
        return self.read_tokens(rollout) if via == "tokens" else self.read_pixels(self.decode(rollout, steps=steps))

    def add_lora(self, spec: LoraSpec, seed: int = 0) -> None:
        """Wrap the language model in a fresh PEFT LoRA adapter and freeze everything else."""
        self._refuse_second()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(
                r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=self.lora_targets(spec.scope)
            )
            self.language = get_peft_model(self.language, config).eval()  # type: ignore[arg-type]

    def load_adapter(self, path: str | Path, *, trainable: bool = False) -> None:
        """Put a saved PEFT adapter on the language model."""
        self._refuse_second()
        if not all((Path(path) / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
            raise GvuError(
                f"no adapter in {str(path)!r}: expected adapter_config.json and adapter_model.safetensors there"
            )
        try:
            wrapped = PeftModel.from_pretrained(self.language, str(path), is_trainable=trainable)  # type: ignore[arg-type]
            if set(load_file(Path(path) / "adapter_model.safetensors")) != set(get_peft_model_state_dict(wrapped)):
                raise ValueError("its tensors belong to other modules")  # PEFT itself only warns
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise GvuError(
                f"the adapter {str(path)!r} does not load on this model ({brief(error)}); "
                "give an adapter that was trained on it, and copy it whole"
            ) from error
        self.language = wrapped.eval()

    def save_adapter(self, path: str | Path) -> None:
        """Save the adapter in PEFT's own format (safetensors)."""
        self._peft().save_pretrained(str(path), safe_serialization=True)

    def merge(self) -> None:
        """Fold the adapter into the language model's weights."""
        self.language = self._peft().merge_and_unload()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name."""
        return {n: p for n, p in self.language.named_parameters() if p.requires_grad}

    def _refuse_second(self) -> None:
        if isinstance(self.language, PeftModel):
            raise GvuError("this model already has an adapter; merge() it, or load the model again")

    def _peft(self) -> PeftModel:
        if not isinstance(self.language, PeftModel):
            raise GvuError("this model has no adapter; call add_lora() or load_adapter() first")
        return self.language

    @contextmanager
    def teacher(self, mode: Teacher) -> Generator[None]:
        """Inside, the parameters are the teacher's: adapter off (`frozen`), as they are (`current`), or averaged
        (`ema`)."""
        has_adapter = isinstance(self.language, PeftModel)
        inner = {"frozen": self._frozen, "current": nullcontext, "ema": self._averaged}[mode]
        with inner() if has_adapter else nullcontext():
            yield

    @contextmanager
    def _frozen(self) -> Generator[None]:
        own = set(self.trainable())
        try:
            with self._peft().disable_adapter():
                yield
        finally:  # PEFT makes every adapter trainable when it puts it back on
            for n, p in self.language.named_parameters():
                p.requires_grad_(n in own)

    @contextmanager
    def merged(self) -> Generator[None]:
        """Inside, the adapter is folded into the weights (in the autocast dtype) and costs nothing; outside they are
        as before.

        For rollouts. The original tensors are put back, not subtracted from, so nothing drifts.
        """
        kept: list[tuple[nn.Linear, Tensor]] = []
        with self._frozen() if isinstance(self.language, PeftModel) else nullcontext():
            try:
                kept.extend(self._fold())
                yield
            finally:
                for layer, weight in kept:
                    layer.weight.data = weight

    @torch.no_grad()
    def _fold(self) -> Iterator[tuple[nn.Linear, Tensor]]:
        kind = self.device.type
        for module in self.language.modules():
            if isinstance(module, LoraLayer):
                lora: Any = module
                layer = lora.get_base_layer()
                yield layer, layer.weight.data
                whole = layer.weight.data + sum(lora.get_delta_weight(name) for name in lora.active_adapters)
                layer.weight.data = (
                    whole.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else whole
                )

    @contextmanager
    def _averaged(self) -> Generator[None]:
        if not self._ema:
            raise GvuError("the EMA teacher has no weights yet; call update_ema() after add_lora()")
        own = self.trainable()
        kept = {n: p.data for n, p in own.items()}
        for n, p in own.items():
            p.data = self._ema[n]
        try:
            yield
        finally:
            for n, p in own.items():
                p.data = kept[n]

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the EMA teacher towards the current adapter: ema = decay * ema + (1 - decay) * current."""
        for n, p in self.trainable().items():
            if n in self._ema:
                self._ema[n].lerp_(p.data, 1.0 - decay)
            else:
                self._ema[n] = p.data.clone()
