"""X-Omni's language model on transformers' Qwen2 layers, with the released checkpoints' state-dict keys.

One id space: 0 <= id < vocab_size are text ids; vocab_size + c is an *image id*, c < image_vocab_size the code, the
rest the multimodal special tokens (<SOM>, <EOM>, <IMAGE>, reserved). "Image position" below means a position that holds
any id >= vocab_size, specials included. The first `num_mm_adap_layers` and the last `num_mm_head_layers` layers change
image positions only; the final norm is `mm_norm` there and `lm_norm` at text positions. The image head scores codes.

Shape suffixes: S sequences, L positions of this call, K positions cached before plus L, C hidden width, V codebook,
W text vocabulary.

Sources: X-Omni (arXiv 2507.22058); transformers' Qwen2.
"""

from typing import Any, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    Qwen2Config,
    Qwen2PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from gvu.models import attention

Vocabulary = Literal["all", "text", "image"]
Masks = dict[str, Tensor | None]


@strict
class XOmniConfig(Qwen2Config):
    """Qwen2's configuration and the multimodal numbers. `vocab_size` counts text ids only."""

    model_type = "x-omni"

    num_mm_adap_layers: int = 4  # first layers, image positions only
    num_mm_head_layers: int = 4  # last layers, image positions only
    mm_vocab_size: int = 16448  # image codes and multimodal special tokens
    image_vocab_size: int = 16384  # image codes V
    mm_special_tokens: list[str] | tuple[str, ...] = ("<SOM>", "<EOM>", "<IMAGE>")
    vision_config: dict[str, Any] | None = None  # where the tokenizer and the decoder of this checkpoint lie

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_mm_adap_layers + self.num_mm_head_layers > self.num_hidden_layers:
            raise ValueError("num_mm_adap_layers + num_mm_head_layers is more than num_hidden_layers")
        if self.image_vocab_size > self.mm_vocab_size:
            raise ValueError("image_vocab_size is more than mm_vocab_size")


class BufferedLayer(DynamicLayer):
    """Cache of one layer that writes into buffers of fixed capacity instead of concatenating at every step."""

    def __init__(self, capacity: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.capacity, self.kept = capacity, dtype
        self.buffers: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (S, heads, L, channels) keys and values; ValueError beyond the capacity. Not differentiable."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states = key_states.to(value_states.dtype)  # under autocast the rotated keys come back as fp32
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, which: int, held: Tensor | None, new: Tensor) -> Tensor:
        """`held` and `new` as a view of the buffer; `held` is copied only if it is not one (first call, repeated)."""
        past = held.shape[-2] if held is not None and held.numel() else 0
        end, buffer = past + new.shape[-2], self.buffers[which]
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit a cache of {self.capacity}")
        if buffer is None or held is None or not past or held.data_ptr() != buffer.data_ptr():
            self.buffers[which] = buffer = new.new_empty(*new.shape[:2], self.capacity, new.shape[-1])
            if held is not None and past:
                buffer[:, :, :past] = held
        buffer[:, :, past:end] = new
        return buffer[:, :, :end]


def rollout_cache(config: Qwen2Config, capacity: int) -> DynamicCache:
    """A key-value cache for a rollout of at most `capacity` positions, prompt included; use under `torch.no_grad`.

    Under CPU autocast it holds what the matrix products take, so that keys are not cast again at every step.

    Expanding a prefilled cache to G samples per prompt works: `cache.batch_repeat_interleave(G)`.
    """
    cache = DynamicCache()
    cache.layers.extend(BufferedLayer(capacity) for _ in range(config.num_hidden_layers))
    return cache


class Hidden(NamedTuple):
    """Output of the trunk."""

    hidden: Tensor  # (S, L, C) after the final norm of each position's kind
    image_mask: Tensor  # (S, L) bool, true at image positions


class XOmniModel(Qwen2PreTrainedModel):
    """Embeddings, layers and final norms."""

    config: XOmniConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: XOmniConfig) -> None:
        super().__init__(config)
        self.lm_embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mm_embed_tokens = nn.Embedding(config.mm_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.lm_norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mm_norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config=config)
        self.layer_types = list(config.layer_types or [])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text table."""
        return self.lm_embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text table."""
        self.lm_embed_tokens = cast(nn.Embedding, value)

    def embed(self, input_ids_S_L: Tensor, *, image_only: bool = False) -> Tensor:
        """Ids (S, L) to embeddings (S, L, C), each from its own table; `image_only` promises image ids everywhere."""
        codes_S_L = input_ids_S_L - self.config.vocab_size
        if image_only:
            return self.mm_embed_tokens(codes_S_L)
        image_S_L = codes_S_L >= 0
        text_S_L_C = self.lm_embed_tokens(input_ids_S_L.masked_fill(image_S_L, 0))
        return torch.where(image_S_L.unsqueeze(-1), self.mm_embed_tokens(codes_S_L.clamp_min(0)), text_S_L_C)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_only: bool | None = None,
        text_only: bool = False,
    ) -> Hidden:
        """See `XOmniForCausalLM.hidden`."""
        image_S_L = _image_mask(input_ids, inputs_embeds, image_mask, self.config.vocab_size)
        if image_only is None:  # worth a look where it costs no synchronisation
            image_only = image_S_L.shape[1] == 1 and image_S_L.device.type == "cpu" and bool(image_S_L.all())
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, image_only=image_only)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if text_only and past_key_values is not None:
            raise ValueError("text_only leaves out layers, so it cannot fill a key-value cache")
        if position_ids is None:
            position_ids = positions(attention_mask, past, inputs_embeds)
        masks = self._masks(attention_mask, inputs_embeds, past_key_values, position_ids)
        hidden_S_L_C = self._layers(
            inputs_embeds,
            None if image_only else image_S_L.unsqueeze(-1),
            masks,
            position_ids,
            past_key_values,
            text_only,
        )
        return Hidden(hidden_S_L_C, image_S_L)

    def _layers(
        self,
        hidden_S_L_C: Tensor,
        where_S_L_1: Tensor | None,
        masks: Masks,
        position_ids: Tensor,
        cache: Cache | None,
        text_only: bool,
    ) -> Tensor:
        """All layers and the final norm; `where_S_L_1` None means every position is an image position."""
        config, rotary = self.config, self.rotary_emb(hidden_S_L_C, position_ids)
        first, last = config.num_mm_adap_layers, config.num_hidden_layers - config.num_mm_head_layers
        for i, layer in enumerate(self.layers[:last] if text_only else self.layers):
            out_S_L_C = layer(
                hidden_S_L_C,
                attention_mask=masks[self.layer_types[i]],
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=rotary,
            )
            if where_S_L_1 is not None and not first <= i < last:
                out_S_L_C = torch.where(where_S_L_1, out_S_L_C, hidden_S_L_C)
            hidden_S_L_C = out_S_L_C
        if where_S_L_1 is None:
            return self.mm_norm(hidden_S_L_C)
        return torch.where(where_S_L_1, self.mm_norm(hidden_S_L_C), self.lm_norm(hidden_S_L_C))

    def _masks(self, mask: Tensor | Masks | None, embeds: Tensor, cache: Cache | None, position_ids: Tensor) -> Masks:
        """One attention mask per layer type; a single-token step over a growing cache needs no causal mask at all."""
        kinds = set(self.layer_types)
        if isinstance(mask, dict):
            return mask
        if isinstance(mask, Tensor) and mask.ndim == 4:
            return dict.fromkeys(kinds, mask)
        step = embeds.shape[1] == 1 and kinds == {"full_attention"} and isinstance(cache, DynamicCache)
        if step and self.config._attn_implementation in ("sdpa", attention.NAME):  # pyright: ignore[reportPrivateUsage]
            return {"full_attention": _step_mask(mask)}
        # Positions go in only without a cache and a mask: there they may mark packed sequences.
        packed = position_ids if mask is None and cache is None else None
        return cast(Masks, create_masks_for_generate(self.config, embeds, mask, cache, position_ids=packed))


def _image_mask(ids: Tensor | None, embeds: Tensor | None, image_mask: Tensor | None, vocab_size: int) -> Tensor:
    """(S, L) bool mask of image positions, from the ids or as given beside embeddings."""
    if (ids is None) == (embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if ids is not None:
        return ids >= vocab_size
    if image_mask is None:
        raise ValueError("inputs_embeds needs image_mask, (S, L) bool: which positions hold image ids")
    return image_mask


def _step_mask(mask_S_K: Tensor | None) -> Tensor | None:
    """(S, 1, 1, K) bool mask of a one-token step; None where nothing is padded (looked at on the CPU only)."""
    if mask_S_K is None or (mask_S_K.device.type == "cpu" and bool(mask_S_K.all())):
        return None
    return mask_S_K.bool()[:, None, None, :]


def positions(attention_mask: Tensor | Masks | None, past: int, embeds_S_L_C: Tensor) -> Tensor:
    """(S, L) position ids that count real tokens only, so left padding does not shift a sequence; padding gets 0."""
    length, device = embeds_S_L_C.shape[1], embeds_S_L_C.device
    if attention_mask is None:
        return torch.arange(past, past + length, device=device).unsqueeze(0)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise ValueError("a prepared attention mask needs position_ids, (S, L)")
    if attention_mask.shape[1] != past + length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} positions, not the {past} cached and {length} new ones"
        )
    if length == 1:
        return (attention_mask.sum(-1, keepdim=True) - 1).clamp_min(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]


class XOmniForCausalLM(Qwen2PreTrainedModel, GenerationMixin):
    """The trunk, the text head and the image head."""

    config: XOmniConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = XOmniConfig
    _tied_weights_keys = {"lm_head.weight": "model.lm_embed_tokens.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^image_tokenizer\."]  # noqa: RUF012

    def __init__(self, config: XOmniConfig) -> None:
        super().__init__(config)
        self.model = XOmniModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mm_head = nn.Linear(config.hidden_size, config.mm_vocab_size, bias=False)
        self.post_init()

    @classmethod
    def untrained(cls, config: XOmniConfig) -> Self:
        """Random weights, with this package's attention."""
        return cls._from_config(config, attn_implementation=attention.NAME)

    def hidden(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_only: bool | None = None,
        text_only: bool = False,
    ) -> Hidden:
        """The trunk: ids (S, L) to hidden states (S, L, C) after the final norm, and the image mask (S, L).

        attention_mask   (S, K) over cached and new positions, 0 = padding; None = no padding. Left padding is exact:
                         unless `position_ids` (S, L) says otherwise, positions count the real tokens.
        past_key_values  cache that this call reads and extends in place.
        inputs_embeds    instead of ids; needs `image_mask`.
        image_only       promise that every position is an image position (a rollout step): skips the selections. None
                         looks for itself in one-token calls on the CPU.
        text_only        hidden states are wanted at text positions only: the last `num_mm_head_layers` layers, which do
                         not touch those, are left out. Image positions then hold no usable state. No cache.

        Raises ValueError for missing or contradictory inputs and for a mask of the wrong length.
        """
        return self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds=inputs_embeds,
            image_mask=image_mask,
            image_only=image_only,
            text_only=text_only,
        )

    def image_logits(self, hidden_C: Tensor) -> Tensor:
        """Hidden states (..., C) to logits over the image codes (..., V); slice the positions you need beforehand."""
        return self.mm_head(hidden_C)[..., : self.config.image_vocab_size]

    def text_logits(self, hidden_C: Tensor) -> Tensor:
        """Hidden states (..., C) to logits over the text ids (..., W)."""
        return self.lm_head(hidden_C)

    def logits(self, hidden_C: Tensor, vocabulary: Vocabulary = "all") -> Tensor:
        """Hidden states (..., C) to logits over all ids (..., W + mm_vocab_size); ids outside `vocabulary` get -inf.

        "text": text ids. "image": image codes. "all": both heads, multimodal special tokens included. The two heads are
        trained apart, so a softmax over "all" mixes two scales.
        """
        if vocabulary == "all":
            return torch.cat([self.lm_head(hidden_C), self.mm_head(hidden_C)], -1)
        size, text = self.config.vocab_size + self.config.mm_vocab_size, self.config.vocab_size
        if vocabulary == "text":
            return F.pad(self.text_logits(hidden_C), (0, size - text), value=float("-inf"))
        after = size - text - self.config.image_vocab_size
        return F.pad(self.image_logits(hidden_C), (text, after), value=float("-inf"))

    def loss(self, hidden_S_L_C: Tensor, labels_S_L: Tensor, *, items: Tensor | int | None = None) -> Tensor:
        """Next-token cross entropy in nats per label, each label under the law of its own kind.

        A text label is scored among the text ids, a code among the image codes, as sampling does; multimodal special
        tokens are never sampled and do not count, nor does -100. Labels are shifted here. Heads run on scored positions
        only. `items` replaces the number of labels as divisor (gradient accumulation).
        """
        labels_S_L, hidden_S_L_C = labels_S_L[:, 1:], hidden_S_L_C[:, :-1]
        codes_S_L = labels_S_L - self.config.vocab_size
        text = (labels_S_L >= 0) & (codes_S_L < 0)
        image = (codes_S_L >= 0) & (codes_S_L < self.config.image_vocab_size)
        total = _cross_entropy_sum(self.text_logits(hidden_S_L_C[text]), labels_S_L[text])
        total = total + _cross_entropy_sum(self.image_logits(hidden_S_L_C[image]), codes_S_L[image])
        return total / ((text | image).sum().clamp_min(1) if items is None else items)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        vocabulary: Vocabulary = "all",
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """transformers' forward, for `generate()` and trainers: logits (S, kept, W + mm_vocab_size), text ids first.

        `logits_to_keep`: the last n positions (0: all) or a 1-D index. `vocabulary` as in `logits`; it passes through
        `generate(..., vocabulary="image")`. `labels` adds `loss`. `return_dict` is accepted and always true.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_S_L_C = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds=inputs_embeds,
            image_mask=image_mask,
        ).hidden
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            loss=None if labels is None else self.loss(hidden_S_L_C, labels, items=num_items_in_batch),  # pyright: ignore[reportArgumentType]
            logits=self.logits(hidden_S_L_C[:, kept], vocabulary),  # pyright: ignore[reportArgumentType]
            past_key_values=past_key_values,
        )


def _cross_entropy_sum(logits_N_K: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_N_K.float(), labels_N, reduction="sum")


AutoConfig.register("x-omni", XOmniConfig, exist_ok=True)
AutoModelForCausalLM.register(XOmniConfig, XOmniForCausalLM, exist_ok=True)
