"""Shapes: the config fields of a smaller model, and what they mean for the model they are cut from.

`Shape` is what users write. `fit` completes it against an anatomy into a `Form` (which parent layers stay and how
large every letter is in each) or refuses it with the nearest shapes that are allowed. `child_config` writes the
config that a form has. No weights are touched here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from nestling.anatomy import Anatomy, Axis
from nestling.anatomy.per_layer import config_class, layer_config
from nestling.errors import ShapeError

Value = int | tuple[int, ...]


class Shape(Mapping[str, Value]):
    """Config fields of a target model: `Shape(intermediate_size=1152, num_hidden_layers=26)`.

    A value is an int, or a list with one value per layer of the target model.
    """

    def __init__(self, **fields: int | Sequence[int]):
        self._fields = {name: _value(name, value) for name, value in sorted(fields.items())}

    def __getitem__(self, field: str) -> Value:
        return self._fields[field]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __hash__(self) -> int:
        return hash(tuple(self._fields.items()))

    def __repr__(self) -> str:
        return f"Shape({', '.join(f'{name}={value}' for name, value in self._fields.items())})"

    def to_dict(self) -> dict[str, int | list[int]]:
        """Plain ints and lists, for JSON and YAML."""
        return {name: value if isinstance(value, int) else list(value) for name, value in self._fields.items()}

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `"intermediate_size=1152,num_hidden_layers=26"`, or a JSON file that `save` wrote."""
        if text.endswith(".json"):
            return cls.load(text)
        fields: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if not value.strip().isdecimal():
                raise ShapeError(f"'{part}' is not a size: write FIELD=NUMBER, as in intermediate_size=1152")
            fields[name.strip()] = int(value)
        if not fields:
            raise ShapeError(f"'{text}' names no size: write FIELD=NUMBER, as in intermediate_size=1152")
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Shape:
        """Read what `save` wrote. Raises `ShapeError` when the file is missing or not a JSON object."""
        try:
            fields = json.loads(Path(path).read_text())
            return cls(**fields)
        except (OSError, ValueError, TypeError) as error:
            raise ShapeError(
                f"'{path}' is not a shape file ({error}): expected JSON such as {{\"hidden_size\": 512}}"
            ) from error


def _value(name: str, value: Any) -> Value:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_size(name, item) for item in value)
    return _size(name, value)


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or int(value) != value or value < 1:
        raise ShapeError(f"{name}={value} is not a size: use a whole number from 1 up")
    return int(value)


@dataclass(frozen=True)
class Form:
    """A shape completed against an anatomy.

    layers: the parent's layers that stay, ascending. sizes: for each of them, the size of every letter.
    values: for each width axis, the value of its config field in each kept layer (one value if model-wide).
    """

    layers: tuple[int, ...]
    sizes: tuple[dict[str, int], ...]
    values: dict[str, tuple[int, ...]]

    def uniform(self, field: str) -> bool:
        return len(set(self.values[field])) <= 1


def fit(
    anatomy: Anatomy, shape: Mapping[str, Any], layers: Sequence[int] | None = None, check_config: bool = True
) -> Form:
    """Complete a shape against an anatomy.

    layers: the parent's layers that stay; the first ones unless given. check_config: also ask the config class whether
    it takes the sizes, which is slow; only for shapes made of sizes that it has taken already is it left out.
    Raises `ShapeError` for a field the model lacks, a size above the parent's, a group that would be torn, or a
    config that transformers refuses; the message names the nearest sizes that are allowed.
    """
    form = _fit(anatomy, shape, layers)
    problem = _refusal(anatomy, form) if check_config else None
    if problem:
        near = _nearest(anatomy, shape, layers)
        raise ShapeError(f"{_show(shape)} is refused by the architecture's config ({problem}); {near}")
    return form


def allows(anatomy: Anatomy, shape: Mapping[str, Any], layers: Sequence[int] | None = None) -> bool:
    """Whether `fit` takes a shape; quicker than its refusal, which looks for the nearest that it would take."""
    try:
        return _refusal(anatomy, _fit(anatomy, shape, layers)) is None
    except ShapeError:
        return False


def child_config(anatomy: Anatomy, form: Form) -> PreTrainedConfig:
    """The config of the model that a form describes: stock if its layers are alike, else with `layer_shapes`."""
    config = copy.deepcopy(anatomy.config)
    differing = {field: list(form.values[field]) for field in form.values if not form.uniform(field)}
    if differing or getattr(config, "layer_shapes", None):
        config = _per_layer(anatomy, config, differing)
    for field, values in form.values.items():
        setattr(config, field, max(values))
    _cut_depth(anatomy, config, form)
    for field, derive in anatomy.architecture.derived.items():
        value = derive(config)
        if value is not None:
            setattr(config, field, value)
    for letter, source in anatomy.architecture.sizes.items():
        written = anatomy.architecture.explicit.get(letter)
        if written and callable(source) and (differing or source(config) != anatomy.sizes(None)[letter]):
            setattr(config, written, anatomy.sizes(None)[letter])
    return config


def _per_layer(anatomy: Anatomy, config: PreTrainedConfig, differing: dict[str, list[int]]) -> PreTrainedConfig:
    model_type = anatomy.architecture.model_type
    if isinstance(config, config_class(model_type)) and type(config) is not config_class(model_type):
        config.layer_shapes = differing or None  # a method's config, which takes layers of any size
        return config
    if not differing:
        # A config that was read from a file holds its type itself too.
        fields = {name: value for name, value in config.__dict__.items() if name not in ("layer_shapes", "model_type")}
        plain = copy.copy(config)
        plain.__class__ = config_class(model_type).__mro__[1]
        plain.__dict__ = fields
        return plain
    config.__class__ = config_class(model_type)
    config.layer_shapes = differing
    return config


def _cut_depth(anatomy: Anatomy, config: PreTrainedConfig, form: Form) -> None:
    setattr(config, anatomy.depth_field, len(form.layers))
    for field in (*anatomy.architecture.per_layer_fields, *getattr(config, "per_layer_fields", ())):
        values = getattr(config, field, None)
        if values is not None:
            setattr(config, field, [values[layer] for layer in form.layers])
    for field in anatomy.architecture.layer_numbers:
        numbers = getattr(config, field, None)
        if numbers is not None:
            setattr(config, field, [new for new, layer in enumerate(form.layers) if layer in numbers])
    for field, block in anatomy.architecture.listed_blocks.items():
        setattr(config, field, [new for new, layer in enumerate(form.layers) if block in anatomy.blocks(layer)])
    for field in anatomy.architecture.layer_thresholds:
        limit = getattr(config, field, None)
        if limit is not None and limit < anatomy.num_layers:
            setattr(config, field, min(limit, sum(layer < limit for layer in form.layers)) or 0)


# ---- completing


def _fit(anatomy: Anatomy, shape: Mapping[str, Any], layers: Sequence[int] | None) -> Form:
    wanted: dict[str, Any] = dict(Shape(**dict(shape)))
    for field in wanted:
        if field != anatomy.depth_field:
            anatomy.axis(field)
    kept = _kept_layers(anatomy, wanted, layers)
    _couple_heads(anatomy, wanted)
    values = {field: _values(anatomy, axis, wanted, kept) for field, axis in anatomy.axes.items()}
    sizes = []
    for position, layer in enumerate(kept):
        layer_sizes = dict(anatomy.sizes(layer))
        for axis in anatomy.axes.values():
            if axis.scope == "model" or anatomy.has(axis, layer):
                total = values[axis.field][0 if axis.scope == "model" else position]
                layer_sizes[axis.letter] = _letter_size(anatomy, axis, total, layer_sizes, layer)
        sizes.append(layer_sizes)
    return Form(tuple(kept), tuple(sizes), values)


def _kept_layers(anatomy: Anatomy, wanted: dict[str, Any], layers: Sequence[int] | None) -> list[int]:
    count = wanted.get(anatomy.depth_field, len(layers) if layers is not None else anatomy.num_layers)
    if not isinstance(count, int) or count > anatomy.num_layers:
        raise ShapeError(
            f"{anatomy.depth_field}={count} cannot be cut from {anatomy.num_layers} layers: give one number up to that"
        )
    kept = sorted(layers) if layers is not None else list(range(count))
    if not anatomy.sharing.in_turn(kept):
        raise ShapeError(
            f"layers {kept} cannot stay alone: a {anatomy.architecture.model_type} takes its shared blocks in turn, "
            f"so drop such layers from the end, or none"
        )
    if len(kept) != count:
        raise ShapeError(f"{anatomy.depth_field}={count} but {len(kept)} layers were named: let the two agree")
    return kept


def _couple_heads(anatomy: Anatomy, wanted: dict[str, Any]) -> None:
    """Inner axes follow outer ones: KV groups take their query heads along, and lone heads their groups."""
    for axis in anatomy.axes.values():
        if not axis.counts_all or len(axis.within) != 1:
            continue
        outer = anatomy.by_letter(axis.within[0]) if axis.within[0] in _letters(anatomy) else None
        if outer is None:
            continue
        inner_size = anatomy.sizes(None)[axis.letter]
        if outer.field in wanted and axis.field not in wanted:
            wanted[axis.field] = _times(wanted[outer.field], inner_size)
        elif axis.field in wanted and outer.field not in wanted and inner_size == 1:
            wanted[outer.field] = wanted[axis.field]


def _letters(anatomy: Anatomy) -> set[str]:
    return {axis.letter for axis in anatomy.axes.values()}


def _times(value: Value, factor: int) -> Value:
    return value * factor if isinstance(value, int) else tuple(item * factor for item in value)


def _values(anatomy: Anatomy, axis: Axis, wanted: dict[str, Any], kept: list[int]) -> tuple[int, ...]:
    """The value of an axis's config field in every kept layer, checked against the parent's."""
    if axis.field not in wanted:
        return tuple(anatomy.value(axis, layer) for layer in (kept[:1] if axis.scope == "model" else kept))
    given = wanted[axis.field]
    if axis.scope == "model" and not isinstance(given, int):
        raise ShapeError(f"{axis.field} runs through the whole model: give one number instead of {list(given)}")
    if axis.field in anatomy.architecture.alike and not isinstance(given, int) and len(set(given)) > 1:
        raise ShapeError(
            f"{axis.field} is one size for all layers of a {anatomy.architecture.model_type}: give one number"
        )
    if not isinstance(given, int) and len(given) != len(kept):
        raise ShapeError(
            f"{axis.field} has {len(given)} values but the target has {len(kept)} layers: give one value per kept layer"
        )
    values = (given,) * (1 if axis.scope == "model" else len(kept)) if isinstance(given, int) else tuple(given)
    for value, layer in zip(values, kept, strict=False):
        if value > anatomy.value(axis, layer):
            raise ShapeError(
                f"{axis.field}={value} is larger than the parent's {anatomy.value(axis, layer)} in layer {layer}: "
                f"pruning only makes smaller"
            )
    return values


def _letter_size(anatomy: Anatomy, axis: Axis, total: int, sizes: dict[str, int], layer: int) -> int:
    groups = 1
    for outer in axis.within if axis.counts_all else ():
        groups *= sizes[outer]
    most = anatomy.sizes(layer)[axis.letter]
    if total % groups or total // groups > most:
        allowed = [groups * n for n in range(1, most + 1)]
        raise ShapeError(
            f"{axis.field}={total} does not give each of the {groups} groups ({', '.join(axis.within)}) the same "
            f"number of units, at most {most}: nearest allowed are {_neighbours(total, allowed)}"
        )
    return total // groups


# ---- what the config class itself refuses


def _refusal(anatomy: Anatomy, form: Form) -> str | None:
    """Why transformers refuses the child's config, in one line; None if it takes it."""
    for axis in anatomy.axes.values():
        used = getattr(anatomy.config, axis.active) if axis.active else 1
        fewest = min((value for value in form.values[axis.field] if value), default=used)
        if fewest < used:
            return f"{axis.active}={used}, but {axis.field}={fewest}"
    try:
        config = child_config(anatomy, form)
        type(config).from_dict(config.to_dict()).validate()  # a class of ours validates only when it is saved
        for layer in range(len(form.layers)) if getattr(config, "layer_shapes", None) else ():
            layer_config(config, layer)
        if anatomy.architecture.refuses and (why := anatomy.architecture.refuses(config)):
            return why
    except Exception as error:  # the config classes raise what they like; all of it means "not this shape"
        return " ".join(str(error).split("\n")[-1].split())
    return None


def _nearest(anatomy: Anatomy, shape: Mapping[str, Any], layers: Sequence[int] | None) -> str:
    found = []
    for field, value in shape.items():
        if isinstance(value, int) and field != anatomy.depth_field:
            top = anatomy.value(anatomy.axis(field), 0)
            below = _first_allowed(anatomy, shape, layers, field, range(value - 1, max(0, value - 257), -1))
            above = _first_allowed(anatomy, shape, layers, field, range(value + 1, min(top, value + 256) + 1))
            found += [f"{field}={near}" for near in (below, above) if near is not None]
    return f"nearest allowed: {' or '.join(found)}" if found else "change one of these sizes"


def _first_allowed(
    anatomy: Anatomy, shape: Mapping[str, Any], layers: Sequence[int] | None, field: str, values: range
) -> int | None:
    for value in values:
        try:
            form = _fit(anatomy, dict(shape) | {field: value}, layers)
        except ShapeError:
            continue
        if _refusal(anatomy, form) is None:
            return value
    return None


def _neighbours(value: int, allowed: list[int]) -> str:
    below = [item for item in allowed if item < value][-1:]
    above = [item for item in allowed if item > value][:1]
    return " and ".join(map(str, below + above))


def _show(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in shape.items())
