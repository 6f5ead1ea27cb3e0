"""What MLflow is to be told: records in the storage, kept until a server has them."""

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_AT_ONCE = 500  # records that are sent together
SYNC_SECONDS = 1.0  # a search's trials report many times a second, and a disk takes milliseconds to answer for each


class Spool:
    """An append-only file of JSON records, empty when all of them were sent.

    One thread appends and one sends. The storage's lock keeps other processes away. After a crash the records since
    the file was last empty are sent again, so sending one twice must do the same as sending it once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._read = 0  # bytes of the file that were sent
        self._next = 0  # bytes of the file that `unsent` returned last
        self._synced = -SYNC_SECONDS  # when the disk last had all of it
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")  # ends a line that a crash has cut

    def append(self, record: Mapping[str, Any], durable: bool) -> None:
        """Append a record; `durable`: it survives a power cut, with all before it, unless another did a moment ago."""
        line = json.dumps(record, default=str).encode() + b"\n"
        with self._lock, open(self._path, "ab") as file:
            file.write(line)
            file.flush()
            if durable and time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(file.fileno())
                self._synced = time.monotonic()

    def unsent(self) -> list[dict[str, Any]]:
        """Return the oldest records that were not sent, at most MOST_AT_ONCE; lines that a crash has cut are none."""
        records: list[dict[str, Any]] = []
        with self._lock, open(self._path, "rb") as file:
            file.seek(self._read)
            for line in iter(file.readline, b""):
                self._next = file.tell()
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue
                if len(records) == MOST_AT_ONCE:
                    break
        return records

    def sent(self) -> None:
        """Forget the records that `unsent` returned last."""
        with self._lock:
            self._read = self._next
            if self._read == self._path.stat().st_size:
                os.truncate(self._path, 0)
                self._read = self._next = 0

    def __len__(self) -> int:
        """Return the number of records that were not sent."""
        with self._lock, open(self._path, "rb") as file:
            file.seek(self._read)
            return sum(bool(line.strip()) for line in file)
