"""Norms under soft masks: the mean, by chance, of the norm over the first i channels for every size i on offer.

A root mean square over the first i channels differs from that over all of them by one number for each token, so all
sizes together are two thin products:

    y_c = norm(x)_c sum_{i > c} pi_i rho_i,     rho_i = sqrt((mean_C x^2 + eps) / (mean_i x^2 + eps))

Other norms are computed size by size. Inside a layer the mean is that over the sizes that have a channel at all,
since the matrices that read the channel are masked by the chance of that already.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import LongTensor, Tensor, nn

from nestling.anatomy import TensorSpec
from nestling.anatomy.notation import Choice
from nestling.elastic.likely import Likely
from nestling.surgery.mask import narrow_norm

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]
LEAST = 1e-6  # chance of a channel below which its mean is not taken any more
_KNOWN: WeakKeyDictionary[nn.Module, float | None] = WeakKeyDictionary()


def soft_norm(module: nn.Module, spec: TensorSpec, likely: Likely) -> Hook:
    """A hook that replaces a norm's output by its mean over the likely sizes."""
    letters = sorted(likely.space.letters_of(spec.layer) & spec.letters)
    total = None
    if len(letters) == 1 and spec.layout[0].parts == ((letters[0],),):
        eps = rms_eps(module)
        total = None if eps is None else _all_sizes(letters[0], spec, likely, eps)
    total = total or _size_by_size(letters, spec, likely)
    if spec.layer is None:  # read by the output matrix, which is not masked
        return total
    mask = likely.along(spec.layout[0], spec.layer, frozenset(letters)).clamp(min=LEAST)
    return lambda module, args, output: total(module, args, output) / mask.to(output.dtype)


def _all_sizes(letter: str, spec: TensorSpec, likely: Likely, eps: float) -> Hook:
    _, chances = likely.choices(letter, spec.layer)
    field, row = likely.space.row(letter, spec.layer)
    first = likely.space.kept_units(field)[row]  # [choices, channels]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):
            ratios = rms_ratios(args[0], first, eps)
            factor = (ratios * chances.to(ratios)) @ first.to(ratios)
        return output * factor.to(output.dtype)

    return hook


def rms_ratios(hidden: Tensor, first: Tensor, eps: float) -> Tensor:
    """rho_i of every token, `[..., choices]`.

    hidden: `[..., channels]`. first: `[choices, channels]`, which channels a size has.
    """
    squares = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).square()
    first = first.to(squares)
    means = squares @ (first / first.sum(-1, keepdim=True)).T
    return ((squares.mean(-1, keepdim=True) + eps) / (means + eps)).sqrt()


def _size_by_size(letters: list[str], spec: TensorSpec, likely: Likely) -> Hook:
    offers = {letter: likely.choices(letter, spec.layer) for letter in letters}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        total = torch.zeros_like(output)
        for picks in itertools.product(*(range(len(offers[letter][0])) for letter in letters)):
            chance = torch.ones((), dtype=output.dtype, device=output.device)
            choices = {}
            for letter, pick in zip(letters, picks, strict=True):
                sizes, chances = offers[letter]
                chance, choices[letter] = chance * chances[pick].to(output), Choice(torch.arange(sizes[pick]))
            index = spec.layout[0].index(choices, likely.space.anatomy.sizes(spec.layer))
            assert index is not None
            whole = len(index) == output.shape[-1]
            total = total + chance * (output if whole else narrow_norm(index)(module, args, output))
        return total

    return hook


def rms_eps(module: nn.Module) -> float | None:
    """The eps of a norm that divides by the root mean square; None for any other, found out by trying."""
    if module not in _KNOWN:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        _KNOWN[module] = eps if isinstance(eps, float) and _is_rms(module, eps) else None
    return _KNOWN[module]


@torch.no_grad()
def _is_rms(module: nn.Module, eps: float) -> bool:
    like = next(module.parameters())
    channels, half = len(like), -(-len(like) // 2)
    first = (torch.arange(channels) < half).to(like.device)
    noise = torch.randn(4, channels, generator=torch.Generator().manual_seed(0)).to(like)
    probe = noise + 3 * first  # so that neither means nor spreads of the halves are alike
    try:
        output = module.forward(probe)
    except (TypeError, AttributeError):  # it takes more than its input, a gate say
        return False
    expected = narrow_norm(cast(LongTensor, torch.arange(half)))(module, (probe,), output)[:, :half]
    found = output[:, :half] * rms_ratios(probe, first[None], eps).to(output)
    return bool((found - expected).norm() <= 0.01 * expected.norm())
