"""Training of all teachers at once: lanes of Ray Train that work through a common queue of systems.

A trainer of Ray Train takes tens of seconds to start, so it does not train one teacher alone. It is a lane: when its
workers have finished a system, they take the next one from the queue. When a worker dies, Ray Train starts the lane's
workers again, and they go on with their system from its last checkpoint. Systems that ask for different resources have
lanes of their own, started as soon as they fit.
"""

import math
import os
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from asc_ray.artifacts import Artifact
from asc_ray.cluster.connection import Caller
from asc_ray.cluster.tasks import Mailbox, OnEvent, beside_the_driver, fits, pass_on, rays_storage, settle
from asc_ray.disk import disk_error
from asc_ray.ensemble.teachers import train_teacher
from asc_ray.errors import UserError
from asc_ray.models.complexity import complexity
from asc_ray.models.config import ModuleConfig
from asc_ray.models.registry import build
from asc_ray.resources import RAYS_FOLDER, TrainerResources
from asc_ray.students.cost import input_shape
from asc_ray.training import parallel
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Teacher:
    artifact: Artifact
    recipe: Recipe
    source: Source
    resources: TrainerResources


@ray.remote(num_cpus=0)
class Queue(Mailbox):
    """Hands out systems to lanes, counts each system's attempts, and relays progress to the driver."""

    def __init__(self, waiting: dict[TrainerResources, list[str]], retries: int) -> None:
        super().__init__()
        self._waiting = waiting
        self._retries = retries
        self._held: dict[str, tuple[TrainerResources, str]] = {}
        self._taken: Counter[str] = Counter()
        self._errors: dict[str, str] = {}

    def take(self, lane: str, resources: TrainerResources) -> str | None:
        """Return the system that `lane` works on next: the one it held when its worker died, else a new one."""
        self._put_back(lane)
        waiting = self._waiting[resources]
        while waiting:
            name = waiting.pop(0)
            if self._taken[name] <= self._retries:
                self._taken[name] += 1
                self._held[lane] = resources, name
                return name
            self._errors.setdefault(name, "its worker died every time")
        return None

    def _put_back(self, lane: str) -> None:
        if lane in self._held:
            resources, name = self._held.pop(lane)
            self._waiting[resources].insert(0, name)

    def unattended(self, lanes: Mapping[str, TrainerResources]) -> dict[TrainerResources, int]:
        """Return how many more lanes have work beside the live `lanes`; systems of dead lanes wait again."""
        for lane in set(self._held) - set(lanes):
            self._put_back(lane)
        starting = Counter(resources for lane, resources in lanes.items() if lane not in self._held)
        return {resources: len(names) - starting[resources] for resources, names in self._waiting.items()}

    def note_error(self, name: str, message: str, final: bool) -> None:
        if final or name not in self._errors:  # the other ranks only report that this one left
            self._errors[name] = message
        if final:
            self._taken[name] = self._retries + 1

    def release(self, lane: str, name: str) -> None:
        self._errors.pop(name, None)
        self._held.pop(lane, None)
        self.post(name, {"finished": True})

    def errors(self) -> dict[str, str]:
        return dict(self._errors)


def train_teachers(teachers: Mapping[str, Teacher], retries: int, on_event: OnEvent) -> dict[str, str]:
    """Train every system, the longest first, as many at once as fit, and return the errors of those that failed.

    A system that keeps failing does not stop the others. A system that is neither complete nor has an error was not
    tried to the end: no node had room for it, or controllers died more than `retries` times.
    """
    waiting: dict[TrainerResources, list[str]] = {}
    for name in _longest_first(teachers):
        waiting.setdefault(teachers[name].resources, []).append(name)
    queue = Queue.options(scheduling_strategy=beside_the_driver()).remote(waiting, retries)  # type: ignore[attr-defined]
    storage = next(iter(teachers.values())).artifact.storage
    scratch = storage / RAYS_FOLDER / uuid.uuid4().hex
    work = {"queue": queue, "teachers": dict(teachers)}
    lanes: dict[str, _Lane] = {}
    crashes = 0
    numbers = count()
    while True:
        for name in [name for name, lane in lanes.items() if not lane.is_alive()]:
            lane = lanes.pop(name)
            if lane.crashed:
                crashes += 1
                lane.free()
        alive = {name: lane.resources for name, lane in lanes.items()}
        for resources, more in ray.get(queue.unattended.remote(alive)).items():
            for _ in range(more if crashes <= retries else 0):
                taken = [asked for asked in (*alive.values(), resources) for _ in range(asked.workers)]
                if not fits(taken):
                    break
                name = f"lane-{next(numbers)}"
                lanes[name] = _Lane({**work, "lane": name, "resources": resources}, scratch, retries)
                lanes[name].start()
                alive[name] = resources
        if not lanes:
            break
        time.sleep(POLL_SECONDS)
        pass_on(queue, on_event)
    errors = ray.get(queue.errors.remote())
    ray.kill(queue)
    settle()
    return {name: error for name, error in errors.items() if not teachers[name].artifact.complete}


def _longest_first(teachers: Mapping[str, Teacher]) -> list[str]:
    """Sort the systems by multiply-accumulates of a clip times epochs; those of the user's own code, which does not run
    on the driver, come first."""
    macs: dict[Any, int] = {}

    def cost(name: str) -> float:
        recipe = teachers[name].recipe
        if isinstance(recipe.model, ModuleConfig):
            return math.inf
        key = recipe.model, recipe.frontend
        if key not in macs:
            macs[key] = complexity(build(recipe.model, scenes=10), input_shape(recipe)).macs
        return macs[key] * recipe.optimizer.epochs

    return sorted(teachers, key=cost, reverse=True)


class _Lane(Caller):
    """A trainer of Ray Train in a thread, because `fit` blocks; a daemon, so that it ends with the program."""

    def __init__(self, work: dict[str, Any], scratch: Path, retries: int) -> None:
        super().__init__(name=work["lane"], daemon=True)
        self.resources: TrainerResources = work["resources"]
        self.crashed = False
        # The placement group cannot have a name: a request for this many bytes of memory marks it.
        self._mark = 1 + uuid.uuid4().int % 2**20
        self._trainer = TorchTrainer(
            _work_through_queue,
            train_loop_config=work,
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.resources.workers,
                resources_per_worker={**self.resources.per_worker(), "memory": self._mark},
                use_gpu=self.resources.gpus > 0,
            ),
            run_config=ray.train.RunConfig(
                name=work["lane"],
                **rays_storage(scratch),
                failure_config=ray.train.FailureConfig(max_failures=(retries + 1) * len(work["teachers"])),
            ),
        )

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception:  # the controller died, or the workers died too often
            self.crashed = True

    def free(self) -> None:
        """Remove the placement group of a killed controller, because Ray's own cleaner needs a dashboard."""
        for group, entry in placement_group_table().items():
            if entry["state"] != "REMOVED" and self._mark in [
                bundle.get("memory") for bundle in entry["bundles"].values()
            ]:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def _work_through_queue(work: dict[str, Any]) -> None:
    """Train systems from the queue on each worker of a lane; rank 0 asks the queue for all of them."""
    resources = work["resources"]
    torch.set_num_threads(resources.threads)
    if resources.gpus:  # the node may have several GPUs
        torch.cuda.set_device(ray.train.torch.get_device())
    queue, lane, first = work["queue"], work["lane"], parallel.rank() == 0
    while True:
        name = parallel.agreed(ray.get(queue.take.remote(lane, resources)) if first else None)
        if name is None:
            return
        teacher: Teacher = work["teachers"][name]
        if first:
            ray.get(queue.post.remote(name, {"started": True, "pid": os.getpid()}))
        try:
            # It is complete if a worker died after it finished the artifact and before it told the queue.
            if not parallel.agreed(teacher.artifact.complete):
                train_teacher(
                    teacher.artifact,
                    teacher.source,
                    teacher.recipe,
                    resources.gpus,
                    on_epoch=lambda metrics, name=name: queue.post.remote(name, metrics),  # type: ignore[misc]
                )
        except Exception as error:
            # A user's mistake, a divergence or a full disk would come again; another error may be the machine's fault.
            error = disk_error(error, teacher.artifact.storage) or error
            final = isinstance(error, UserError)
            message = str(error) if final else traceback.format_exc(limit=-1).strip().replace("\n", " ")
            ray.get(queue.note_error.remote(name, message, final))
            if not final or parallel.world() > 1:  # the other workers may wait for this one, so restart them all
                raise
        else:
            if first:
                ray.get(queue.release.remote(lane, name))
