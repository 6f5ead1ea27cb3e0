"""The search for the student's configuration."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from asc_ray.artifacts import write_atomically
from asc_ray.cluster.sweep import SCRATCH, concurrent, run_sweep
from asc_ray.cluster.tasks import slots
from asc_ray.plan import BEST_STUDENT, TRIALS_TABLE, dump
from asc_ray.search.config import SweepConfig
from asc_ray.search.course import ended_trials
from asc_ray.search.proposals import trial_config
from asc_ray.search.trials import ENDED_WELL, TrialResult, best, trial_name, trials_table, values_over_seeds
from asc_ray.stages.work import Work

STATE_TAG = "asc_ray.state"  # on a trial's run in MLflow: how the trial ended


def make(work: Work) -> None:
    plan, config, sweep = work.plan, work.plan.config, work.plan.config.sweep
    assert plan.sweep is not None
    assert sweep is not None
    trials = {trial_name(n): plan.trial(n) for n in range(sweep.most)}
    ended = ended_trials(plan.sweep)
    work.progress.expect("sweep", dict.fromkeys(trials, sweep.epochs), len(ended))
    room, running = slots(config.student_resources), concurrent(sweep, config.student_resources)
    idle = f"; sweep.lookback {sweep.lookback} leaves {room - running} slots idle" if running < room else ""
    work.progress.note(f"{running} of at most {sweep.most} trials at a time, in {room} slots{idle}")
    work.progress.note(f"searched: {', '.join(sweep.space)}")
    if sweep.scheduler == "asha" and sweep.grace_epochs >= sweep.epochs:
        work.progress.note(f"no trial is stopped early: they end before sweep.grace_epochs, {sweep.grace_epochs}")
    if sweep.validation.devices and config.taught:
        work.progress.note(
            f"{', '.join(sweep.validation.devices)}: left out of the trials, but the teachers were trained on them; "
            "with soft_target: none the trials are judged by devices that nothing has heard"
        )

    def listener(name: str, event: dict[str, Any]) -> None:
        if event.get("started"):
            own = {key: event[key] for key in ("seed", "repeats", "parent") if event[key] is not None}
            work.tracker.start(name, trials[name].key, event["parameters"] | own)
        on_event(name, event)
        if event.get("finished"):
            work.tracker.log(name, {key: event[key] for key in ("value", "cost")}, sweep.epochs)
            work.tracker.tag(name, trials[name].key, STATE_TAG, event["state"])
            work.tracker.end(name, "FINISHED" if event["state"] in ENDED_WELL else "FAILED")

    with work.tracked(trials) as on_event:
        for result in ended:  # a killed driver may not have told MLflow how a trial ended
            name, told = trial_name(result.number), vars(result) | {"value": result.value}
            if not work.tracker.ended_with(STATE_TAG, name, trials[name].key):
                listener(name, {"started": True, **told})
                listener(name, {"finished": True, **told})
        results = run_sweep(
            plan.sweep,
            work.source,
            {target: plan.target_files(target) for target in config.soft_target_names},
            config.student,
            sweep,
            config.limits,
            config.student_resources,
            config.cluster.retries,
            listener,
        )
    winner = best(sweep, results)
    student = trial_config(config.student, sweep, winner.parameters)
    files = {
        BEST_STUDENT: "# The search's configuration with its best student: `asc-ray student --config` takes it.\n"
        + yaml.safe_dump({**dump(config), "sweep": None, "student": dump(student)}, sort_keys=False),
        TRIALS_TABLE: trials_table(results),
    }
    for file, text in files.items():
        write_atomically(plan.sweep.partial / file, text)
        work.tracker.log_file("", plan.sweep.partial / file)
    work.tracker.tag(trial_name(winner.number), trials[trial_name(winner.number)].key, "asc_ray.winner", "true")
    for line in sweep_summary(sweep, results, winner):
        work.progress.note(line)
    plan.sweep.finish({"trials": [dump(result) for result in results]}, SCRATCH)


def sweep_summary(sweep: SweepConfig, results: Sequence[TrialResult], winner: TrialResult) -> list[str]:
    """Return lines on how the trials ended, on the winner, and on what failed."""
    ended = ", ".join(f"{count} {state}" for state, count in sorted(Counter(r.state for r in results).items()))
    searched = sum(result.repeats is None for result in results)
    early = f"; the budget was used up before {sweep.searched}" if searched < sweep.searched else ""
    values = values_over_seeds(results, winner.number)
    over = f", mean of {len(values)} seeds" if len(values) > 1 else ""
    found = ", ".join(f"{key} {_short(value)}" for key, value in winner.parameters.items())
    lines = [
        f"{len(results)} trials: {ended}{early}",
        f"winner: trial {winner.number}, objective {100 * sum(values) / len(values):.1f} %{over}: {found}",
    ]
    lines += [f"trial {r.number} {r.state}: {r.error}" for r in results if r.state in ("failed", "diverged")]
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
