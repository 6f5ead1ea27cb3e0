"""Object storages. All code reads and writes artifacts as plain folders; this module brings and sends their files.

Functions take paths, and leave those alone that belong to no object storage (`places`).

In the storage an artifact has its final name from the start, because objects cannot be renamed: the manifest, sent
last, makes it one. An object is there whole or not at all.
"""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from asc_ray.disk import DiskError
from asc_ray.files import locked
from asc_ray.objects import open_storage, told
from asc_ray.places import named, place_of

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileSystem

_AT_ONCE = 8  # requests
_CHUNK = 8 << 20  # bytes


def filesystem(path: Path) -> tuple["FileSystem | None", str]:
    """Return the file system that a path belongs to, and the path in it: None, and the path itself, for a folder's."""
    place = place_of(path)
    if place is None:
        return None, str(path)
    files, base = open_storage(place[0])
    return files, f"{base}/{place[1]}".rstrip("/")


def push(*paths: Path) -> None:
    """Send files to their storage, whole or not at all; what is temporary stays. Raises DiskError."""
    work = [path for path in paths if place_of(path) and not any(part.endswith(".tmp") for part in path.parts[-2:])]
    together(_send, work)


def _send(path: Path) -> None:
    """Send a file. Only a thread of `together` may: Arrow makes an object of what it has when the stream is closed, and
    a signal, which interrupts the main thread alone, would have a file's beginning made one."""
    files, inner = filesystem(path)
    assert files is not None
    with told(_uri(path)), open(path, "rb") as source:
        try:
            with files.open_output_stream(inner) as sink:
                while chunk := source.read(_CHUNK):
                    sink.write(chunk)
        except OSError as error:
            if error.errno is not None:  # of this node's disk; after the store's own, what was there before stays
                with suppress(OSError):
                    files.delete_file(inner)
            raise


def pull(folder: Path, pattern: str = "*") -> None:
    """Bring what a storage has of an unfinished artifact's files that match `pattern`: those that this node lacks, and
    records that are newer there. Nothing that is here alone is removed. Raises DiskError."""
    if place_of(folder) is None:
        return
    found = {name: info for name, info in listed(folder).items() if PurePosixPath(name).match(pattern)}

    def bring(name: str) -> None:
        info, target = found[name], folder / name
        here = target.stat() if target.is_file() else None
        newer = name.endswith(".json") and here is not None and info.mtime_ns > here.st_mtime_ns
        if here is None or here.st_size != info.size or newer:
            _fetch(target, info.mtime_ns)

    together(bring, found)


def listed(folder: Path) -> dict[str, Any]:
    """Return what a storage has below a folder, which is made here if there is anything: sizes and times by name."""
    import pyarrow.fs

    files, inner = filesystem(folder)
    assert files is not None
    with told(_uri(folder)):
        infos = files.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True, recursive=True))
    found = {info.path.removeprefix(f"{inner}/"): info for info in infos if info.is_file}
    # Names that anybody has given who may write there: none leads out of the folder.
    found = {name: info for name, info in found.items() if not {"", ".", ".."} & {*name.split("/")}}
    if found:
        folder.mkdir(parents=True, exist_ok=True)
    return found


def refreshed(file: Path) -> Path:
    """Return the file, after it was made what the storage has: brought, or removed where that has none."""
    files, inner = filesystem(file)
    if files is not None:
        with told(_uri(file)):
            info = files.get_file_info(inner)
        here = file.stat() if file.is_file() else None
        if not info.is_file:
            file.unlink(missing_ok=True)
        elif here is None or here.st_size != info.size or here.st_mtime_ns != info.mtime_ns:
            _fetch(file, info.mtime_ns)
    return file


_seen: set[Path] = set()


def committed(manifest: Path) -> bool:
    """Whether an artifact's manifest is there. An object storage is asked until it is, once in each process.

    What this node has of an artifact that the storage has not any more is removed.
    """
    if place_of(manifest) is None:
        return manifest.is_file()
    if manifest in _seen and manifest.is_file():
        return True
    if refreshed(manifest).is_file():
        _seen.add(manifest)
        return True
    shutil.rmtree(manifest.parent, ignore_errors=True)
    return False


def bring(folder: Path, entries: Mapping[str, Any]) -> None:
    """Bring the files of a finished artifact that this node lacks; the first to ask does so, others wait.

    `entries`: size and checksum by name, as the manifest has them. Raises DiskError.
    """
    if place_of(folder) is None or not (lacking := _lacking(folder, entries)):
        return
    with locked(folder.with_name(f".{folder.name}.lock")):
        lacking = _lacking(folder, entries)
        together(lambda name: _fetch(folder / name, sha256=entries[name]["sha256"]), lacking)


@lru_cache(maxsize=8192)
def _reader(path: Path) -> "NativeFile":
    files, inner = filesystem(path)
    assert files is not None
    return files.open_input_file(inner)  # which asks for its size


def part(path: Path, first: int, size: int) -> bytes:
    """Return `size` bytes of a file from byte `first` on, fewer where it ends earlier; an object stays where it is.

    Raises DiskError.
    """
    try:
        if place_of(path) is None:
            with open(path, "rb") as file:
                return os.pread(file.fileno(), size, first)
        with told(_uri(path)):
            reader = _reader(path)
            return reader.read_at(size, first) if first + size <= reader.size() else b""
    except FileNotFoundError:
        raise _missing(path) from None


def difference(path: Path, entry: Mapping[str, Any]) -> str:
    """Return how an object differs from its `entry` in a manifest, empty for not at all. Keeps nothing of it here."""
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in _chunks(path):
            digest.update(chunk)
            size += len(chunk)
    except FileNotFoundError:
        return "missing"
    return "" if (size, digest.hexdigest()) == (entry["bytes"], entry["sha256"]) else "checksum differs"


def dropped(folder: Path) -> bool:
    """Remove what this node has of a finished artifact in an object storage; False for a folder, which stays."""
    if place_of(folder) is None:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _lacking(folder: Path, entries: Mapping[str, Any]) -> list[str]:
    def lacks(name: str) -> bool:
        file = folder / name
        return not file.is_file() or file.stat().st_size != entries[name]["bytes"]

    return [name for name in entries if lacks(name)]


def publish(folder: Path, files: Mapping[str, Any], sent: Iterable[str]) -> None:
    """Send all `files` of an artifact that is ready, by name; those in `sent` only if they are not there.

    Raises DiskError where a file is neither here nor there.
    """
    kept = place_of(folder) is not None
    there = listed(folder) if kept else {}
    skipped = {name for name in sent if name in there and there[name].size == files[name]["bytes"]}
    work = [folder / name for name in files if name not in skipped]
    if lost := next((path for path in work if not path.is_file()), None):
        raise _missing(lost)
    if kept:
        together(_send, work)


def rename(partial: Path, folder: Path) -> None:
    """Give the folder of a committed artifact its name; what others on this node have brought meanwhile makes room."""
    while True:
        dropped(folder)
        try:
            os.rename(partial, folder)
            return
        except OSError as error:
            if place_of(folder) is None or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def tidy(folder: Path, kept: Iterable[str]) -> None:
    """Remove from the storage what only the building of an artifact needed: all but the files `kept`."""
    if place_of(folder) is None:
        return
    names = {*kept}
    folders = {name.partition("/")[0] for name in names}
    left = {name if (top := name.partition("/")[0]) in folders else top for name in listed(folder) if name not in names}
    together(forget, [folder / name for name in sorted(left)])


def forget(path: Path) -> None:
    """Remove a file or a folder from its storage, if it is there; here it stays. Raises DiskError."""
    files, inner = filesystem(path)
    if files is None:
        return
    # Google's folders are no objects of their own: Arrow says, after it has emptied one, that there is none.
    with told(_uri(path)), suppress(FileNotFoundError):
        info = files.get_file_info(inner)
        if info.is_file:
            files.delete_file(inner)
        elif info.type.name == "Directory":
            files.delete_dir(inner)


def children(folder: Path) -> list[str]:
    """Return the names in a folder of a storage, sorted; none where it is not there."""
    files, inner = filesystem(folder)
    if files is None:
        return sorted(path.name for path in folder.glob("*"))
    import pyarrow.fs

    everything = files.type_name == "gcs"  # of which Arrow sees no folder that is not an object, too
    with told(_uri(folder)):
        infos = files.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True, recursive=everything))
    return sorted({info.path.removeprefix(f"{inner}/").partition("/")[0] for info in infos})


def _uri(path: Path) -> str:
    place = place_of(path)
    assert place is not None
    return place[0]


def _fetch(target: Path, mtime_ns: int | None = None, sha256: str | None = None) -> None:
    """Write an object to its path here, under a temporary name first. Raises DiskError if its checksum is another."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as sink:
            for chunk in _chunks(target):
                digest.update(chunk)
                sink.write(chunk)
        if sha256 is not None and digest.hexdigest() != sha256:
            folder = named(target.parent)
            raise DiskError(
                f"{named(target)}: its checksum differs; delete the artifact {folder} and run its stage again: it is "
                "made anew"
            )
        if mtime_ns is not None:
            os.utime(temporary, ns=(mtime_ns, mtime_ns))
        os.replace(temporary, target)
    except FileNotFoundError:
        raise _missing(target) from None
    finally:
        temporary.unlink(missing_ok=True)


def _chunks(path: Path) -> Iterator[bytes]:
    files, inner = filesystem(path)
    assert files is not None
    with told(_uri(path)):
        source = files.open_input_stream(inner)
        while chunk := source.read(_CHUNK):
            yield chunk


def _missing(path: Path) -> DiskError:
    return DiskError(f"{named(path)}: is missing; was it deleted? Run its stage again")


def together(do: Callable[[Any], None], work: Iterable[Any]) -> None:
    """Do all of it, several at once, and end what has begun when a signal comes. Raises the first error."""
    items = list(work)
    if not items:
        return
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        for _ in pool.map(do, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
