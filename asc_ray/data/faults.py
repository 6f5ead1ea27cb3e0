"""Faults of a corpus: counted, listed and reported together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asc_ray.errors import CorpusError

EXAMPLES = 3
WHOLE_CORPUS = 0.5  # a fault that more than this share of the clips have has one cause and is reported once
MOST_LINES, LONGEST_LINE = 1000, 2000  # of a message


@dataclass(frozen=True)
class BadClip:
    clip_id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.clip_id}: {self.reason}"


class Faults(list[tuple[str, str, str]]):
    """Faults of a corpus: (the line that reports it, the clip, what it has in common with others)."""

    def add(self, line: str, clip: str = "", what: str = "") -> None:
        self.append((line, clip, what or line))

    def add_clip(self, clip: BadClip) -> None:
        self.add(str(clip), clip.clip_id, clip.reason)

    def refuse(self, root: Path, clips: int, skippable: bool) -> None:
        """Raise CorpusError with all faults, if any; one of over half of the `clips` is told once, with its cause.

        `skippable`: on_bad_clip=skip would leave these clips out.
        """
        if not self:
            return
        kinds: dict[str, list[tuple[str, str, str]]] = {}
        for fault in self:
            kinds.setdefault(re.sub(r"\d+(\.\d+)?", "#", fault[2]), []).append(fault)
        lines: list[str] = []
        for some in kinds.values():
            if some[0][1] and len(some) > max(EXAMPLES, WHOLE_CORPUS * clips):
                examples = ", ".join(clip for _, clip, _ in some[:EXAMPLES])
                cause = _cause([clip for _, clip, _ in some], some[0][2])
                lines.append(f"{len(some)} of {clips} clips: {some[0][2]} ({examples}, ...){cause}")
            else:
                lines += [line for line, _, _ in some]
        if len(lines) > MOST_LINES:
            lines = [*lines[:MOST_LINES], f"and {len(lines) - MOST_LINES} more"]
        listed = "".join(f"\n  {line[:LONGEST_LINE]}" for line in lines)
        advice = (
            "Mend the files, or leave these clips out with corpus.on_bad_clip=skip." if skippable else "Mend the files."
        )
        raise CorpusError(f"{root}: {len(self)} problem(s) in the corpus:{listed}\n{advice}")


def _cause(names: Sequence[str], what: str) -> str:
    """Return why a whole corpus has one fault; empty where that does not show."""
    if all(name[:1] in "\"'" and name[:1] == name[-1:] for name in names if name):
        return ". The names are in quotes: write the tables without them"
    if any("\\" in name for name in names):
        return ". The names have backslashes: write them with /"
    if what == "no such file":
        return ". Is this the corpus' own folder, and was all of it unpacked?"
    return ""
