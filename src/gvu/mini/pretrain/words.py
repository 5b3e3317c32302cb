"""The mini checkpoints' tokenizer: byte-level BPE over the world's own captions, in Hugging Face format, with a chat
template.

Text ids come first; `<MM-Token-k>` has id `vocab_size + k`, then `<SOM>`, `<EOM>`, `<IMAGE>` as in the released
tokenizer.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gvu.mini.pretrain import shapes
from gvu.mini.splits import sample_train
from gvu.models.xomni.tiny import CHAT, TEMPLATE

INSTRUCTION = "Describe the image in detail."


def _corpus(count: int) -> Iterator[str]:
    rng = np.random.default_rng(5)
    for i in range(count):
        yield sample_train(rng)["prompt"]
        if i % 50 == 0:
            yield f"user\nassistant\n{INSTRUCTION}"
            yield "8 8"


def make_tokenizer(count: int = 20_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `count` training captions; every other text falls back to its bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=list(CHAT), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(_corpus(count), trainer)
    tokens = [f"<MM-Token-{k}>" for k in range(shapes.CODES)] + ["<SOM>", "<EOM>", "<IMAGE>"]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Make the tokenizer and write it to a checkpoint folder."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer
