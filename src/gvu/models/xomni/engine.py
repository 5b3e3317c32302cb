"""One image token at a time: the decode loop of a rollout, after the prompt is in the cache.

At small sizes a step is spent around the matrix products as much as in them, so this computes what
`XOmniForCausalLM.hidden` computes at image positions with few operations and copies (benchmarks/speed.py, `rollout`):

- q, k, v come from one product whose output is, per kv head, its queries, its key, its value: attention reads it as it
  lies, and the query heads of a kv head are rows of one product, so keys are never repeated.
- Channels of q and k are reordered so that a rotary pair lies together: the rotation is one complex product. Scores do
  not change.
- Keys and values fill dense blocks: a batched product over a slice of a longer buffer takes two to three times as long,
  so the buffers grow by `BLOCK` positions when full, and what is not filled yet is masked.
- Weights, keys and values are in the autocast dtype; the residual stream, rotation and softmax stay in fp32.

gate and up stay two products: halves of a fused one are not contiguous, which costs what the fusion saves, and the
weights need no second copy.

Shape suffixes: R rows (samples, under guidance twice as many), H query heads, J kv heads, N query heads per kv head,
M = N + 2 vectors of a kv head (one less without the value), D channels of a head, E = D / 2, C width, F inner width,
O = J M D outputs, L prompt positions, K positions with room in the cache, T positions in all, V codes.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

from gvu.errors import GvuError
from gvu.models.xomni.language import XOmniConfig, XOmniForCausalLM

BLOCK = 16  # positions by which the cache grows


def require_engine(config: XOmniConfig) -> None:
    """GvuError for a network that this engine would compute wrongly: windows, rotations that change as text grows."""
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if set(config.layer_types or []) != {"full_attention"} or kind in ("dynamic", "longrope"):
        raise GvuError(
            f"X-Omni draws with full attention and fixed rotary frequencies only, not with layer_types "
            f"{sorted(set(config.layer_types or []))} and rope_type {kind!r}; change them in config.json"
        )


def plain_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """(out, in) weight of a linear layer in `dtype`, its active adapters folded in unless they are off or merged."""
    if not isinstance(linear, LoraLayer):
        return cast(nn.Linear, linear).weight.data.to(dtype)
    weight = cast(nn.Linear, linear.get_base_layer()).weight.data
    if not (linear.disable_adapters or linear.merged):
        weight = weight + sum(linear.get_delta_weight(name) for name in linear.active_adapters)  # type: ignore[operator]
    return weight.to(dtype)


def plain_bias(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """(out,) bias in `dtype`."""
    base = linear.get_base_layer() if isinstance(linear, LoraLayer) else linear
    return cast(nn.Linear, base).bias.data.to(dtype)


def pairs(x_D: Tensor, dim: int) -> Tensor:
    """Channels along `dim` in the order that puts the two of a rotary pair side by side: 0, D/2, 1, D/2 + 1, ..."""
    order = torch.arange(x_D.shape[dim], device=x_D.device).view(2, -1).t().flatten()
    return x_D.index_select(dim, order)


class Step:
    """One decoder layer with its part of the cache."""

    def __init__(self, layer: Qwen2DecoderLayer, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.kv, self.width = cast(int, attention.config.num_key_value_heads), attention.head_dim
        self.dtype, self.act = dtype, mlp.act_fn
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv_C_O = self._fuse([plain_weight(m, dtype) for m in qkv]).t()
        self.bias_O = self._fuse([plain_bias(m, dtype) for m in qkv])
        self.out_O_C = plain_weight(attention.o_proj, dtype).t()
        self.gate_C_F, self.up_C_F = plain_weight(mlp.gate_proj, dtype).t(), plain_weight(mlp.up_proj, dtype).t()
        self.down_F_C = plain_weight(mlp.down_proj, dtype).t()
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.scale_1 = torch.tensor([attention.scaling], device=self.bias_O.device)

    def _fuse(self, qkv: Sequence[Tensor]) -> Tensor:
        """Weights (heads D, C) or biases (heads D,) of q, k, v to (O, ...), kv head by kv head."""
        q, k, v = (part.unflatten(0, (self.kv, -1, self.width)) for part in qkv)
        return torch.cat([pairs(q, 2), pairs(k, 2), v], 1).flatten(0, 2)

    def fill(self, keys_P_J_L_D: Tensor, values_P_J_L_D: Tensor, repeats: int) -> None:
        """Take over a prefilled cache, every row `repeats` times."""
        self.keys_RJ_K_D, self.values_RJ_K_D = (
            part.to(self.dtype).repeat_interleave(repeats, 0).flatten(0, 1)
            for part in (pairs(keys_P_J_L_D, -1), values_P_J_L_D)
        )

    def grow(self, positions: int) -> None:
        """Room for `positions` in all; the new ones hold zeros."""
        more = (0, 0, 0, positions - self.keys_RJ_K_D.shape[1])
        self.keys_RJ_K_D, self.values_RJ_K_D = F.pad(self.keys_RJ_K_D, more), F.pad(self.values_RJ_K_D, more)

    def __call__(self, x_R_C: Tensor, at: int, turn_1_E: Tensor, bias_R_1_K: Tensor) -> Tensor:
        """Residual stream (R, C) of position `at` through the layer, in place."""
        qkv_R_O = torch.addmm(self.bias_O, normed(x_R_C, self.norms[0], self.dtype), self.qkv_C_O)
        _add_product(x_R_C, self._attend(qkv_R_O, at, turn_1_E, bias_R_1_K), self.out_O_C)
        inner_R_C = normed(x_R_C, self.norms[1], self.dtype)
        gated_R_F = self.act(inner_R_C @ self.gate_C_F).mul_(inner_R_C @ self.up_C_F)
        return _add_product(x_R_C, gated_R_F, self.down_F_C)

    def _attend(self, qkv_R_O: Tensor, at: int, turn_1_E: Tensor, bias_R_1_K: Tensor) -> Tensor:
        """Heads (R, H D) of one position over all up to it."""
        rows = len(qkv_R_O)
        qkv_RJ_M_D = qkv_R_O.view(rows * self.kv, -1, self.width)
        turned_RJ_M_D = _rotate(qkv_RJ_M_D[:, :-1], turn_1_E)
        self.keys_RJ_K_D[:, at], self.values_RJ_K_D[:, at] = turned_RJ_M_D[:, -1], qkv_RJ_M_D[:, -1]
        scores_RJ_N_K = torch.bmm(turned_RJ_M_D[:, :-1].to(self.dtype), self.keys_RJ_K_D.transpose(1, 2))
        scores_R_H_K = torch.addcmul(bias_R_1_K, scores_RJ_N_K.view(rows, -1, bias_R_1_K.shape[-1]), self.scale_1)
        weights_RJ_N_K = scores_R_H_K.softmax(-1).to(self.dtype).view_as(scores_RJ_N_K)
        return torch.bmm(weights_RJ_N_K, self.values_RJ_K_D).view(rows, -1)


class Engine:
    """Steps all rows of a rollout by one image token.

    The weights are taken as they are when it is built: inside `UnifiedModel.merged()`, the merged ones.

    Args:
        language: the network, with or without an adapter.
        cache: the prompts' keys and values, from `language.hidden(ids, mask, past_key_values=cache)`.
        mask_P_L: the prompts' mask, 0 = left padding.
        repeats: samples per prompt; row p * repeats + k continues prompt p.
        steps: how many tokens follow at most.
    """

    def __init__(self, language: nn.Module, cache: DynamicCache, mask_P_L: Tensor, repeats: int, steps: int) -> None:
        whole = cast(XOmniForCausalLM, language.get_base_model() if isinstance(language, PeftModel) else language)
        require_engine(whole.config)
        self.model, self.device, self.at = whole.model, mask_P_L.device, mask_P_L.shape[1]
        kind = self.device.type
        own = self.model.mm_embed_tokens.weight.dtype
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        self.layers = [Step(cast(Qwen2DecoderLayer, layer), self.dtype) for layer in self.model.layers]
        for step, held in zip(self.layers, cache.layers, strict=True):
            prefilled = cast(DynamicLayer, held)
            step.fill(cast(Tensor, prefilled.keys), cast(Tensor, prefilled.values), repeats)
        self.head_C_V = plain_weight(whole.mm_head, self.dtype)[: whole.config.image_vocab_size].t()
        self.turns_T_1_E = self._turns(self.at + steps)
        padded = not bool(mask_P_L.all())
        self.positions_RJ = mask_P_L.sum(1).repeat_interleave(repeats * self.layers[0].kv) if padded else None
        hidden = (mask_P_L.repeat_interleave(repeats, 0) if padded else mask_P_L[:1]) == 0
        self.bias_R_1_K = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, float("-inf"))[:, None]

    def _turns(self, length: int) -> Tensor:
        """(T, 1, E) rotations as complex numbers, from the network's own rotary embedding."""
        like, positions_1_T = torch.empty((), device=self.device), torch.arange(length, device=self.device)[None]
        cos_1_T_D, sin_1_T_D = self.model.rotary_emb(like, positions_1_T)
        return torch.complex(cos_1_T_D, sin_1_T_D)[0, :, None].chunk(2, -1)[0]

    @torch.inference_mode()
    def step(self, code_R: Tensor) -> Tensor:
        """The last drawn codes (R,) to logits (R, V) over the next ones, in the dtype of the products."""
        with torch.autocast(self.device.type, enabled=False):
            turn, x_R_C = self._advance(), self.model.mm_embed_tokens(code_R)
            for layer in self.layers:
                layer(x_R_C, self.at, turn, self.bias_R_1_K)
            self.at += 1
            return normed(x_R_C, self.model.mm_norm, self.dtype) @ self.head_C_V

    def _advance(self) -> Tensor:
        """Room for the next position in every layer, which the mask then shows; its rotation (1, E), or (R J, 1, E)."""
        room = self.bias_R_1_K.shape[-1]
        if self.at == room:
            self.bias_R_1_K = F.pad(self.bias_R_1_K, (0, BLOCK), value=float("-inf"))
            for layer in self.layers:
                layer.grow(room + BLOCK)
        self.bias_R_1_K[..., self.at] = 0.0
        if self.positions_RJ is None:
            return self.turns_T_1_E[self.at]
        self.positions_RJ += 1
        return self.turns_T_1_E[self.positions_RJ - 1]


def normed(x_R_C: Tensor, norm: Qwen2RMSNorm, dtype: torch.dtype) -> Tensor:
    """RMS norm (R, C), statistics in fp32, result in `dtype`."""
    return F.rms_norm(x_R_C, x_R_C.shape[-1:], norm.weight, norm.variance_epsilon).to(dtype)


def _rotate(x_RJ_M_D: Tensor, turn_1_E: Tensor) -> Tensor:
    """Pairs of neighbouring channels times complex numbers; fp32, in place if that is what came."""
    x_RJ_M_E = torch.view_as_complex(x_RJ_M_D.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(x_RJ_M_E.mul_(turn_1_E)).flatten(-2)


def _add_product(x_R_C: Tensor, left_R_F: Tensor, right_F_C: Tensor) -> Tensor:
    """x += left @ right, in place; one operation where the dtypes allow it."""
    return x_R_C.addmm_(left_R_F, right_F_C) if x_R_C.dtype == left_R_F.dtype else x_R_C.add_(left_R_F @ right_F_C)
