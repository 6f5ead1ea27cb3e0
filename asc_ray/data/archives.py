"""Archives of a public corpus: compared with their checksums, and unpacked with care."""

import errno
import hashlib
import os
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from asc_ray.errors import UserError
from asc_ray.files import open_plain, read_plain, write_atomically
from asc_ray.shown import printable

CHUNK = 1 << 18  # bytes
SHA256 = ".sha256"


@dataclass(frozen=True)
class Archive:
    name: str
    md5: str
    size: int  # bytes, for the disk and the progress only: the checksum says whether a file is right


def checksum(file: BinaryIO, archive: Archive, folder: Path) -> str:
    """Return how the file's checksum differs; empty for a right file, whose SHA-256 is then noted in `folder`."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    file.seek(0)
    while block := file.read(CHUNK):
        md5.update(block)
        sha256.update(block)
    if md5.hexdigest() != archive.md5:
        return f"{md5.hexdigest()}, expected {archive.md5}"
    known: dict[str, str] = {}
    with suppress(FileNotFoundError):
        lines = read_plain(folder / SHA256, 1 << 20, follow=False).decode(errors="replace").splitlines()
        known = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    entry = f"{archive.name} {archive.md5}"
    if known.setdefault(entry, sha256.hexdigest()) != sha256.hexdigest():
        return f"{sha256.hexdigest()} (SHA-256), but {known[entry]} when it first came ({SHA256})"
    write_atomically(folder / SHA256, "".join(f"{digest}  {name}\n" for name, digest in known.items()))
    return ""


# Bytes on disk per byte of an archive: TAU22's 230,350 clips of 24 bits take 31.1 GB in whole blocks, zipped 27.5 GB.
UNPACKED = 1.15
MOST_TIMES = 50  # the archive's size, at most, unpacked: text packs to a tenth, a zip bomb to a thousandth


def unpack(path: Path, archive: Archive, folder: Path, top: str) -> None:
    """Write the archive's files into `folder` without the folder `top`, over what an interrupted run left.

    The file is opened once, so that the bytes that are unpacked are the ones that were compared with the checksum.
    """
    try:
        with open_plain(path, follow=False) as file:
            if found := checksum(file, archive, folder):
                raise zipfile.BadZipFile(f"checksum {found}")
            with zipfile.ZipFile(file) as packed:
                for member, target in _members(packed, path, archive, folder, top):
                    with packed.open(member) as data, _created(folder, target) as sink:
                        shutil.copyfileobj(data, sink)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        path.unlink()
        raise UserError(
            f"{path}: not a whole zip file ({printable(error)}) although its checksum was right when it came; it was "
            "deleted, and the same command fetches it again"
        ) from error


def _members(
    packed: zipfile.ZipFile, path: Path, archive: Archive, folder: Path, top: str
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """Return the archive's files and where they go. Raises UserError for an archive that cannot be trusted."""
    members = [(member, _path(member.filename, top)) for member in packed.infolist() if not member.is_dir()]
    faults = {
        "leads out of the corpus folder": [m.filename for m, place in members if place is None],
        "is encrypted": [m.filename for m, _ in members if m.flag_bits & 1],
        "is compressed in a way that zip files of corpora are not": [
            m.filename for m, _ in members if m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        ],
        "is no plain file": [
            m.filename for m, _ in members if stat.S_IFMT(m.external_attr >> 16) not in (0, stat.S_IFREG)
        ],
        "is there twice": [str(place) for place, count in Counter(place for _, place in members).items() if count > 1],
    }
    for fault, names in faults.items():
        if names:
            listed = ", ".join(repr(name) for name in names[:5])
            raise UserError(
                f"{path}: {listed} {fault}; nothing of this archive was unpacked. It is not one to trust: delete it "
                "and the folder"
            )
    size, free = sum(member.file_size for member, _ in members), shutil.disk_usage(folder).free
    if size > MOST_TIMES * archive.size + CHUNK:
        raise UserError(f"{path}: unpacks to {size:,} bytes, which no corpus does; nothing of it was unpacked")
    if size > free:
        raise UserError(f"{path}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed; make room, and run it again")
    return [(member, place) for member, place in members if place is not None]


def _created(folder: Path, path: PurePosixPath) -> BinaryIO:
    """Open a plain file below the folder for writing. Raises UserError where a link is on the way to it."""
    opened = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for part in path.parts[:-1]:
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=opened[-1])
            opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(path.name, flags, 0o644, dir_fd=opened[-1])
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(file)
            raise OSError(errno.ELOOP, "no file of its own")
        os.ftruncate(file, 0)
        return os.fdopen(file, "wb")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise UserError(
                f"{folder / path}: a link or another thing stands on the way to it, and nothing is written through "
                "that; take it away"
            ) from None
        raise
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _path(member: str, top: str) -> PurePosixPath | None:
    """Return where a member goes, relative to the corpus; None for a path that leads out of it or cannot be shown."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or not member.isprintable() or not path.parts:
        return None
    return path.relative_to(top) if path.is_relative_to(top) else path
