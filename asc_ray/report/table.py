"""A table that compares students with each other and with the paper's figures, in Markdown, CSV and HTML."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asc_ray.evaluation.gains import Gain, Interval
from asc_ray.evaluation.scores import Evaluation
from asc_ray.evaluation.seeds import OverSeeds
from asc_ray.models.complexity import BYTES_EACH
from asc_ray.report.page import environment
from asc_ray.shown import in_csv, in_markdown

PAPER = "the paper, TAU22"


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """A row of a comparison. `paper` has the paper's figures by column, `gains` those over the row `over` by group.

    Columns: `parameters` in K, `macs` in M, `float32 kB` and `int8 kB`; devices' names, `all` and `int8` in %.
    """

    name: str
    parameters: int
    macs: int
    scores: OverSeeds
    int8: OverSeeds | None = None
    paper: Mapping[str, float] = field(default_factory=dict)
    over: str | None = None
    gains: Mapping[str, Gain] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    title: str
    corpus: str
    training_clips: Sequence[int]  # of the rows, the smallest number first
    unseen_devices: Sequence[str]
    rows: Sequence[ComparedRow]
    remark: str = ""

    @property
    def note(self) -> str:
        clips = {row.scores[0].clips for row in self.rows}
        trained = " to ".join(
            f"{count:,}" for count in dict.fromkeys((self.training_clips[0], self.training_clips[-1]))
        )
        seeds = {row.scores[1].runs if row.scores[1] else 1 for row in self.rows}
        number = str(max(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        many = f"mean ± standard deviation of {number} seeds" if max(seeds) > 1 else "one seed"
        papers = "Lines of the paper are its figures on TAU22. " if any(row.paper for row in self.rows) else ""
        return (
            f"Accuracy in % on {max(clips):,} test clips of {self.corpus} ({trained} training clips), "
            f"{many}; not in training: {', '.join(self.unseen_devices) or 'no device'}. {papers}{self.remark}".strip()
        )


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A training of a table's student: `seconds` are those of its epochs, `scores` those of the test split."""

    row: str
    kind: str
    seed: int
    key: str
    training_clips: int
    epochs: int
    seconds: float
    scores: Evaluation | None


@dataclass(frozen=True)
class Line:
    """A line of the table: the row's name or the paper, and each cell's value and deviation, or None."""

    name: str
    cells: tuple[tuple[float | None, float | None], ...]
    paper: bool


def columns(comparison: Comparison) -> list[str]:
    """Return the columns: sizes, devices (seen ones first), groups of devices, all, int8 if there is one, log loss."""
    devices = {name for row in comparison.rows for name in row.scores[0].per_device}
    unseen = comparison.unseen_devices
    groups = [group for group in ("seen", "unseen") if all(group in row.scores[0].groups for row in comparison.rows)]
    int8 = any(row.int8 for row in comparison.rows)
    ordered = sorted(devices, key=lambda name: (name in unseen, name))
    sizes = ["parameters", "macs", *(BYTES if int8 else ())]
    return [*sizes, *ordered, *groups, "all", *(["int8"] if int8 else []), "log loss"]


def lines(comparison: Comparison) -> Iterator[Line]:
    """Yield each row's own figures, then the paper's if it has some."""
    names = columns(comparison)
    for row in comparison.rows:
        yield Line(row.name, tuple(_ours(row, name) for name in names), paper=False)
        if row.paper:
            yield Line(PAPER, tuple((row.paper.get(name), None) for name in names), paper=True)


def _ours(row: ComparedRow, column: str) -> tuple[float | None, float | None]:
    if column in SIZES:
        return SIZES[column](row), None
    scores = row.int8 if column == "int8" else row.scores
    if scores is None:
        return None, None
    mean, deviation = scores
    if column == "log loss":
        return mean.log_loss, deviation.log_loss if deviation else None
    column = "all" if column == "int8" else column
    if (share := mean.accuracies().get(column)) is None:
        return None, None
    return 100 * share, 100 * deviation.accuracies()[column] if deviation else None


# The bytes of the parameters alone, as in the paper; an exported model also has scales, biases and a graph.
BYTES: dict[str, Callable[[ComparedRow], float]] = {
    f"{dtype} kB": lambda row, each=each: each * row.parameters / 1e3  # type: ignore[misc]
    for dtype, each in BYTES_EACH.items()
}
SIZES = {"parameters": lambda row: row.parameters / 1e3, "macs": lambda row: row.macs / 1e6, **BYTES}
TITLES = {"parameters": "parameters, K", "macs": "MACs, M", "int8": "all, int8"}


def cell(column: str, value: float | None, deviation: float | None, paper: bool) -> str:
    """Return a cell's text; the paper's figures keep their decimals."""
    if value is None:
        return ""
    digits = 3 if column == "log loss" else 2 if paper or column in SIZES else 1
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def differences(comparison: Comparison) -> list[tuple[ComparedRow, dict[str, Interval]]]:
    """Return for each row that is compared with another the difference, by column: points, and nats of log loss."""
    found = []
    for row in comparison.rows:
        if row.gains:
            points = {group: _scaled(own.accuracy, 100) for group, own in row.gains.items()}
            found.append((row, points | {"log loss": _scaled(row.gains["all"].log_loss, -1)}))
    return found


def _scaled(interval: Interval, factor: float) -> Interval:
    low, high = sorted((factor * interval.low, factor * interval.high))
    return Interval(value=factor * interval.value, low=low, high=high)


def gains_note(comparison: Comparison) -> str:
    """Say what the differences are, and what their intervals do not hold."""
    found = [gain for row in comparison.rows for gain in row.gains.values()]
    runs = min(gain.runs for gain in found)
    over = f"and {runs} seeds" if runs > 1 else "alone: with one seed the seed's own luck is not in it"
    return (
        f"Difference to another row, in points and nats (95 % by resampling {max(own.places for own in found)} "
        f"places {over}). Where 0 lies within, the difference is not told from 0."
    )


def difference(column: str, interval: Interval) -> str:
    """Return a difference's text."""
    digits = 3 if column == "log loss" else 1
    value, low, high = (f"{each:+.{digits}f}" for each in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})" + ("" if interval.told else ", not told from 0")


def markdown(comparison: Comparison) -> str:
    names = columns(comparison)
    rows = [["", *(in_markdown(TITLES.get(name, name)) for name in names)]]
    for line in lines(comparison):
        shown = [cell(name, *found, line.paper) for name, found in zip(names, line.cells, strict=True)]
        rows.append([in_markdown(line.name), *shown])
    text = f"# {in_markdown(comparison.title)}\n\n{in_markdown(comparison.note)}\n\n{_piped(rows)}"
    if found := differences(comparison):
        rows = [["", "against", *found[0][1]]]
        rows += [
            [in_markdown(row.name), in_markdown(str(row.over)), *(difference(*own) for own in values.items())]
            for row, values in found
        ]
        text += f"\n{in_markdown(gains_note(comparison))}\n\n{_piped(rows)}"
    return text


def _piped(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows, the first of which is the head, as a table in Markdown."""
    head, *others = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *others))


def comma_separated(comparison: Comparison) -> str:
    """Return CSV with a line for each of `lines`: every figure with six digits, and its deviation beside it."""
    names, out = columns(comparison), io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    named = [{"parameters": "parameters_K", "macs": "macs_M"}.get(name, name.replace(" ", "_")) for name in names]
    head = [text for name in named for text in (name, f"{name}_deviation")]
    writer.writerow(["row", "source", "corpus", "seeds", *map(in_csv, head)])
    row = None
    for line in lines(comparison):
        if not line.paper:
            row = next(own for own in comparison.rows if own.name == line.name)
        assert row is not None
        ours = (comparison.corpus, row.scores[1].runs if row.scores[1] else 1)
        source = ("paper", "TAU22", "") if line.paper else ("ours", *ours)
        figures = ["" if figure is None else f"{figure:.6g}" for found in line.cells for figure in found]
        writer.writerow([in_csv(row.name), *(in_csv(str(own)) for own in source), *figures])
    return out.getvalue()


def runs_separated(runs: Iterable[TrainedRun]) -> str:
    """Return CSV with a line a training: the log of the table's runs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "kind", "seed", "key", "training_clips", "epochs", "seconds", "accuracy", "log_loss"])
    for run in runs:
        figures = [f"{run.scores.accuracy:.6g}", f"{run.scores.log_loss:.6g}"] if run.scores else ["", ""]
        about = [in_csv(run.row), run.kind, run.seed, run.key, run.training_clips, run.epochs, f"{run.seconds:.1f}"]
        writer.writerow([*about, *figures])
    return out.getvalue()


def _gains_separated(comparison: Comparison) -> str:
    """Return CSV with a line a row and column of `differences`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "against", "what", "value", "low", "high", "places", "seeds"])
    for row, values in differences(comparison):
        for column, own in values.items():
            gain = row.gains.get(column, row.gains["all"])
            figures = [f"{each:.6g}" for each in (own.value, own.low, own.high)]
            names = [in_csv(row.name), in_csv(str(row.over)), column.replace(" ", "_")]
            writer.writerow([*names, *figures, gain.places, gain.runs])
    return out.getvalue()


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write table.md, table.csv, gains.csv and table.html to the folder, and return their paths."""
    names, compared = columns(comparison), differences(comparison)
    html = (
        environment()
        .get_template("table.html.j2")
        .render(
            comparison=comparison,
            columns=[(TITLES.get(name, name), name in comparison.unseen_devices) for name in names],
            lines=[
                (line, [cell(name, *found, line.paper) for name, found in zip(names, line.cells, strict=True)])
                for line in lines(comparison)
            ],
            gains=[(row, [difference(*own) for own in values.items()]) for row, values in compared],
            gained=[column for _, values in compared[:1] for column in values],
            gains_note=gains_note(comparison) if compared else "",
        )
    )
    texts = {"table.md": markdown(comparison), "table.csv": comma_separated(comparison), "table.html": html}
    if compared:
        texts["gains.csv"] = _gains_separated(comparison)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]
