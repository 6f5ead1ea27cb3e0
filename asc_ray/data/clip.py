"""A clip: one second of a corpus, and what its metadata say of it."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)  # without slots a clip takes twice the memory
class Clip:
    clip_id: str  # its name, relative to the corpus: its file's, or that of `second_id`
    scene: str
    device: str
    place: str  # clips that share it come from one place
    split: Split
    recording: str = ""  # the file of which the clip is a second; empty where the clip is a whole file
    second: int = 0  # which one, from 0

    @property
    def file(self) -> str:
        return self.recording or self.clip_id


def second_id(recording: str, second: int) -> str:
    """Return the id of a second of a recording: `audio/bus-3.wav` has `audio/bus-3-0.wav`, `audio/bus-3-1.wav`, ...

    No two seconds have the same, because the recording's name is what is left without the last number.
    """
    suffix = PurePosixPath(recording).suffix
    return f"{recording.removesuffix(suffix)}-{second}{suffix}"
