"""The parent under soft masks: what it computes when sizes are only likely, differentiable in their chances.

With chances pi over the sizes of an axis its mask is sum_i pi_i I_i, I_i = 1 for the first i units (Nemotron Elastic,
arXiv 2511.16664, equation 51). It stands where the axis is read: at the columns of the matrices that read it. A norm
becomes the mean, by pi, of the same norm over the first i channels, so nothing needs to be corrected for zeros. A
layer adds its chance of staying times what it would add. At a hard choice all of this is exactly the slice.

Axes that no matrix reads (a Mamba state), and those that a mixer normalizes inside its own kernel, are masked on every
tensor that has them; such a norm is corrected by the mean of what each size would ask for, as the released code does.
Routed experts are chosen, not masked: a router picks among the likeliest number of them, and the chances of that
number follow the budget and the other axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy, TensorSpec
from nestling.anatomy.notation import Choice, Dimension
from nestling.anatomy.routing import narrowed
from nestling.elastic.space import PerChoice, Space
from nestling.surgery.mask import EPS, by_module, is_inner, is_norm, narrow_norm, shadow, times, unshadow

Masks = Mapping[str, Tensor]
Views = dict[str, Callable[[Any], Any]]


@contextmanager
def softly(model: PreTrainedModel, space: Space, chances: PerChoice) -> Iterator[PreTrainedModel]:
    """Within this context `model`, which is sorted, computes with chances `[rows, choices]` for each knob.

    Activations must not be recomputed in the backward pass: it runs after the context.
    """
    anatomy = space.anatomy
    with ExitStack() as hooks:
        for path, specs in by_module(anatomy).items():
            layer, module = specs[0].layer, model.get_submodule(path)
            likely = _Likely(space, chances, layer, module)
            inner = is_inner(anatomy, path, layer)
            if likely.routes(path):
                hooks.callback(module.register_forward_hook(likely.router(specs[0])).remove)
                continue
            if is_norm(module, specs) and not inner:
                if likely.letters & specs[0].letters:
                    hooks.callback(module.register_forward_hook(likely.norm(specs[0])).remove)
            elif layer is not None:
                views = likely.views(specs) | (likely.correction(module, specs) if inner else {})
                if views:
                    runs = model.get_submodule(anatomy.layer_path(layer))
                    hooks.callback(runs.register_forward_pre_hook(shadow(module, views)).remove)
                    hooks.callback(runs.register_forward_hook(unshadow(module, views), always_call=True).remove)
        if anatomy.depth_field in space.knobs:
            gates = space.gates(chances[anatomy.depth_field])
            for gate, module in zip(gates, anatomy.layers(model), strict=True):
                hooks.callback(module.register_forward_hook(_gate(gate), with_kwargs=True).remove)
        yield model


class _Likely:
    """The chances that rule one module."""

    def __init__(self, space: Space, chances: PerChoice, layer: int | None, module: nn.Module):
        self.anatomy, self.layer = space.anatomy, layer
        parameter = next(module.parameters(recurse=False))
        self.knobs = {
            knob.letter: (
                space.spread(field, knob.sizes)[layer or 0].long().tolist(),
                space.spread(field, chances[field])[layer or 0].to(parameter),
            )
            for field, knob in space.knobs.items()
            if knob.letter is not None and (layer is None or _has(space.anatomy, field, layer))
        }
        self.letters = frozenset(self.knobs)

    def routes(self, path: str) -> bool:
        """Whether a module is a router whose experts are chosen from."""
        routed = self.anatomy.architecture.routed
        if routed is None or self.layer is None or not self.letters & self._of_experts():
            return False
        return path == f"{self.anatomy.layer_path(self.layer)}.{routed.router}"

    def router(self, spec: TensorSpec) -> Callable[..., Any]:
        """A hook that lets a router choose among the likeliest number of experts; a choice has no mean."""
        choices = {}
        for letter in self.letters & self._of_experts():
            sizes, chances = self.knobs[letter]
            choices[letter] = Choice(torch.arange(sizes[int(chances.argmax())]))
        kept = spec.layout[0].index(choices, self.anatomy.sizes(self.layer))
        assert kept is not None
        return lambda module, args, output: narrowed(module, kept)(*args)

    def _of_experts(self) -> frozenset[str]:
        return frozenset(axis.letter for axis in self.anatomy.axes.values() if axis.active)

    def views(self, specs: list[TensorSpec]) -> Views:
        """How a module's tensors are seen, by name."""
        seen = {spec.name.rpartition(".")[2]: self._masks(spec) for spec in specs}
        return {name: _multiplied(masks) for name, masks in seen.items() if masks}

    def correction(self, module: nn.Module, specs: list[TensorSpec]) -> Views:
        """Weight and eps by which a norm inside a kernel averages over what is likely to be kept."""
        dimension, sizes = specs[0].layout[0], self.anatomy.sizes(self.layer)
        letters = sorted(self.letters & specs[0].letters)
        if not letters:
            return {}
        root = share = torch.ones((), dtype=torch.float64)
        for letter in letters:
            size, chances = self.knobs[letter]
            parts = torch.tensor(size, dtype=torch.float64, device=chances.device) / sizes[letter]
            share, root = share * (chances * parts).sum(), root * (chances * parts.sqrt()).sum()
        mask = _along(dimension, {letter: self._units(letter) for letter in letters}, sizes)
        return {"weight": lambda value: value * (mask * root).to(value.dtype), EPS: times(share.item())}

    def _masks(self, spec: TensorSpec) -> list[Tensor]:
        """Masks to multiply a tensor with, each along one dimension."""
        everywhere = self.letters - _read(self.anatomy, spec.layer) - self._of_experts()
        masks = []
        for dim, dimension in enumerate(spec.layout):
            wanted = self.letters - self._of_experts() if dim > 0 and dim == len(spec.layout) - 1 else everywhere
            wanted &= dimension.letters
            if wanted:
                line = _along(dimension, {k: self._units(k) for k in wanted}, self.anatomy.sizes(self.layer))
                masks.append(line.view([-1 if i == dim else 1 for i in range(len(spec.layout))]))
        return masks

    def norm(self, spec: TensorSpec) -> Callable[..., Tensor]:
        """A hook that replaces a norm's output by the mean over sizes of that of the narrower norm."""
        letters = sorted(self.letters & spec.letters)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            total = torch.zeros_like(output)
            for picks in itertools.product(*(range(len(self.knobs[letter][0])) for letter in letters)):
                chance = torch.ones((), dtype=output.dtype, device=output.device)
                choices = {}
                for letter, pick in zip(letters, picks, strict=True):
                    sizes, chances = self.knobs[letter]
                    chance, choices[letter] = chance * chances[pick].to(output), Choice(torch.arange(sizes[pick]))
                index = spec.layout[0].index(choices, self.anatomy.sizes(self.layer))
                assert index is not None
                whole = len(index) == output.shape[-1]
                total = total + chance * (output if whole else narrow_norm(index)(module, args, output))
            return total

        return hook

    def _units(self, letter: str) -> Tensor:
        """The mask of one letter's units: the chance that at least so many are kept."""
        sizes, chances = self.knobs[letter]
        kept = torch.arange(max(sizes))[:, None] < torch.tensor(sizes)
        return (kept.to(chances) * chances).sum(-1)


def _along(dimension: Dimension, units: Masks, sizes: Mapping[str, int]) -> Tensor:
    """The mask of a dimension's elements, from those of its letters' units."""
    device = next(iter(units.values())).device
    parts = []
    for part in dimension.parts:
        line = torch.ones((), device=device)
        for letter in part:
            size = int(letter) if letter.isdigit() else sizes[letter]
            own = units.get(letter)
            line = line[..., None] * (torch.ones(size, device=device) if own is None else own)
        parts.append(line.flatten())
    return dimension.joined(parts, sizes)


def _read(anatomy: Anatomy, layer: int | None) -> frozenset[str]:
    """Letters that some matrix of a layer has in its columns, those of norms inside kernels aside."""
    specs = [spec for spec in anatomy.tensors.values() if spec.layer == layer]
    columns = frozenset().union(*(spec.layout[-1].letters for spec in specs if len(spec.layout) > 1))
    return columns.difference(*(spec.letters for spec in specs if is_inner(anatomy, spec.module, layer)))


def _has(anatomy: Anatomy, field: str, layer: int) -> bool:
    axis = anatomy.axis(field)
    return axis.scope == "model" or anatomy.has(axis, layer)


def _multiplied(masks: list[Tensor]) -> Callable[[Any], Any]:
    def view(tensor: Tensor) -> Tensor:
        for mask in masks:
            tensor = tensor * mask.to(tensor.dtype)
        return tensor

    return view


def _gate(gate: Tensor) -> Callable[..., Any]:
    """Scale what a layer adds to its input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        gated = before + gate.to(after) * (after - before)
        return (gated, *output[1:]) if isinstance(output, tuple) else gated

    return hook
