"""Fetch a public corpus: its archives, one after the other, checked and unpacked into a folder in the TAU22 layout.

Written on requests because no loader library resumes a broken transfer: pooch, soundata and dcase_util all start an
archive over, here up to 1.9 GB.

    DIR/.download/NAME.part   bytes so far; NAME.etag beside it names the version of the file
    DIR/.download/NAME        the checksum is right
    DIR/.download/NAME.done   unpacked, and the archive deleted
    DIR/.downloaded           everything is there: the archives' checksums, as `md5sum` writes them
    DIR/.sha256               each archive's SHA-256 when it first came, because the source publishes only MD5. Put this
                              file into a new folder, and what is downloaded there is compared with it

Each step leaves what the next run starts from, so the same command goes on wherever the last one was killed.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asc_ray.data.archives import CHUNK, SHA256, UNPACKED, Archive, checksum, unpack
from asc_ray.errors import ConfigError, UserError
from asc_ray.files import open_plain, write_atomically
from asc_ray.lock import exclusive

if TYPE_CHECKING:
    import requests

# Seconds before the next attempt; together more than the minute for which Zenodo refuses after too many requests.
PAUSES: tuple[float, ...] = (1, 4, 15, 30, 60)
TIMEOUT = 60  # seconds without a byte

Progress = Callable[[str, int, int], None]  # archive, bytes so far, bytes in all
Note = Callable[[str], None]


@dataclass(frozen=True)
class PublicCorpus:
    url: str  # of the folder with the archives
    top: str  # the folder that everything in the archives lies in
    archives: tuple[Archive, ...]


_TAU22 = "TAU-urban-acoustic-scenes-2022-mobile-development"

# Names, checksums and sizes as in dcase_util 0.2.20; soundata 1.0.1 has the same checksums.
# The metadata comes last: until then no stage takes the folder for a corpus. The licence is in `doc`.
SOURCES = {
    "tau22": PublicCorpus(
        url="https://zenodo.org/records/6337421/files",
        top=_TAU22,
        archives=tuple(
            Archive(f"{_TAU22}.{part}.zip", md5, size)
            for part, md5, size in (
                ("audio.1", "8be14bdbd844481dce059ab31fbd2239", 1_736_050_960),
                ("audio.2", "e821abda49b069248bb75eab39df7575", 1_791_821_989),
                ("audio.3", "9c7897f78bb42ca0008936daddf3f8f3", 1_878_561_499),
                ("audio.4", "53ec3e37c0fc0be75f53c5abbc5300b8", 1_887_825_128),
                ("audio.5", "528422c33c5d10263203d2c61cb1f3be", 1_832_871_840),
                ("audio.6", "4759a9465c903e13e57d5e82e791fc28", 1_836_165_296),
                ("audio.7", "6d545fc83a55a17856a9ccc1ac9aff6b", 1_737_838_582),
                ("audio.8", "3a2916a9b5d3f43cc7a22a62b180b0d9", 1_758_317_867),
                ("audio.9", "071f664c86639ad730f7be4e3c39d886", 1_790_044_829),
                ("audio.10", "e0839d019e9b77ecbcbb0eff85965530", 1_736_836_871),
                ("audio.11", "fc60f1c83726be3963ae14fbcb95eeb4", 1_754_618_148),
                ("audio.12", "02246547f86c0a814dc63ec65d7033bb", 1_748_795_940),
                ("audio.13", "88ae9ef884665140d1572d8061725e00", 1_844_234_922),
                ("audio.14", "c3f400d74ae90e5190dc518cde43de47", 1_854_884_822),
                ("audio.15", "85594c6fe4f91c10aa2a410f748103b8", 1_877_789_093),
                ("audio.16", "6e2df8438c69f6789414aeba8cbad9d8", 435_379_083),
                ("doc", "9c4f610bdb5d3e3e72a17d393a26452a", 16_819),
                ("meta", "419b6ff6570f1030730352dc80cd8d15", 1_538_781),
            )
        ),
    ),
}


class _Broken(Exception):
    """A request failed in a way that may pass."""


def _silent(*_: object) -> None:
    pass


def download(
    name: str,
    folder: Path,
    *,
    base_url: str | None = None,
    on_progress: Progress = _silent,
    on_note: Note = _silent,
) -> bool:
    """Fetch the corpus `name` into `folder`; return False if an earlier run has done so already.

    `base_url` is another address of the same files. Raises ConfigError for an unknown name, and UserError for a folder
    that holds something else, too small a disk, a server that keeps failing, and a wrong archive.
    """
    if name not in SOURCES:
        raise ConfigError(f"corpus {name!r}: not one that can be downloaded; known: {', '.join(SOURCES)}")
    try:
        import requests
    except ImportError:
        raise UserError("downloading needs `requests`: pip install 'asc-ray[download]'") from None

    source, scratch, finished = SOURCES[name], folder / ".download", folder / ".downloaded"
    try:
        if finished.is_file():
            shutil.rmtree(scratch, ignore_errors=True)
            return False
        if scratch.is_symlink():
            raise UserError(f"{scratch}: a symbolic link, and not the folder that a download makes; delete it")
        others = folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {SHA256})
        if others and not scratch.is_dir():
            raise UserError(f"{folder}: not an empty folder, nor one with an unfinished download; choose another")
        with exclusive(scratch), requests.Session() as session:
            left = [archive for archive in source.archives if not (scratch / f"{archive.name}.done").exists()]
            if len(left) < len(source.archives):
                on_note(f"{len(source.archives) - len(left)} of {len(source.archives)} archives are there already")
            for index, archive in enumerate(left):
                if not (scratch / archive.name).exists():
                    _check_space(scratch, left[index:])
                    _fetch(session, base_url or source.url, archive, scratch, on_progress, on_note)
                on_note(f"{archive.name}: unpacking")
                unpack(scratch / archive.name, archive, folder, source.top)
                os.sync()  # after a power cut the mark must not be there without the clips
                (scratch / f"{archive.name}.done").touch()
                (scratch / archive.name).unlink()
            write_atomically(finished, "".join(f"{archive.md5}  {archive.name}\n" for archive in source.archives))
            shutil.rmtree(scratch)
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: {error.strerror or error}; mend this, and the same command goes on") from error
    return True


def _check_space(scratch: Path, left: Sequence[Archive]) -> None:
    needed = UNPACKED * sum(archive.size for archive in left) + max(archive.size for archive in left)
    needed -= sum(part.stat().st_size for part in scratch.glob("*.part"))
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise UserError(
            f"{scratch.parent}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed for the {len(left)} archives "
            "that are left; make room and run the same command again, or choose another folder"
        )


def _fetch(
    session: "requests.Session",
    base_url: str,
    archive: Archive,
    scratch: Path,
    on_progress: Progress,
    on_note: Note,
) -> None:
    """Fetch the archive into `scratch` and check its checksum. A wrong one is fetched once more from the start."""
    url, part = f"{base_url}/{archive.name}?download=1", scratch / f"{archive.name}.part"
    found = ""
    for _ in range(2):
        if found:
            on_note(f"{archive.name}: wrong checksum {found}; fetching it again from the start")
        _fetch_part(session, url, archive, part, lambda done: on_progress(archive.name, done, archive.size), on_note)
        with open_plain(part, follow=False) as file:
            found = checksum(file, archive, scratch.parent)
        if not found:
            part.replace(scratch / archive.name)
            return
        part.unlink()
    raise UserError(
        f"{url}: checksum {found}, twice; the file was deleted and nothing of it unpacked. "
        "Run the same command again later; if it stays wrong, see whether its page shows another checksum"
    )


def _fetch_part(
    session: "requests.Session",
    url: str,
    archive: Archive,
    part: Path,
    on_bytes: Callable[[int], None],
    on_note: Note,
) -> None:
    """Send requests until all of `part` is here, or the server has failed too often without sending anything new."""
    import requests

    failures = furthest = 0
    while True:
        try:
            _request(session, url, archive, part, on_bytes)
            return
        except (_Broken, requests.RequestException) as error:
            size = part.stat().st_size if part.exists() else 0
            failures = 1 if size > furthest else failures + 1
            furthest = max(size, furthest)
            reason: BaseException = error
            while reason.__context__:  # "connection refused" stands under layers of pools and retries
                reason = reason.__context__
            if failures > len(PAUSES):
                raise UserError(
                    f"{url}: {reason}; {failures} attempts brought nothing new. {size / 1e6:.1f} MB are kept: check "
                    "the connection, and the same command goes on from there"
                ) from error
            on_note(f"{part.stem}: {reason}; next attempt in {PAUSES[failures - 1]:g} s")
            time.sleep(PAUSES[failures - 1])


def _request(
    session: "requests.Session", url: str, archive: Archive, part: Path, on_bytes: Callable[[int], None]
) -> None:
    """GET what `part` lacks, or everything where the server cannot continue or has another version by now."""
    etag_file = part.with_suffix(".etag")
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # so that ranges and lengths count the bytes of the file
    if have:
        headers["Range"] = f"bytes={have}-"
        with suppress(FileNotFoundError):
            headers["If-Range"] = etag_file.read_text()
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        if status == 416 and have:
            return  # nothing follows what we have; the checksum tells whether it is complete
        if status == 429 or status >= 500:
            raise _Broken(f"HTTP {status} {response.reason}")
        if status not in (200, 206):
            raise UserError(f"{url}: HTTP {status} {response.reason}; see in a browser whether the file is still there")
        if status == 200:
            have = 0
        if part.is_symlink():
            raise UserError(f"{part}: a symbolic link, and not the file that a download makes; delete it")
        with part.open("ab" if have else "wb") as sink:
            if not have:
                # After `part` was emptied: the bytes of one version never stand beside the tag of another.
                etag_file.unlink(missing_ok=True)
                etag = response.headers.get("ETag", "")
                if etag.startswith('"'):  # If-Range takes no weak tag
                    write_atomically(etag_file, etag)
            length = response.headers.get("Content-Length")
            expected = have + int(length) if length and length.isdecimal() else None
            on_bytes(have)
            for chunk in response.iter_content(CHUNK):
                sink.write(chunk)
                have += len(chunk)
                on_bytes(have)
                if have > archive.size:
                    break
    if have > archive.size:
        part.unlink()
        raise UserError(
            f"{url}: more than the {archive.size:,} bytes that it is known to have; deleted. See whether its page "
            "shows another size"
        )
    if expected is not None and have < expected:
        raise _Broken(f"the connection ended after {have} of {expected} bytes")
