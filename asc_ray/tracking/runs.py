"""Runs in MLflow: one parent run for each configuration, with a child run for each thing trained.

MLflow listens, and nothing waits for it: what it is to be told goes to a file in the storage, and a thread sends it.
What a server did not take stays in the file for the next command. The same configuration resumes a run that was cut
off. Runs that nobody resumes are ended as KILLED, so none stays RUNNING.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asc_ray.artifacts import content_key
from asc_ray.errors import UserError
from asc_ray.places import named
from asc_ray.shown import masked
from asc_ray.tracking.config import ARTIFACTS, TrackingConfig, database_of, default_uri
from asc_ray.tracking.spool import Spool
from asc_ray.tracking.store import on_a_network, prepare
from asc_ray.tracking.things import ERROR_TAG, KEY_TAG, KIND_TAG, Thing, first_line

GREETING_SECONDS = 15.0
# One thread at a time sends a file's records: a run's last attempt may outlive it, while the next run begins.
_SENDING: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
_PAUSES = (1.0, 5.0, 15.0, 60.0)  # seconds before another attempt at a server that does not answer


class Tracker:
    """Tells MLflow about the runs of one storage. Its methods return at once.

    `say` shows the user a line. Leave the tracker with `close`.
    """

    def __init__(self, config: TrackingConfig, storage: Path, say: Callable[[str], None]) -> None:
        self._config, self._storage, self._say = config, storage, say
        self.uri = config.uri or default_uri(storage)
        self._file = _file_of(config, storage)
        self._spool = Spool(self._file)
        self._parent: Thing | None = None
        self._wake, self._answered = threading.Event(), threading.Event()
        self._closing = False
        self._error: BaseException | None = None  # of the last attempt
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def greet(self) -> None:
        """Wait for the server's first answer. Raises UserError if there is none and `tracking.required` is set."""
        if (database := database_of(self.uri)) and (kind := on_a_network(database.resolve(), _mounts())):
            self._say(
                f"warning: MLflow's store {database} lies on {kind}, where locks may not hold between machines; run "
                "`mlflow ui` on this machine alone, or let tracking.uri name a server or a file on a local disk"
            )
        if self._answered.wait(GREETING_SECONDS) and self._error is None:
            return
        if self._config.required:
            raise UserError(f"tracking.required: {self._failure()}; start or mend it, or leave tracking.required out")
        if self._error is None:  # else the thread has said it
            self._say(f"warning: {self._failure()}; the run goes on, and sends what it has to tell later")

    def close(self) -> None:
        """Wait for the thread, at most `tracking.wait_seconds`; say what could not be sent."""
        self._closing = True
        self._wake.set()
        try:
            self._thread.join(self._config.wait_seconds)
        finally:
            if left := len(self._spool):
                self._say(
                    f"warning: {left} records were not sent to {self._failure()}; they are kept, and the next command "
                    "in this storage, or `asc-ray track --resend`, sends them"
                )

    @contextmanager
    def parent(self, thing: Thing, configuration: str, complete: Iterable[str] = ()) -> Iterator["Tracker"]:
        """Open the parent run; at the end it is FINISHED, FAILED, or KILLED by an interrupt.

        `complete`: keys of finished artifacts; a driver may have died before it ended their runs.
        `configuration` is YAML.
        """
        self._tell("take over", thing, complete=sorted(complete))
        self.start(thing)
        self._parent = thing
        self.tag(thing, {ERROR_TAG: None})
        self._tell("text", thing, text=configuration, path="config.yaml")
        status = "FAILED"
        try:
            yield self
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        except Exception as error:
            self.tag(thing, {ERROR_TAG: masked(error, self.uri)[:5000]})
            raise
        finally:
            self.end(thing, status)

    @property
    def top(self) -> Thing:
        """The thing of the parent run."""
        assert self._parent is not None
        return self._parent

    def start(self, thing: Thing) -> None:
        """Open or resume the thing's run below the parent."""
        self._tell("open", thing, **self._about(thing))

    def log(self, thing: Thing, metrics: Mapping[str, float], step: int = 0, epoch: bool = False) -> None:
        """Log metrics at a step; an `epoch` that the run has from before is not logged again."""
        if metrics:
            self._tell("log", thing, metrics=dict(metrics), step=step, epoch=epoch)

    def log_file(self, thing: Thing, path: Path, folder: str | None = None) -> None:
        """Store a file of a finished artifact with the thing's run."""
        self._tell("file", thing, path=str(path), folder=folder)

    def tag(self, thing: Thing, tags: Mapping[str, str | None]) -> None:
        """Set tags of the thing's run; None removes one."""
        self._tell("tag", thing, tags=dict(tags))

    def end(self, thing: Thing, status: str = "FINISHED") -> None:
        self._tell("end", thing, status=status)

    def whole(
        self, thing: Thing, curve: Sequence[tuple[int, Mapping[str, float]]] = (), status: str = "FINISHED"
    ) -> None:
        """Make the run of what has ended on a server that does not have it ended, with its curve by epoch."""
        self._tell("whole", thing, curve=list(curve), status=status, **self._about(thing))

    def _about(self, thing: Thing) -> dict[str, Any]:
        return {
            "name": thing.name,
            "tags": {KEY_TAG: thing.key, KIND_TAG: thing.kind, **thing.tags},
            "parameters": dict(thing.parameters),
            "below": self._parent.run if self._parent else None,
            "corpus": thing.corpus,
        }

    def _tell(self, do: str, thing: Thing, **what: Any) -> None:
        record = {"do": do, "run": thing.run, "time": int(time.time() * 1000), **what}
        self._spool.append(record, durable=do != "file")
        self._wake.set()

    def _failure(self) -> str:
        reason = f"does not answer ({first_line(self._error, self.uri)})" if self._error else "has not answered yet"
        return f"MLflow at {masked(self.uri)}, which {reason}"

    def _send(self) -> None:
        with _SENDING[self._file]:
            self._send_all()

    def _send_all(self) -> None:
        """Send what the spool holds, until the tracker is closed; after an error begin anew, some time later."""
        server, attempts = None, 0
        while True:
            self._wake.clear()
            try:
                if server is None:
                    from asc_ray.tracking.server import Server  # mlflow takes seconds to import

                    files = None if self._config.uri else (self._storage / ARTIFACTS).as_uri()
                    if files:
                        prepare(self._storage)
                    server = Server(self.uri, self._config.experiment, named(self._storage), files, self._say)
                    self._answered.set()
                if records := self._spool.unsent():
                    server.apply(records)
                    self._spool.sent()
                    attempts, self._error = 0, None
                    continue
            except Exception as error:  # whatever the server or its store does: the run goes on
                server = None
                first, self._error = self._error is None, error
                self._answered.set()
                if first:
                    self._say(
                        f"warning: {self._failure()}; the run goes on, and what there is to tell is kept and sent later"
                    )
                if self._closing and attempts:
                    return
                deadline = time.monotonic() + _PAUSES[min(attempts, len(_PAUSES) - 1)]
                attempts += 1
                while not self._closing and (left := deadline - time.monotonic()) > 0:
                    self._wake.wait(min(left, 1.0))
                    self._wake.clear()
                continue
            if self._closing:
                return
            self._wake.wait()


def waiting(config: TrackingConfig, storage: Path) -> int:
    """Return the number of records that this server was not sent yet."""
    file = _file_of(config, storage)
    return len(Spool(file)) if file.exists() else 0


def resend(config: TrackingConfig, storage: Path, say: Callable[[str], None]) -> None:
    """Send what waits for this server, as long as `tracking.wait_seconds` allow."""
    if waiting(config, storage):
        Tracker(config, storage, say).close()


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(errors="replace")
    except OSError:  # not Linux
        return ""


def _file_of(config: TrackingConfig, storage: Path) -> Path:
    """Return the file of what a server is to be told; its name tells servers apart and shows no login."""
    server = content_key(uri=masked(config.uri or default_uri(storage)), experiment=config.experiment)
    return storage / "tracking" / f"{server}.jsonl"
