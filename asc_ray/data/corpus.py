"""A corpus in the TAU22 layout: its metadata, the checks on it, and splits of its training clips by place.

    meta.csv                             filename scene_label identifier source_label   (tab-separated)
    evaluation_setup/fold1_train.csv     filename scene_label
    evaluation_setup/fold1_evaluate.csv  filename scene_label
    evaluation_setup/fold1_test.csv      filename                                       (used without an evaluate file)
    audio/...

Scenes, devices and the seen/unseen split are read from these files; nothing here knows TAU22's own.
"""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from pydantic import Field

from asc_ray.data.demo import DemoConfig
from asc_ray.errors import ConfigError, CorpusError
from asc_ray.section import Section

META_COLUMNS = ("filename", "scene_label", "identifier", "source_label")
Split = Literal["train", "test"]


class CorpusConfig(Section):
    """`path` None stands for the synthetic demo corpus that `demo` describes."""

    path: Path | None = None
    train_split: Path | None = Field(
        None, description="a list of training clips instead of fold1_train.csv, as DCASE24's split5.csv"
    )
    on_bad_clip: Literal["refuse", "skip"] = "refuse"
    shard_clips: int = Field(4096, ge=1, le=4096, description="clips of one Arrow file")
    impulse_responses: Path | None = None  # folder of wavs for DIR
    demo: DemoConfig = Field(default_factory=DemoConfig)


@dataclass(frozen=True)
class Clip:
    clip_id: str  # the file name as meta.csv has it, relative to the corpus
    scene: str
    device: str
    location: str  # meta.csv's `identifier`: clips that share it come from one place
    split: Split


@dataclass(frozen=True)
class BadClip:
    clip_id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.clip_id}: {self.reason}"


@dataclass(frozen=True)
class Corpus:
    root: Path
    clips: tuple[Clip, ...]  # training clips, then test clips, each in the order of their split file
    labels: tuple[str, ...]  # sorted
    devices: tuple[str, ...]  # sorted
    fingerprint: str  # sha256 of the metadata files and of every listed file's name and size
    bad: tuple[BadClip, ...]  # clips left out, with on_bad_clip="skip"


def unseen_devices(clips: Iterable[Clip]) -> tuple[str, ...]:
    """The devices that occur in the test split only, sorted."""
    devices: dict[Split, set[str]] = {"train": set(), "test": set()}
    for clip in clips:
        devices[clip.split].add(clip.device)
    return tuple(sorted(devices["test"] - devices["train"]))


def read_corpus(
    root: Path, on_bad_clip: Literal["refuse", "skip"] = "refuse", train_split: Path | None = None
) -> Corpus:
    """Read and check the metadata of the corpus in `root`; no audio is decoded.

    `train_split` lists the training clips, by file name and scene, instead of fold1_train.csv; a relative path counts
    from the working directory or, where it leads nowhere, from the corpus' evaluation_setup.

    Raises CorpusError with every offending row and file. Absent and empty audio files are bad clips: refused, or left
    out and recorded in `Corpus.bad`. Everything else wrong with the corpus is refused in either case.
    """
    meta_file = root / "meta.csv"
    setup = root / "evaluation_setup"
    split_files: dict[Split, Path] = {"train": setup / "fold1_train.csv", "test": setup / "fold1_evaluate.csv"}
    if train_split is not None:
        split_files["train"] = train_split if train_split.is_file() else setup / train_split
        if not split_files["train"].is_file():
            raise ConfigError(f"corpus.train_split: {train_split}: no such file, nor in {setup}")
    if not split_files["test"].is_file():
        split_files["test"] = setup / "fold1_test.csv"
    digest = hashlib.sha256()
    problems: list[str] = []

    meta: dict[str, dict[str, str]] = {}
    for line, row in _read_table(meta_file, META_COLUMNS, digest, problems):
        if row["filename"] in meta:
            problems.append(f"{meta_file.name} line {line}: {row['filename']} is listed a second time")
        meta[row["filename"]] = row
    clips = _read_splits(split_files, meta, digest, problems)

    sizes, outside = _file_sizes(root, [clip.clip_id for clip in clips])
    problems += [f"{name}: leads out of the corpus folder; only paths inside it are read" for name in outside]
    for name, size in sizes.items():
        digest.update(f"{name}\0{size}\n".encode())
    bad = tuple(
        BadClip(name, "empty file" if size == 0 else "no such file") for name, size in sizes.items() if not size
    )
    if on_bad_clip == "skip":
        left_out = {clip.clip_id for clip in bad}
        clips = [clip for clip in clips if clip.clip_id not in left_out]
    else:
        problems += map(str, bad)

    scenes = {split: {clip.scene for clip in clips if clip.split == split} for split in split_files}
    for split, file in split_files.items():
        if not scenes[split]:
            problems.append(f"{file.name}: no usable clip in the {split} split")
    if scenes["train"]:
        unknown = sorted(scenes["test"] - scenes["train"])
        problems += [f"scene {label!r} is in the test split and not in the training split" for label in unknown]
    refuse(root, problems, skippable=bool(bad) and len(problems) == len(bad))
    return Corpus(
        root=root,
        clips=tuple(clips),
        labels=tuple(sorted(scenes["train"])),
        devices=tuple(sorted({clip.device for clip in clips})),
        fingerprint=digest.hexdigest(),
        bad=bad,
    )


def _read_splits(files: dict[Split, Path], meta: dict[str, dict[str, str]], digest, problems: list[str]) -> list[Clip]:
    """The clips of the split files as meta.csv describes them; what cannot be one goes to `problems`."""
    clips: list[Clip] = []
    split_of: dict[str, Split] = {}
    for split, file in files.items():
        columns = ("filename",) if file.name == "fold1_test.csv" else ("filename", "scene_label")
        for line, row in _read_table(file, columns, digest, problems):
            name, known = row["filename"], meta.get(row["filename"])
            if name in split_of:
                reason = "listed a second time" if split_of[name] == split else f"in the {split_of[name]} split too"
            elif known is None:
                reason = "not in meta.csv"
            elif (scene := row.get("scene_label", known["scene_label"])) != known["scene_label"]:
                reason = f"{scene!r} here and {known['scene_label']!r} in meta.csv"
            else:
                clips.append(Clip(name, known["scene_label"], known["source_label"], known["identifier"], split))
                reason = ""
            if reason:
                problems.append(f"{file.name} line {line}: {name} is {reason}")
            split_of.setdefault(name, split)
    return clips


def refuse(root: Path, problems: Sequence[str], skippable: bool) -> None:
    """Raise CorpusError listing `problems`, if any. `skippable`: on_bad_clip=skip would leave them out."""
    if not problems:
        return
    listed = "".join(f"\n  {problem}" for problem in problems)
    advice = (
        "Mend the files, or leave these clips out with corpus.on_bad_clip=skip." if skippable else "Mend the files."
    )
    raise CorpusError(f"{root}: {len(problems)} problem(s) in the corpus:{listed}\n{advice}")


def _read_table(file: Path, columns: tuple[str, ...], digest, problems: list[str]) -> list[tuple[int, dict[str, str]]]:
    """The (line number, row) pairs of a tab-separated file; rows with a missing value go to `problems` instead."""
    try:
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CorpusError(
            f"{file}: {error.strerror or error}. Expected a corpus in the TAU22 layout: "
            "meta.csv, evaluation_setup/fold1_train.csv, evaluation_setup/fold1_evaluate.csv, audio/"
        ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file}: not UTF-8 text ({error})") from error
    digest.update(f"{file.name}\0{len(content)}\n".encode() + content)
    reader = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    found = tuple(reader.fieldnames or ())
    if missing := [column for column in columns if column not in found]:
        raise CorpusError(
            f"{file}: missing column(s) {', '.join(missing)}; found {', '.join(map(repr, found)) or 'an empty file'}, "
            f"expected tab-separated columns {', '.join(columns)}"
        )
    rows = []
    for row in reader:
        if empty := [column for column in columns if not row[column]]:
            problems.append(f"{file.name} line {reader.line_num}: no value for {', '.join(empty)}")
        else:
            rows.append((reader.line_num, row))
    return rows


def _file_sizes(root: Path, names: list[str]) -> tuple[dict[str, int | None], list[str]]:
    """The size of each named file (None: no such file), and the names that lead out of `root`.

    One directory scan instead of one path resolution a file: TAU22 lists 169,300 files in one folder.
    """
    resolved_root = root.resolve()

    def inside(path: Path) -> bool:
        return path.resolve().is_relative_to(resolved_root)

    folders: dict[str, dict[str, os.DirEntry] | None] = {}  # None: outside
    sizes: dict[str, int | None] = {}
    outside = []
    for name in names:
        parent, _, base = name.rpartition("/")
        if parent not in folders:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not inside(root / parent):
                folders[parent] = None
            else:
                folders[parent] = {e.name: e for e in os.scandir(root / parent)} if (root / parent).is_dir() else {}
        folder = folders[parent]
        entry = folder.get(base) if folder else None
        if folder is None or base == ".." or (entry and entry.is_symlink() and not inside(Path(entry.path))):
            outside.append(name)
        else:
            sizes[name] = entry.stat().st_size if entry and entry.is_file() else None
    return sizes, outside


def partition(clips: Sequence[Clip], shares: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Split `clips` into named parts so that no location is in two of them; {part: sorted int64 indices into `clips`}.

    `shares` gives each held-out part's share of the clips of every scene; the rest is the part "train" (left out where
    the shares add up to 1, as for cross-fitting). Per scene the locations are shuffled, and each goes to the part that
    is then filled least relative to its share. A location with clips of several scenes goes as a whole.

    Raises ConfigError for shares that are no shares, CorpusError where a scene has too few locations.
    """
    rest = 1 - sum(shares.values())
    if "train" in shares or rest < -1e-9 or not all(0 < share < 1 for share in shares.values()):
        raise ConfigError(
            f"shares {shares}: each must lie between 0 and 1, together at most 1; the remainder is called 'train'"
        )
    share = ({"train": rest} if rest > 1e-9 else {}) | shares
    rng = np.random.default_rng(seed)
    at_location: dict[str, Counter[str]] = {}  # clips by scene
    locations_of: dict[str, list[str]] = {}  # in order of appearance
    for clip in clips:
        if clip.scene not in (counts := at_location.setdefault(clip.location, Counter())):
            locations_of.setdefault(clip.scene, []).append(clip.location)
        counts[clip.scene] += 1

    part_of: dict[str, str] = {}
    filled: dict[str, Counter[str]] = {part: Counter() for part in share}  # clips by scene
    for scene in sorted(locations_of):
        free = [location for location in locations_of[scene] if location not in part_of]
        rng.shuffle(free)
        for position, location in enumerate(free):
            size = at_location[location][scene]
            empty = [part for part in share if not filled[part][scene]]
            # The last locations are kept for parts that have none yet, whatever their share.
            candidates = empty if len(free) - position <= len(empty) else list(share)
            part = min(candidates, key=lambda part: (filled[part][scene] + size) / share[part])
            part_of[location] = part
            filled[part] += at_location[location]

    lacking = [
        f"\n  {scene}: {len(locations_of[scene])} location(s); clips "
        + ", ".join(f"{part} {filled[part][scene]}" for part in share)
        for scene in sorted(locations_of)
        if not all(filled[part][scene] for part in share)
    ]
    if lacking or not clips:
        raise CorpusError(
            f"no split into {', '.join(share)} by location has every scene in every part; {len(clips)} clips."
            f"{''.join(lacking)}\nHold out fewer parts (lower fusion.folds), or use a corpus with more locations "
            "in these scenes."
        )
    indices: dict[str, list[int]] = {part: [] for part in share}
    for index, clip in enumerate(clips):
        indices[part_of[clip.location]].append(index)
    return {part: np.array(values, dtype=np.int64) for part, values in indices.items()}
