"""What Mamba-2 mixers have in common: gated state-space heads in groups that share B and C.

Letters: `g` groups, `h` heads inside their group, `p` channels of a head, `n` state of a channel, `k` width of the
convolution. A head may move inside its group only, since B, C and the gated norm belong to the group; channels may be
chosen head by head, since they never mix before the output. Paper: arXiv 2405.21060; pruning: 2504.11409, section 3.
"""

from collections.abc import Callable

from nestling.anatomy.declare import Axis, Config


def axes(mixers: str | tuple[str, ...], heads: str, channels: str, state: str) -> tuple[Axis, ...]:
    """The three axes of a mixer, by the config fields that hold their sizes. mixers: the names that it may have."""
    mixers = (mixers,) if isinstance(mixers, str) else mixers

    def at(place: str) -> tuple[str, ...]:
        return tuple(f"{mixer}.{place}" for mixer in mixers)

    read = at("out_proj")
    also = {"z": at("in_proj[0]"), "x": at("in_proj[1]"), "o": read}
    return (
        Axis("h", heads, within=("g",), scored_at=read, also_at=also),
        Axis("p", channels, within=("g", "h"), counts_all=False, scored_at=read, also_at=also),
        Axis(
            "n",
            state,
            within=("g",),
            counts_all=False,
            scored_at=(*at("in_proj[2]"), *at("in_proj[3]")),
            combine="product",
            metric="activation",
        ),
    )


def tensors(mixer: str) -> dict[str, str]:
    """The tensors of a mixer: z | x | B | C | dt in one projection, x | B | C in the convolution."""
    inner = "(g h p + g h p + g n + g n + g h)"
    layout = {
        "in_proj.weight": f"{inner} hidden",
        "in_proj.bias?": inner,
        "conv1d.weight": "(g h p + g n + g n) 1 k",
        "conv1d.bias?": "(g h p + g n + g n)",
        "dt_bias": "(g h)",
        "A_log": "(g h)",
        "D": "(g h)",
        "norm.weight?": "(g h p)",
        "out_proj.weight": "hidden (g h p)",
        "out_proj.bias?": "hidden",
    }
    return {f"{mixer}.{name}": spec for name, spec in layout.items()}


def expand(heads: str, channels: str) -> Callable[[Config], int | None]:
    """The factor between hidden size and inner width, where the sizes leave a whole one."""

    def factor(config: Config) -> int | None:
        quotient, rest = divmod(getattr(config, heads) * getattr(config, channels), config.hidden_size)
        return quotient if quotient and not rest else None

    return factor


# The parts of its input projection that fused kernels (mamba_ssm, causal_conv1d) read are aligned to so many elements.
ALIGNED = 8

# What a sequence keeps in one layer: the state of every head, and the last inputs of the convolution.
STATE = ("g h p n",)
RECENT = ("g h p k", "g n k", "g n k")
