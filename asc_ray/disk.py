"""The disk under a storage: where it is full, read-only, broken or gone, a run ends with one line and can go on."""

import errno
import os
import re
import shutil
import tempfile
import traceback
from pathlib import Path

from asc_ray.errors import UserError
from asc_ray.places import is_kept, named

# What a user does about each, by the system's own words, which every library puts into its error.
_REMEDIES = {
    os.strerror(code): remedy
    for remedy, codes in {
        "make room": (errno.ENOSPC, errno.EDQUOT),
        "mount it writable": (errno.EROFS,),
        "look after the disk": (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO),
    }.items()
    for code in codes
}
_GONE = re.compile(rf"\[Errno {errno.ENOENT}\] [^:\n]+: '([^'\n]+)'")
_PROBE_BYTES = 1 << 20
GOES_ON = "and the same command goes on from here"
_OWN_LINE = re.compile(rf"(storage|data\.cache) [^\n]*, {GOES_ON}")  # of a DiskError, in another library's words


class DiskError(UserError):
    """A storage cannot be written or read. This says nothing of what was being made, which is made by the next run."""


def disk_error(error: BaseException | str, storage: Path) -> DiskError | None:
    """Return what the disk under the storage has done, if the error came of it; None for any other error.

    The error, or its message, may be of any library and from any worker. If its words do not tell, the storage is
    tried.
    """
    if isinstance(error, DiskError):
        return error
    text = error if isinstance(error, str) else "".join(traceback.format_exception(error))
    if told := _OWN_LINE.search(text):
        return DiskError(told[0])
    for folder in (storage, *(Path(found).parent for found in _GONE.findall(text))):
        if folder.is_relative_to(storage) and not folder.exists():
            return _line(f"{folder}: was deleted while the run worked", "leave it there")
    reason = next((words for words in _REMEDIES if words in text), None) or _trial(storage)
    if reason is None:
        return None
    where = f"storage {storage}"
    if is_kept(storage):
        where = f"data.cache {storage.parent}, a node's copy of {named(storage)}"
    return _line(f"{where}: {reason}{_room(storage)}", _REMEDIES.get(reason, "mend it"))


def _line(what: str, remedy: str) -> DiskError:
    return DiskError(f"{what}; {remedy}, {GOES_ON}")


def _trial(storage: Path) -> str | None:
    """Write a little file to the storage, and return why that fails."""
    try:
        with tempfile.TemporaryFile(dir=storage) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def _room(storage: Path) -> str:
    try:
        free = [f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB" for folder in (storage, Path(tempfile.gettempdir()))]
    except OSError:
        return ""
    return f" ({free[0]} are free there, {free[1]} in {tempfile.gettempdir()}, where Ray works)"
