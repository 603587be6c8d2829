"""`masked`: for a while, the parent computes exactly what the slice would.

Every tensor is seen through a zero mask that the anatomy implies, dropped layers return their input, routers choose
among the experts that stay, and every norm
takes its statistics over the kept channels only (zeroed channels would otherwise still count in the mean; see
arXiv 2504.11409 and the identity RMSNorm_slice(x_k; eps) = sqrt(r) RMSNorm_full(m x; eps r)). Parameters are
shadowed on their modules while the layer runs, never changed, so gradients reach the parent and are zero outside the
slice. For a whole layer, because mixers read the weights of modules that they do not call (a convolution, a norm inside
a fused kernel); such a norm is corrected by that identity, through its weight and eps, in each of its groups at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy, TensorSpec
from nestling.anatomy.routing import narrowed
from nestling.errors import ShapeError
from nestling.ranking.ranking import Ranking
from nestling.surgery.choose import Selection, choose, prefix_ranking
from nestling.surgery.cut import current_ranking, sorted_by

EPS = "variance_epsilon"
SHADOWED = "_nestling_shadowed_"


@contextmanager
def masked(
    model: PreTrainedModel, shape: Mapping[str, Any], ranking: Ranking | None = None
) -> Iterator[PreTrainedModel]:
    """Within this context `model` computes what the model pruned to `shape` would, in logits and gradients.

    ranking: which units stay. Without one they are the first of every axis, which is right for a model that
    `reorder` has sorted; a shape with fewer layers then needs that the model was sorted by a ranking of its layers.
    """
    anatomy = Anatomy.of(model)
    selection = choose(anatomy, _ranking_for(model, anatomy, shape, ranking), shape)
    with ExitStack() as hooks:
        for path, specs in by_module(anatomy).items():
            _mask_module(model, path, specs, selection, hooks)
        for layer, module in enumerate(anatomy.layers(model)):
            if layer not in selection.form.layers:
                hooks.enter_context(anatomy.bypassed(module))
        yield model


def _ranking_for(
    model: PreTrainedModel, anatomy: Anatomy, shape: Mapping[str, Any], ranking: Ranking | None
) -> Ranking:
    if ranking is not None:
        return current_ranking(model, ranking)
    known = sorted_by(model)
    depth = known.scores.get(anatomy.depth_field) if known else None
    if depth is None and anatomy.depth_field in shape and shape[anatomy.depth_field] != anatomy.num_layers:
        raise ShapeError(
            f"{anatomy.depth_field}={shape[anatomy.depth_field]} without an order of the layers: pass ranking=, or "
            f"call reorder(model, ranking) first"
        )
    return prefix_ranking(anatomy, depth if isinstance(depth, Tensor) else torch.zeros(anatomy.num_layers))


def by_module(anatomy: Anatomy) -> dict[str, list[TensorSpec]]:
    modules: dict[str, list[TensorSpec]] = {}
    for spec in anatomy.tensors.values():
        modules.setdefault(spec.module, []).append(spec)
    return modules


def _mask_module(model: nn.Module, path: str, specs: list[TensorSpec], selection: Selection, hooks: ExitStack) -> None:
    anatomy, layer, module = selection.anatomy, specs[0].layer, model.get_submodule(path)
    if layer is not None and layer not in selection.form.layers:
        return
    indices = {spec.name.rpartition(".")[2]: selection.index(spec) for spec in specs}
    cut = {name: index for name, index in indices.items() if _shortened(index, getattr(module, name))}
    if not cut:
        return
    relative = path.removeprefix(f"{anatomy.layer_path(layer or 0)}.")
    routed = anatomy.architecture.routed
    if routed is not None and relative == routed.router and (kept := next(iter(indices.values()))[0]) is not None:
        hooks.callback(module.register_forward_hook(_route_among(kept)).remove)
        return
    inner = is_inner(anatomy, path, layer)
    if is_norm(module, specs) and not inner:
        kept = next(iter(cut.values()))[0]
        assert kept is not None
        hooks.callback(module.register_forward_hook(narrow_norm(kept)).remove)
        return
    views: dict[str, Callable[[Any], Any]] = {
        name: times(_mask(getattr(module, name), index)) for name, index in cut.items()
    }
    if inner:
        views = _corrected(module, views, cut["weight"][0])
    runs = module if layer is None else model.get_submodule(anatomy.layer_path(layer))
    hooks.callback(runs.register_forward_pre_hook(shadow(module, views)).remove)
    hooks.callback(runs.register_forward_hook(unshadow(module, views), always_call=True).remove)


def _shortened(index: tuple[LongTensor | None, ...], tensor: Tensor) -> bool:
    return any(kept is not None and kept.shape[-1] < size for kept, size in zip(index, tensor.shape, strict=True))


def is_norm(module: nn.Module, specs: list[TensorSpec]) -> bool:
    """A leaf whose tensors are all vectors over the same channels normalizes them."""
    return not any(True for _ in module.children()) and all(len(spec.layout) == 1 for spec in specs)


def is_inner(anatomy: Anatomy, path: str, layer: int | None) -> bool:
    """Whether a module is a norm that its mixer may apply inside a kernel, without calling it."""
    return layer is not None and path.removeprefix(f"{anatomy.layer_path(layer)}.") in anatomy.architecture.inner_norms


def _mask(tensor: Tensor, index: tuple[LongTensor | None, ...]) -> Tensor:
    """A tensor of ones that broadcasts, with zeros where any dimension's element is not kept."""
    mask = torch.ones((), dtype=tensor.dtype, device=tensor.device)
    for dim, kept in enumerate(index):
        if kept is not None:
            mask = mask * _line(tensor, dim, index[0], kept.to(tensor.device))
    return mask


def _line(tensor: Tensor, dim: int, first: LongTensor | None, kept: Tensor) -> Tensor:
    """Ones at the kept elements of one dimension, which may differ between kept elements of the `first` dimension."""
    shape = [1] * tensor.dim()
    shape[0] = len(tensor) if kept.dim() > 1 else 1
    line = tensor.new_zeros(shape[0], tensor.shape[dim], requires_grad=False)
    if kept.dim() == 1:
        line[0, kept] = 1
    else:
        rows = torch.arange(len(tensor)) if first is None else first
        line[rows.to(tensor.device)[:, None], kept] = 1
    shape[dim] = tensor.shape[dim]
    return line.view(shape)


def times(factor: Tensor | float) -> Callable[[Any], Any]:
    return lambda value: value * factor


def _corrected(module: nn.Module, views: dict[str, Callable], kept: LongTensor | None) -> dict[str, Callable]:
    """Weight and eps by which a norm over all channels, those that go at zero, is one over the `kept` ones."""
    assert kept is not None
    share = len(kept) / len(cast(Tensor, module.weight))
    weight = views["weight"]
    return views | {"weight": lambda value: weight(value) * share**0.5, EPS: times(share)}


def shadow(module: nn.Module, views: dict[str, Callable]) -> Callable[..., None]:
    """Hook that puts a view of each attribute in front of it, and `unshadow` the one that takes it away again."""

    def hook(runs: nn.Module, args: Any) -> None:
        for name, view in views.items():
            module.__dict__[SHADOWED + name] = module.__dict__.get(name)
            module.__dict__[name] = view(getattr(module, name))

    return hook


def unshadow(module: nn.Module, views: dict[str, Callable]) -> Callable[..., None]:
    def hook(runs: nn.Module, args: Any, output: Any) -> None:
        for name in views:
            before = module.__dict__.pop(SHADOWED + name, None)
            module.__dict__.pop(name, None)
            if before is not None:  # a plain attribute; parameters are not in the module's dict
                module.__dict__[name] = before

    return hook


def _route_among(kept: LongTensor) -> Callable[..., Any]:
    """Replace a router's output by that of the same router over the kept experts."""
    return lambda module, args, output: narrowed(module, kept)(*args)


def narrow_norm(kept: LongTensor) -> Callable[..., Tensor]:
    """Replace a norm's output by that of the same norm over the kept channels, zero elsewhere."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        index = kept.to(output.device)
        narrow = copy.copy(module)
        narrow.__dict__ = dict(module.__dict__) | {
            "_forward_hooks": {},
            "_forward_pre_hooks": {},
            "_parameters": {},
        }
        for name, parameter in module._parameters.items():
            narrow.__dict__[name] = None if parameter is None else parameter[index]
        if hasattr(module, "normalized_shape"):
            narrow.__dict__["normalized_shape"] = (len(kept),)
        inner = narrow(args[0][..., index], *args[1:])
        return torch.zeros_like(output).index_copy(-1, index, inner)

    return hook
