"""Work on the Ray cluster: checking that it has room before work starts, running tasks on it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asc_ray import remote
from asc_ray.errors import ConfigError, UserError
from asc_ray.resources import Resources, TrainerResources

OnEvent = Callable[[str, dict[str, Any]], None]


def slots(request: Resources) -> int:
    """Return how many workers with this request the cluster can run at once; a worker fits on one node."""
    count = 0
    for node in _nodes():
        by_cpu = node["CPU"] / request.cpus
        by_gpu = node["GPU"] / request.gpus if request.gpus else by_cpu
        count += int(min(by_cpu, by_gpu))
    return count


def fits(requests: Sequence[Resources]) -> bool:
    """Whether the cluster's nodes have room for all these workers at once, if the largest are placed first."""
    free = _nodes()
    for request in sorted(requests, key=lambda request: (request.gpus, request.cpus), reverse=True):
        for node in free:
            if node["CPU"] >= request.cpus and node["GPU"] >= request.gpus:
                node["CPU"] -= request.cpus
                node["GPU"] -= request.gpus
                break
        else:
            return False
    return True


def rays_storage(folder: Path) -> dict[str, Any]:
    """Return the arguments of a RunConfig with which Ray Train and Tune write to a folder of a storage."""
    filesystem, path = remote.filesystem(folder)
    return {"storage_path": path, "storage_filesystem": filesystem}


def _nodes() -> list[dict[str, float]]:
    """Return the CPUs and GPUs of each live node, and a little more, so that a third of a GPU fits three times."""
    return [
        {name: node["Resources"].get(name, 0) + 1e-9 for name in ("CPU", "GPU")}
        for node in ray.nodes()
        if node["Alive"]
    ]


def check_feasible(requests: Mapping[str, Resources]) -> None:
    """Raise ConfigError, naming the key, for a request that the cluster can never meet: Ray would wait forever."""
    total = ray.cluster_resources()
    for key, request in requests.items():
        workers = request.workers if isinstance(request, TrainerResources) else 1
        if not fits([request] * workers):
            many = f"{workers} workers, each with " if workers > 1 else ""
            raise ConfigError(
                f"{key}: asks for {many}{request.cpus:g} CPUs and {request.gpus:g} GPUs on one node; the cluster has "
                f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs on {len(ray.nodes())} node(s). "
                f"Ask for less, as in --set {key}.cpus=1 --set {key}.gpus=0, or use a larger cluster"
            )


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """Place an actor on the driver's own node, so that the loss of another node does not end it."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Mailbox:
    """Collects events from workers on any node until the driver fetches them to show and track."""

    def __init__(self) -> None:
        self._events: list[tuple[str, dict[str, Any]]] = []

    def post(self, name: str, event: dict[str, Any]) -> None:
        self._events.append((name, event))

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        events, self._events = self._events, []
        return events


Events = ray.remote(num_cpus=0)(Mailbox)
LAST = {"last": True}  # the last event of every task
MAIL_SECONDS = 10.0  # how long the driver waits for a task's last event, which a dead worker never sends


@dataclass(frozen=True)
class Task:
    """A call `function(*arguments)`, with `on_epoch=` added if the task `reports` progress."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    resources: Resources
    reports: bool = False


def run_tasks(
    tasks: Sequence[Task], retries: int, on_event: OnEvent, on_done: OnEvent, patient: bool = False
) -> list[Any]:
    """Run all tasks, as many at once as fit, and return their results in the order of `tasks`.

    Ray is given twice as many as fit: no worker waits for the driver, and Ray's queue does not grow with the corpus.
    A task whose worker died is started again, up to `retries` times. The first error cancels the other tasks and is
    raised, as `fetch` does. With `patient`, a UserError lets the other tasks end; one UserError then lists all.
    """
    events: Any = None
    errors: dict[str, UserError] = {}
    if any(task.reports for task in tasks):
        events = Events.options(scheduling_strategy=beside_the_driver()).remote()
    requests = {task.resources for task in tasks}
    running: dict[Any, int] = {}
    submitted = 0
    results: list[Any] = [None] * len(tasks)
    told: set[str] = set()  # tasks whose last event has arrived

    def listener(name: str, event: dict[str, Any]) -> None:
        if event == LAST:
            told.add(name)
        else:
            on_event(name, event)

    try:
        while running or submitted < len(tasks):
            window = 2 * max(1, *map(slots, requests))  # nodes may have come or gone
            for task in tasks[submitted : submitted + window - len(running)]:
                reference = _run.options(**task.resources.options(), max_retries=retries, name=task.name).remote(
                    task.function, task.arguments, task.resources.threads, task.name, events if task.reports else None
                )
                running[reference] = submitted
                submitted += 1
            done, _ = ray.wait(list(running), timeout=0.5)
            if events is not None:
                pass_on(events, listener)
            for reference in done:
                index = running.pop(reference)
                end = time.monotonic() + MAIL_SECONDS
                while tasks[index].reports and tasks[index].name not in told and time.monotonic() < end:
                    pass_on(events, listener)
                try:
                    results[index] = fetch(reference)
                except UserError as error:
                    if not patient or len(tasks) == 1:
                        raise
                    errors[tasks[index].name] = error
                    continue
                on_done(tasks[index].name, results[index] if isinstance(results[index], dict) else {})
    finally:
        for reference in running:  # only after a failure; cancelling a finished task can crash Ray 2.60
            ray.cancel(reference, force=True)
        if events is not None:
            ray.kill(events)
    if errors:
        reasons = "; ".join(f"{task.name}: {errors[task.name]}" for task in tasks if task.name in errors)
        raise UserError(
            f"{len(errors)} of {len(tasks)} failed ({reasons}). The others are kept; the same command tries these again"
        )
    return results


def fetch(reference: Any) -> Any:
    """Call `ray.get`, but raise a UserError of the worker without Ray's wrapping."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def pass_on(events: Any, on_event: OnEvent) -> None:
    for name, event in ray.get(events.drain.remote()):
        on_event(name, event)


def settle() -> None:
    """Wait, at most a few seconds, until the killed workers of a stage have released their CPUs."""
    for _ in range(20):
        if ray.available_resources().get("CPU", 0) >= ray.cluster_resources().get("CPU", 0):
            return
        time.sleep(0.1)


@ray.remote
def _run(function: Callable[..., Any], arguments: tuple[Any, ...], threads: int, name: str, events: Any) -> Any:
    torch.set_num_threads(threads)
    if events is None:
        return function(*arguments)
    # Do not wait for events: Ray would start another task on this one's CPUs meanwhile. Events arrive in order.
    try:
        return function(*arguments, on_epoch=lambda metrics: events.post.remote(name, metrics))
    finally:
        events.post.remote(name, LAST)
