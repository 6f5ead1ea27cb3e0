"""The stage `fuse`: the fusion and the soft targets from the systems' logits."""

from collections.abc import Mapping
from typing import Any

from asc_ray.config.configuration import Config
from asc_ray.ensemble.fuse import fuse_systems
from asc_ray.evaluation.gains import Gain
from asc_ray.resources import Resources
from asc_ray.stages.tracked import fusion_thing
from asc_ray.stages.work import Job, Work


def make(work: Work) -> None:
    plan, config = work.plan, work.plan.config
    if warning := fusion_warning(config, len(plan.imported) + len(config.teachers.imported)):
        work.progress.note(warning)
    logits = {name: artifact.path for name, artifact in plan.logits.items()}
    cpus = Resources(cpus=config.logits.resources.cpus)
    arguments = (work.source, logits, config.fusion)
    work.together({"fusion": Job(plan.fusion, fuse_systems, arguments, cpus, thing=fusion_thing(plan))})
    for line in fusion_summary(plan.fusion.facts()):
        work.progress.note(line)


def fusion_warning(config: Config, imported: int) -> str | None:
    """Return a warning if the teachers may have been trained on the clips of eq. 4, else None.

    `imported`: how many systems were trained elsewhere.
    """
    if config.fusion.data == "train":
        return (
            "warning: fusion.data is train: eq. 4 is learned on clips that the teachers were trained on, and favors "
            "those that overfit; holdout and crossfit do not"
        )
    if imported:
        return (
            f"warning: the logits of {imported} systems come from elsewhere; where these were trained on the whole "
            "training split, eq. 4 is learned on clips that they know"
        )
    return None


def fusion_summary(facts: Mapping[str, Any]) -> list[str]:
    """Return lines: a table of the systems on held-out places, the gain over the average, and the fit's notes."""
    figures, weights, without = facts["validation"], facts["weights"], facts["validation_without"]
    width = max(map(len, figures))
    lines = [f"{'held-out places':{width}}  weight  log loss  accuracy  log loss without it"]
    for name, own in figures.items():
        weight = f"{weights[name]:6.3f}" if name in weights else " " * 6
        line = f"{name:{width}}  {weight}  {own['log_loss']:8.3f}  {100 * own['accuracy']:6.1f} %"
        if name in without:
            line += f"  {without[name]['log_loss'] - figures['fusion']['log_loss']:+.4f}"
        lines.append(line)
    lines.append(_gained("fusion over the average", facts["validation_gain"]))
    if half := facts["validation_without_half"]:
        lines.append(_gained(f"without the weakest half ({', '.join(half['left_out'])}) over the fusion", half["gain"]))
    return [*lines, *facts["notes"]]


def _gained(what: str, facts: Mapping[str, Any]) -> str:
    gain = Gain.model_validate(facts)
    loss, accuracy = gain.log_loss, gain.accuracy
    return (
        f"{what}: log loss {-loss.value:+.3f} ({-loss.high:+.3f} to {-loss.low:+.3f}), accuracy "
        f"{100 * accuracy.value:+.1f} points ({100 * accuracy.low:+.1f} to {100 * accuracy.high:+.1f}); 95 % by "
        f"resampling {gain.places} places"
    )
