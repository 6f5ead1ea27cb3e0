"""Recordings: clips are consecutive seconds of them, as their names say."""

from collections.abc import Sequence

import numpy as np

from asc_ray.data.corpus import Clip
from asc_ray.errors import ConfigError


def following(clips: Sequence[Clip]) -> np.ndarray:
    """Return for each clip of a part the index of the second that follows it in its recording, else its own, (N,).

    Names are TAU22's, SCENE-CITY-PLACE-RECORDING-SECOND-DEVICE, so the second that follows is of the same device.
    """
    index_of = {clip.clip_id: index for index, clip in enumerate(clips)}
    found = np.arange(len(clips))
    for index, clip in enumerate(clips):
        recording, second, device = ("", "", *clip.clip_id.rsplit("-", 2))[-3:]
        if second.isdecimal():
            after = index_of.get(f"{recording}-{int(second) + 1}-{device}", index)
            if (clips[after].scene, clips[after].place) == (clip.scene, clip.place):  # else it is no recording's name
                found[index] = after
    return found


def is_followed(clips: Sequence[Clip]) -> bool:
    """Whether any of the clips is followed by another second of its recording among them."""
    return not np.array_equal(following(clips), np.arange(len(clips)))


def check_followed(key: str, followed: bool, example: str) -> None:
    """Raise ConfigError unless some clip of the training split is `followed` by another second; `example` is one."""
    if not followed:
        raise ConfigError(
            f"{key}.augment.crop: no training clip is followed by another second of its recording; names end in "
            f"-SECOND-DEVICE, as in park-lisbon-1000-40000-0-a.wav; found {example}; leave augment.crop out"
        )
