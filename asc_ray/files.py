"""Files from anywhere: read once, whole, and only where they are plain files of a sane size; and a node's own files."""

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from asc_ray.errors import UserError

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


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write under a temporary name, flush to disk, rename: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def built(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, which the caller fills and renames; after an error nothing of it stays.

    Raises UserError where it cannot be made.
    """
    building = out.with_name(f".{out.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another folder") from None
    try:
        yield building
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def own_folder() -> Path:
    """Return this user's folder below the node's temporary one. Raises OSError where others could write into it."""
    folder = Path(tempfile.gettempdir()) / f"asc-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(errno.EACCES, "belongs to others, or others may write into it", str(folder))
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file, which is made; other processes of this node wait meanwhile. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
