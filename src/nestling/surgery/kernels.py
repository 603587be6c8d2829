"""What fused kernels make of a shape: sizes that transformers' own code takes, and a kernel may refuse.

Mamba-2 kernels read their parts out of one projection and want every part to begin at a multiple of eight elements. A
declaration says so with `strides`. transformers' default for experts, grouped products, wants widths of 16 bytes. A
shape that breaks either is cut all the same, with a word about it. Unequal groups are no such case: `fit` refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping

from nestling.anatomy import Anatomy
from nestling.anatomy.notation import Dimension
from nestling.shape import Form, Value, fit

GROUPED = 8  # elements of two bytes in 16


def kernel_word(anatomy: Anatomy, shape: Mapping[str, Value]) -> str | None:
    """A sentence about the first part of a tensor that fused kernels take in the parent and may refuse in the child."""
    form = fit(anatomy, shape, check_config=False)
    for name, multiple in anatomy.architecture.strides.items():
        for part, size in _uneven(anatomy, form, name, multiple):
            fields = [axis.field for axis in anatomy.axes.values() if axis.letter in part and axis.field in shape]
            return (
                f"{' and '.join(fields)} leave {size} rows in a part of {name.removesuffix('.weight')}: fused kernels "
                f"may want multiples of {multiple} there (transformers' own code takes any)"
            )
    return _experts_word(anatomy, form)


def _experts_word(anatomy: Anatomy, form: Form) -> str | None:
    """A sentence about a width of experts that grouped products take in the parent and refuse in the child."""
    routed = anatomy.architecture.routed
    if routed is None:
        return None
    for layer, sizes in zip(form.layers, form.sizes, strict=True):
        at = f"{anatomy.layer_path(layer)}.{routed.experts}."
        for spec in (spec for name, spec in anatomy.tensors.items() if name.startswith(at)):
            for dimension in spec.layout[1:]:
                width = dimension.size(sizes)
                if len(dimension.parts) == 1 and width % GROUPED and not dimension.size(anatomy.sizes(layer)) % GROUPED:
                    fields = [axis.field for axis in anatomy.axes.values() if axis.letter in dimension.letters]
                    return (
                        f"{' and '.join(fields)} leaves experts {width} wide, and transformers' default for them "
                        f"(grouped_mm) takes multiples of 4 in float32, of {GROUPED} in half precision: outside of "
                        f'nestling load the model with experts_implementation="eager"'
                    )
    return None


def _uneven(anatomy: Anatomy, form: Form, name: str, multiple: int) -> list[tuple[tuple[str, ...], int]]:
    """Products of a tensor's rows, with their size in the child, that are a multiple in the parent and none there."""
    found = []
    for layer, sizes in zip(form.layers, form.sizes, strict=True):
        spec = anatomy.tensors.get(f"{anatomy.layer_path(layer)}.{name}")
        for part in spec.layout[0].parts if spec is not None else ():
            rows = Dimension((part,))
            if not rows.size(anatomy.sizes(layer)) % multiple and rows.size(sizes) % multiple:
                found.append((part, rows.size(sizes)))
    return found
