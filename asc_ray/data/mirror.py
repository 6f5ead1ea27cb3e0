"""A copy of a folder storage's clip store on each node's own disk."""

import os
import shutil
from pathlib import Path

from asc_ray.artifacts import MANIFEST, damaged_files
from asc_ray.errors import UserError
from asc_ray.files import locked
from asc_ray.places import is_kept


def mirrored(artifact: Path, cache: Path) -> Path:
    """Return the artifact's copy in `cache`, a folder of this node; the first to ask makes it, the others wait.

    Raises UserError when it cannot be copied whole.
    """
    if is_kept(artifact):  # which the node has a folder for anyway
        return artifact
    copy = cache / artifact.name
    try:
        with locked(cache / f".{artifact.name}.lock"):
            if not (copy / MANIFEST).is_file():
                partial = copy.with_name(f"{copy.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(artifact, partial)
                if damaged := damaged_files(partial):
                    raise UserError(f"{partial}: copied from {artifact}, but {'; '.join(damaged)}")
                os.rename(partial, copy)
    except (OSError, shutil.Error) as error:
        raise UserError(
            f"data.cache: {artifact} cannot be copied to {cache} ({error}); name a folder with more room, or null"
        ) from None
    return copy
