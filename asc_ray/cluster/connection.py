"""The connection to a Ray cluster: made within a stated time or refused in one line, and watched while it lasts."""

import atexit
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
import ray._private.parameter
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from asc_ray.errors import UserError
from asc_ray.resources import ClusterConfig

# Ray itself would end the driver after this time of silence, without a word of ours.
RAYS_SECONDS = int(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112
# A head that is silent for this long is given up; one that Kubernetes starts again is back before.
SILENT_SECONDS = RAYS_SECONDS - 20
# How long the driver has to end after that: it may be in a call to the dead head, which nothing can interrupt.
LAST_SECONDS = 10
GOES_ON = "the same command goes on from here"


@contextmanager
def connected(config: ClusterConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Connect to Ray while the context lasts; an embedded cluster is shut down at the end.

    `say` shows the user a line, the last one if the driver is in a call that nothing can interrupt.

    Raises UserError where Ray does not start or answer within `cluster.connect_seconds`, and where the head, or
    something that Ray needs, dies while the context lasts.
    """
    session = _Session(config.joined, config.connect_seconds, say)
    try:
        session.begin()
        yield
    except KeyboardInterrupt:
        if session.lost:
            raise UserError(session.loss()) from None
        raise
    except RayTaskError:  # what a task raised, and not what became of the cluster
        raise
    except RayError as error:
        raise UserError(f"{session.where}: Ray failed ({_first_line(error)}); {GOES_ON}") from None
    finally:
        session.end()


class Caller(threading.Thread):
    """A thread that waits for Ray. Shut down under it, Ray ends the process with an exit code of its own."""


class _Session(threading.Thread):
    """Connects to Ray in a thread, for nothing interrupts `ray.init`, and then watches whether the head answers.

    The thread lives until the connection ends: the kernel ends the processes of an embedded cluster with it.
    """

    def __init__(self, address: str, seconds: float, say: Callable[[str], None]) -> None:
        super().__init__(name="ray", daemon=True)
        self.where = f"cluster.address {address}" if address != EMBEDDED else "Ray's embedded cluster"
        self._address, self._seconds, self._say = address, seconds, say
        self._deadline = time.monotonic() + seconds
        self._ready, self._left, self._leaving = threading.Event(), threading.Event(), threading.Event()
        self._asking = threading.Thread(target=self._ask, name="head", daemon=True)
        self._error: Exception | None = None
        self._heard = 0  # how often the head has answered
        self.lost = False

    def begin(self) -> None:
        self.start()
        if not self._ready.wait(self._seconds):
            _leave_without_ray()
            raise UserError(f"{self.where}: {self._silence()}")
        if self._error:
            raise UserError(f"{self.where}: {_refusal(self._error)}") from None
        for number in (signal.SIGTERM, signal.SIGHUP):  # Ray's own say where each thread is, or end the process at once
            signal.signal(number, signal.getsignal(number))

    def end(self) -> None:
        self._leaving.set()
        # An interrupted driver has such threads: it ends without Ray's farewell, and so does an embedded cluster.
        if self._ready.is_set() and not self.lost and not any(isinstance(one, Caller) for one in threading.enumerate()):
            if self._asking.is_alive():
                self._asking.join(5.0)
            ray.shutdown()
        self._left.set()

    def run(self) -> None:
        try:
            self._connect()
        except Exception as error:  # Ray raises anything, also plain Exception
            self._error = error
        self._ready.set()
        if self._error is None:
            self._asking.start()
            self._watch()
        self._left.wait()

    def _connect(self) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        join = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        if self._address != EMBEDDED:
            _greet(self._address)
            # Not None: Ray would then join the cluster that was last started on this machine, or wait for it if dead.
            join(address=self._address)
            return
        while True:
            try:
                with _patient_start() as port:
                    join(address=EMBEDDED, _metrics_export_port=port)
                return
            except (OSError, ValueError):  # of a path or a permission: another attempt ends as this one did
                raise
            except Exception:  # a start on a loaded machine took longer than Ray's own limits
                if time.monotonic() > self._deadline:
                    raise

    def _silence(self) -> str:
        key = f"{self._seconds:g} seconds (cluster.connect_seconds)"
        if self._address == EMBEDDED:
            return (
                f"has not started within {key}, as on a machine that is loaded; end other work, or wait longer, as in "
                "--set cluster.connect_seconds=300"
            )
        return (
            f"does not answer within {key}; see whether its head lives, as with `ray status --address "
            f"{self._address}`, start it anew, or wait longer, as in --set cluster.connect_seconds=300"
        )

    def _ask(self) -> None:
        while not self._leaving.wait(5.0):
            try:
                ray.nodes()
                self._heard += 1
            except Exception:  # no answer, which `_watch` counts
                continue

    def _watch(self) -> None:
        """End the driver when the head is silent. A driver that was stopped for a while counts no seconds meanwhile."""
        heard, silent = 0, 0
        while not self._leaving.wait(1.0):
            silent = 0 if self._heard != heard else silent + 1
            heard = self._heard
            if silent == SILENT_SECONDS:
                self.lost = True
                _leave_without_ray()
                # As Ctrl-C does: it is the one exception that a signal may raise while Ray waits.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if silent == SILENT_SECONDS + LAST_SECONDS:
                self._say(self.loss())
                _exit()

    def loss(self) -> str:
        return f"{self.where}: its head has not answered for {SILENT_SECONDS} seconds; {GOES_ON}, on any cluster"


EMBEDDED = "local"


def _greet(address: str) -> None:
    """Ask the head at HOST:PORT once. Raises what Ray itself would only raise after minutes of attempts."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
        ensure_token_if_auth_enabled(None, create_token_if_missing=False)  # without a token, asking ends the process
        raylet: Any = ray._raylet
        raylet.GcsClient(address=address)


@contextmanager
def _patient_start() -> Iterator[int]:
    """Let Ray's own agents take their time to start; gives the one of their ports that `ray.init` takes itself.

    A raylet ends itself when its agents, which are Python, take more than 15 s to write down which ports they have, as
    on a loaded machine (ray issue 65983). Ports that are given are not waited for. Nor is there an autoscaler to start.
    """
    sockets = [socket.socket() for _ in range(4)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    names = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    module: Any = ray._private.parameter
    parameters = module.RayParams
    module.RayParams = partial(parameters, **dict(zip(names, ports, strict=False)), no_monitor=True)
    try:
        yield ports[-1]
    finally:
        module.RayParams = parameters


def _leave_without_ray() -> None:
    """Let the process end without Ray's own farewell, which would wait for a cluster that does not answer."""
    atexit.register(_exit)


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(UserError.exit_code)


def _refusal(error: BaseException) -> str:
    """Return why Ray did not start or could not be joined, and what to do."""
    causes = [error]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    text = " ".join(map(str, causes))
    reason = _first_line(causes[-1])
    if isinstance(causes[-1], AuthenticationError) or "Unauthenticated" in text or "InvalidAuthToken" in text:
        return (
            "it wants a login token, and this process has none or another; set RAY_AUTH_MODE to token, and put the "
            "cluster's token (`ray get-auth-token` on its head) into ~/.ray/auth_token or into RAY_AUTH_TOKEN"
        )
    if "AF_UNIX path length" in text:
        return f"the path of Ray's folder is too long for its sockets ({reason}); set RAY_TMPDIR to a shorter one"
    if isinstance(causes[-1], PermissionError):
        return f"Ray's folder belongs to another user ({reason}); set RAY_TMPDIR to a folder of your own"
    if "Version mismatch" in text:
        return f"it runs other versions ({' '.join(text.split())[:300]}); install the same of Python and Ray"
    return f"cannot be reached ({reason}); see whether it runs, as with `ray status`, or leave cluster.address out"


def _first_line(error: BaseException) -> str:
    """Return an error's first line; the last where Ray has put a traceback into the text."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if "Traceback" in str(error) else 0].strip()
