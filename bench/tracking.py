"""Measure what MLflow costs a search when each request to its server takes 200 ms.

    python bench/tracking.py [--trials 48] [--epochs 40] [--seconds 20] [--slots 8] [--delay 0.2] [--uri URI]

The search is told as `asc-ray sweep` tells it, but its trials only wait: --epochs epochs in --seconds, --slots trials
at once. The server is a real one (`mlflow server` in a temporary folder, or --uri), behind a proxy on 127.0.0.1 that
waits --delay seconds before it passes a request on.

driver: how long it was held by telling the tracker, of an epoch and of the whole time. A trial that reports waits for
        the driver, and for what other trials report at that moment: the share is the most that a trial can lose.
writer: how long its thread was held by requests, and when it had sent all.
"""

import argparse
import heapq
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from asc_ray.config.composition import load_config
from asc_ray.plan import Plan
from asc_ray.search.trials import TrialResult
from asc_ray.stages.tracked import pipeline_thing, tell_trial, trial_thing
from asc_ray.tracking.config import TrackingConfig, default_uri
from asc_ray.tracking.runs import Tracker

METRICS = ("loss", "train_accuracy", "seconds", "objective", "validation_accuracy", "validation_macro_accuracy")


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on to the server `behind`, after `delay` seconds."""

    behind = ""
    delay = 0.0
    seconds: ClassVar[list[float]] = []  # of each request

    def answer(self) -> None:
        start = time.perf_counter()
        time.sleep(self.delay)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = urllib.request.Request(self.behind + self.path, body or None, method=self.command)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        self.seconds.append(time.perf_counter() - start)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = lambda self: self.answer()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def proxy(handler: type[Proxy]) -> Iterator[str]:
    """Run a proxy while the context lasts, and yield its URI."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as node:
        threading.Thread(target=node.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{node.server_port}"
        finally:
            node.shutdown()


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Run a tracking server with its store in the folder while the context lasts, and yield its URI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--port", str(port), "--workers", "1", "--backend-store-uri", default_uri(folder)]
    words += ["--artifacts-destination", (folder / "files").as_uri()]
    node = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(480):
            try:
                urllib.request.urlopen(f"{uri}/health").close()
                break
            except OSError:
                time.sleep(0.5)
        yield uri
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def search(tracker: Tracker, plan: Plan, trials: int, epochs: int, seconds: float, slots: int) -> float:
    """Tell a search of trials that only wait, and return the seconds for which that held the driver."""
    held, start = 0.0, time.perf_counter()
    waiting = [(seconds / epochs * (1 + slot / slots), slot, 1) for slot in range(min(slots, trials))]
    begun = len(waiting)
    things = {}
    while waiting:
        when, number, epoch = heapq.heappop(waiting)  # of the epoch that ends next
        time.sleep(max(0.0, start + when - time.perf_counter()))
        before = time.perf_counter()
        trial = {"number": number, "parameters": {}, "seed": 0, "repeats": None, "parent": None}
        if epoch == 1:
            things[number] = trial_thing(plan, trial)
            tracker.start(things[number])
        metrics = dict.fromkeys(METRICS, float(epoch))
        tracker.log(things[number], metrics, epoch, epoch=True)
        if epoch == epochs:
            curve = tuple(float(epoch) for epoch in range(1, epochs + 1))
            tell_trial(plan, tracker, TrialResult(**trial, curve=curve, state="complete"))
        held += time.perf_counter() - before
        if epoch < epochs:
            heapq.heappush(waiting, (when + seconds / epochs, number, epoch + 1))
        elif begun < trials:
            heapq.heappush(waiting, (when + seconds / epochs, begun, 1))
            begun += 1
    return held


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("--uri")
    options = parser.parse_args(words)
    trials, epochs, slots = options.trials, options.epochs, options.slots
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder) / "storage"
        plan = Plan(load_config("demo", [f"storage={storage}", f"sweep.trials={trials}", f"sweep.epochs={epochs}"]))
        with nullcontext(options.uri) if options.uri else server(Path(folder)) as behind:
            Proxy.behind, Proxy.delay = behind, options.delay
            with proxy(Proxy) as uri:
                config = TrackingConfig(uri=uri, experiment="bench", wait_seconds=600)
                with closing(Tracker(config, storage, print)) as tracker:
                    with tracker.parent(pipeline_thing(plan, "bench", plan.key), ""):
                        tracker.greet()
                        start = time.perf_counter()
                        held = search(tracker, plan, trials, epochs, options.seconds, slots)
                        wall = time.perf_counter() - start
                    ended = time.perf_counter()
                last = time.perf_counter() - ended
    requests, busy = len(Proxy.seconds), sum(Proxy.seconds)
    print(f"{trials} trials of {options.seconds:g} s ({epochs} epochs) in {slots} slots: {wall:.1f} s")
    print(f"driver: {1000 * held / trials / epochs:.2f} ms an epoch, {held:.2f} s in all, {100 * held / wall:.2f} %")
    print(f"writer: {requests} requests, {busy:.1f} s in all; had sent all {last:.1f} s after the search's end")


if __name__ == "__main__":
    main()
