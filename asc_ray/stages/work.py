"""What every stage works with: the plan, the tracker, the progress, and jobs on the cluster."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from asc_ray.artifacts import MANIFEST, Artifact
from asc_ray.cluster.stream import stream
from asc_ray.cluster.tasks import Task, run_tasks
from asc_ray.plan import Plan
from asc_ray.progress import Progress
from asc_ray.resources import Resources
from asc_ray.tracking.runs import Tracker
from asc_ray.tracking.things import Thing, curve
from asc_ray.training.dataset import Source


@dataclass(frozen=True)
class Job:
    """A call `function(artifact, *arguments)` on the cluster.

    `epochs`: how many it reports, or 0. `thing`: what its run in MLflow is about; None: it has none.
    """

    artifact: Artifact
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    resources: Resources
    epochs: int = 0
    thing: Thing | None = None


@dataclass
class Work:
    """What a stage's `make` needs. The plan changes when systems are left out."""

    plan: Plan
    tracker: Tracker
    progress: Progress

    @property
    def source(self) -> Source:
        return source_of(self.plan)

    @contextmanager
    def tracked(
        self, artifacts: Mapping[str, Artifact], things: Mapping[str, Thing]
    ) -> Iterator[Callable[[str, dict[str, Any]], None]]:
        """Yield a listener that opens the run of each named thing at its first event and logs every epoch.

        The run of a complete artifact ends FINISHED, any other FAILED, or KILLED by an interrupt.
        """
        status, opened = "FAILED", set[str]()

        def on_event(name: str, event: dict[str, Any]) -> None:
            if thing := things.get(name):
                if name not in opened:
                    self.tracker.start(thing)
                    opened.add(name)
                if "epoch" in event:
                    self.tracker.log(thing, curve(event), int(event["epoch"]), epoch=True)
                if event.get("finished"):
                    opened.discard(name)
                    if "state" not in event:  # trials have a state; the search ends their runs
                        self.tracker.end(thing)
            self.progress.event(name, event)

        try:
            yield on_event
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            for name in opened:
                self.tracker.end(things[name], "FINISHED" if artifacts[name].complete else status)

    def together(self, jobs: Mapping[str, Job]) -> None:
        """Run the jobs that are not complete on the cluster, as many at once as fit."""
        config = self.plan.config
        todo = {name: job for name, job in jobs.items() if not job.artifact.complete}
        self.progress.expect("all", {name: job.epochs for name, job in todo.items() if job.epochs})
        things = {name: job.thing for name, job in todo.items() if job.thing}
        with self.tracked({name: job.artifact for name, job in todo.items()}, things) as on_event:
            tasks = []
            for name, job in todo.items():
                if not job.epochs:
                    on_event(name, {"started": True})
                tasks.append(Task(name, job.function, (job.artifact, *job.arguments), job.resources, bool(job.epochs)))

            def on_done(name: str, result: Any) -> None:
                if name in things and todo[name].artifact.complete:  # which another node may have made
                    self.tracker.log_file(things[name], todo[name].artifact.path / MANIFEST)
                if len(todo) > 1 and todo[name].epochs:
                    on_event(name, {"finished": True})

            run_tasks(tasks, config.cluster.retries, on_event, on_done, patient=True)

    def say_on_trust(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Warn about weights whose files do not say which output is which scene."""
        if names := [name for name, own in facts.items() if own["on_trust"]]:
            order = ", ".join(self.plan.clips.facts()["labels"])
            self.progress.note(
                f"warning: the weights of {', '.join(names)} do not say in which order they name the scenes; this is "
                f"taken on trust: {order}"
            )


def source_of(plan: Plan) -> Source:
    """Return the source of clips for a plan's trainings."""
    config = plan.config
    return Source(plan.clips.path, config.partition, config.data, stream, config.fusion.data, config.fusion.folds)
