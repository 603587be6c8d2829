"""The parent under soft masks: what it computes when sizes are only likely, differentiable in their chances.

With chances pi over the sizes of an axis its mask is sum_i pi_i I_i, I_i = 1 for the first i units (Nemotron Elastic,
arXiv 2511.16664, equation 51). It stands where the axis is read: at the columns of the matrices that read it. A norm
uses the mean, by pi, of the statistics over the first i channels, so nothing needs to be corrected for zeros. A layer
adds its chance of staying times what it would add. At a hard choice all of this is exactly the slice.

Axes that no matrix reads (a Mamba state), and those that a mixer normalizes inside its own kernel, are masked on every
tensor that has them; such a norm is corrected by the mean of what each size would ask for, as the released code does.
Routed experts are chosen, not masked: a router picks among the likeliest number of them, and the chances of that
number follow the budget and the other axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy, TensorSpec
from nestling.anatomy.notation import Choice
from nestling.anatomy.routing import narrowed
from nestling.elastic.likely import Likely
from nestling.elastic.soft_norm import soft_norm
from nestling.elastic.space import PerChoice, Space
from nestling.surgery.mask import EPS, SHADOWED, by_module, is_inner, is_norm, shadow, times, unshadow

Views = dict[str, Callable[[Any], Any]]
Hooks = list[tuple[nn.Module, Callable[..., Any]]]


@dataclass
class _Layer:
    """Where chances act in one layer: matrices and the norms inside kernels, norms that are called, routers."""

    seen: list[tuple[nn.Module, list[TensorSpec], bool]] = field(default_factory=list)
    norms: list[tuple[nn.Module, TensorSpec]] = field(default_factory=list)
    routers: list[tuple[nn.Module, TensorSpec]] = field(default_factory=list)


class Softened:
    """A sorted model and the places in it at which chances act, found once."""

    def __init__(self, model: PreTrainedModel, space: Space):
        self.model, self.space = model, space
        anatomy = space.anatomy
        self._layers: dict[int | None, _Layer] = {layer: _Layer() for layer in (None, *range(anatomy.num_layers))}
        self._everywhere: dict[int, frozenset[str]] = {}
        for path, specs in by_module(anatomy).items():
            self._place(path, specs)
        self._running: tuple[int, Hooks] | None = None

    def _place(self, path: str, specs: list[TensorSpec]) -> None:
        anatomy, layer, module = self.space.anatomy, specs[0].layer, self.model.get_submodule(path)
        letters, here = self.space.letters_of(layer), self._layers[layer]
        inner = is_inner(anatomy, path, layer)
        if _routes(anatomy, path, layer) and letters & _of_experts(anatomy):
            here.routers.append((module, specs[0]))
        elif is_norm(module, specs) and not inner:
            if letters & specs[0].letters:
                here.norms.append((module, specs[0]))
        elif layer is not None:
            here.seen.append((module, specs, inner))

    @contextmanager
    def under(self, chances: PerChoice) -> Iterator[PreTrainedModel]:
        """Within this context the model computes with chances `[rows, choices]` for each knob."""
        likely, anatomy = Likely(self.space, chances, next(self.model.parameters())), self.space.anatomy
        with ExitStack() as hooks:
            made = {layer: self._hooks(layer, likely) for layer in self._layers}
            for part, hook in itertools.chain(*made.values()):
                hooks.callback(part.register_forward_hook(hook).remove)
            gates = self.space.gates(chances[anatomy.depth_field]) if anatomy.depth_field in self.space.knobs else None
            for layer, module in enumerate(anatomy.layers(self.model)):
                hooks.callback(module.register_forward_pre_hook(self._note(layer, made[layer])).remove)
                for part, views in self._views(layer, likely):
                    hooks.callback(module.register_forward_pre_hook(shadow(part, views)).remove)
                    hooks.callback(module.register_forward_hook(unshadow(part, views), always_call=True).remove)
                if gates is not None:
                    hooks.callback(module.register_forward_hook(_gate(gates[layer]), with_kwargs=True).remove)
            try:
                yield self.model
            finally:
                self._running = None

    def recomputed(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For `torch.utils.checkpoint`: contexts of a layer's forward pass, and of that which recomputes it.

        A layer's own hooks run outside both. What they put in front of its weights is handed on, and the hooks of the
        norms and routers in it, gone by the time of the backward pass, are set again.
        """
        if self._running is None:
            return nullcontext(), nullcontext()
        layer, hooks = self._running
        return nullcontext(), _again(hooks, [(part, _shadowed(part)) for part, _, _ in self._layers[layer].seen])

    def _note(self, layer: int, hooks: Hooks) -> Callable[..., None]:
        def note(module: nn.Module, args: Any) -> None:
            self._running = layer, hooks

        return note

    def _hooks(self, layer: int | None, likely: Likely) -> Hooks:
        """Hooks of the routers and norms of a layer. Nothing that a gradient flows through is made again later."""
        here = self._layers[layer]
        routers = [(module, self._route(module, spec, likely)) for module, spec in here.routers]
        return [*routers, *((module, soft_norm(module, spec, likely)) for module, spec in here.norms)]

    def _views(self, layer: int, likely: Likely) -> Iterator[tuple[nn.Module, Views]]:
        """The modules of a layer with tensors that are seen through masks, and how."""
        for module, specs, inner in self._layers[layer].seen:
            masks = {spec.name.rpartition(".")[2]: self._masks(spec, likely) for spec in specs}
            views = {name: _multiplied(lines) for name, lines in masks.items() if lines}
            views |= _correction(specs[0], likely) if inner else {}
            if views:
                yield module, views

    def _masks(self, spec: TensorSpec, likely: Likely) -> list[Tensor]:
        """Masks to multiply a tensor with, each along one dimension."""
        assert spec.layer is not None
        anatomy, masks = self.space.anatomy, []
        letters = self.space.letters_of(spec.layer) - _of_experts(anatomy)
        if spec.layer not in self._everywhere:
            self._everywhere[spec.layer] = letters - _read(anatomy, spec.layer)
        for dim, dimension in enumerate(spec.layout):
            columns = dim > 0 and dim == len(spec.layout) - 1
            wanted = (letters if columns else self._everywhere[spec.layer]) & dimension.letters
            if wanted:
                shape = [-1 if i == dim else 1 for i in range(len(spec.layout))]
                masks.append(likely.along(dimension, spec.layer, wanted).view(shape))
        return masks

    def _route(self, module: nn.Module, spec: TensorSpec, likely: Likely) -> Callable[..., Any]:
        """A hook that lets a router choose among the likeliest number of experts; a choice has no mean."""
        anatomy, choices = self.space.anatomy, {}
        for letter in self.space.letters_of(spec.layer) & _of_experts(anatomy):
            sizes, chances = likely.choices(letter, spec.layer)
            choices[letter] = Choice(torch.arange(sizes[int(chances.argmax())]))
        kept = spec.layout[0].index(choices, anatomy.sizes(spec.layer))
        assert kept is not None
        return lambda module, args, output: narrowed(module, kept)(*args)


def softly(model: PreTrainedModel, space: Space, chances: PerChoice) -> AbstractContextManager[PreTrainedModel]:
    """Within this context `model`, which is sorted, computes with chances `[rows, choices]` for each knob."""
    return Softened(model, space).under(chances)


def _correction(spec: TensorSpec, likely: Likely) -> Views:
    """Weight and eps by which a norm inside a kernel averages over what is likely to be kept."""
    letters = sorted(likely.space.letters_of(spec.layer) & spec.letters)
    if not letters:
        return {}
    root = share = torch.ones((), dtype=torch.float64)
    for letter in letters:
        sizes, chances = likely.choices(letter, spec.layer)
        parts = torch.tensor(sizes, dtype=torch.float64, device=chances.device)
        parts = parts / likely.space.anatomy.sizes(spec.layer)[letter]
        share, root = share * (chances * parts).sum(), root * (chances * parts.sqrt()).sum()
    mask = likely.along(spec.layout[0], spec.layer, frozenset(letters))
    return {"weight": lambda value: value * (mask * root).to(value.dtype), EPS: times(share.item())}


@contextmanager
def _again(made: Hooks, seen: list[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    """Hooks of the modules in a layer set, and values in front of their tensors."""
    with ExitStack() as hooks:
        for part, hook in made:
            hooks.callback(part.register_forward_hook(hook).remove)
        for part, values in seen:
            views = {name: _always(value) for name, value in values.items()}
            shadow(part, views)(part, ())
            hooks.callback(unshadow(part, views), part, (), None)
        yield


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _shadowed(module: nn.Module) -> dict[str, Any]:
    """What stands in front of a module's tensors now."""
    held = vars(module)
    return {name: value for name, value in held.items() if SHADOWED + name in held}


def _routes(anatomy: Anatomy, path: str, layer: int | None) -> bool:
    """Whether a module is a router whose experts are chosen from."""
    routed = anatomy.architecture.routed
    return routed is not None and layer is not None and path == f"{anatomy.layer_path(layer)}.{routed.router}"


def _of_experts(anatomy: Anatomy) -> frozenset[str]:
    return frozenset(axis.letter for axis in anatomy.axes.values() if axis.active)


def _read(anatomy: Anatomy, layer: int) -> frozenset[str]:
    """Letters that some matrix of a layer has in its columns, those of norms inside kernels aside."""
    specs = anatomy.of_layer[layer]
    columns = frozenset().union(*(spec.layout[-1].letters for spec in specs if len(spec.layout) > 1))
    return columns.difference(*(spec.letters for spec in specs if is_inner(anatomy, spec.module, layer)))


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
        gated = torch.lerp(before, after, gate.to(after))
        return (gated, *output[1:]) if isinstance(output, tuple) else gated

    return hook
