"""The report's figures of a search. A trial's value is the mean over its seeds, as in the report's tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from asc_ray.report.figures import ACCENT, MUTED, PALETTE, WIDTH, as_svg, logarithmic, plain
from asc_ray.search.trials import Tried

COLORS = LinearSegmentedColormap.from_list("worst to best", (MUTED, "#3aa676", "#e0832f"))


@as_svg
def sweep(trials: Sequence[Tried]) -> Figure:
    """Draw every trial's value in the order of trials, and against each parameter; bars are deviations over seeds."""
    parameters = sorted({name for trial in trials for name in trial.result.parameters})
    columns = 4
    rows = -(-len(parameters) // columns)
    figure = Figure(figsize=(WIDTH, 3.0 + 2.1 * rows))
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.35] + [1.0] * rows)
    course = figure.add_subplot(grid[0, :])
    known = [t for t in trials if t.result.has_value]
    values = [100 * (t.value + end * (t.deviation or 0.0)) for t in known for end in (-1, 1)] or [0.0]
    margin = 0.08 * (max(values) - min(values)) + 0.5
    floor = min(values) - margin  # trials without a value are drawn here, because their 0 would stretch the scale
    course.set_ylim(floor, max(values) + margin)
    _points(course, trials, [t.result.number for t in trials], floor)
    finished = sorted((t for t in trials if t.result.state == "complete"), key=lambda t: t.result.number)
    if finished:
        so_far = np.maximum.accumulate([100 * t.value for t in finished])
        course.step(
            [t.result.number for t in finished], so_far, where="post", color=PALETTE[1], lw=1.3, label="best so far"
        )
    course.set(xlabel="trial", ylabel="value, %")
    course.set_xlim(-0.7, max(t.result.number for t in trials) + 0.7)
    course.xaxis.set_major_locator(MaxNLocator(integer=True))
    course.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderpad=0)
    course.grid()
    for i, name in enumerate(parameters):
        axes = figure.add_subplot(grid[1 + i // columns, i % columns], sharey=course)
        having = [t for t in trials if name in t.result.parameters]
        _points(axes, having, _positions(axes, [t.result.parameters[name] for t in having]), floor)
        axes.set_xlabel(name if len(name) <= 36 else "…" + name[-35:], fontsize=8)
        axes.set_ylabel("value, %" if i % columns == 0 else "")
        axes.tick_params(labelsize=8, labelleft=i % columns == 0)
        axes.grid()
    return figure


@as_svg
def importance(shares: Mapping[str, float], trials: Mapping[str, int]) -> Figure:
    """Draw how important each parameter is for the best trials, as shares of 1, and how many trials say so."""
    order = sorted(shares, key=lambda name: shares[name])
    figure = Figure(figsize=(WIDTH, 0.7 + 0.28 * len(order)))
    axes = figure.add_subplot()
    bars = axes.barh(order, [100 * shares[name] for name in order], color=ACCENT, height=0.6)
    axes.bar_label(
        bars, [f"{100 * shares[name]:.0f} %, {trials[name]} trials" for name in order], padding=4, fontsize=8
    )
    axes.set(xlabel="importance, %", xlim=(0, 1.2 * 100 * max(shares.values())))
    axes.grid(axis="x")
    return figure


@as_svg
def parallel_coordinates(trials: Sequence[Tried]) -> Figure:
    """Draw a line a trial over all parameters, in the color of its value; a parameter without a value leaves a gap."""
    names = sorted({name for trial in trials for name in trial.result.parameters})
    drawn = sorted((t for t in trials if t.result.has_value), key=lambda t: t.value)
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.add_subplot()
    heights = np.full((len(drawn), len(names)), np.nan)
    for column, name in enumerate(names):
        having = [i for i, trial in enumerate(drawn) if name in trial.result.parameters]
        places, ends = _heights([drawn[i].result.parameters[name] for i in having])
        heights[having, column] = places
        for height, text in ends.items():
            beyond = {0.0: -0.05, 1.0: 1.05}.get(height, height)  # above and below the lines, or beside its own
            inner = beyond == height
            axes.text(column + 0.03 * inner, beyond, text, fontsize=7, va="center", ha="left" if inner else "center")
    values = np.array([100 * trial.value for trial in drawn])
    scale = Normalize(*((values.min(), values.max()) if len(values) else (0, 1)))
    for row, value in zip(heights, values, strict=True):  # the best last, above the others
        axes.plot(row, color=COLORS(scale(value)), lw=1.1, alpha=0.85, marker="o", ms=2.5)
    axes.set_xticks(range(len(names)), [name.replace(".", ".\n") for name in names], fontsize=7)
    axes.set(yticks=[], ylim=(-0.1, 1.1))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(axis="x", alpha=0.5)
    bar = figure.colorbar(ScalarMappable(scale, COLORS), ax=axes, label="value, %")
    bar.solids.set_rasterized(False)  # type: ignore[union-attr]
    return figure


def _heights(values: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    """Return the heights of a parameter's values between 0 and 1, and the texts by height."""
    if values and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        low, high = min(values), max(values)
        scaled = np.asarray(values, float)
        if low > 0 and high > 5 * np.median(values):
            scaled = np.log(scaled)
        span = scaled.max() - scaled.min()
        return list((scaled - scaled.min()) / span if span else scaled * 0 + 0.5), (
            {0.0: plain(low), 1.0: plain(high)} if span else {0.5: plain(low)}
        )
    choices = sorted({str(v) for v in values})
    places = {choice: i / max(1, len(choices) - 1) for i, choice in enumerate(choices)}
    return [places[str(v)] for v in values], {place: choice for choice, place in places.items()}


@as_svg
def pareto_front(trials: Sequence[Tried], front: Sequence[Tried], cost: str) -> Figure:
    """Draw value against cost of the trials that ran to their ends, and the line of the best for each cost."""
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.add_subplot()
    complete = [t for t in trials if t.result.state == "complete" and t.result.cost is not None]
    costs = [t.result.cost or 0 for t in complete]
    axes.scatter(costs, [100 * t.value for t in complete], color=MUTED, s=20, label="trial")
    axes.step(
        [t.result.cost or 0 for t in front], [100 * t.value for t in front], where="post", marker="o", color=PALETTE[1],
        label="better than all that cost less",
    )  # fmt: skip
    axes.set(xlabel=cost, ylabel="value, %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0)
    axes.grid()
    return figure


def _points(axes: Axes, trials: Sequence[Tried], x: Sequence[float], floor: float) -> None:
    """Draw every trial's value in % at its `x`, with the mark of its state."""
    marks: dict[str, dict[str, Any]] = {
        "complete": {"color": ACCENT, "s": 26, "zorder": 3},
        "stopped": {"facecolors": "none", "edgecolors": MUTED, "s": 20},
        "diverged": {"color": PALETTE[4], "marker": "x", "s": 24, "clip_on": False},
        "failed": {"color": PALETTE[4], "marker": "+", "s": 30, "clip_on": False},
    }
    for state, mark in marks.items():
        of_state = [i for i, trial in enumerate(trials) if trial.result.state == state]
        if of_state:
            values = [100 * trials[i].value if trials[i].result.has_value else floor for i in of_state]
            axes.scatter([x[i] for i in of_state], values, label=state, **mark)
    for at, trial in zip(x, trials, strict=True):
        if trial.deviation is not None:
            axes.errorbar(at, 100 * trial.value, 100 * trial.deviation, color=ACCENT, lw=1.0, capsize=2)


def _positions(axes: Axes, values: Sequence[Any]) -> list[float]:
    """Return the x positions of a parameter's values: logarithmic if they crowd near zero; choices sorted."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        if min(values) > 0 and max(values) > 5 * np.median(values):
            axes.set_xlim(0.8 * min(values), 1.25 * max(values))
            logarithmic(axes)
        return [float(v) for v in values]
    choices = sorted({str(v) for v in values})
    axes.set_xticks(range(len(choices)), choices)
    axes.set_xlim(-0.5, len(choices) - 0.5)
    return [float(choices.index(str(v))) for v in values]
