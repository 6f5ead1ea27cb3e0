"""The lock of an object storage: every run has a claim there, an object that it renews as long as it works.

A run puts its claim first and looks for others then, so of two runs at least one sees the other. A claim whose process
is known to be dead, or that was not renewed for some time, holds nobody up and is removed.
"""

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asc_ray import remote
from asc_ray.artifacts import read_record, write_record
from asc_ray.disk import DiskError
from asc_ray.errors import UserError
from asc_ray.places import named
from asc_ray.shown import printable

CLAIMS = ".lock"  # a folder of the storage
RENEW_SECONDS = 10.0
LEASE_SECONDS = 60.0  # a claim that was not renewed for so long is that of a dead run
_LOOK_SECONDS = 1.0


@contextmanager
def claimed(storage: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold an object storage's lock. `say` shows the user a line, where another claim has to be waited for.

    Raises UserError where another run holds it, and where one took it because this process stood still.
    """
    own = storage / CLAIMS / f"{uuid.uuid4().hex}.json"
    renewal = _Renewal(own)
    try:
        _take(own, say)
        renewal.start()
        yield
    except KeyboardInterrupt:
        if renewal.lost:
            raise UserError(
                f"storage {named(storage)}: another run took it over, because this one was silent for "
                f"{LEASE_SECONDS:.0f} seconds; the same command goes on from here, when that one has ended"
            ) from None
        raise
    finally:
        renewal.ended.set()
        if renewal.is_alive():  # it must not renew what is removed
            renewal.join(RENEW_SECONDS)
        own.unlink(missing_ok=True)
        with suppress(DiskError):
            remote.forget(own)


def has_claims(storage: Path) -> bool:
    """Whether a run is at work in an object storage."""
    claims = _others(storage / CLAIMS / "none")
    return any(time.time() - claim.renewed < LEASE_SECONDS and _lives(claim.owner) is not False for claim in claims)


class _Claim:
    def __init__(self, file: Path, renewed: float) -> None:
        self.file, self.renewed = file, renewed
        self.owner: dict[str, Any] = read_record(remote.refreshed(file)) or {}

    def __str__(self) -> str:
        pid, host, since = (printable(self.owner.get(key, "?")) for key in ("pid", "host", "since"))
        return f"process {pid} on {host}, since {since}"

    def remove(self) -> None:
        remote.forget(self.file)
        self.file.unlink(missing_ok=True)


def _take(own: Path, say: Callable[[str], None]) -> None:
    """Put a claim, and wait until no other is alive. Raises UserError where one is renewed meanwhile."""
    owner = {"pid": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    owner["process"] = _process(os.getpid())
    seen: dict[Path, float] = {}
    while True:
        own.parent.mkdir(parents=True, exist_ok=True)
        write_record(own, owner)
        now = remote.listed(own.parent)[own.name].mtime.timestamp()  # by the store's clock, as all claims' times
        alive = []
        for claim in _others(own):
            if _lives(claim.owner) is False or now - claim.renewed > LEASE_SECONDS:
                claim.remove()
            else:
                alive.append(claim)
        if not alive:
            return
        for claim in alive:
            if _lives(claim.owner) or claim.renewed > seen.get(claim.file, claim.renewed):
                raise UserError(
                    f"storage {named(own.parents[1])}: another asc-ray run is working there ({claim}); wait for it, "
                    "end it, or choose another `storage`"
                )
        if not seen:
            say(f"waiting, at most {LEASE_SECONDS:.0f} s, whether another run is still at work ({alive[0]})")
        seen |= {claim.file: claim.renewed for claim in alive}
        time.sleep(_LOOK_SECONDS)


def _others(own: Path) -> list[_Claim]:
    found = remote.listed(own.parent)
    return [_Claim(own.parent / name, info.mtime.timestamp()) for name, info in found.items() if name != own.name]


class _Renewal(threading.Thread):
    """Renews a claim. It interrupts the main thread, as Ctrl-C does, when another run has removed it."""

    def __init__(self, own: Path) -> None:
        super().__init__(name="claim", daemon=True)
        self._own = own
        self.ended = threading.Event()
        self.lost = False

    def run(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            try:
                if self._own.name not in remote.listed(self._own.parent):
                    self.lost = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                if not self.ended.is_set():
                    remote.push(self._own)
            except (DiskError, OSError):  # the storage cannot be reached, which the run itself will tell
                continue


def _lives(owner: dict[str, Any]) -> bool | None:
    """Whether a claim's process lives; None where this cannot be known here, as of another machine's."""
    process, own = owner.get("process"), _process(os.getpid())
    if process is None or own is None or process[:2] != own[:2]:
        return None
    return _process(owner["pid"]) == process


def _process(pid: int) -> list[str] | None:
    """Return what tells a process from every other: the machine's boot, the process's namespace, its start and number.

    None where the system does not say it; the start is empty for a process that is not there.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    try:
        words = Path(f"/proc/{int(pid)}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError):
        return [boot, namespace, "", str(pid)]
    return [boot, namespace, "" if words[0] == "Z" else words[19], str(pid)]
