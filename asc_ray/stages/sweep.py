"""The search for the student's configuration."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from asc_ray.cluster.sweep import SCRATCH, concurrent, run_sweep
from asc_ray.cluster.tasks import slots
from asc_ray.files import write_atomically
from asc_ray.plan import BEST_STUDENT, TRIALS_TABLE, dump
from asc_ray.search.config import SweepConfig
from asc_ray.search.course import ended_trials
from asc_ray.search.proposals import trial_config
from asc_ray.search.trials import TrialResult, best, trial_name, trials_table, values_over_seeds
from asc_ray.stages.tracked import tell_trial, trial_thing
from asc_ray.stages.work import Work
from asc_ray.tracking.things import Thing


def make(work: Work) -> None:
    plan, config, sweep = work.plan, work.plan.config, work.plan.config.sweep
    assert plan.sweep is not None
    assert sweep is not None
    numbers = {trial_name(n): n for n in range(sweep.most)}
    ended = ended_trials(plan.sweep)
    work.progress.expect("sweep", dict.fromkeys(numbers, sweep.epochs), len(ended))
    room, running = slots(config.student_resources), concurrent(sweep, config.student_resources)
    work.progress.note(f"{running} of at most {sweep.most} trials at a time, in {room} slots")
    if line := advice(sweep, room):
        work.progress.note(line)
    work.progress.note(f"searched: {', '.join(sweep.space)}")
    if sweep.scheduler == "asha" and sweep.grace_epochs >= sweep.epochs:
        work.progress.note(f"no trial is stopped early: they end before sweep.grace_epochs, {sweep.grace_epochs}")
    if sweep.validation.devices and config.taught:
        work.progress.note(
            f"{', '.join(sweep.validation.devices)}: left out of the trials, but the teachers were trained on them; "
            "with soft_target: none the trials are judged by devices that nothing has heard"
        )

    things: dict[str, Thing] = {}

    def listener(name: str, event: dict[str, Any]) -> None:
        if event.get("started"):
            things[name] = trial_thing(plan, {"number": numbers[name], **event})
        on_event(name, event)
        if event.get("finished"):
            tell_trial(plan, work.tracker, TrialResult.model_validate({k: event[k] for k in TrialResult.model_fields}))

    for result in ended:  # a killed driver may not have told MLflow how a trial ended
        tell_trial(plan, work.tracker, result)
    with work.tracked({name: plan.trial(number) for name, number in numbers.items()}, things) as on_event:
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
    work.tracker.tag(trial_thing(plan, vars(winner)), {"asc_ray.winner": "true"})
    for line in sweep_summary(sweep, results, winner):
        work.progress.note(line)
    plan.sweep.finish({"trials": [dump(result) for result in results]}, SCRATCH)
    for file in files:
        work.tracker.log_file(work.tracker.top, plan.sweep.path / file)


def advice(sweep: SweepConfig, room: int) -> str:
    """Return a line about the slots, of `room`, that the search leaves idle; empty where it leaves none."""
    key, most = sweep.most_at_once
    if most >= room:
        return ""
    return f"advice: {key} {most} leaves {room - most} of {room} slots idle; a larger one uses them, in another search"


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
