"""The fan-out of the teachers: lanes of Ray Train, each working through a common queue of systems.

A trainer of Ray Train costs tens of seconds to start, whatever it trains. So there is one trainer per slot of the
cluster and not one per teacher: its worker takes the next system from the queue when it has finished one. When the
worker dies, Ray Train starts it again, and it goes on with the system it held, from that system's last checkpoint.
"""

import os
import shutil
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from asc_ray.artifacts import Artifact
from asc_ray.cluster.resources import Resources
from asc_ray.cluster.runtime import OnEvent, pass_on, settle, slots
from asc_ray.errors import UserError
from asc_ray.training.dataset import Source
from asc_ray.training.loop import Recipe
from asc_ray.training.systems import train_teacher

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Teacher:
    artifact: Artifact
    recipe: Recipe


@ray.remote(num_cpus=0)
class Queue:
    """Hands out systems to lanes, remembers who holds what and how often, and relays progress to the driver."""

    def __init__(self, names: list[str], retries: int) -> None:
        self._waiting = names
        self._retries = retries
        self._held: dict[str, str] = {}
        self._taken: Counter[str] = Counter()
        self._errors: dict[str, str] = {}
        self._events: list[tuple[str, dict[str, Any]]] = []

    def take(self, lane: str) -> str | None:
        """The system that `lane` works on next: the one it held when its worker died, else a new one."""
        held = self._held.get(lane)
        if held is not None and self._taken[held] > self._retries:
            self._errors.setdefault(held, "its worker died every time")
            held = None
        if held is None:
            held = self._waiting.pop(0) if self._waiting else None
        if held is None:
            self._held.pop(lane, None)
            return None
        self._held[lane] = held
        self._taken[held] += 1
        return held

    def note_error(self, name: str, message: str, final: bool) -> None:
        self._errors[name] = message
        if final:
            self._taken[name] = self._retries + 1

    def release(self, lane: str, name: str) -> None:
        self._errors.pop(name, None)
        self._held.pop(lane, None)
        self._events.append((name, {"finished": True}))

    def post(self, name: str, event: dict[str, Any]) -> None:
        self._events.append((name, event))

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        events, self._events = self._events, []
        return events

    def errors(self) -> dict[str, str]:
        return dict(self._errors)


def train_teachers(
    teachers: Mapping[str, Teacher],
    source: Source,
    resources: Resources,
    retries: int,
    on_event: OnEvent,
) -> None:
    """Train every system of `teachers`, as many at once as fit the cluster.

    One that keeps failing does not stop the others. Raises UserError naming those that failed, with their errors.
    """
    names = list(teachers)
    lanes = min(len(names), slots(resources))
    queue = Queue.remote(names, retries)  # type: ignore[attr-defined]
    scratch = teachers[names[0]].artifact.storage / ".ray-train" / uuid.uuid4().hex
    work = {"queue": queue, "teachers": dict(teachers), "source": source, "threads": resources.threads}
    crashes: list[str] = []

    def run_lane(number: int) -> None:
        try:
            _lane({**work, "lane": f"lane-{number}"}, resources, scratch, failures=(retries + 1) * len(names)).fit()
        except Exception as error:  # what a lane dies of is told with the systems that it leaves behind
            crashes.append(str(error).strip().splitlines()[-1])

    # Threads, because `fit` blocks; daemons, so that an interrupt ends the program and with it the lanes.
    running = [Thread(target=run_lane, args=(number,), daemon=True) for number in range(lanes)]
    for thread in running:
        thread.start()
    while any(thread.is_alive() for thread in running):
        time.sleep(POLL_SECONDS)
        pass_on(queue, on_event)
    errors = ray.get(queue.errors.remote())
    ray.kill(queue)
    shutil.rmtree(scratch, ignore_errors=True)
    settle()
    failed = [name for name, teacher in teachers.items() if not teacher.artifact.complete]
    if failed:
        reasons = "; ".join(f"{name}: {errors.get(name, crashes[0] if crashes else 'not started')}" for name in failed)
        raise UserError(
            f"{len(failed)} of {len(names)} teachers failed ({reasons}). The others are kept; "
            "the same command goes on with those that failed"
        )


def _lane(work: dict[str, Any], resources: Resources, scratch: Path, failures: int) -> TorchTrainer:
    return TorchTrainer(
        _work_through_queue,
        train_loop_config=work,
        scaling_config=ray.train.ScalingConfig(
            num_workers=1, resources_per_worker=resources.per_worker(), use_gpu=resources.gpus > 0
        ),
        run_config=ray.train.RunConfig(
            name=work["lane"],
            storage_path=str(scratch),
            failure_config=ray.train.FailureConfig(max_failures=failures),
        ),
    )


def _work_through_queue(work: dict[str, Any]) -> None:
    """What a lane's worker runs."""
    torch.set_num_threads(work["threads"])
    queue, lane = work["queue"], work["lane"]
    while (name := ray.get(queue.take.remote(lane))) is not None:
        teacher: Teacher = work["teachers"][name]
        ray.get(queue.post.remote(name, {"started": True, "pid": os.getpid()}))
        try:
            if not teacher.artifact.complete:
                train_teacher(
                    teacher.artifact,
                    work["source"],
                    teacher.recipe,
                    on_epoch=lambda metrics, name=name: queue.post.remote(name, metrics),  # type: ignore[misc]
                )
        except Exception as error:
            # A user's mistake or a divergence comes again each time; anything else may be the machine's fault.
            final = isinstance(error, UserError)
            message = str(error) if final else traceback.format_exc(limit=-1).strip().replace("\n", " ")
            ray.get(queue.note_error.remote(name, message, final))
        else:
            ray.get(queue.release.remote(lane, name))
