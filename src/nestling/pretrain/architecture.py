"""From a text that names an architecture to a model with fresh weights.

The text is a preset, a YAML or JSON file with `model_type` and config fields, or a checkpoint whose config is taken
without its weights. Single fields can be set on top. Knows configs, no data and no training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import set_seed as seeded

from nestling import hub
from nestling.anatomy import Anatomy
from nestling.anatomy.declare import ARCHITECTURES
from nestling.errors import CheckpointError
from nestling.shape import child_config, fit

_FOLDER = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
FILES = (".yaml", ".yml", ".json")
OF_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def architecture_config(
    text: str | Path, fields: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config that a preset, a file or a checkpoint describes, with `fields` set on top.

    Raises `CheckpointError` when there is no such thing, or its config class refuses the fields.
    """
    name = str(text)
    if not names_checkpoint(name):
        values = _read(_FOLDER / f"{name}.yaml" if name in PRESETS else Path(name))
    else:
        values = _as_deep(hub.config(name, trust_remote_code=trust_remote_code), fields or {}).to_dict()
    values |= fields or {}
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise CheckpointError(f"'{name}' has no model_type: say which transformers model it is, as model_type: llama")
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # the config classes raise what they like
        raise CheckpointError(
            f"'{name}' is no config of a {model_type} model: {' '.join(str(error).split())}"
        ) from error


def names_checkpoint(text: str) -> bool:
    """Whether the text of an architecture is that of a checkpoint, not of a preset or a file."""
    return text not in PRESETS and not text.endswith(FILES)


def build(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """A float32 model of that config with fresh weights; vocabulary and special tokens are the tokenizer's, if given.

    The config is changed accordingly. Raises `CheckpointError` when transformers cannot build it.
    """
    if tokenizer is not None:
        config.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        for name in OF_TOKENS:
            setattr(config, name, getattr(tokenizer, name))
    seeded(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # sizes that do not go together fail anywhere
        raise CheckpointError(
            f"a {config.model_type} model cannot be built from this config: {' '.join(str(error).split())}"
        ) from error
    return model.to(device) if device is not None else model


def _as_deep(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A config with as few layers as the fields ask for: what it lists of each layer goes with the layer."""
    architecture = ARCHITECTURES.get(config.model_type)
    depth = fields.get(architecture.depth_field) if architecture else None
    if architecture is None or not isinstance(depth, int) or depth >= getattr(config, architecture.depth_field):
        return config
    anatomy = Anatomy.of(config)
    return child_config(anatomy, fit(anatomy, {architecture.depth_field: depth}))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read as an architecture ({' '.join(str(error).split())}): give a YAML or JSON file, "
            f"one of {', '.join(PRESETS)}, or a checkpoint"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"'{path}' is not a mapping of config fields: begin it with model_type: llama")
    return values
