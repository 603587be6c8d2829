"""Accelerators by name: how fast they compute, what they hold, and how they reach each other.

Figures are the makers' own, dense (no sparsity), for the variant that servers have (SXM where there is one). Peak is
bfloat16 with float32 accumulation. A link is one direction of one device to the others of its node; between nodes each
device has a network of its own, 400 Gb/s unless said otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nestling.errors import TargetError

GIB = 2**30
NETWORK = 50e9  # bytes per second, one direction
RESERVE = 0.08  # part of the memory that fragments
LIBRARIES = 1.5 * GIB  # context, kernels and communication buffers


@dataclass(frozen=True)
class Device:
    """One accelerator.

    flops: peak bfloat16, per second. memory: bytes. bandwidth: of its memory, bytes per second. link: to its
    neighbours, bytes per second.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float

    @property
    def usable(self) -> float:
        """Bytes that are left for tensors."""
        return self.memory * (1 - RESERVE) - LIBRARIES


_ALL = (
    Device("B200", 2250e12, 180 * GIB, 8.0e12, 900e9),
    Device("H200", 989e12, 141 * GIB, 4.8e12, 450e9),
    Device("H100", 989e12, 80 * GIB, 3.35e12, 450e9),
    Device("A100", 312e12, 80 * GIB, 2.04e12, 300e9),
    Device("A100-40GB", 312e12, 40 * GIB, 1.56e12, 300e9),
    Device("L40S", 362e12, 48 * GIB, 0.86e12, 32e9),
    Device("L4", 121e12, 24 * GIB, 0.30e12, 32e9),
    Device("RTX4090", 165e12, 24 * GIB, 1.01e12, 32e9),
    Device("MI300X", 1307e12, 192 * GIB, 5.3e12, 448e9),
)
DEVICES = {device.name.lower(): device for device in _ALL}
_SPELLED = re.compile(r"((?:\d+x)*)([A-Za-z][\w-]*)\Z")


@dataclass(frozen=True)
class Machines:
    """`count` devices of one kind, `per_node` in each node. network: between nodes, bytes per second and device."""

    device: Device
    count: int
    per_node: int
    network: float = NETWORK

    @classmethod
    def parse(cls, text: str, **own: float | None) -> Machines:
        """Read `8xH100` or, with nodes, `32x8xH100`.

        own: `flops`, `memory`, `bandwidth`, `link` instead of the table's, and `network`; a device that is not in the
        table needs the first two. Raises `TargetError`.
        """
        found = _SPELLED.match(text.strip())
        if not found:
            raise TargetError(f"gpus '{text}' cannot be read: write 8xH100, or 32x8xH100 for 32 nodes of 8")
        numbers = [int(number) for number in found.group(1).split("x")[:-1]] or [1]
        if len(numbers) > 2 or min(numbers) < 1:
            raise TargetError(
                f"gpus '{text}' cannot be read: give a number of devices, or of nodes and devices in each"
            )
        given = {name: value for name, value in own.items() if value is not None}
        network = given.pop("network", NETWORK)
        device = _device(found.group(2), given)
        count = numbers[0] * numbers[-1] if len(numbers) == 2 else numbers[0]
        per_node = numbers[-1] if len(numbers) == 2 else min(8, count)
        return cls(device, count, per_node, network)

    @property
    def link(self) -> float:
        """Bytes per second at which a device exchanges data with all others: its slowest way."""
        return self.device.link if self.count <= self.per_node else min(self.device.link, self.network)

    def __str__(self) -> str:
        nodes = self.count // self.per_node
        return f"{nodes}x{self.per_node}x{self.device.name}" if nodes > 1 else f"{self.count}x{self.device.name}"


def _device(name: str, given: dict[str, float]) -> Device:
    known = DEVICES.get(name.lower())
    if known is not None:
        return replace(known, **given)  # type: ignore[arg-type]
    if not {"flops", "memory"} <= set(given):
        names = ", ".join(device.name for device in _ALL)
        raise TargetError(
            f"'{name}' is not a device that is known here ({names}): take one of these, or say what yours has with "
            f"--device_flops and --device_memory"
        )
    return Device(name, **({"bandwidth": 1e12, "link": 32e9} | given))
