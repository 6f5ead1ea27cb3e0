"""A run's progress for people: bars on a terminal, a line now and then in a log file."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from asc_ray.artifacts import Artifact
from asc_ray.places import named
from asc_ray.shown import printable

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows stages, and in each stage named pieces of work that count epochs, shards or trials."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._expected: dict[str, int] = {}
        self._done = 0
        self._counts: dict[str, int] = {}
        self._last_line: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        self._tasks, self._expected, self._counts, self._last_line, self._done = {}, {}, {}, {}, 0
        self.console.print(f"[bold]{name}[/bold] ...")
        columns = (
            TextColumn("  {task.description:<18}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        if self.console.is_terminal:
            with Bars(*columns, console=self.console, transient=True) as self._bars:
                yield
            self._bars = None
        else:
            yield
        self.console.print(f"[bold]{name}[/bold] done in {time.monotonic() - start:.1f} s")

    def note(self, text: str) -> None:
        text = printable(text, keep="\n")
        self.console.print(f"  {text}", markup=False)

    def skipped(self, stage: str, artifacts: Sequence[Artifact]) -> None:
        where = (
            named(artifacts[0].path)
            if len(artifacts) == 1
            else f"{len(artifacts)} artifacts in {named(artifacts[0].path.parent)}"
        )
        self.console.print(f"[bold]{stage}[/bold] is done: {escape(where)}")

    def left_out(self, system: str, error: str) -> None:
        self.note(f"left out: {system} failed ({error}); --set teachers.allow_missing=0 tries it again")

    def nothing_to_do(self) -> None:
        self.console.print("Nothing to do: every stage of this configuration is done.")

    def expect(self, stage: str, epochs: Mapping[str, int], done: int = 0) -> None:
        """Announce the stage's pieces with their numbers of epochs, and how many are done already."""
        self._expected, self._done = dict(epochs), done
        if done:
            self.note(f"{done} of {len(epochs)} are done already")
        if self._bars is not None and len(epochs) > 1:
            self._tasks[""] = self._bars.add_task(stage, total=len(epochs), completed=done, note="")

    def event(self, name: str, event: Mapping[str, Any]) -> None:
        """Show that a piece has finished an epoch, advanced, or finished."""
        if "epoch" in event:
            total = int(event.get("epochs", self._expected.get(name, 0)))
            self._show(name, int(event["epoch"]), total, _figures(event), force=event["epoch"] == total)
        elif "total" in event:
            done = self._counts.get(name, 0) + int(event.get("advance", 0)) + int(event.get("done", 0))
            self._counts[name] = done
            self._show(name, done, int(event["total"]), "", force=done == event["total"])
        elif event.get("finished"):
            self._done += 1
            if self._bars is not None:
                if "" in self._tasks:
                    self._bars.update(self._tasks[""], completed=self._done)
                if name in self._tasks:
                    self._bars.update(self._tasks[name], visible=False)
            state = event.get("state", "finished")
            of = f" ({self._done} of {len(self._expected)})" if len(self._expected) > 1 else ""
            value = f", objective {100 * event['value']:.1f} %" if "value" in event else ""
            self.note(f"{name}: {state}{value}{of}")

    def _show(self, name: str, done: int, total: int, text: str, force: bool) -> None:
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, note="")
            self._bars.update(self._tasks[name], completed=done, total=total, note=text)
            return
        now = time.monotonic()
        if force or now - self._last_line.get(name, 0.0) >= SECONDS_BETWEEN_LINES:
            self._last_line[name] = now
            self.note(f"{name}: {done}/{total} {text}".rstrip())


def _figures(event: Mapping[str, Any]) -> str:
    parts = []
    if "loss" in event:
        parts.append(f"loss {event['loss']:.3f}")
    if "validation_accuracy" in event:
        parts.append(f"validation {100 * event['validation_accuracy']:.1f} %")
    if "clips_per_second" in event:
        parts.append(f"{event['clips_per_second']:.0f} clips/s")
    return ", ".join(parts)
