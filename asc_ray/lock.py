"""The lock of a storage: two drivers that build the same artifacts would undo each other's resume."""

import errno
import fcntl
import json
import os
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from asc_ray.claims import claimed, has_claims
from asc_ray.errors import ConfigError, UserError
from asc_ray.files import open_plain, read_plain
from asc_ray.places import is_kept
from asc_ray.shown import printable


@contextmanager
def exclusive(storage: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold the storage's lock, because two drivers building the same artifacts would undo each other's resume.

    `say` shows the user a line. The lock of an object storage is a claim. That of a folder is two locks: one on the
    file `.lock`, which other hosts see too and which says who holds it; one on the folder, which stays when somebody
    deletes the file. The kernel drops both with the process, however it dies.

    Raises UserError when another run holds it, and ConfigError when the folder cannot be written or has no locks.
    """
    if is_kept(storage):
        with claimed(storage, say):
            yield
        return
    path = storage / LOCK
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    strange = ConfigError(f"storage: {path} is no file that asc-ray makes; delete it")
    with ExitStack() as held:
        try:
            storage.mkdir(parents=True, exist_ok=True)
            folder = os.open(storage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, folder)
            file = os.open(path, flags, 0o644)
            held.callback(os.close, file)
        except OSError as error:
            if path.is_symlink():
                raise strange from None
            raise ConfigError(
                f"storage: {storage} cannot be written ({error.strerror}); choose another folder"
            ) from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise strange
        _lock(path, file, folder)
        os.ftruncate(file, 0)
        owner = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.write(file, json.dumps(owner).encode())
        yield


def _lock(path: Path, file: int, folder: int) -> None:
    try:
        fcntl.fcntl(file, _SETLK, _LOCK)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EBADF:  # a network file system, which locks only files
            return
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(
                f"storage {path.parent}: another asc-ray run is working there ({_owner(path)}); wait for it, end it, "
                "or choose another `storage`"
            ) from None
        raise ConfigError(
            f"storage: {path.parent} is on a file system without locks ({error.strerror}), where two runs would undo "
            "each other's work; choose another folder"
        ) from None


def _owner(path: Path) -> str:
    try:
        owner = json.loads(read_plain(path, 4096, follow=False))
        return f"process {int(owner['pid'])} on {printable(owner['host'])}, since {printable(owner['since'])}"
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return "which says nothing of itself"


def is_locked(storage: Path) -> bool:
    """Whether a run is at work in this storage; asking takes no lock, so a run that starts now can still get it."""
    if is_kept(storage):
        return has_claims(storage)
    try:
        with open_plain(storage / LOCK, follow=False) as file:
            answer = fcntl.fcntl(file, _GETLK, _LOCK)
    except OSError:
        return False
    return struct.unpack(_LAYOUT, answer)[_TYPE] != fcntl.F_UNLCK


LOCK = ".lock"
# Locks of an open file, where the system has them; a process's lock ends when the process closes the file anywhere.
_SETLK, _GETLK = (getattr(fcntl, f"F_OFD_{name}", getattr(fcntl, f"F_{name}")) for name in ("SETLK", "GETLK"))
# struct flock: type, whence, start, length, pid; in another order on systems that came from BSD.
_LAYOUT, _TYPE = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi4x", 0)
_LOCK = struct.pack(_LAYOUT, *((0, 0, 0, fcntl.F_WRLCK, 0) if _TYPE else (fcntl.F_WRLCK, 0, 0, 0, 0)))
