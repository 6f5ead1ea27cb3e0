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
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from asc_ray.data.demo import DemoConfig
from asc_ray.data.faults import EXAMPLES, BadClip, Faults
from asc_ray.errors import ConfigError, CorpusError
from asc_ray.files import read_plain
from asc_ray.runtime import fit_label
from asc_ray.section import Section
from asc_ray.shown import printable

META_COLUMNS = ("filename", "scene_label", "identifier", "source_label")
MOST_BYTES = 1 << 32  # of a table; TAU22's have up to 20 MB, those of 17 million clips 2 GB
DELIMITERS = {",": "commas", ";": "semicolons", "|": "bars", " ": "blanks"}
Split = Literal["train", "test"]


class CorpusConfig(Section):
    """The corpus, and how it is read. `path: null` stands for the synthetic demo corpus that `demo` describes."""

    path: Path | None = Field(None, description="folder of a corpus in the layout of TAU22")
    train_split: Path | None = Field(
        None, description="a list of training clips instead of fold1_train.csv, such as DCASE24's split5.csv"
    )
    on_bad_clip: Literal["refuse", "skip"] = Field(
        "refuse", description="whether a clip that cannot be used stops the ingest, or is left out and recorded"
    )
    shard_clips: int = Field(4096, ge=1, le=4096, description="clips of one Arrow file")
    impulse_responses: Path | None = Field(
        None, description="folder of wavs for DIR; null: `dirs` in the corpus, else a built-in bank"
    )
    demo: DemoConfig = Field(default_factory=DemoConfig)


@dataclass(frozen=True, slots=True)  # without slots a clip takes twice the memory
class Clip:
    clip_id: str  # the file name as meta.csv has it, relative to the corpus
    scene: str
    device: str
    place: str  # meta.csv's `identifier`: clips that share it come from one place
    split: Split


@dataclass(frozen=True)
class Corpus:
    root: Path
    clips: tuple[Clip, ...]  # training clips, then test clips, each in the order of their split file
    labels: tuple[str, ...]  # sorted
    devices: tuple[str, ...]  # sorted
    fingerprint: str  # sha256 of the metadata files and of every listed file's name and size
    bad: tuple[BadClip, ...]  # clips left out, with on_bad_clip="skip"
    notes: tuple[str, ...] = ()  # what a user should know about a corpus that can be used
    linked: bool = False  # whether a clip's file is a symbolic link


def read_corpus(
    root: Path, on_bad_clip: Literal["refuse", "skip"] = "refuse", train_split: Path | None = None
) -> Corpus:
    """Read and check the metadata of the corpus in `root`; no audio is decoded.

    `train_split` lists the training clips, by file name and scene, instead of fold1_train.csv; a relative path counts
    from the working directory or, where it leads nowhere, from the corpus' evaluation_setup.

    Raises CorpusError with every offending row and file. Absent and empty audio files are bad clips: refused, or left
    out and recorded in `Corpus.bad`. Everything else wrong with the corpus is refused in either case.
    """
    meta_file, evaluate, test, *train = table_files(root, train_split)
    split_files: dict[Split, Path] = {
        "train": next((file for file in train[:-1] if file.is_file()), train[-1]),
        "test": evaluate if evaluate.is_file() else test,
    }
    if train_split is not None and not split_files["train"].is_file():
        raise ConfigError(f"corpus.train_split: {train_split}: no such file, nor in {test.parent}")
    digest = hashlib.sha256()
    faults, stripped = Faults(), Counter[str]()

    meta: dict[str, tuple[str, str, str]] = {}  # scene, place, device
    for line, row in _read_table(meta_file, META_COLUMNS, digest, faults, stripped):
        if row["filename"] in meta:
            what = "is listed a second time"
            faults.add(f"{meta_file.name} line {line}: {row['filename']} {what}", row["filename"], what)
        # One string for each scene, place and device, and not one for each clip.
        scene, place, device = (sys.intern(row[column]) for column in ("scene_label", "identifier", "source_label"))
        meta[row["filename"]] = scene, place, device
    clips, listed = _read_splits(split_files, meta, digest, faults, stripped)

    sizes, linked = _file_sizes(root, [clip.clip_id for clip in clips], faults)
    for name, size in sizes.items():
        digest.update(f"{name}\0{size}\n".encode())
    bad = tuple(
        BadClip(name, "empty file" if size == 0 else "no such file") for name, size in sizes.items() if not size
    )
    if on_bad_clip == "skip":
        left_out = {clip.clip_id for clip in bad}
        clips = [clip for clip in clips if clip.clip_id not in left_out]
    for clip in bad if on_bad_clip == "refuse" else ():
        faults.add_clip(clip)
    scenes = _scenes(clips, split_files, faults)
    faults.refuse(root, listed, skippable=bool(bad) and len(faults) == len(bad))
    return Corpus(
        root=root,
        clips=tuple(clips),
        labels=tuple(sorted(scenes)),
        devices=tuple(sorted({clip.device for clip in clips})),
        fingerprint=digest.hexdigest(),
        bad=bad,
        notes=tuple(_notes(clips, stripped)),
        linked=linked,
    )


def table_files(root: Path, train_split: Path | None = None) -> list[Path]:
    """Return meta.csv, two that may list the test clips, and one or two that may list the training clips."""
    setup = root / "evaluation_setup"
    train = [setup / "fold1_train.csv"] if train_split is None else [train_split, setup / train_split]
    return [root / "meta.csv", setup / "fold1_evaluate.csv", setup / "fold1_test.csv", *train]


def _scenes(clips: Sequence[Clip], files: Mapping[Split, Path], faults: Faults) -> set[str]:
    """Return the scenes of the training clips; a split without clips and scenes only of the test split are faults."""
    scenes = {split: {clip.scene for clip in clips if clip.split == split} for split in files}
    for split, file in files.items():
        if not scenes[split]:
            faults.add(f"{file.name}: no usable clip in the {split} split")
    if scenes["train"]:
        for label in sorted(scenes["test"] - scenes["train"]):
            faults.add(f"scene {label!r} is in the test split and not in the training split")
    return scenes["train"]


def _notes(clips: Sequence[Clip], stripped: Mapping[str, int]) -> Iterator[str]:
    """Yield what is strange about a corpus that can be used."""
    if stripped:
        found = ", ".join(f"{column} {count}" for column, count in stripped.items())
        yield f"blanks around values were taken away, by column: {found}"
    for what, names in (
        ("scenes", {clip.scene for clip in clips}),
        ("devices", {clip.device for clip in clips}),
        ("places", {clip.place for clip in clips}),
    ):
        spellings: dict[str, list[str]] = {}
        for name in sorted(names):
            spellings.setdefault(name.casefold(), []).append(name)
        for same in spellings.values():
            if len(same) > 1:
                yield f"warning: {what} that differ in upper and lower case alone, and are taken for different: " + (
                    ", ".join(same)
                )
    places: dict[Split, set[str]] = {"train": set(), "test": set()}
    for clip in clips:
        places[clip.split].add(clip.place)
    if both := sorted(places["train"] & places["test"]):
        some = ", ".join(both[:EXAMPLES]) + (", ..." if len(both) > EXAMPLES else "")
        yield (
            f"warning: {len(both)} of {len(places['test'])} places of the test split are in the training split, too "
            f"({some}): test figures say less of places never heard"
        )
    if len({clip.scene for clip in clips}) == 1:
        yield f"warning: the corpus has one scene, {clips[0].scene}: whatever is trained is always right"


def _read_splits(
    files: dict[Split, Path], meta: dict[str, tuple[str, str, str]], digest, faults: Faults, stripped: Counter[str]
) -> tuple[list[Clip], int]:
    """Return the clips of the split files as meta.csv describes them, and how many names the files list.

    Rows that cannot be clips go to `faults`.
    """
    clips: list[Clip] = []
    split_of: dict[str, Split] = {}
    for split, file in files.items():
        columns = ("filename",) if file.name == "fold1_test.csv" else ("filename", "scene_label")
        for line, row in _read_table(file, columns, digest, faults, stripped):
            name, known = row["filename"], meta.get(row["filename"])
            if name in split_of:
                second = split_of[name] == split
                reason = "is listed a second time" if second else f"is in the {split_of[name]} split too"
            elif known is None:
                reason = "is not in meta.csv"
            elif (scene := row.get("scene_label", known[0])) != known[0]:
                reason = f"is {scene!r} here and {known[0]!r} in meta.csv"
            else:
                clips.append(Clip(name, known[0], known[2], known[1], split))
                reason = ""
            if reason:
                faults.add(f"{file.name} line {line}: {name} {reason}", name, reason)
            split_of.setdefault(name, split)
    return clips, len(split_of)


def _read_table(
    file: Path, columns: tuple[str, ...], digest, faults: Faults, stripped: Counter[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the (line number, row) pairs of a tab-separated file; rows with a missing value go to `faults` instead.

    Blanks around a value would turn it into another scene, device or place, so they are removed and counted by column.
    File names lose `./` and doubled slashes. Raises CorpusError for a file that is no such table.
    """
    try:
        content = read_plain(file, MOST_BYTES)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CorpusError(
            f"{file}: {error.strerror or error}. Expected a corpus in the TAU22 layout: "
            "meta.csv, evaluation_setup/fold1_train.csv, evaluation_setup/fold1_evaluate.csv, audio/"
        ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file}: not UTF-8 text ({error})") from error
    digest.update(f"{file.name}\0{len(content)}\n".encode() + content)
    if lone := re.search(r"\r(?!\n)", text):
        line = text.count("\n", 0, lone.start()) + 1
        raise CorpusError(
            f"{file} line {line}: a carriage return without a line feed; save the file with \\n at line ends"
        )
    reader = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        found = [name.strip() for name in reader.fieldnames or ()]
        _check_columns(file, columns, found)
        reader.fieldnames = found
        for row in reader:
            for column in columns:
                value = row[column] or ""
                if value != value.strip():
                    stripped[column] += 1
                    row[column] = value.strip()
            if empty := [column for column in columns if not row[column]]:
                faults.add(f"{file.name} line {reader.line_num}: no value for {', '.join(empty)}")
                continue
            if odd := [column for column in columns if not _shown(row[column], column)]:
                shown = printable(row[odd[0]][:80])
                faults.add(f"{file.name} line {reader.line_num}: control characters in {', '.join(odd)}: {shown}")
                continue
            if "//" in row["filename"] or "./" in row["filename"]:
                row["filename"] = str(PurePosixPath(row["filename"]))
            yield reader.line_num, row
    except csv.Error as error:
        raise CorpusError(f"{file} line {reader.line_num + 1}: {error}") from None


def _shown(value: str, column: str) -> bool:
    """Whether a value can be shown without steering a terminal; only a file's name may have other odd characters."""
    if column == "filename":
        return len(value) <= 1000 and not any(unicodedata.category(c) == "Cc" for c in value)
    return fit_label(value)


def _check_columns(file: Path, columns: tuple[str, ...], found: Sequence[str]) -> None:
    """Raise CorpusError where a column is missing or there twice, with the cause if it shows."""
    if twice := [column for column in columns if found.count(column) > 1]:
        raise CorpusError(f"{file}: the column {twice[0]} is there twice; keep one")
    missing = [column for column in columns if column not in found]
    if not missing:
        return
    cause = ""
    bare = [name.strip("\"'") for name in found]
    if set(columns) <= set(bare):
        cause = ". The names are in quotes: write the tables without them"
    for delimiter, name in DELIMITERS.items():
        if len(found) == 1 and set(columns) <= {part.strip("\"' ") for part in found[0].split(delimiter)}:
            cause = f". The columns are separated by {name}: write the file with tabs"
    raise CorpusError(
        f"{file}: missing column(s) {', '.join(missing)}; found {', '.join(map(repr, found)) or 'an empty file'}, "
        f"expected tab-separated columns {', '.join(columns)}{cause}"
    )


def _file_sizes(root: Path, names: list[str], faults: Faults) -> tuple[dict[str, int | None], bool]:
    """Return each named file's size (None: no such file), and whether one is a symbolic link.

    Names that lead out of `root`, or to one file, are faults. Each folder is scanned once and no path is resolved,
    because TAU22 lists 169,300 files in one folder.
    """
    try:
        resolved_root = root.resolve()
    except RuntimeError:
        raise CorpusError(f"{root}: symbolic links that lead to themselves; name the corpus' own folder") from None

    def inside(path: Path) -> bool:
        return path.resolve().is_relative_to(resolved_root)

    def listed(parent: str) -> dict[str, os.DirEntry] | None:
        path = PurePosixPath(parent)
        if path.is_absolute() or ".." in path.parts or not inside(root / parent):
            return None
        return {e.name: e for e in os.scandir(root / parent)} if (root / parent).is_dir() else {}

    folders: dict[str, dict[str, os.DirEntry] | None] = {}  # None: outside
    sizes: dict[str, int | None] = {}
    any_link = False
    linked: dict[tuple[int, int], str] = {}  # by device and inode: links give one file several names
    for name in names:
        parent, _, base = name.rpartition("/")
        try:
            if parent not in folders:
                folders[parent] = listed(parent)
            folder = folders[parent]
            entry = folder.get(base) if folder else None
            link = entry is not None and entry.is_symlink()
            any_link |= link
            outside = folder is None or base == ".." or (link and not inside(root / name))
            there = not outside and entry is not None and entry.is_file()
        except RuntimeError:
            faults.add_clip(BadClip(name, "leads through symbolic links to itself"))
            folders.setdefault(parent, {})
            continue
        except OSError as error:
            faults.add_clip(BadClip(name, f"cannot be found ({error.strerror})"))
            folders.setdefault(parent, {})
            continue
        if outside:
            faults.add_clip(BadClip(name, "leads out of the corpus folder; only paths inside it are read"))
        elif entry is None or not there:
            sizes[name] = None
        else:
            status = entry.stat()
            sizes[name] = status.st_size
            other = linked.setdefault((status.st_dev, status.st_ino), name) if status.st_ino else name
            if other != name:
                faults.add_clip(BadClip(name, f"is one file with {other}"))
    return sizes, any_link
