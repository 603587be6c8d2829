"""Models as GGUF files, for llama.cpp: config, weights, tokenizer and chat template in one file.

Names come from the package gguf, differences of layout from the anatomy. Matrices take the type asked for, vectors stay
float32, as llama.cpp wants them. The file is written beside its name, read back, compared and renamed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.anatomy.gguf import gguf_of
from nestling.errors import CheckpointError, NestlingError
from nestling.runs import whole

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # kinds of tokens in llama.cpp


def save_gguf(
    model: PreTrainedModel, file: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, dtype: str = "auto"
) -> Path:
    """Write a model into one GGUF file; returns it.

    dtype: of the matrices, float32, float16 or bfloat16; the model's own unless given. Raises
    `UnsupportedArchitecture` for a model that llama.cpp has otherwise, `CheckpointError` for a tokenizer that is no
    byte-level BPE and for a file that cannot be written.
    """
    target, kind = Path(file), gguf_of(model.config)
    dtype = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    if dtype not in TYPES:
        raise NestlingError(f"dtype '{dtype}' is not possible in GGUF here: choose from {', '.join(TYPES)}")
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError('GGUF files need the package gguf: pip install "nestling[gguf]"') from error
    with whole(target, "name another file") as beside:
        writer = gguf.GGUFWriter(beside, kind.name)
        _config(
            writer, model.config, gguf.LlamaFileType[f"{'ALL_' if dtype == 'float32' else 'MOSTLY_'}{TYPES[dtype]}"]
        )
        if tokenizer is not None:
            _tokenizer(writer, tokenizer, model.config.vocab_size)
        tensors = _tensors(model, kind.name, kind.paired, gguf)
        for name, tensor in tensors.items():
            _add(writer, name, tensor, dtype if tensor.dim() > 1 else "float32", gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _verify(beside, tensors, gguf)
    return target


def _config(writer: Any, config: Any, file_type: Any) -> None:
    """The sizes, under llama.cpp's names."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(Path(str(config._name_or_path)).name or "nestling")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)


def _tensors(model: PreTrainedModel, arch: str, paired: bool, gguf: Any) -> dict[str, Tensor]:
    """The weights under llama.cpp's names, tied embeddings once."""
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names, config = gguf.get_tensor_name_map(key, model.config.num_hidden_layers), model.config
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor: Tensor = parameter.detach()
        module, _, leaf = name.rpartition(".")
        new = names.get_name(module)
        if new is None:
            raise CheckpointError(f"llama.cpp's {arch} has no tensor for '{name}', so the model cannot be written")
        if paired and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            tensor = in_pairs(tensor, heads)
        found[f"{new}.{leaf}"] = tensor
    return found


def in_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows `[heads * d, ...]` whose rotary channels stand in halves, with each pair side by side."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add(writer: Any, name: str, tensor: Tensor, dtype: str, gguf: Any) -> None:
    values = tensor.to("cpu", torch.float32).contiguous().numpy()
    kind = gguf.GGMLQuantizationType[TYPES[dtype]]
    if dtype == "bfloat16":
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values.astype(dtype))


def _verify(file: Path, tensors: dict[str, Tensor], gguf: Any) -> None:
    """Read the file back and compare every tensor, to the rounding of its type."""
    reader = gguf.GGUFReader(file)
    written = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        values = torch.from_numpy(np.array(gguf.quants.dequantize(written[name].data, written[name].tensor_type)))
        expected = tensor.to("cpu", torch.float32)
        if values.shape != expected.shape or not torch.allclose(values, expected, rtol=1e-2, atol=1e-6):
            raise CheckpointError(
                f"tensor '{name}' came back from the GGUF file otherwise than it was: write it in float32"
            )


def _tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """A byte-level BPE: tokens, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    none: dict[str, Any] = {"model": {"type": type(tokenizer).__name__}}
    state = json.loads(backend.to_str()) if backend is not None else none
    model, splitter = state["model"], _splitter(state.get("pre_tokenizer"))
    if model["type"] != "BPE" or splitter is None:
        raise CheckpointError(
            f"the tokenizer ({model['type']}) is no byte-level BPE that llama.cpp knows by name: export without it "
            f"(--tokenizer false), or use llama.cpp's own convert_hf_to_gguf.py"
        )
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry["special"] for entry in state["added_tokens"]}
    kinds = [
        (CONTROL if added[i] else USER) if i in added else NORMAL if i in tokens else UNUSED for i in range(vocab_size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _splitter(pre: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for how text is split before BPE; None if it is none of those known here."""
    parts = (pre or {}).get("pretokenizers", [pre] if pre else [])
    kinds = [part["type"] for part in parts]
    patterns = [str(part.get("pattern", {}).get("Regex", "")) for part in parts if part["type"] == "Split"]
    if "ByteLevel" not in kinds:
        return None
    if any(part["type"] == "Digits" and part.get("individual_digits") for part in parts):
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if any("{1,3}" in pattern for pattern in patterns):
        return "llama-bpe"
    return "qwen2" if any(r"\p{N}" in pattern for pattern in patterns) else None
