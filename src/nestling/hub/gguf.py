"""Models from GGUF files: dequantized by transformers, then moved into a plain model that can be saved.

transformers keeps a GGUF model marked as quantized, and such a model refuses `save_pretrained`; its tensors are
therefore copied into a fresh model of the same class. Its tokenizer is rebuilt from the file's metadata, except for
pre-tokenizers that put every digit by itself: those are set here, or numbers behind blanks come out otherwise than
in llama.cpp.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nestling.errors import CheckpointError
from nestling.hub.check import first_line
from nestling.quiet import model_class_name, quiet

# Values of `tokenizer.ggml.pre` that llama.cpp splits with "\p{N}" before GPT-2's pattern.
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
PRE = "tokenizer.ggml.pre"
MAGIC = b"GGUF"
SIZES = "ignore_mismatched_sizes"  # in what transformers says of tensors whose sizes are not the config's


def load(file: Path, dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The dequantized model of a GGUF file and the tokenizer that it describes (`None` when it describes none).

    A dtype of "auto" is the file's own float type, float32 if it is quantized. Raises `CheckpointError`.
    """
    fields = metadata(file)
    with quiet():
        return _model(file, dtype), _tokenizer(file, fields)


def load_config(file: Path) -> PreTrainedConfig:
    """The config that a GGUF file describes. Raises `CheckpointError`."""
    metadata(file)
    return _plain_config(_read(AutoConfig, file))


def _model(file: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    found = _read(AutoModelForCausalLM, file, dtype=dtype)
    config = _plain_config(found.config)
    with torch.device("meta"):
        plain = type(found)(config)
    # assign=True: the fresh model takes the tensors over instead of a second copy of them.
    plain.load_state_dict(found.state_dict(), assign=True)
    plain.tie_weights()
    _own_buffers(plain, found)
    plain.generation_config = GenerationConfig.from_model_config(config)
    return plain.to(found.dtype)


def _plain_config(found: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without the mark that the weights were quantized, and with the name of the model class."""
    config = copy.deepcopy(found)
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    name = model_class_name(config)
    config.architectures = [name] if name else None
    return config


def _tokenizer(file: Path, fields: Any) -> PreTrainedTokenizerBase | None:
    if "tokenizer.ggml.tokens" not in fields:
        return None
    tokenizer = _read(AutoTokenizer, file)
    if PRE in fields and fields[PRE].contents() in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def metadata(file: Path) -> Any:
    """The metadata fields of a GGUF file. Raises `CheckpointError` when the file is not GGUF or is cut off."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"'{file}' is a GGUF file, which needs the package gguf: pip install \"nestling[gguf]\""
        ) from error
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise CheckpointError(f"'{file}' is not a GGUF file (its first four bytes differ): download it again")
    try:
        return GGUFReader(file).fields
    except Exception as error:  # numpy's errors about a buffer that ends too early
        raise CheckpointError(f"'{file}' is cut off or corrupt ({first_line(error)}): download it again") from error


def _read(auto: Any, file: Path, **options: Any) -> Any:
    try:
        return auto.from_pretrained(file.parent, gguf_file=file.name, **options)
    except Exception as error:  # unknown architectures and tokenizers raise many types
        why = (
            "it takes other sizes from the metadata than the tensors have" if SIZES in str(error) else first_line(error)
        )
        raise CheckpointError(f"'{file}' cannot be read by transformers: {why}") from error


def _own_buffers(plain: PreTrainedModel, found: PreTrainedModel) -> None:
    """Buffers that no state dict holds (rotary frequencies) are still on the meta device: take the loaded ones."""
    for name, buffer in found.named_buffers():
        module, _, leaf = name.rpartition(".")
        plain.get_submodule(module)._buffers[leaf] = buffer
