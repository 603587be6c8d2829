"""Tokenizers made on the spot, for tests of everything that reads text."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 300
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TEXT = ["def f(x): return x + 1\n", "the quick brown fox jumps over the lazy dog\n", "import os, sys\n"] * 5


def tokenizer(adds_bos: bool = False, special: bool = True, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; with `adds_bos` it begins every text with BOS, as some models' do."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} if special else {}
    made = PreTrainedTokenizerFast(tokenizer_object=_backend(adds_bos), **names)
    made.chat_template = template
    return made


def _backend(adds_bos: bool) -> Tokenizer:
    backend = Tokenizer.from_str(_trained())
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@lru_cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend.to_str()
