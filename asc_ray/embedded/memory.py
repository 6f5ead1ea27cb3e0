"""Where each value of a network lies in one arena, planned by lifetimes."""

from collections.abc import Mapping
from dataclasses import dataclass

from asc_ray.embedded.layers import Convolution, Layer, Network, ResidualNorm, ResponseNorm, Sum, made, taken

WORK = "work"  # name of what the front end computes in
_ALIGNED = 8  # bytes


@dataclass(frozen=True)
class Plan:
    """`at`: bytes from the arena's start, by name of a value; what only layer n needs is `scratch(n)`."""

    at: Mapping[str, int]
    bytes: int


# A place's contents one after the other: (bytes, first step, last step).
_Contents = list[tuple[int, int, int]]


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

    A layer writes its output over an input that nothing reads afterwards, where its kernel allows that, so one place
    holds several values after each other. The places with the largest contents are chosen first, each as low as what
    lives at the same time leaves room.
    """
    last = {grid.name: step for step, layer in enumerate(network.layers, start=1) for grid in taken(layer)}
    input = network.input
    places: dict[str, _Contents] = {WORK: [(work, 0, 0)], input.name: [(input.bytes, 0, last[input.name])]}
    for step, layer in enumerate(network.layers, start=1):
        places[scratch(step)] = [(scratch_bytes(layer), step, step)]
        if y := made(layer):
            free = [grid for grid in taken(layer) if last[grid.name] == step and _may_overwrite(layer)]
            place = places[free[-1].name] if free else []  # of a sum the shortcut, which lay there for longer
            place.append((y.bytes, step, last[y.name]))
            places[y.name] = place
    at: dict[int, int] = {}
    placed: list[_Contents] = []
    for place in sorted({id(place): place for place in places.values()}.values(), key=max, reverse=True):
        occupied = [
            (at[id(other)], at[id(other)] + size, own)
            for other in placed
            for size, *times in other
            for own, *own_times in place
            if times[0] <= own_times[1] and own_times[0] <= times[1]
        ]
        candidates = sorted({0, *(-(-high // _ALIGNED) * _ALIGNED for _, high, _ in occupied)})
        at[id(place)] = next(
            start for start in candidates if not any(start < high and low < start + own for low, high, own in occupied)
        )
        placed.append(place)
    end = max(at[id(place)] + max(place)[0] for place in placed)
    return Plan({name: at[id(place)] for name, place in places.items()}, -(-end // _ALIGNED) * _ALIGNED)


def _may_overwrite(layer: Layer) -> bool:
    """Whether the layer's kernel reads each input before it writes there."""
    if isinstance(layer, Convolution):
        return layer.pointwise or layer.depthwise
    return not isinstance(layer, Sum) or layer.a.bytes == layer.y.bytes
