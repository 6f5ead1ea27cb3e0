"""Artifacts: a folder with a manifest, built aside and renamed into place.

An artifact's key is the hash of what it is made from: the stage, its part of the configuration and the keys of its
inputs. Equal key, equal content; so a complete artifact is never built again, and another configuration builds
another folder. While it is being built the folder carries the suffix `.partial`; what a stage left there when it was
killed is what it resumes from.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from asc_ray.errors import ConfigError, UserError

MANIFEST = "manifest.json"
# Part of every key: raise it when the meaning of stored artifacts changes, and old ones are left alone.
FORMAT = 4


def content_key(**parts: Any) -> str:
    """Hash of JSON-serializable parts, 16 hexadecimal digits; the order of keys does not matter."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write under a temporary name, flush to disk, rename: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class Artifact:
    """`storage/stage/name-key/`; `inputs` maps the role of each input artifact to its key."""

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
        return self.path.with_name(self.path.name + ".partial")

    @property
    def complete(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.path)

    def facts(self) -> dict[str, Any]:
        """What the stage noted about its result (counts, metrics)."""
        return self.manifest()["facts"]

    def open_partial(self) -> Path:
        """The folder to build in; it holds what an earlier, interrupted run finished."""
        self.partial.mkdir(parents=True, exist_ok=True)
        return self.partial

    def finish(
        self, facts: Mapping[str, Any], scratch: tuple[str, ...] = (), checksums: Mapping[str, str] | None = None
    ) -> None:
        """Drop what only the building needed (`scratch`: glob patterns), write the manifest, rename into place.

        `checksums`: SHA-256 of files whose writers have it; the others are read for theirs.
        """
        known = checksums or {}
        for pattern in (*scratch, MANIFEST, ".*.tmp"):  # a manifest that no rename followed
            for path in self.partial.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        files = {}
        for path in sorted(self.partial.rglob("*")):
            name = str(path.relative_to(self.partial))
            _flush(path)
            if path.is_file():
                files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
        manifest = {
            "stage": self.stage,
            "name": self.name,
            "key": self.key,
            "inputs": dict(self.inputs),
            "config": dict(self.config),
            "facts": dict(facts),
            "files": files,
        }
        write_atomically(self.partial / MANIFEST, json.dumps(manifest, indent=1, default=str))
        _flush(self.partial)
        os.rename(self.partial, self.path)
        _flush(self.path.parent)


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text())
    except OSError:
        raise UserError(f"{folder}: no {MANIFEST}, so this is not a finished artifact") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); delete the folder {folder} and run the stage again"
        ) from None


def damaged_files(folder: Path, pattern: str = "*") -> list[str]:
    """Files of an artifact, of those that match, that are missing or differ from the manifest's checksums."""
    return [
        f"{name}: {'checksum differs' if (folder / name).is_file() else 'missing'}"
        for name, entry in read_manifest(folder)["files"].items()
        if fnmatch(name, pattern) and (not (folder / name).is_file() or file_sha256(folder / name) != entry["sha256"])
    ]


def refuse_damaged(folder: Path, pattern: str = "*") -> None:
    """Raises UserError where files of an artifact, of those that match, are not as they were written."""
    if damaged := damaged_files(folder, pattern):
        raise UserError(f"{folder}: {'; '.join(damaged)}. Delete the folder and run its stage again: it is made anew")


def mirrored(artifact: Path, cache: Path) -> Path:
    """The finished artifact's copy in `cache`, a folder of this node; the first who asks makes it, the others wait.

    Raises UserError when it cannot be copied whole.
    """
    copy = cache / artifact.name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f".{artifact.name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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


@contextmanager
def exclusive(storage: Path) -> Iterator[None]:
    """Hold the storage's lock: two drivers building the same artifacts would undo each other's resume.

    The kernel drops the lock with the process, however it dies. Raises UserError when another run holds it, and
    ConfigError when the folder cannot be written.
    """
    try:
        storage.mkdir(parents=True, exist_ok=True)
        file = open(storage / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"storage: {storage} cannot be written ({error.strerror}); choose another folder") from None
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise UserError(
                f"storage {storage}: another asc-ray run is working there (process {owner}); "
                "wait for it, end it, or choose another `storage`"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}")
        lock.flush()
        yield


def is_locked(storage: Path) -> bool:
    """Whether a run is at work in this storage."""
    if not (storage / ".lock").is_file():
        return False
    with open(storage / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
