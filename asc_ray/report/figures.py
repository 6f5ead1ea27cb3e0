"""The report's figures. Each function returns one <svg> element for a page.

Text and axes take the page's text color, so a figure can be read on a light and on a dark page. Legends lie beside or
above what is drawn. Equal input gives equal bytes with the same matplotlib. Names are drawn literally, never as TeX.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from asc_ray.evaluation.scores import Evaluation

P = ParamSpec("P")
Curves = Mapping[str, Sequence[Mapping[str, float]]]  # run -> the metrics of every epoch

WIDTH = 11.0  # inches, of every figure
INK = "#010203"  # stands for the page's text color
ACCENT, MUTED = "#3f7fc4", "#8a94a3"
# Mid-tones that stand out from white and from near-black.
PALETTE = ("#3f7fc4", "#e0832f", "#3aa676", "#9b6fc8", "#d0566b", "#37a8bd", "#b0903a", "#8a94a3")
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "asc-ray",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def as_svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Make a function that draws a figure return it as an <svg> element."""

    @wraps(draw)
    def to_svg(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(STYLE):
            buffer = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            draw(*args, **kwargs).savefig(buffer, format="svg", transparent=True, metadata=nothing)
        head, body = re.split(r"(?<=>)", buffer.getvalue().partition("<svg ")[2], maxsplit=1)
        box = re.search(r'viewBox="[^"]*"', head)
        assert box, head
        body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{draw.__name__}-", body)  # make ids unique in the page
        return f'<svg role="img" class="{draw.__name__}" {box[0]}>' + body.replace(INK, "currentColor")

    return to_svg


def plain(value: float, digits: int = 3) -> str:
    """Return a number rounded to so many digits, never with an exponent: 1000, 0.00123, 12300."""
    return np.format_float_positional(value, precision=digits, unique=False, fractional=False, trim="-")


def logarithmic(axes: Axes) -> None:
    """Make the x axis logarithmic, with plain numbers at the powers of ten, and at 2 and 5 of a narrow range."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: plain(value))
    axes.xaxis.set_minor_formatter(NullFormatter())


def standalone(svg: str) -> str:
    """Return a figure for a file of its own: dark on white, because a picture viewer has no page's text color."""
    head, body = re.split(r"(?<=>)", svg, maxsplit=1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ')
    background = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return head + background + body.replace("currentColor", "#1d2430")


@as_svg
def device_accuracy(systems: Mapping[str, Evaluation], colors: Mapping[str, str], unseen: Sequence[str]) -> Figure:
    """Draw bars of accuracy by device, one a system; unseen devices come last and are shaded."""
    figure = Figure(figsize=(WIDTH, 3.7))
    axes = figure.subplots()
    names = sorted({d for e in systems.values() for d in e.per_device}, key=lambda d: (d in unseen, d))
    width = 0.84 / len(systems)
    for i, (system, e) in enumerate(systems.items()):
        heights = [100 * e.per_device[d].accuracy if d in e.per_device else math.nan for d in names]
        offset = (i - (len(systems) - 1) / 2) * width
        x = np.append(np.arange(len(names)), len(names) + 0.3) + offset
        axes.bar(x, [*heights, 100 * e.accuracy], width * 0.92, color=colors[system], label=system)
    strangers = sum(d in unseen for d in names)
    if strangers:
        left, right = len(names) - strangers - 0.5, len(names) - 0.5
        axes.axvspan(left, right, color=MUTED, alpha=0.14, lw=0, zorder=0)
        axes.text(
            (left + right) / 2, 0.985, "not in training", ha="center", va="top", transform=axes.get_xaxis_transform()
        )
    chance = 100 / len(next(iter(systems.values())).labels)
    axes.axhline(chance, color=INK, lw=0.8, ls=":", label="chance")
    axes.set_xticks([*range(len(names)), len(names) + 0.3], [*names, "all clips"])
    axes.set_xlim(-0.6, len(names) + 0.9)
    top = max(
        [e.accuracy for e in systems.values()] + [d.accuracy for e in systems.values() for d in e.per_device.values()]
    )
    axes.set_ylim(0, min(100.0, 100 * top) * 1.12)
    axes.set(xlabel="recording device", ylabel="accuracy, %")
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    figure.legend(loc="outside upper center", ncols=len(systems) + 1)
    return figure


@as_svg
def confusion(systems: Mapping[str, Evaluation], colors: Mapping[str, str]) -> Figure:
    """Draw one confusion matrix a system: the share of a scene's clips (row) that got each answer (column)."""
    labels = next(iter(systems.values())).labels
    columns = max(2, len(systems))
    names = 0.075 * max(map(len, labels))  # inches for the longest name
    side = WIDTH / columns - 0.55 - names
    figure = Figure(figsize=(WIDTH, side + 0.7 * names + 0.75))
    for axes, (system, e) in zip(figure.subplots(1, columns), systems.items(), strict=False):
        counts = np.array(e.confusion)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        _matrix(axes, shares, labels, colors[system])
        axes.set(title=f"{system}: {100 * e.accuracy:.2f} %", xlabel="answer", ylabel="scene")
    for axes in figure.axes[len(systems) :]:
        axes.set_axis_off()
    return figure


@as_svg
def disagreement(names: Sequence[str], shares: Sequence[Sequence[float]]) -> Figure:
    """Draw the shares (S, S) of clips that each two systems answer differently."""
    longest = 0.075 * max(map(len, names))  # inches
    side = min(WIDTH - longest - 0.4, 0.42 * len(names) + 0.6)
    figure = Figure(figsize=(WIDTH, side + longest + 0.5))
    axes = figure.subplots()
    _matrix(axes, np.array(shares), names, ACCENT)
    axes.set_title("answers that differ", loc="left")
    return figure


def _matrix(axes: Axes, shares: np.ndarray, names: Sequence[str], color: str) -> None:
    count = len(names)
    for row in range(count):
        for column in range(count):
            share = shares[row, column]
            alpha = share**0.75  # keeps rare ones visible
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=color, alpha=alpha, lw=0))
            if share >= 0.005:
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(count), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), names)
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", lw=0.5)
    axes.tick_params(which="both", length=0)


@as_svg
def fusion_weights(weights: Mapping[str, float], center: Sequence[float], biases: Mapping[str, float]) -> Figure:
    """Draw the fusion's weight of every system, with the centre it is pulled to, and its bias of every scene."""
    figure = Figure(figsize=(WIDTH, 1.1 + 0.25 * max(len(weights), len(biases))))
    left, right = figure.subplots(1, 2)
    _bars(left, weights, ACCENT)
    left.plot(center, range(len(center)), "|", color=PALETTE[1], ms=13, mew=2, label="centre")
    left.set_title("weight of each system", loc="left")
    left.set_xlabel("weight w")
    left.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0)
    _bars(right, biases, PALETTE[2])
    right.set_title("bias of each scene", loc="left")
    right.set_xlabel("bias b, nats")
    return figure


@as_svg
def reliability(parts: Mapping[str, Mapping[str, Evaluation]]) -> Figure:
    """Draw accuracy over confidence, a row a set of clips: the single systems, their average, the fusion, a student.

    The student is the last whose name says that it is one. On the diagonal confidence equals accuracy; below it answers
    are overconfident. Areas are shares of clips.
    """
    students = [name for systems in parts.values() for name in systems if name.startswith("student")][-1:]
    columns = {"single systems": ACCENT, "average": PALETTE[5], "fusion": PALETTE[1], **dict.fromkeys(students, ACCENT)}
    figure = Figure(figsize=(WIDTH, (WIDTH / len(columns) + 0.35) * len(parts)))
    grid = figure.subplots(len(parts), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, (part, systems) in zip(grid, parts.items(), strict=True):
        for axes, (title, color) in zip(row, columns.items(), strict=True):
            shown = [e for name, e in systems.items() if name == title] or [
                e for name, e in systems.items() if name not in columns and not name.startswith("student")
            ]
            if title in students and title not in systems:
                axes.set_axis_off()
                continue
            axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
            for e in shown:
                x, y = [b.confidence for b in e.reliability], [b.accuracy for b in e.reliability]
                axes.plot(x, y, color=color, lw=1.2, alpha=1.0 if len(shown) == 1 else 0.45)
                if len(shown) == 1:
                    axes.scatter(x, y, [400 * b.clips / e.clips for b in e.reliability], color=color, alpha=0.5, lw=0)
            error = np.mean([e.calibration_error for e in shown])
            axes.set_title(f"{title}, {part}\ncalibration error {error:.3f}", loc="left")
            axes.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
            axes.grid()
        row[0].set_ylabel("accuracy")
    for column in grid.T:
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.set_xlabel("confidence")
        lowest.tick_params(labelbottom=True)
    return figure


def _bars(axes: Axes, values: Mapping[str, float], color: str) -> None:
    bars = axes.barh(range(len(values)), list(values.values()), 0.68, color=color)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.axvline(0, color=INK, lw=0.8)
    axes.margins(x=0.16, y=0.02)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


@as_svg
def energy_histogram(energies: np.ndarray, threshold: float | None) -> Figure:
    """Draw the distribution of the training clips' energy E(x) = sum x[t]^2 with ADIR's threshold (Fig. 2)."""
    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.subplots()
    audible = energies[energies > 0]
    low, high = (audible.min(), audible.max()) if len(audible) else (1.0, 10.0)
    edges = np.geomspace(low * 0.999, high * 1.001, 61)
    if threshold is not None and edges[0] < threshold < edges[-1]:
        edges = np.unique(np.append(edges, threshold))  # a bin must end where the color changes
        edges = np.delete(edges, _nearest_inner(edges, threshold))
    counts, _ = np.histogram(audible, edges)
    above = np.zeros(len(counts), bool) if threshold is None else edges[:-1] >= threshold
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=np.where(above, PALETTE[1], ACCENT), alpha=0.85)
    axes.set_xlim(edges[0], edges[-1])
    axes.set(xlabel="energy of the one-second clip, sum of squared samples at 32 kHz", ylabel="training clips a bin")
    axes.grid(axis="y")
    if threshold is not None:
        share = 100 * float((energies > threshold).mean())
        axes.set_xlim(min(edges[0], threshold / 2), max(edges[-1], threshold * 2))
        axes.axvline(threshold, color=INK, lw=1.3, ls="--")
        axes.set_title(f"threshold {plain(threshold, 4)}: {share:.1f} % of the clips lie above (orange)", loc="left")
    logarithmic(axes)
    return figure


def _nearest_inner(edges: np.ndarray, value: float) -> int:
    """Return the index of the inner edge nearest to `value` on a logarithmic axis; its bin would be too narrow."""
    distance = np.abs(np.log(edges) - np.log(value))
    distance[[0, -1]] = np.inf
    distance[edges == value] = np.inf
    return int(distance.argmin())


@as_svg
def training_curves(panels: Mapping[str, Curves]) -> Figure:
    """Draw loss and validation accuracy by epoch, a column a panel; runs that differ in a last number share a color."""
    figure = Figure(figsize=(WIDTH, 5.2))
    grid = figure.subplots(2, len(panels), squeeze=False, sharex="col")
    for (upper, lower), (title, curves) in zip(grid.T, panels.items(), strict=True):
        families = {run: re.sub(r"([_\- ]|seed|fold)+\d+$", "", run) or run for run in curves}
        order = list(dict.fromkeys(families.values()))
        labels = {
            family: family if len(runs := [run for run in curves if families[run] == family]) == 1
            else f"{family} ({len(runs)} runs)" for family in order
        }  # fmt: skip
        for run, history in curves.items():
            family = families[run]
            color = PALETTE[order.index(family) % len(PALETTE)]
            for axes, key, scale in ((upper, "loss", 1), (lower, "validation_accuracy", 100)):
                points = [(m["epoch"], scale * m[key]) for m in history if key in m]
                marker = "o" if len(points) < 2 else None
                axes.plot(*np.reshape(points, (-1, 2)).T, color=color, label=labels.pop(family, None), marker=marker)
        upper.set(title=title, ylabel="training loss, nats")
        lower.set(xlabel="epoch", ylabel="validation accuracy, %")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        upper.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
        upper.grid()
        lower.grid()
    return figure
