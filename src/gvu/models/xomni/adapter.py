"""X-Omni behind the `UnifiedModel` interface: draws image codes token by token, reads codes or pixels.

Drawing:  `{prompt}<SOM>rows columns<IMAGE>` then rows * columns codes, sampled from the image head only.
Reading:  chat turn of the user `<SOM>rows columns<IMAGE>codes<EOM>\\n{instruction}`, the text as the assistant's
answer.
Codes travel as ids, never as strings.

Shape suffixes: P prompts, S samples, A image tokens, L prompt tokens, T text tokens, V codes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from gvu.errors import GvuError
from gvu.models.base import Capabilities, Prompts, Reading, Rollout, TextScore, UnifiedModel
from gvu.models.xomni import checkpoint
from gvu.models.xomni.decoder import FlowDecoder
from gvu.models.xomni.engine import Engine
from gvu.models.xomni.language import XOmniForCausalLM, rollout_cache
from gvu.sampling import Sampling, draw, entropy, guide, log_law, uniforms

LAYERS = r"(?:.*\.)?model\.layers\.\d+\."
TARGETS = {"all": r"(?:self_attn|mlp)\.\w+_proj", "attention": r"self_attn\.\w+_proj", "mlp": r"mlp\.\w+_proj"}


class XOmni(UnifiedModel):
    """X-Omni of any size; X-Omni-Mini is a checkpoint of it."""

    language: XOmniForCausalLM

    def __init__(self, parts: checkpoint.Parts, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)
        self.language = parts.language.to(self.device).eval().requires_grad_(False)  # pyright: ignore
        self.config = parts.language.config
        self.vision = parts.vision.to(self.device).eval().requires_grad_(False)
        self.tokenizer, self.parts, self._decoder = parts.tokenizer, parts, None
        self.special = {t: checkpoint.token_id(self.tokenizer, t) for t in ("<SOM>", "<EOM>", "<IMAGE>")}
        self.capabilities = Capabilities(
            policy="ar",
            reads=frozenset({"tokens", "pixels"}),
            shared_parameters=True,
            cfg="log_softmax",
            codebook=self.config.image_vocab_size,
            grids=(parts.grid,),
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """Load a checkpoint folder in the released layout (see `checkpoint`)."""
        return cls(checkpoint.load(Path(path), dtype), device)

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        """Random X-Omni of a few ten thousand parameters, 4x4 tokens."""
        from gvu.models.xomni.tiny import tiny_parts

        return cls(tiny_parts(seed))

    def save_pretrained(self, path: str | Path) -> None:
        """See `UnifiedModel`; in the released layout."""
        if isinstance(self.language, PeftModel):
            raise GvuError("this model has an adapter; merge() it before save_pretrained(), or use save_adapter()")
        checkpoint.save(Path(path), self.parts, dtype=next(self.language.parameters()).dtype)

    @property
    def decoder(self) -> FlowDecoder:
        """The flow decoder, loaded when first needed."""
        if self._decoder is None:
            self._decoder = self.parts.decoder().to(self.device).eval().requires_grad_(False)
        return self._decoder

    # --- drawing ---------------------------------------------------------------------------------------------------

    def encode_prompts(self, texts: Sequence[str], grid: tuple[int, int] | None = None) -> Prompts:
        """See `UnifiedModel`; raises GvuError when a prompt and its image do not fit the context."""
        grid = grid or self.capabilities.grids[0]
        frame = self._frame(grid)
        rows = [self._ids(text) + frame for text in texts]
        for text, row in zip(texts, rows, strict=True):
            self._check_length(text, len(row) + grid[0] * grid[1])
        ids, mask = self._left_pad(rows)
        uncond_ids, uncond_mask = self._left_pad([frame] * len(rows), ids.shape[1])
        return Prompts(
            texts=tuple(texts),
            grid=grid,
            ids_P_L=ids,
            mask_P_L=mask,
            uncond_ids_P_L=uncond_ids,
            uncond_mask_P_L=uncond_mask,
        )

    @torch.no_grad()
    def rollout(self, prompts: Prompts, n: int, sampling: Sampling, seeds: Sequence[int]) -> Rollout:
        """See `UnifiedModel`. The prompt is prefilled once per prompt; each step runs one position of all S samples."""
        if len(seeds) != len(prompts.texts) * n:
            raise GvuError(f"{len(seeds)} seeds for {len(prompts.texts)} prompts x {n} samples; give one per sample")
        guided, actions = sampling.cfg != 1, prompts.grid[0] * prompts.grid[1]
        ids, mask = self._branches(prompts, guided)
        cache = rollout_cache(self.config, ids.shape[1])
        last = self.language.hidden(ids, mask, past_key_values=cache).hidden[:, -1]
        engine = Engine(self.language, cache, mask, n, actions)
        logits = self.language.image_logits(last).repeat_interleave(n, 0)
        uniform = uniforms(tuple(seeds), actions, self.device)
        codes, logps, entropies = [], [], []
        for a in range(actions):
            law = log_law(self._guided(logits, sampling), sampling)
            code = draw(law, uniform[:, a]) if sampling.temperature else law.argmax(-1)
            codes.append(code)
            logps.append(law.gather(1, code[:, None])[:, 0])
            entropies.append(entropy(law))
            if a + 1 < actions:
                logits = engine.step(code.repeat(2) if guided else code)
        return Rollout(
            prompts=prompts.expand(n),
            codes_S_A=torch.stack(codes, 1),
            logp_S_A=torch.stack(logps, 1),
            entropy_S_A=torch.stack(entropies, 1),
            sampling=sampling,
            seeds=tuple(seeds),
        )

    def policy_logp(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """See `UnifiedModel`. One pass over prompt and codes; the head runs on the positions that predict codes
        only."""
        guided, codes = rollout.sampling.cfg != 1, rollout.codes_S_A
        ids, mask = self._branches(rollout.prompts, guided)
        image = (codes[:, :-1] + self.config.vocab_size).repeat(2 if guided else 1, 1)
        whole, seen = torch.cat([ids, image], 1), F.pad(mask, (0, image.shape[1]), value=1)
        hidden = self.language.hidden(whole, None if bool(mask.all()) else seen).hidden[:, ids.shape[1] - 1 :]
        law = log_law(self._guided(self.language.image_logits(hidden), rollout.sampling), rollout.sampling, keep=codes)
        return law.gather(-1, codes.unsqueeze(-1)).squeeze(-1), entropy(law.detach())

    def _branches(self, prompts: Prompts, guided: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask of the conditional rows, with the unconditional ones below them under guidance."""
        if not guided:
            return prompts.ids_P_L, prompts.mask_P_L
        return torch.cat([prompts.ids_P_L, prompts.uncond_ids_P_L]), torch.cat(
            [prompts.mask_P_L, prompts.uncond_mask_P_L]
        )

    @staticmethod
    def _guided(logits: Tensor, sampling: Sampling) -> Tensor:
        if sampling.cfg == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, sampling.cfg)

    @torch.no_grad()
    def decode(self, rollout: Rollout, *, steps: int | None = None, cfg: float | None = None) -> Tensor:
        """See `UnifiedModel`; the decoder reads the tokens alone (empty prompt)."""
        latents = self.vision.latents(rollout.codes_S_A, rollout.prompts.grid)
        return self.decoder.decode(
            latents,
            rollout.prompts.grid,
            steps=steps or self.parts.decoder_steps,
            cfg=cfg or 1.0,
            seeds=list(rollout.seeds),
        )

    # --- reading ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read_pixels(self, pixels_S_3_H_W: Tensor) -> Reading:
        """See `UnifiedModel`; pictures of another size are resized to the default grid."""
        grid, side = self.capabilities.grids[0], self.vision.vit.config.patch_size
        size, pixels = (grid[0] * side, grid[1] * side), pixels_S_3_H_W.to(self.device)
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return Reading(content_S=self.vision.encode((2 * pixels - 1).to(self.vision.vit.pos_embed.dtype)), grid=grid)

    def read_tokens(self, rollout: Rollout) -> Reading:
        """See `UnifiedModel`; both branches share one vocabulary."""
        return Reading(content_S=rollout.codes_S_A, grid=rollout.prompts.grid)

    def text_logp(self, reading: Reading, texts: Sequence[str], instruction: str) -> TextScore:
        """See `UnifiedModel`. Rows differ only after the instruction, so they are padded on the right and need no
        mask."""
        before, after = self._turn(reading.grid, instruction)
        rows = [self._ids(t) for t in texts]
        for text, row in zip(texts, rows, strict=True):
            self._check_length(text, len(before) + reading.content_S.shape[1] + len(after) + len(row))
        answer, mask = self._right_pad(rows)
        head = self._with_image(before, reading, after)
        hidden = self.language.hidden(torch.cat([head, answer], 1), text_only=True).hidden[:, head.shape[1] - 1 : -1]
        logp = (
            torch.log_softmax(self.language.text_logits(hidden).float(), -1)
            .gather(-1, answer.unsqueeze(-1))
            .squeeze(-1)
        )
        return TextScore(logp_S_T=logp.masked_fill(~mask, 0.0), mask_S_T=mask, ids_S_T=answer)

    @torch.no_grad()
    def answer(self, reading: Reading, question: str, *, max_new_tokens: int = 64) -> list[str]:
        """See `UnifiedModel`; decoding is transformers' own."""
        head = self._with_image(*self._turn_around(reading, question))
        out = self.language.generate(  # pyright: ignore[reportAttributeAccessIssue]
            head,
            attention_mask=torch.ones_like(head),
            vocabulary="text",
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return [str(t) for t in self.tokenizer.batch_decode(out[:, head.shape[1] :], skip_special_tokens=True)]

    def text_tokens(self, text: str) -> list[str]:
        """See `UnifiedModel`."""
        return [str(self.tokenizer.decode([i])) for i in self._ids(text)]

    def lora_targets(self, scope: str) -> str:
        """Linear layers of the decoder layers; never embeddings, heads, tokenizer or decoder."""
        return LAYERS + TARGETS[scope]

    # --- token ids -------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        """Ids of a user's text; what looks like a special token in it is taken as plain text."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _chat_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _frame(self, grid: tuple[int, int]) -> list[int]:
        return [self.special["<SOM>"], *self._ids(f"{grid[0]} {grid[1]}"), self.special["<IMAGE>"]]

    def _turn(self, grid: tuple[int, int], instruction: str) -> tuple[list[int], list[int]]:
        """Ids before and after the image codes of the chat turn that asks `instruction`."""
        content = f"<SOM>{grid[0]} {grid[1]}<IMAGE><EOM>\n{instruction}"
        chat = [{"role": "user", "content": content}]
        ids = self._chat_ids(str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)))
        cut = ids.index(self.special["<IMAGE>"]) + 1
        return ids[:cut], ids[cut:]

    def _turn_around(self, reading: Reading, instruction: str) -> tuple[list[int], Reading, list[int]]:
        before, after = self._turn(reading.grid, instruction)
        return before, reading, after

    def _with_image(self, before: list[int], reading: Reading, after: list[int]) -> Tensor:
        """(S, prefix) ids with each image's codes between the fixed parts."""
        codes = reading.content_S + self.config.vocab_size
        sides = [torch.tensor(part, device=self.device).expand(len(codes), -1) for part in (before, after)]
        return torch.cat([sides[0], codes, sides[1]], 1)

    def _left_pad(self, rows: list[list[int]], length: int = 0) -> tuple[Tensor, Tensor]:
        length = max(length, *map(len, rows))
        ids = [[self.tokenizer.pad_token_id] * (length - len(r)) + r for r in rows]
        mask = [[0] * (length - len(r)) + [1] * len(r) for r in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _right_pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        length = max(map(len, rows))
        ids = [r + [self.tokenizer.pad_token_id] * (length - len(r)) for r in rows]
        mask = [[True] * len(r) + [False] * (length - len(r)) for r in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _check_length(self, text: str, length: int) -> None:
        limit = self.config.max_position_embeddings
        if length > limit:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise GvuError(
                f"prompt {shown!r} needs {length} positions with its image, the model has {limit}; shorten it"
            )
