"""A tokenizer made from the data, for models that are trained from scratch: a small vocabulary suits a small model.

Byte-level BPE by the `tokenizers` library: every text can be written in it, and the same text gives the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nestling.data.documents import documents
from nestling.data.files import stretches
from nestling.errors import DataError

END, PAD = "<|endoftext|>", "<|pad|>"
SMALLEST = 258  # every byte and the two special tokens
CHARACTERS = 8_000_000  # more text hardly changes a vocabulary of some thousand tokens
PIECE = 20_000


def train_tokenizer(
    spec: str | Path, vocab_size: int = 2048, *, seed: int = 0, characters: int = CHARACTERS
) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` tokens, merges learned on that many characters of the source's training part.

    Raises `DataError` for fewer tokens than 258, and what `documents` raises.
    """
    if vocab_size < SMALLEST:
        raise DataError(f"vocab_size {vocab_size} is not possible: give at least {SMALLEST}, one for each byte")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(spec, seed, characters), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _sample(spec: str | Path, seed: int, characters: int) -> Iterator[str]:
    texts = documents(spec, "train", seed=seed)
    return islice((piece for text in texts for piece in stretches(text, PIECE)), max(1, characters // PIECE))
