"""From a source to a model and its tokenizer: resolve, check cheaply, then let transformers load.

Order matters here: settings first (dtype, device), then the config (is it a causal language model, can it be built
without foreign code), then the headers of the weight files, and only then the weights. Keys that are missing or left
over after loading are errors, never warnings: a model with random layers looks like a bad model, not like a mistake.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import nestling.anatomy  # noqa: F401  models whose layers differ in size become known to the auto classes
from nestling import processes
from nestling.errors import CheckpointError
from nestling.experts import use_fast_experts
from nestling.hub import builtin, gguf
from nestling.hub.check import check_folder, check_weights, first_line
from nestling.hub.source import fetch_config, fetch_snapshot, locate
from nestling.quiet import model_class_name, quiet

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model in eval mode and its tokenizer (`None` when the source has no tokenizer files).

    `dtype` is a torch dtype or its name; "auto" keeps the checkpoint's (float32 for quantized GGUF files).
    Raises `CheckpointError` for everything that is wrong with the source.
    """
    kind = _dtype(dtype)
    _check_device(device)
    place = locate(source)
    if place.kind == "builtin":
        folder = builtin.folder(place.name)
    elif place.kind == "gguf":
        return _finish(*gguf.load(place.path, kind), source, device)
    elif place.kind == "hub":
        check_config(fetch_config(place.name), place.name, trust_remote_code)
        folder = fetch_snapshot(place.name, trust_remote_code)
    else:
        folder = place.path
    return _finish(*load_folder(folder, kind, trust_remote_code), source, device)


def load_once(source: str | Path, **how: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """As `load`, in the first of several processes; the others get the model without its weights (on the meta device).

    For models that are to be sharded (`nestling.train.sharding`). how: as `load` takes it. What it raises, all raise.
    """
    made: list[tuple[PreTrainedModel, PreTrainedTokenizerBase | None]] = []

    def whole() -> dict[str, Any]:
        made.append(load(source, **how))
        model = made[0][0]
        kinds = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()}
        return {"dtype": str(model.dtype).removeprefix("torch."), "kinds": kinds}

    told = processes.first(whole)
    if made:
        return made[0]
    trust = {"trust_remote_code": how.get("trust_remote_code", False)}
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config(source, **trust), dtype=getattr(torch, told["dtype"]), **trust)
    for name, parameter in model.named_parameters():  # some stay wide where the others are narrow
        parameter.data = parameter.data.to(getattr(torch, told["kinds"][name]))
    return use_fast_experts(model).eval(), tokenizer(source, **trust)


def config(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a source, without its weights; also of a YAML or JSON file with the config's fields alone.

    Of a checkpoint that reads pictures too it is the config of the language model, which is what `load` loads.
    Raises `CheckpointError` like `load`.
    """
    if Path(source).suffix in CONFIG_SUFFIXES and Path(source).is_file():
        return _config_file(Path(source))
    place = locate(source)
    if place.kind == "gguf":
        found = gguf.load_config(place.path)
    else:
        fetch = {"builtin": builtin.folder, "hub": fetch_config}.get(place.kind)
        folder = fetch(place.name) if fetch else place.path
        check_folder(folder)
        found = check_config(folder, source, trust_remote_code)
    return _of_text(found, source)


def _config_file(path: Path) -> PreTrainedConfig:
    """A config from a file that names `model_type` and whatever is not that type's default."""
    try:
        fields = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        found: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # config classes validate with exceptions of many libraries
        raise CheckpointError(
            f"'{path}' is not a config ({first_line(error)}): give YAML or JSON fields, model_type among them"
        ) from error
    return _of_text(found, path)


def _of_text(found: PreTrainedConfig, source: str | Path) -> PreTrainedConfig:
    text = found.get_text_config()
    text._name_or_path = str(source)
    return text


def tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a source, without its weights; `None` when it has none. Raises `CheckpointError` like `load`."""
    place = locate(source)
    if place.kind == "gguf":
        return gguf.load(place.path)[1]
    if place.kind == "hub":
        return load_tokenizer(fetch_snapshot(place.name, trust_remote_code, weights=False), trust_remote_code)
    folder = builtin.folder(place.name) if place.kind == "builtin" else place.path
    check_folder(folder)
    return load_tokenizer(folder, trust_remote_code)


def load_folder(
    folder: Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """`load` for a folder in transformers' layout. Raises `CheckpointError`."""
    check_folder(folder)
    check_config(folder, folder, trust_remote_code)
    check_weights(folder)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # reported by check_keys, with names
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the model in '{folder}' cannot be loaded: {first_line(error)}") from error
    model, found = loaded
    check_keys(found, folder)
    return model, load_tokenizer(folder, trust_remote_code)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, or `None` when it holds none. Raises `CheckpointError` when it is damaged."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise CheckpointError(f"the tokenizer in '{folder}' cannot be read: {first_line(error)}") from error


def tokenizer_beside(tokenizer: PreTrainedTokenizerBase, model_type: str) -> PreTrainedTokenizerBase:
    """A tokenizer as the auto classes read it from the folder of a model of that type.

    For some types (Qwen2) they take a class that splits text in its own way, whatever the file says: a model
    that is trained with another tokenizer has to learn from what it will be given later.
    """
    with tempfile.TemporaryDirectory(prefix="nestling-") as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "config.json").write_text(json.dumps({"model_type": model_type}))
        found = load_tokenizer(Path(folder))
    return tokenizer if found is None else found


def check_config(folder: Path, name: str | Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The config in `folder`. Raises `CheckpointError` unless it is a causal language model that may be built here."""
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes validate with exceptions of many libraries
        raise CheckpointError(_config_sentence(name, error)) from error
    stated = found.architectures or []
    foreign = trust_remote_code and "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {})
    buildable = model_class_name(found) is not None
    if not foreign and not (buildable and (not stated or any(map(_is_causal, stated)))):
        what = stated[0] if stated and buildable else f"model of type '{found.model_type}'"
        raise CheckpointError(f"'{name}' is a {what}, but only causal language models (...ForCausalLM) can be loaded")
    return found


def check_keys(found: dict[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` when tensors were missing, left over or of another shape."""
    for problem, meaning in (
        ("missing_keys", "lacks tensors that its config asks for"),
        ("unexpected_keys", "holds tensors that its config has no place for"),
        ("mismatched_keys", "holds tensors whose shape is not the config's"),
    ):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found.get(problem) or ())
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"the checkpoint '{folder}' {meaning} ({', '.join(keys[:3])}{more}): "
                f"config.json and weights are not of the same model"
            )


def _finish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str | Path,
    device: str | torch.device | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    model.config._name_or_path = str(source)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return use_fast_experts(model).eval(), tokenizer


def _is_causal(name: str) -> bool:
    return name.endswith("ForCausalLM") or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _config_sentence(name: str | Path, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"'{name}' brings its own model code, which is not run unless you allow it: "
            f"pass trust_remote_code=True (--trust_remote_code true) if you trust its author"
        )
    return f"the config of '{name}' cannot be used: {first_line(error)}"


def _dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise CheckpointError(f"dtype '{dtype}' is not known: use auto, float32, bfloat16 or float16")
    return found


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CheckpointError(f"device '{device}' cannot be used here: {first_line(error)}") from error
    if device is not None and torch.device(device).type == "meta":
        raise CheckpointError("device 'meta' holds no numbers to compute with: use cpu or an accelerator")
