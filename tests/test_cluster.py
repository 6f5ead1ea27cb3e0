"""Tasks on a cluster of two CPUs: they hold what they asked for, and what they say arrives."""

import time
from pathlib import Path

import pytest
import ray
from conftest import TINY

from asc_ray.cluster.tasks import Task, run_tasks
from asc_ray.config.composition import load_config
from asc_ray.errors import UserError
from asc_ray.plan import Plan
from asc_ray.resources import Resources
from asc_ray.stages.evaluate import evaluation_jobs
from asc_ray.stages.qat import int8_jobs
from asc_ray.stages.student import student_jobs


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def talker():
    """A function of no module, for workers do not import the tests."""

    def talk(folder: Path, name: str, fails: bool = False, on_epoch=None) -> dict[str, int]:
        """Say fifty things, and count who else is at work meanwhile."""
        mine = folder / name
        mine.touch()
        most = 0
        for epoch in range(50):
            on_epoch({"epoch": epoch})
            most = max(most, len(list(folder.iterdir())))
            time.sleep(0.01)
        mine.unlink()
        if fails:
            raise UserError(f"{name} has failed")
        return {"most": most}

    return talk


def run(folder: Path, failing: tuple[str, ...] = ()) -> tuple[list, list, UserError | None]:
    events, error, results = [], None, []
    names = [f"task-{number}" for number in range(6)]
    talk = talker()
    tasks = [Task(name, talk, (folder, name, name in failing), Resources(), reports=True) for name in names]
    try:
        results = run_tasks(
            tasks, 0, lambda name, event: events.append((name, event["epoch"])),
            lambda name, _: events.append((name, "done")), patient=True,
        )  # fmt: skip
    except UserError as raised:
        error = raised
    return events, results, error


def test_a_task_keeps_its_cpu_while_it_talks_and_is_heard_to_the_end(cluster, tmp_path):
    events, results, error = run(tmp_path)
    assert error is None
    assert max(result["most"] for result in results) <= 2
    for number in range(6):
        own = [what for name, what in events if name == f"task-{number}"]
        assert own == [*range(50), "done"]


def test_the_last_words_of_a_task_that_fails_are_heard_before_its_error(cluster, tmp_path):
    events, _, error = run(tmp_path, failing=("task-1", "task-4"))
    assert "2 of 6 failed (task-1: task-1 has failed; task-4: task-4 has failed)" in str(error)
    for number in range(6):
        own = [what for name, what in events if name == f"task-{number}"]
        assert own == [*range(50), *(["done"] if number not in (1, 4) else [])]


def test_twice_as_many_tasks_are_submitted_as_fit(cluster):
    submitted, done, most = [], [], []

    class Number:
        """Is pickled when its task is submitted."""

        def __init__(self, number: int) -> None:
            self.number = number

        def __reduce__(self):
            submitted.append(self.number)
            most.append(len(submitted) - len(done))
            return int, (self.number,)

    def square(number: int) -> int:
        return number**2

    tasks = [Task(f"task-{n}", square, (Number(n),), Resources()) for n in range(20)]
    results = run_tasks(tasks, 0, lambda name, event: None, lambda name, _: done.append(name))
    assert results == [n**2 for n in range(20)]
    assert submitted == list(range(20))
    assert max(most) == 4


def test_every_training_computes_where_it_asked_for(finished):
    """The share of a GPU that a job asks of the cluster is the one that its function is given."""
    asked = ["student_resources.gpus=0.25", f"storage={finished.storage}"]
    plan = Plan(load_config(TINY, asked))
    jobs = [*student_jobs(plan).values(), *int8_jobs(plan).values(), *evaluation_jobs(plan, plan.evaluations).values()]
    assert len(jobs) == 4
    for job in jobs:
        assert job.resources.gpus == 0.25
        assert job.arguments[-1] == 0.25
