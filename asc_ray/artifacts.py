"""Artifacts: folders with a manifest, built aside and renamed into place.

An artifact's key is the hash of what it is made from: the stage, its part of the configuration and the keys of its
inputs. Equal keys mean equal content, so a complete artifact is never built again, and another configuration builds
another folder. While it is being built the folder has the suffix `.partial`; a stage that was killed resumes from what
it left there.

Nothing is trusted only because it exists. A finished artifact's files are read through `stored_file` and
`stored_files`, which compare them with the manifest. State that a killed run left is read through `read_record`, which
refuses what is cut or changed. Of an object storage each node has a folder: `remote` brings and sends its files.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from asc_ray import remote
from asc_ray.errors import UserError
from asc_ray.files import locked, own_folder, read_plain, write_atomically
from asc_ray.places import PARTIAL, is_kept, named
from asc_ray.provenance import machine, program

MANIFEST = "manifest.json"
STARTED = ".started"  # an empty file; its time is when the building began
# Part of every key: raise it when the meaning of stored artifacts changes, so that old ones are not used.
FORMAT = 5
# A file up to this size is compared with its checksum each time that it is asked for, a larger one once per node.
SMALL_BYTES = 1 << 20
_CHECKSUM = "checksum"  # a record's entry that holds the record's own checksum
_MOST_RECORD = 1 << 28  # bytes
_FOLDER = re.compile(r"(?P<name>.+)-(?P<key>[0-9a-f]{16})")


def content_key(**parts: Any) -> str:
    """Return the hash of JSON-serializable parts, 16 hexadecimal digits; the order of keys does not matter."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that holds its own checksum, for `read_record`; in an object storage it is there afterwards."""
    document = json.loads(json.dumps(content, default=str))
    write_atomically(path, json.dumps({**document, _CHECKSUM: _digest(document)}, indent=1))
    remote.push(path)


def read_record(path: Path) -> dict[str, Any] | None:
    """Return what `write_record` wrote to `path`; None where the file is absent, cut, changed, or of another kind."""
    try:
        document = json.loads(read_plain(path, _MOST_RECORD))
        return document if document.pop(_CHECKSUM) == _digest(document) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _digest(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """The artifact in `storage/stage/name-key/`; `inputs` maps the role of each input artifact to its key."""

    storage: Path
    stage: str
    name: str
    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.storage / self.stage / f"{self.name}-{self.key}"

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL)

    @property
    def complete(self) -> bool:
        """Whether the artifact is there. Raises UserError where its manifest is damaged or another artifact's."""
        return remote.committed(self.path / MANIFEST) and bool(self.manifest())

    def manifest(self) -> dict[str, Any]:
        manifest = read_manifest(self.path)
        if manifest["key"] != self.key:
            raise UserError(
                f"{named(self.path / MANIFEST)}: is that of {manifest['stage']}/{manifest['name']}-{manifest['key']}; "
                f"delete the folder {named(self.path)} and run the stage again"
            )
        return manifest

    def facts(self) -> dict[str, Any]:
        """Return what the stage noted about its result (counts, metrics)."""
        return self.manifest()["facts"]

    def open_partial(self) -> Path:
        """Make the folder to build in, and return it; it holds what an earlier, interrupted run finished."""
        self.partial.mkdir(parents=True, exist_ok=True)
        remote.pull(self.partial, STARTED)
        with suppress(FileExistsError):
            (self.partial / STARTED).touch(exist_ok=False)
            remote.push(self.partial / STARTED)
        return self.partial

    def begun(self) -> Path | None:
        """Return the folder with the notes of an unfinished artifact; None where nobody has begun it."""
        remote.pull(self.partial, "*.json")
        return self.partial if self.partial.is_dir() else None

    def finish(
        self,
        facts: Mapping[str, Any],
        scratch: tuple[str, ...] = (),
        known: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Drop what only the building needed (`scratch`: glob patterns), write the manifest, rename into place.

        `known`: `bytes` and `sha256` of files whose writers know them, by name; all other files are read. Of an object
        storage they may be there alone. Raises DiskError where one of them is not there.
        """
        known = known or {}
        made = self._made()
        for pattern in (*scratch, STARTED, MANIFEST, ".*.tmp"):  # a run may have died between manifest and rename
            for path in self.partial.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        files = {}
        for path in sorted(self.partial.rglob("*")):
            name = str(path.relative_to(self.partial))
            _flush(path)
            if path.is_file():
                sha256 = known[name]["sha256"] if name in known else file_sha256(path)
                files[name] = {"bytes": path.stat().st_size, "sha256": sha256}
        for name in known.keys() - files.keys():
            files[name] = {key: known[name][key] for key in ("bytes", "sha256")}
        manifest = {
            "stage": self.stage,
            "name": self.name,
            "key": self.key,
            "inputs": dict(self.inputs),
            "config": dict(self.config),
            "facts": dict(facts),
            "made": made,
            "files": dict(sorted(files.items())),
        }
        remote.publish(self.partial, files, sent=known)
        write_record(self.partial / MANIFEST, manifest)
        _flush(self.partial)
        remote.rename(self.partial, self.path)
        _flush(self.path.parent)
        remote.tidy(self.path, [*files, MANIFEST])

    def _made(self) -> dict[str, str]:
        """Return when the artifact is made, by what and on what; an interrupted run's break is part of the time."""
        started = self.partial / STARTED
        times = {"began": started.stat().st_mtime} if started.exists() else {}  # an earlier version left no such file
        times["ended"] = time.time()
        stamps = {name: datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") for name, at in times.items()}
        return stamps | {"program": program(), "machine": machine()}

    def made(self) -> dict[str, str]:
        """Return the times `began` and `ended` (ISO 8601), `program` and `machine`; empty for older artifacts."""
        return self.manifest().get("made", {})


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished artifact. Raises UserError where it is missing, cut or changed."""
    path = folder / MANIFEST
    try:
        remote.committed(path)
        status = path.stat()
    except OSError:
        raise UserError(f"{named(folder)}: no {MANIFEST}, so this is not a finished artifact") from None
    manifest = _record(path, status.st_mtime_ns, status.st_size)
    if manifest is None or not _is_manifest(manifest):
        raise UserError(
            f"{named(path)}: is not as it was written; delete the folder {named(folder)} and run its stage again: it "
            "is made anew"
        )
    return manifest


def _is_manifest(manifest: Mapping[str, Any]) -> bool:
    """Whether a record is a manifest whose file names stay inside the artifact."""
    words, mappings = ("stage", "name", "key"), ("inputs", "config", "facts", "files")
    return (
        all(isinstance(manifest.get(key), str) for key in words)
        and all(isinstance(manifest.get(key), dict) for key in mappings)
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("sha256"), str)
            and not PurePosixPath(name).is_absolute()
            and ".." not in PurePosixPath(name).parts
            and "\0" not in name
            for name, entry in manifest["files"].items()
        )
    )


@lru_cache(maxsize=1024)
def _record(path: Path, mtime_ns: int, size: int) -> dict[str, Any] | None:
    """Read a record; cached while the file's time and size stay, because it is asked for often."""
    return read_record(path)


def artifacts_in(storage: Path) -> list[Artifact]:
    """Return the finished artifacts of a storage by their folders' names, sound or not; without config and inputs."""
    children = remote.children
    found = ((stage, _FOLDER.fullmatch(name)) for stage in children(storage) for name in children(storage / stage))
    artifacts = [Artifact(storage, stage, match["name"], match["key"], {}, {}) for stage, match in found if match]
    return [artifact for artifact in artifacts if remote.committed(artifact.path / MANIFEST) or artifact.path.is_dir()]


def input_folder(storage: Path, stage: str, key: str) -> Path:
    """Return the folder of the artifact with this key, which another was made from. Raises UserError."""
    if name := next((name for name in remote.children(storage / stage) if name.endswith(f"-{key}")), None):
        return storage / stage / name
    raise UserError(f"{named(storage / stage)}: nothing with the key {key}, which this was made from; was it deleted?")


def stored_file(folder: Path, name: str) -> Path:
    """Return the path of one file of a finished artifact. Raises UserError where it is not as it was written."""
    return stored_files(folder, name)[0]


def stored_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the paths of a finished artifact's files that match `pattern`, by name.

    Each is compared with the manifest's checksum: a large one once per node, and again when its size or time changes.
    Raises UserError where a file is missing or not as it was written, or where the artifact has none that matches.
    """
    entries = _entries(folder, pattern)
    damaged = _compared(folder, entries) if entries else [f"{pattern}: missing"]
    if damaged and entries and remote.dropped(folder):  # it was this node's copy that is damaged
        damaged = _compared(folder, entries)
    if damaged:
        raise UserError(
            f"{named(folder)}: {'; '.join(damaged)}. Delete the folder and run its stage again: it is made anew"
        )
    return [folder / name for name in sorted(entries)]


def _compared(folder: Path, entries: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with these files of an artifact; of an object storage's they are brought first."""
    remote.bring(folder, entries)
    large = {name: entry for name, entry in entries.items() if entry["bytes"] > SMALL_BYTES}
    damaged = _damage(folder, {name: entry for name, entry in entries.items() if name not in large})
    if large:
        with _node_memory(folder) as known:
            unknown = {name: entry for name, entry in large.items() if known.get(name) != _stamp(folder / name, entry)}
            found = _damage(folder, unknown)
            if not found:
                known |= {name: _stamp(folder / name, entry) for name, entry in unknown.items()}
            damaged += found
    return damaged


def damaged_files(folder: Path) -> list[str]:
    """Read all files of a finished artifact; return what is missing or differs from the manifest's checksums.

    Of an object storage's it is what lies there, and not what this node has kept of it.
    """
    entries = _entries(folder, "*")
    if not is_kept(folder):
        return _damage(folder, entries)
    found = {name: remote.difference(folder / name, entry) for name, entry in entries.items()}
    return [f"{name}: {difference}" for name, difference in found.items() if difference]


def _entries(folder: Path, pattern: str) -> dict[str, Any]:
    return {name: entry for name, entry in read_manifest(folder)["files"].items() if fnmatch(name, pattern)}


def _damage(folder: Path, entries: Mapping[str, Any]) -> list[str]:
    damaged = []
    for name, entry in entries.items():
        file = folder / name
        try:
            if not file.is_file():
                damaged.append(f"{name}: missing")
            elif file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                damaged.append(f"{name}: checksum differs")
        except OSError as error:
            damaged.append(f"{name}: {error.strerror}")
    return damaged


def _stamp(file: Path, entry: Mapping[str, Any]) -> list[Any]:
    """Return what shows that a file is the one that was compared with this checksum; empty for no file."""
    try:
        status = file.stat()
    except OSError:
        return []
    return [entry["sha256"], status.st_size, status.st_mtime_ns, status.st_ino]


@contextmanager
def _node_memory(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield which files of an artifact this node has compared, to be added to; other processes wait meanwhile.

    It lies in this user's folder below the node's temporary folder. If that cannot be used, nothing is remembered.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    try:
        memory = own_folder()
    except OSError:
        yield {}
        return
    file = memory / f"{name}.json"
    with locked(memory / f"{name}.lock"):
        before: dict[str, Any] = {}
        with suppress(OSError):
            status = file.stat()
            before = _record(file, status.st_mtime_ns, status.st_size) or {}
        known = dict(before)
        yield known
        if known != before:
            with suppress(OSError):
                write_record(file, known)
