"""What a table or a figure is: its rows, the configuration and plan of each, and what is refused before any work."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from asc_ray.config.composition import checked, load_config, preset
from asc_ray.config.configuration import Config
from asc_ray.config.fitting import check_limits
from asc_ray.data.config import CorpusConfig
from asc_ray.errors import ConfigError
from asc_ray.int8.config import check_int8
from asc_ray.plan import Plan
from asc_ray.progress import Progress
from asc_ray.report import table
from asc_ray.section import Section

TAU22_DEVICES = ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6")  # the paper gives figures for these


class RowConfig(Section):
    """A row of a table. `set`: what it changes, by dotted key. `paper`: the paper's figures, see ComparedRow.

    With `student.specialize` it has the figures of the specialized students.
    """

    later = frozenset({"against"})
    name: str = Field(pattern=r"^[^'\"\\]+$", description="name of the row, and of its runs in MLflow")
    set: dict[str, Any] = Field({})
    paper: dict[str, float] = Field({})
    against: str | None = Field(None, description="the row that this one's difference is to; null: the first row")


class TableConfig(Section):
    """A file in `configs/tables/` or `configs/figures/`. `set` holds for all rows; the command's `--set` changes it."""

    title: str
    note: str = Field("", description="remark on the paper's figures, shown with the table")
    int8: bool = Field(False, description="whether to quantize every student")
    set: dict[str, Any] = Field({})
    rows: tuple[RowConfig, ...] = Field(min_length=1)

    @field_validator("rows")
    @classmethod
    def _distinct(cls, rows: tuple[RowConfig, ...]) -> tuple[RowConfig, ...]:
        names = [row.name for row in rows]
        if len(set(names)) < len(names):
            raise ValueError("two rows have the same name")
        for row in rows:
            if row.against is not None and (row.against not in names or row.against == row.name):
                others = ", ".join(name for name in names if name != row.name)
                raise ValueError(f"row {row.name}: against: found {row.against!r}; allowed: another row, of {others}")
        return rows


def planned(
    kind: str, number: str, config: str | Path, overrides: Sequence[str], progress: Progress
) -> tuple[TableConfig, str, dict[str, Config], dict[str, Plan]]:
    """Return a table's description and short name, and the configurations and plans of its rows. Raises ConfigError."""
    spec, name = read_table(kind, number)
    configs = {}
    for row in spec.rows:
        given = [*_lines(spec.set), *overrides, *_lines(row.set), "sweep=null"]
        try:
            configs[row.name] = load_config(config, given)
        except ConfigError as error:
            raise ConfigError(f"row {row.name}: {error}") from None
        for key in sorted({text.partition("=")[0] for text in overrides} & row.set.keys()):
            progress.note(
                f"row {row.name}: sets {key} itself, to {json.dumps(row.set[key])}; --set does not change that"
            )
    plans = plans_of(configs)
    for name_of_row, plan in plans.items():
        try:
            check_limits(plan.config, plan.scenes)
            if spec.int8:
                check_int8(plan.config.student.model.name)
        except ConfigError as error:
            raise ConfigError(f"row {name_of_row}: {error}") from None
    _refuse_unknown_columns(spec, next(iter(plans.values())))
    return spec, name, configs, plans


def plans_of(configs: Mapping[str, Config]) -> dict[str, Plan]:
    """Return the plans of all rows.

    Raises ConfigError if the rows do not share one corpus, of which each may have a training split of its own, the
    devices that they are trained on, and one storage.
    """
    plans: dict[str, Plan] = {}
    for row, config in configs.items():
        lead = next(iter(plans.values()), None)
        # Reading a large corpus takes seconds, so the rows share it.
        same = lead is not None and config.corpus == lead.config.corpus
        plans[row] = Plan(config, lead.source if lead and same else None)
        if lead and config.storage != lead.config.storage:
            raise ConfigError(f"row {row}: storage: a table has one, {lead.config.storage}; give it by --set")
        first = next(iter(plans))
        if lead and _but_split(config) != _but_split(lead.config):
            raise ConfigError(f"row {row}: corpus: differs from that of row {first}; a table is of one corpus")
        if lead and (trained := _trained_on(plans[row]) ^ _trained_on(lead)):
            raise ConfigError(
                f"row {row}: corpus.train_split: only one of this row and row {first} is trained on device "
                f"{min(trained)}, so their figures on unseen devices are of different clips; choose another list"
            )
    return plans


def _but_split(config: Config) -> CorpusConfig:
    return config.corpus.model_copy(update={"train_split": None})


def _trained_on(plan: Plan) -> set[str]:
    """Return the devices of the training clips; none for the demo, whose rows all have the same."""
    return set(plan.source.devices_of(plan.source.heard)) if plan.source else set()


def read_table(kind: str, number: str) -> tuple[TableConfig, str]:
    """Return the description of a table or figure, and its short name. Raises ConfigError."""
    raw = preset(kind.removesuffix("s"), number, (kind,))
    return checked(TableConfig, raw, number if Path(number).is_file() else f"{kind}/{number}.yaml"), Path(number).stem


def _refuse_unknown_columns(spec: TableConfig, plan: Plan) -> None:
    """Raise ConfigError if `paper` of a row names a column that no table has."""
    devices = plan.source.devices if plan.source else ()
    known = {*table.SIZES, "seen", "unseen", "all", "int8", "log loss", *TAU22_DEVICES, *devices}
    for row in spec.rows:
        for column in row.paper.keys() - known:
            close = difflib.get_close_matches(column, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"row {row.name}: paper.{column}: no such column; {hint}known: {', '.join(sorted(known))}"
            )


def _lines(values: Mapping[str, Any]) -> list[str]:
    """Return the values in the form of `--set`, which reads JSON as YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
