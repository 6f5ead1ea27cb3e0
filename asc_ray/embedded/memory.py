"""Where each value of a network lies in one arena, planned by lifetimes."""

from collections.abc import Mapping
from dataclasses import dataclass

from asc_ray.embedded.layers import Convolution, Layer, Network, ResidualNorm, ResponseNorm, Sum, made, taken

WORK = "work"  # name of what the front end computes in
_ALIGNED = 4  # bytes


@dataclass(frozen=True)
class Plan:
    """`at`: bytes from the arena's start, by name of a value; what only layer n needs is `scratch(n)`."""

    at: Mapping[str, int]
    bytes: int


@dataclass
class _Slot:
    """Bytes that hold one value, or several after each other, from the step `first` to the step `last`."""

    bytes: int
    first: int
    last: int


def scratch(number: int) -> str:
    return f"scratch of layer {number}"


def scratch_bytes(layer: Layer) -> int:
    """Return the bytes that the layer needs besides its values."""
    if isinstance(layer, Convolution):
        if layer.depthwise:
            return 3 * ((layer.y.width - 1) * layer.strides[1] + 3) * layer.x.channels
        _, channels, height, width = layer.weights.shape
        return int(height * width * channels)
    if isinstance(layer, ResponseNorm):
        return 4 * layer.x.channels + 256
    return 256 if isinstance(layer, ResidualNorm) else 0


def plan(network: Network, work: int) -> Plan:
    """Give every value a place in one arena. The front end is step 0, needs `work` bytes and makes the first value.

    A layer writes its output over an input that nothing reads afterwards, where its kernel allows that. Then the
    largest slots are placed first, each as low as the slots that live at the same time leave room.
    """
    last = {grid.name: step for step, layer in enumerate(network.layers, start=1) for grid in taken(layer)}
    slots = {WORK: _Slot(work, 0, 0), network.input.name: _Slot(network.input.bytes, 0, last[network.input.name])}
    for step, layer in enumerate(network.layers, start=1):
        slots[scratch(step)] = _Slot(scratch_bytes(layer), step, step)
        y = made(layer)
        if y is None:
            continue
        free = [grid for grid in taken(layer) if last[grid.name] == step and _may_overwrite(layer)]
        if free:
            slot = slots[y.name] = slots[max(free, key=lambda grid: slots[grid.name].bytes).name]
            slot.bytes, slot.last = max(slot.bytes, y.bytes), last[y.name]
        else:
            slots[y.name] = _Slot(y.bytes, step, last[y.name])
    placed: list[tuple[int, _Slot]] = []
    for slot in sorted({id(slot): slot for slot in slots.values()}.values(), key=lambda slot: -slot.bytes):
        at = 0
        for start, other in sorted(placed, key=lambda pair: pair[0]):
            together = slot.first <= other.last and other.first <= slot.last
            if together and at < start + other.bytes and start < at + slot.bytes:
                at = -(-(start + other.bytes) // _ALIGNED) * _ALIGNED
        placed.append((at, slot))
    where = {id(slot): at for at, slot in placed}
    total = max(at + slot.bytes for at, slot in placed)
    return Plan({name: where[id(slot)] for name, slot in slots.items()}, -(-total // _ALIGNED) * _ALIGNED)


def _may_overwrite(layer: Layer) -> bool:
    """Whether the layer's kernel reads each input before it writes there."""
    if isinstance(layer, Convolution):
        return layer.pointwise or layer.depthwise
    return not isinstance(layer, Sum) or layer.a.bytes == layer.y.bytes
