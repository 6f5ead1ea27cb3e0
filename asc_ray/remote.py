"""Object storages. All code reads and writes artifacts as plain folders; this module brings and sends their files.

Functions take paths, and leave those alone that belong to no object storage (`places`).

In the storage an artifact has its final name from the start, because objects cannot be renamed: the manifest, sent
last, makes it one. An object is there whole or not at all.
"""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from asc_ray.disk import GOES_ON, DiskError
from asc_ray.errors import ConfigError
from asc_ray.files import locked
from asc_ray.places import named, place_of

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_AT_ONCE = 8  # requests
_CHUNK = 8 << 20  # bytes
# What a user does about each error, by a word of the store's own message.
_REMEDIES = {
    "there is no such bucket; make it, or correct `storage`": (
        "NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist",
    ),
    "access is denied; give this process and every node credentials that may list, read, write and delete there": (
        "ACCESS_DENIED", "AccessDenied", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN",
        "InvalidAccessKeyId", "INVALID_CLIENT_TOKEN_ID", "PERMISSION_DENIED", "UNAUTHENTICATED", "HTTP status 403",
        "HTTP status 401", "UNRECOGNIZED_CLIENT", "MISSING_AUTHENTICATION_TOKEN", "no credentials",
    ),
    "it cannot be reached; see whether it runs, and whether AWS_ENDPOINT_URL and the network are right": (
        "NETWORK_CONNECTION", "UNAVAILABLE", "Could not resolve", "Could not connect", "timed out", "TIMEOUT",
        "SERVICE_UNAVAILABLE", "SLOW_DOWN", "INTERNAL_FAILURE",
    ),
}  # fmt: skip


@lru_cache(maxsize=8)
def _open(uri: str) -> tuple["FileSystem", str]:
    """Return the file system of a storage, and the storage's path in it, which begins with the bucket."""
    import pyarrow as pa
    import pyarrow.fs

    # One request for a small file in place of three.
    fast = "&allow_delayed_open=true" if "?" in uri else "?allow_delayed_open=true"
    with _told(uri):
        try:
            files, base = pyarrow.fs.FileSystem.from_uri(uri + (fast if uri.startswith("s3://") else ""))
        except pa.ArrowInvalid as error:
            raise ConfigError(f"storage: {uri}: {error}") from None
        bucket = base.partition("/")[0]  # others than S3 ask for rights of its own to look at a bucket
        if uri.startswith("s3://") and files.get_file_info(bucket).type == pyarrow.fs.FileType.NotFound:
            raise OSError("NO_SUCH_BUCKET")
    return files, base.rstrip("/")


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Raise DiskError, in one line with what to do, for an error of the store."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno is not None:  # of this node's disk
            raise
        text = str(error)
        known = next((line for line, words in _REMEDIES.items() if any(word in text for word in words)), None)
        kind = re.search(r"AWS Error [A-Z_]+ during \w+", text)
        reason = known or f"{text.splitlines()[0][:300]}; mend it"
        detail = f" ({kind[0]})" if kind else ""
        raise DiskError(f"storage {uri}: {reason}{detail}, {GOES_ON}") from None


def filesystem(path: Path) -> tuple["FileSystem | None", str]:
    """Return the file system that a path belongs to, and the path in it: None, and the path itself, for a folder's."""
    place = place_of(path)
    if place is None:
        return None, str(path)
    files, base = _open(place[0])
    return files, f"{base}/{place[1]}".rstrip("/")


def push(*paths: Path) -> None:
    """Send files to their storage, whole or not at all; what is temporary stays. Raises DiskError."""
    work = [path for path in paths if place_of(path) and not any(part.endswith(".tmp") for part in path.parts[-2:])]
    _together(_send, work)


def _send(path: Path) -> None:
    files, inner = filesystem(path)
    assert files is not None
    with _told(_uri(path)), open(path, "rb") as source, files.open_output_stream(inner) as sink:
        while chunk := source.read(_CHUNK):
            sink.write(chunk)


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

    _together(bring, found)


def listed(folder: Path) -> dict[str, Any]:
    """Return what a storage has below a folder, which is made here if there is anything: sizes and times by name."""
    import pyarrow.fs

    files, inner = filesystem(folder)
    assert files is not None
    with _told(_uri(folder)):
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
        with _told(_uri(file)):
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
        _together(lambda name: _fetch(folder / name, sha256=entries[name]["sha256"]), lacking)


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
    """Send all `files` of an artifact that is ready, by name; those in `sent` only if they are not there."""
    if place_of(folder) is None:
        return
    there = listed(folder)
    skipped = {name for name in sent if name in there and there[name].size == files[name]["bytes"]}
    _together(_send, [folder / name for name in files if name not in skipped])


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
    _together(forget, [folder / name for name in sorted(left)])


def forget(path: Path) -> None:
    """Remove a file or a folder from its storage, if it is there; here it stays. Raises DiskError."""
    files, inner = filesystem(path)
    if files is None:
        return
    with _told(_uri(path)):
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

    with _told(_uri(folder)):
        infos = files.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True))
    return sorted({info.base_name for info in infos})


def _uri(path: Path) -> str:
    place = place_of(path)
    assert place is not None
    return place[0]


def _fetch(target: Path, mtime_ns: int | None = None, sha256: str | None = None) -> None:
    """Write an object to its path here, under a temporary name first. Raises DiskError if its checksum is another."""
    files, inner = filesystem(target)
    assert files is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as sink, _told(_uri(target)):
            source = files.open_input_stream(inner)
            while chunk := source.read(_CHUNK):
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
        raise DiskError(f"{named(target)}: is missing; was it deleted? Run its stage again") from None
    finally:
        temporary.unlink(missing_ok=True)


def _together(do: Callable[[Any], None], work: Iterable[Any]) -> None:
    """Do all of it, several at once. Raises the first error."""
    items = list(work)
    if len(items) < 2:
        for item in items:
            do(item)
        return
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        for _ in pool.map(do, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
