"""A whole checkpoint in a folder: a tiny model, a tokenizer with a chat template, and text it can read."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nestling import hub
from tests.models import tiny

TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
WORDS = ("the", "a", "model", "of", "every", "small", "thing", "reads", "one", "token", "after", "another", "and")


def tokenizer(vocab_size: int = 97) -> PreTrainedTokenizerFast:
    """One token per byte of ASCII, three of them special; nothing is learned, so nothing can change."""
    alphabet = ["<pad>", "<s>", "</s>", *(chr(code) for code in range(32, 126))][:vocab_size]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    )
    found.chat_template = TEMPLATE
    return found


def write(folder: Path, variant: str = "llama", **fields) -> Path:
    """A tiny float32 model of that variant with its tokenizer, saved."""
    hub.save(tiny(variant, dtype=torch.float32, **fields), folder, tokenizer())
    return folder


def write_text(file: Path, documents: int = 40, seed: int = 0) -> Path:
    """Sentences of words, one document per line of a .jsonl file."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(WORDS), (documents, 40), generator=generator).tolist()
    texts = (" ".join(WORDS[i] for i in row) + "." for row in choice)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file
