"""The search as it runs: populations, budgets, costs, killed and started again."""

import csv
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from conftest import TINY, command, environment, joined, processes, relabel_test_clips
from mlflow.tracking import MlflowClient

from asc_ray.artifacts import read_record, write_record
from asc_ray.config.composition import load_config
from asc_ray.models.registry import build
from asc_ray.plan import Plan
from asc_ray.search.config import SweepConfig
from asc_ray.search.course import Course
from asc_ray.search.proposals import trial_config
from asc_ray.search.trials import TrialResult, best, pareto
from asc_ray.stages.work import source_of
from asc_ray.students.config import Limits, StudentConfig
from asc_ray.students.train import fit_student

LABELS_ALONE = ["student.distillation.soft_target=none", "sweep.seeds=1"]
RATE = "optimizer.learning_rate: {loguniform: [0.0003, 0.03]}"


@pytest.fixture
def storage(finished, tmp_path):
    """All that a search needs, and nothing behind it."""
    for part in ("corpus", "clips", "teachers", "logits", "fusion"):
        shutil.copytree(finished.storage / part, tmp_path / "storage" / part)
    return tmp_path / "storage"


def arguments(storage, *overrides):
    given = [f"storage={storage}", *LABELS_ALONE, *overrides]
    return given, ("sweep", "--config", TINY, *(word for own in given for word in ("--set", own)))


def results(plan):
    return [TrialResult.model_validate(trial) for trial in plan.sweep.facts()["trials"]]


@pytest.mark.campaign
def test_a_population_killed_half_way_ends_as_an_unbroken_one(storage, tmp_path):
    overrides = [
        f"sweep.space={{{RATE}, augment.freq_mixstyle.p: {{uniform: [0.0, 0.9]}}}}",
        "sweep.scheduler=pbt", "sweep.trials=3", "sweep.epochs=4", "sweep.population.every=2",
    ]  # fmt: skip
    shutil.copytree(storage, tmp_path / "broken")
    given, words = arguments(storage, *overrides)
    done = subprocess.run(command(*words), capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = Plan(load_config(TINY, given))
    trials = results(plan)
    assert [t.number for t in trials] == list(range(6))
    assert all(len(t.curve) == 2 and t.state == "complete" for t in trials)
    assert {p.name for p in (plan.sweep.path / "trials").iterdir()} == {f"{n:04d}.json" for n in range(6)}

    # What went on as itself has the curve of a training that nobody interrupted.
    second = next(t for t in trials[3:] if t.parent == t.number - 3)
    recipe = trial_config(plan.config.student, plan.config.sweep, second.parameters)
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.scaled_to(4)})
    data = source_of(plan).open()
    network = build(recipe.model, len(data.store.labels), recipe.seed)
    history = fit_student(network, recipe, data, None, tmp_path / "alone", 0.0, lambda metrics: None)
    alone = tuple(metrics["validation_macro_accuracy"] for metrics in history)
    assert alone == trials[second.parent].curve + second.curve
    # What went on from another one has other parameters.
    moved = [t for t in trials[3:] if t.parent != t.number - 3]
    assert [t.parameters != trials[t.parent].parameters for t in moved] == [True]

    given, words = arguments(tmp_path / "broken", *overrides)
    driver = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, env=environment())
    while driver.poll() is None and not list((tmp_path / "broken").glob("sweep/*.partial/trials/0003.checkpoints")):
        time.sleep(0.01)
    assert driver.poll() is None
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = subprocess.run(command(*words), capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trial-000: 1/" not in done.stdout
    assert results(Plan(load_config(TINY, given))) == trials


@pytest.mark.campaign
def test_a_search_killed_among_its_finalists_goes_on_from_checkpoints(storage, tmp_path):
    """With devices left out. Of the test split it knows nothing: in one of the two storages its labels are wrong."""
    overrides = [
        f"sweep.space={{{RATE}}}", "sweep.trials=3", "sweep.epochs=3", "sweep.grace_epochs=1", "sweep.reduction=2",
        "sweep.finalists=2", "sweep.seeds=2", "sweep.validation={devices: [a], weight: 0.7}",
    ]  # fmt: skip
    shutil.copytree(storage, tmp_path / "broken")
    relabel_test_clips(tmp_path / "broken")
    given, words = arguments(storage, *overrides)
    done = subprocess.run(command(*words), capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = results(Plan(load_config(TINY, given)))
    last = len(whole) - 1
    assert whole[last].repeats is not None

    given, words = arguments(tmp_path / "broken", *overrides)
    driver = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, env=environment())
    checkpoint = f"sweep/*.partial/trials/{last:04d}.checkpoints/epoch-00001/meta.json"
    while driver.poll() is None and not (found := list((tmp_path / "broken").glob(checkpoint))):
        time.sleep(0.01)
    assert driver.poll() is None
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    while processes("ImplicitFunc"):
        time.sleep(0.1)
    meta = read_record(found[0])
    meta["history"][0] |= {"validation_seen": 5.0, "validation_unseen": 5.0}  # what no training gives
    write_record(found[0], meta)
    for later in found[0].parents[1].glob("epoch-0000[23]"):
        shutil.rmtree(later)
    done = subprocess.run(command(*words), capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = results(Plan(load_config(TINY, given)))
    assert resumed[last].curve == (pytest.approx(5.0), *whole[last].curve[1:])
    assert resumed[:last] == whole[:last]
    client = MlflowClient(f"sqlite:///{tmp_path}/broken/mlflow.db")
    for run in client.search_runs(["1"], "tags.`asc_ray.state` != ''"):
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "objective")]
        assert steps == sorted(set(steps)), "no epoch twice"
        assert len(steps) == len(whole[int(run.info.run_name.removeprefix("trial-"))].curve)


def test_a_search_for_accuracy_and_size_within_a_budget(storage):
    space = f"sweep.space={{{RATE}, model.size: {{choice: [sm1, sm2]}}}}"
    overrides = [space, "sweep.cost=bytes", "sweep.trials=6", "sweep.epochs=1", "sweep.budget.epochs=2"]
    given, words = arguments(storage, *overrides)
    done = subprocess.run(command(*words), capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = Plan(load_config(TINY, given))
    trials = results(plan)
    assert len(trials) == 3  # lookback 2: trial 3 learns from 0 and 1 and 2, which had two epochs already at trial 3
    sizes = {"sm1": 13_728, "sm2": 30_708}
    assert [t.cost for t in trials] == [sizes[t.parameters["model.size"]] for t in trials]
    winner = best(plan.config.sweep, trials)
    assert "3 trials: 3 complete; the budget was used up before 6" in done.stdout
    assert f"winner: trial {winner.number}, objective {100 * winner.value:.1f} %" in done.stdout
    chosen = yaml.safe_load((plan.sweep.path / "best.yaml").read_text())["student"]
    assert chosen["model"]["size"] == winner.parameters["model.size"]
    rows = list(csv.DictReader((plan.sweep.path / "trials.csv").open()))
    assert [int(row["number"]) for row in rows if row["pareto"] == "True"] == sorted(
        one.result.number for one in pareto(trials)
    )
    assert [float(row["optimizer.learning_rate"]) for row in rows] == [
        t.parameters["optimizer.learning_rate"] for t in trials
    ]
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs(
        [client.get_experiment_by_name("asc-ray").experiment_id], "tags.`asc_ray.winner` = 'true'"
    )
    assert [run.info.run_name for run in runs] == [f"trial-{winner.number:03d}"]
    assert runs[0].data.metrics["final_objective"] == pytest.approx(winner.value)
    assert runs[0].data.metrics["cost"] == winner.cost


def test_trials_that_fail_are_told_and_the_search_goes_on(storage):
    """What works, what diverges and what crashes its worker, which is told only in a training's forward."""
    space = "{distillation.temperature: {choice: [2.0, 1.0e-40]}, model.patchout: {choice: [0, 1000]}}"
    passt = [
        "student.model={name: passt, width: 16, depth: 1, heads: 1, patchout_freq: 0}",
        "student.frontend={n_fft: 1024, window: 800, hop: 320, mels: 128}",
        "student.distillation.soft_target=fused",
    ]
    overrides = [
        f"sweep.space={space}",
        *passt,
        "sweep.sampler=random",
        "sweep.trials=5",
        "sweep.epochs=2",
        "sweep.seed=11",
    ]
    given, words = arguments(storage, *overrides, "sweep.scheduler=none", "cluster.retries=1")
    done = subprocess.run(command(*words), capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = Plan(load_config(TINY, given))
    trials = results(plan)
    states = {tuple(t.parameters.values()): t.state for t in trials}
    assert states == {(2.0, 0): "complete", (2.0, 1000): "failed", (1e-40, 0): "diverged", (1e-40, 1000): "failed"}
    for trial in trials:
        expected = {
            "complete": "",
            "failed": "patchout = 1000 leaves none",
            "diverged": "the loss became nan in epoch 1",
        }
        assert expected[trial.state] in trial.error
        assert (f"trial {trial.number} {trial.state}: {trial.error}" in done.stdout) == (trial.state != "complete")
    assert re.search("5 trials: [12] complete, [12] diverged, [23] failed", done.stdout)
    assert "Traceback" not in done.stderr
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = {run.info.run_name: run for run in client.search_runs(["1"], "tags.`asc_ray.state` != ''")}
    assert {n: (r.data.tags["asc_ray.state"], r.info.status) for n, r in runs.items()} == {
        f"trial-{t.number:03d}": (t.state, "FINISHED" if t.state == "complete" else "FAILED") for t in trials
    }
    curve = client.get_metric_history(runs["trial-000"].info.run_id, "objective")
    assert [metric.value for metric in sorted(curve, key=lambda metric: metric.step)] == list(trials[0].curve)


def test_a_trial_without_a_network_fails_before_it_starts(tmp_path):
    """Each value is allowed by itself; together they are over the limits, or no student at all."""
    space = {
        "model.multiplier": {"choice": [2.3, 4.0]},
        "model.width": {"choice": [8, 32]},
        "augment.freq_mask": {"choice": [0, 48]},
        "frontend.mels": {"choice": [32, 256]},
    }
    sweep = SweepConfig.model_validate(
        {"trials": 40, "epochs": 2, "sampler": "random", "lookback": 40, "cost": "bytes", "space": space}
    )
    student = StudentConfig.model_validate({"model": {"name": "cp_mobile"}})
    events = []
    course = Course(sweep, student, Limits(), 10, tmp_path, [], lambda name, event: events.append((name, event)))
    started = []
    while (trial := course.start()) is not None:
        started.append(trial["parameters"])
    assert len(course.ended) + len(started) == 40
    states = [event["state"] for _, event in events if "finished" in event]
    assert states == ["failed"] * len(course.ended)

    def reason(freq_mask, mels, multiplier, width):
        if mels < freq_mask:
            return "augment.freq_mask is 48, but the front end's log-mel has 32 mel bins"
        return "cp_mobile is too large for the device (limits.bytes: " if (multiplier, width) == (4.0, 32) else ""

    expected = [(reason(*result.parameters.values()), result.error) for result in course.ended]
    assert all(why and why in error for why, error in expected)
    assert len({why for why, _ in expected}) == 2
    assert not any(reason(*(parameters[key] for key in sorted(space))) for parameters in started)


@pytest.mark.campaign
def test_a_trial_whose_worker_dies_too_often_is_left_for_the_next_command(storage):
    """What killed the worker says nothing of the trial's parameters, so it is no result of the search."""
    overrides = [f"sweep.space={{{RATE}}}", "sweep.trials=2", "sweep.epochs=3", "cluster.retries=0"]
    given, words = arguments(storage, *overrides)
    driver = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    while driver.poll() is None and not list(storage.glob("sweep/*.partial/trials/0000.checkpoints/epoch-00001")):
        time.sleep(0.01)
    for pid in processes("ImplicitFunc"):
        os.kill(pid, signal.SIGKILL)
    output = driver.communicate()[0]
    assert driver.returncode == 1, output
    assert "trials did not end, because their workers died too often" in output
    assert "Traceback" not in output
    done = subprocess.run(command(*words), capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(t.state, len(t.curve)) for t in results(Plan(load_config(TINY, given)))] == [("complete", 3)] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.space={}"], "sweep.space: "),
        (["sweep.space={optimizer.learning_rate: {uniform: [0.1, 0.01]}}"], "the lower bound 0.1 is not below"),
        (["sweep.space={optimizer.learning: {uniform: [0.01, 0.1]}}"], "sweep.space.optimizer.learning"),
        (
            ["sweep.space={model: {choice: [{name: cp_resnet, width: 64}]}}"],
            "sweep.space.model",
        ),
        (
            ["sweep.space={model.size: {choice: [sm1, sm4]}}", "limits.bytes=50000"],
            "sm4: student.model: ds_flexinet is",
        ),
        (["sweep.scheduler=pbt", "sweep.trials=4"], "with scheduler pbt allowed"),
    ],
)
def test_a_wrong_search_is_refused_before_any_work(tmp_path, overrides, message):
    _, words = arguments(tmp_path / "storage", *overrides)
    done = subprocess.run(command("pipeline", *words[1:]), capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "storage").exists()
