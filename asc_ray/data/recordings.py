"""Recordings: clips are consecutive seconds of them, as their names say, or because they were cut."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from asc_ray.errors import ConfigError


def following(ids: pa.ChunkedArray, scene: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return for each clip of a part the index of the second that follows it in its recording, else its own, (N,).

    Names are TAU22's, SCENE-CITY-PLACE-RECORDING-SECOND-DEVICE, so the second that follows is of the same device.
    `scene` and `place` (N,) are numbers.
    """
    # RE2: the second has so many digits at most that a number holds it.
    parts = pc.extract_regex(ids, r"^(?P<recording>(?s:.*))-(?P<second>[0-9]{1,18})-(?P<device>[^-]*)$")
    recording, second, device = (pc.struct_field(parts, name) for name in ("recording", "second", "device"))
    after = pc.cast(pc.add(pc.cast(second, pa.int64()), 1), pa.string())
    found = pc.index_in(pc.binary_join_element_wise(recording, after, device, "-"), value_set=ids, skip_nulls=True)
    own = np.arange(len(ids))
    after = np.where(found.is_null().to_numpy(), own, found.fill_null(0).to_numpy())
    same = (scene[after] == scene) & (place[after] == place)  # else it is no recording's name
    return np.where(same, after, own)


def cut_following(recording: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return what `following` does for clips that were cut: seconds (N,) of recordings (N,), which are numbers."""
    order = np.lexsort((second, recording))
    before, after = order[:-1], order[1:]
    next_to = (recording[before] == recording[after]) & (second[before] + 1 == second[after])
    found = np.arange(len(order))
    found[before[next_to]] = after[next_to]
    return found


def check_followed(key: str, followed: bool, example: str) -> None:
    """Raise ConfigError unless some clip of the training split is `followed` by another second; `example` is one."""
    if not followed:
        raise ConfigError(
            f"{key}.augment.crop: no training clip is followed by another second of its recording; names end in "
            f"-SECOND-DEVICE, as in park-lisbon-1000-40000-0-a.wav; found {example}; leave augment.crop out"
        )
