"""`convert`: a stock model becomes one whose cache can be compressed, in place and without changing a logit.

The gate channel is the last of every head, where the anatomy says queries and keys are made. Until it has been freed
(`keep` at 0) nothing is decided and nothing merges. `free` does so at once, the first
stage of a retrofit gradually: the rows that write the channel become zero, so a gate starts at its offset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.anatomy.attention import Site, last_channel, sites
from nestling.dmc.register import config_class, model_class
from nestling.dmc.runtime.gates import METHODS, Gates
from nestling.dmc.runtime.modeling import attach
from nestling.errors import NestlingError, UnsupportedArchitecture
from nestling.quiet import saved_as_published


def convert(model: PreTrainedModel, **gates: Any) -> PreTrainedModel:
    """Put gates into the model, in place; returns it. Nothing is merged yet, and its logits are unchanged.

    gates: fields of `Gates` other than `keep`: scale, offset, temperature, shared, method, window.
    Raises `NestlingError` for a model that has them already or a field that is not known, and
    `UnsupportedArchitecture` for one without full attention.
    """
    if is_converted(model):
        raise NestlingError("this model has gates already: start from the stock model")
    anatomy = Anatomy.of(model)
    places = check(anatomy)
    kinds: list[str | None] = [None] * anatomy.num_layers
    for site in places:
        kinds[site.layer] = "rotary" if site.rotary else "plain"
    base = anatomy.architecture.model_type
    config = model.config
    config.__class__ = config_class(base)
    config.dmc = _checked(gates) | {
        "layers": anatomy.architecture.layers,
        "attention": places[0].declared.module,
        "rotate": places[0].declared.rotate,
        "separators": _separators(config),
        "ratio": 1.0,
    }
    config.dmc_layers = kinds
    if not hasattr(config, "layer_shapes"):
        config.layer_shapes = None
    config.architectures = [model_class(base).__name__]
    model.__class__ = model_class(base)
    saved_as_published(model)
    attach(model)
    return model


def check(anatomy: Anatomy) -> list[Site]:
    """Where tokens could share slots. Raises `UnsupportedArchitecture` for a model that has no such place."""
    places = sites(anatomy)
    if not places:
        raise UnsupportedArchitecture(
            f"no layer of this {anatomy.architecture.model_type} model has plain full attention with a "
            f"cache of its own: what slides or keeps a state is bounded already, sinks, gates, latents cannot be merged"
        )
    return places


def free(model: PreTrainedModel) -> PreTrainedModel:
    """Set the rows that write the gate channel to zero and let gates decide, in place; returns the model."""
    anatomy = Anatomy.of(model)
    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for site in sites(anatomy):
            for name, rows in last_channel(anatomy, site).items():
                _clear(tensors[name], rows)
    set_keep(model, 0.0)
    return model


def _clear(tensor: Tensor, rows: Tensor) -> None:
    """Set rows to zero, in place, also of a tensor that is spread over processes by rows."""
    keep = torch.ones(tensor.shape[0], dtype=tensor.dtype, device=tensor.device)
    keep = keep.index_fill(0, rows.to(tensor.device), 0).view(-1, *(1,) * (tensor.dim() - 1))
    if isinstance(tensor, DTensor):
        keep = distribute_tensor(keep, tensor.device_mesh, tensor.placements)
    tensor.mul_(keep)


def set_keep(model: PreTrainedModel, keep: float) -> None:
    """The factor of the gate channel in plain attention; at 0 gates decide."""
    model.config.dmc["keep"] = float(keep)


def is_converted(model: PreTrainedModel) -> bool:
    """Whether the model's cache can be compressed."""
    return bool(getattr(model.config, "dmc", None))


def _checked(gates: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in Gates().__dict__.items() if name != "keep"}
    for name in gates:
        if name not in known:
            raise NestlingError(f"'{name}' is not a setting of the gates: choose from {', '.join(known)}")
    values = known | gates
    for name in ("scale", "temperature", "offset"):
        if not values[name] > 0:
            raise NestlingError(f"{name} {values[name]} of the gates is not possible: give a number above 0")
    if values["method"] not in METHODS:
        raise NestlingError(f"there is no method '{values['method']}' for a cache: choose from {', '.join(METHODS)}")
    if not values["window"] >= 0:
        raise NestlingError(f"window {values['window']} is not possible: give how many tokens are kept at least")
    return values | {"keep": 1.0}


def _separators(config: Any) -> list[int]:
    """Tokens that part documents: what begins and what ends a text."""
    found: set[int] = set()
    for value in (config.bos_token_id, config.eos_token_id):
        found |= {int(token) for token in (value if isinstance(value, list) else [value]) if token is not None}
    return sorted(found)
