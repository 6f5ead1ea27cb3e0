"""How the training clips are divided, by place, into parts that learn, fuse and validate."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from asc_ray.errors import ConfigError, CorpusError

FEWER_PARTS = "Hold out fewer parts (lower fusion.folds), or use a corpus with more places in these scenes."


def partition(
    scene: np.ndarray, place: np.ndarray, labels: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Split N clips into named parts so that no place is in two of them; {part: their sorted indices, int64}.

    `scene` (N,) are numbers of `labels`, and `place` (N,) numbers of places. Raises as `divide` does, which says what
    goes where.
    """
    share = _whole(shares)
    groups = ((labels[one], at, clips) for one, at, clips in grouped(scene, place))
    numbers = {part: number for number, part in enumerate(share)}
    part_of = np.zeros(place.max(initial=0) + 1, dtype=np.int8 if len(share) < 128 else np.int64)
    for at, part in divide(groups, shares, seed).items():
        part_of[at] = numbers[part]
    own = part_of[place]
    return {part: np.flatnonzero(own == number) for part, number in numbers.items()}


def grouped(*codes: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Yield the combinations of numbers that N clips have, each with its count, in the order of first appearance."""
    sizes = [int(own.max(initial=0)) + 1 for own in codes]
    together = np.zeros(len(codes[0]), dtype=np.int64)
    for own, size in zip(codes, sizes, strict=True):
        together *= size
        together += own
    found = pc.value_counts(pa.array(together))
    numbers = np.unravel_index(found.field("values").to_numpy(), sizes)
    yield from zip(*(own.tolist() for own in numbers), found.field("counts").to_pylist(), strict=True)


def divide(
    groups: Iterable[tuple[str, int, int]], shares: Mapping[str, float], seed: int, advice: str = FEWER_PARTS
) -> dict[int, str]:
    """Return the part of every place; `groups` are (scene, place, clips), in the order in which the clips first appear.

    `shares` gives each held-out part's share of the clips of every scene; the rest is the part "train" (left out where
    the shares add up to 1, as for cross-fitting). Per scene the places are shuffled, and each goes to the part that
    is then filled least relative to its share. A place with clips of several scenes goes as a whole.

    Raises ConfigError for impossible shares, CorpusError with `advice` where a scene has too few places.
    """
    share = _whole(shares)
    rng = np.random.default_rng(seed)
    at_place: dict[int, Counter[str]] = {}  # clips by scene
    places_of: dict[str, list[int]] = {}  # in order of appearance
    for scene, place, clips in groups:
        if scene not in (counts := at_place.setdefault(place, Counter())):
            places_of.setdefault(scene, []).append(place)
        counts[scene] += clips

    part_of: dict[int, str] = {}
    filled: dict[str, Counter[str]] = {part: Counter() for part in share}  # clips by scene
    for scene in sorted(places_of):
        free = [place for place in places_of[scene] if place not in part_of]
        rng.shuffle(free)
        for position, place in enumerate(free):
            size = at_place[place][scene]
            empty = [part for part in share if not filled[part][scene]]
            # The last places are kept for parts that have none yet, whatever their share.
            candidates = empty if len(free) - position <= len(empty) else list(share)
            part = min(candidates, key=lambda part: (filled[part][scene] + size) / share[part])
            part_of[place] = part
            filled[part] += at_place[place]

    lacking = [
        f"\n  {scene}: {len(places_of[scene])} place(s); clips "
        + ", ".join(f"{part} {filled[part][scene]}" for part in share)
        for scene in sorted(places_of)
        if not all(filled[part][scene] for part in share)
    ]
    if lacking or not at_place:
        total = sum(counts.total() for counts in at_place.values())
        raise CorpusError(
            f"no split into {', '.join(share)} by place has every scene in every part; {total} clips."
            f"{''.join(lacking)}\n{advice}"
        )
    return part_of


def _whole(shares: Mapping[str, float]) -> dict[str, float]:
    """Return the shares with that of the part "train", unless they add up to 1. Raises ConfigError."""
    rest = 1 - sum(shares.values())
    if "train" in shares or rest < -1e-9 or not all(0 < share < 1 for share in shares.values()):
        raise ConfigError(
            f"shares {dict(shares)}: each must lie between 0 and 1, together at most 1; the remainder is called 'train'"
        )
    return ({"train": rest} if rest > 1e-9 else {}) | dict(shares)


def check_held_out_devices(held_out_devices: Sequence[str], trained: Iterable[str], validated: Iterable[str]) -> None:
    """Raise ConfigError unless these devices have clips to validate on, and leave others to train on."""
    known = set(trained) & set(validated)
    if held_out_devices and not set(held_out_devices) < known:
        raise ConfigError(
            f"sweep.validation.devices: found {', '.join(held_out_devices)}; allowed are some, and not all, of "
            f"{', '.join(sorted(map(str, known)))}, the devices of the training and the validation part"
        )
