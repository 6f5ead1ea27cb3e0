"""Files from anywhere: read once, whole, and only where they are plain files of a sane size."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def open_plain(path: Path, follow: bool = True) -> BinaryIO:
    """Open a plain file for reading; without `follow` a symbolic link is refused.

    Pipes and device files are refused, because a pipe may keep a reader waiting for ever and reading a device file may
    do anything. Raises OSError, whose `strerror` says what there is instead.
    """
    if not follow and path.is_symlink():
        raise OSError(errno.ELOOP, "a symbolic link, and not a plain file", str(path))
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    kind = stat.S_IFMT(os.stat(path).st_mode)  # first, because opening alone rewinds some tapes
    if kind == stat.S_IFREG:
        descriptor = os.open(path, flags)
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind == stat.S_IFREG:
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'something else')}, and not a plain file", str(path))


def read_plain(path: Path, most: int, follow: bool = True) -> bytes:
    """Read a plain file of at most `most` bytes. Raises OSError as `open_plain` does, and for a larger file."""
    with open_plain(path, follow) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if size > most or len(content) > most:
        raise OSError(errno.EFBIG, f"{size:,} bytes; allowed are {most:,}", str(path))
    return content
