"""Two forms of a model: whether they give clips the same scenes."""

import numpy as np

from asc_ray.errors import UserError

LEAST_AGREEMENT = 0.995  # share of the clips for which two forms name the same scene


def differing(one: np.ndarray, other: np.ndarray, forms: str, remedy: str) -> int:
    """Return for how many clips the logits (N, scenes) of two forms name different scenes.

    Raises UserError, which names the `forms` and the `remedy`, where these are more than one clip and more than 0.5 %.
    """
    differ = int((one.argmax(1) != other.argmax(1)).sum())
    if differ > max(1, (1 - LEAST_AGREEMENT) * len(one)):
        raise UserError(f"{forms} name {differ} of {len(one)} clips differently; allowed are 0.5 %. {remedy}")
    return differ
