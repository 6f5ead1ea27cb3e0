"""How corpora lie on disk, and what their metadata say: TAU's layout, one table, a folder a scene.

TAU's layout:

    meta.csv                             filename scene_label identifier source_label   (tab-separated)
    evaluation_setup/fold1_train.csv     filename scene_label
    evaluation_setup/fold1_evaluate.csv  filename scene_label
    evaluation_setup/fold1_test.csv      filename                                       (used without an evaluate file)
    audio/...

Scenes, devices and splits are read from these files; nothing here knows TAU's own.
"""

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from asc_ray.data.clip import Clip, Split
from asc_ray.data.config import TableConfig
from asc_ray.data.division import divide
from asc_ray.data.faults import Faults
from asc_ray.data.tables import table_rows, tau_rows, tidy
from asc_ray.errors import ConfigError, CorpusError

META_COLUMNS = ("filename", "scene_label", "identifier", "source_label")
DEVICE = "a"  # of a corpus that names none, as TAU calls its real microphone
SPLITS: tuple[Split, ...] = ("train", "test")
# Endings of recordings. Those that libsndfile does not decode are among them, so that they are refused and not missed.
RECORDINGS = {
    ".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd",
    ".caf", ".sph", ".voc", ".m4a", ".mp4", ".aac", ".wma", ".webm", ".mka", ".amr", ".ape", ".wv", ".dsf",
}  # fmt: skip
IMPULSE_RESPONSES = "dirs"  # a folder of a corpus that holds no scene


@dataclass(frozen=True)
class Splitting:
    """Which recordings are the test split: `test` are the values or folders that stand for it, None for `test`.

    Where the corpus has no splits, the test split is `share` of the recordings of each scene, whole places of them.
    """

    test: tuple[str, ...] | None
    share: float
    seed: int


@dataclass
class Listing:
    """What metadata say: a clip for each file, `digest` of it, and what a user should know.

    `split_files` name what lists each split. `folders` were searched for files, so one that is added there would change
    the listing. `made_split`: whether the test split was made here.
    """

    clips: list[Clip]
    listed: int  # names in the metadata, with those that are faults
    digest: "hashlib._Hash"
    split_files: Mapping[Split, str]
    notes: list[str]
    folders: tuple[str, ...] = ()
    made_split: bool = False


# --- TAU's layout -----------------------------------------------------------------------------------------------------


def tau_files(root: Path, train_split: Path | None = None) -> list[Path]:
    """Return meta.csv, two that may list the test clips, and one or two that may list the training clips."""
    setup = root / "evaluation_setup"
    train = [setup / "fold1_train.csv"] if train_split is None else [train_split, setup / train_split]
    return [root / "meta.csv", setup / "fold1_evaluate.csv", setup / "fold1_test.csv", *train]


def read_tau(root: Path, train_split: Path | None, faults: Faults, stripped: Counter[str]) -> Listing:
    """Read TAU's layout. Raises ConfigError, and CorpusError for a file that is no table of it."""
    meta_file, evaluate, test, *train = tau_files(root, train_split)
    split_files: dict[Split, Path] = {
        "train": next((file for file in train[:-1] if file.is_file()), train[-1]),
        "test": evaluate if evaluate.is_file() else test,
    }
    if train_split is not None and not split_files["train"].is_file():
        raise ConfigError(f"corpus.train_split: {train_split}: no such file, nor in {test.parent}")
    digest = hashlib.sha256()
    meta: dict[str, tuple[str, str, str]] = {}  # scene, place, device
    for where, row in tau_rows(meta_file, META_COLUMNS, digest, faults, stripped):
        if row["filename"] in meta:
            what = "is listed a second time"
            faults.add(f"{meta_file.name} {where}: {row['filename']} {what}", row["filename"], what)
        # One string for each scene, place and device, and not one for each clip.
        scene, place, device = (sys.intern(row[column]) for column in ("scene_label", "identifier", "source_label"))
        meta[row["filename"]] = scene, place, device
    clips: list[Clip] = []
    split_of: dict[str, Split] = {}
    for split, file in split_files.items():
        columns = ("filename",) if file.name == "fold1_test.csv" else ("filename", "scene_label")
        for where, row in tau_rows(file, columns, digest, faults, stripped):
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
                faults.add(f"{file.name} {where}: {name} {reason}", name, reason)
            split_of.setdefault(name, split)
    return Listing(clips, len(split_of), digest, {split: file.name for split, file in split_files.items()}, [])


# --- One table --------------------------------------------------------------------------------------------------------


def read_table(
    root: Path, config: TableConfig, splitting: Splitting, place_pattern: str | None, faults: Faults, stripped: Counter
) -> Listing:
    """Read the layout `table`. Raises ConfigError, and CorpusError for a file that is no such table."""
    file, columns = root / config.file, config.columns
    found: dict[str, Clip] = {}
    values: dict[str, str] = {}  # of the column `split`, by name
    for where, row in table_rows(file, columns, set(config.path_columns), faults, stripped):
        name = tidy(config.path_of(row))
        if name in found:
            what = "is listed a second time"
            faults.add(f"{file.name} {where}: {name} {what}", name, what)
            continue
        device = row[config.device] if config.device else DEVICE
        place = row[config.place] if config.place else name
        found[name] = Clip(name, sys.intern(row[config.scene]), sys.intern(device), sys.intern(place), "train")
        if config.split:
            values[name] = sys.intern(row[config.split])
    if not found and not faults:
        raise CorpusError(f"{file}: no row")
    notes = [] if config.device else [_no_device("corpus.table.device names no column")]
    clips = list(found.values())
    if not config.place:
        clips = _placed(clips, place_pattern, "corpus.table.place names no column", notes, faults)
    if config.split:
        clips = _split_by(clips, values, splitting, f"the column {config.split} of {file.name}", notes)
    return _listing(file, clips, len(found), splitting, notes, made=not config.split, faults=faults)


# --- A folder a scene -------------------------------------------------------------------------------------------------


def read_folders(root: Path, splitting: Splitting, place_pattern: str | None, faults: Faults) -> Listing:
    """Read the layout `folders`: SCENE/..., or where the test split is named SPLIT/SCENE/...

    Raises ConfigError, and CorpusError where there is no recording.
    """
    depth = 1 if splitting.test is None else 2  # of the folder that is named for a scene
    files, folders, others = _walk(root, faults)
    clips, values = [], {}
    for name in files:
        parts = PurePosixPath(name).parts
        if len(parts) <= depth:
            above = "" if depth == 1 else ", which are below those that corpus.test names: SPLIT/SCENE/NAME"
            what = f"lies in no folder of a scene{above}"
            faults.add(f"{name}: {what}", name, what)
            continue
        values[name] = parts[0]
        clips.append(Clip(name, sys.intern(parts[depth - 1]), DEVICE, name, "train"))
    if not files:
        raise CorpusError(f"{root}: no recording in any folder; expected SCENE/NAME.wav; corpus.layout has others")
    notes = [_no_device("folders name none")]
    if others:
        listed = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in sorted(others.items()))
        notes.append(f"files that are no recordings were left alone, by ending: {listed}")
    clips = _placed(clips, place_pattern, "folders name none", notes, faults)
    if splitting.test is not None:
        clips = _split_by(clips, values, splitting, f"the folders of {root}", notes)
    listing = _listing(root, clips, len(files), splitting, notes, made=splitting.test is None, faults=faults)
    listing.folders = tuple(folders)
    return listing


def _walk(root: Path, faults: Faults) -> tuple[list[str], list[str], Counter[str]]:
    """Return the recordings below `root` by name, all folders searched ("" is `root`), and the endings of other files.

    Hidden files, and the folder of impulse responses, are left out. Links to folders are faults.
    """
    files, folders, others = [], [""], Counter[str]()
    for folder in folders:  # it grows
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise CorpusError(f"{root / folder}: {error.strerror}; corpus.path names a folder of scenes") from None
        for entry in entries:
            name = f"{folder}/{entry.name}".removeprefix("/")
            if entry.name.startswith((".", "__MACOSX")) or name == IMPULSE_RESPONSES:
                continue
            if entry.is_dir():
                if entry.is_symlink():
                    faults.add(f"{name}: is a symbolic link to a folder; put the folder itself there")
                else:
                    folders.append(name)
            elif (suffix := PurePosixPath(name).suffix.lower()) in RECORDINGS:
                files.append(name)
            else:
                others[suffix] += 1
    return sorted(files), folders, others


# --- Of both ----------------------------------------------------------------------------------------------------------


def _no_device(why: str) -> str:
    return f"one device: {why}, so all recordings are of a device {DEVICE!r}"


def _placed(clips: list[Clip], pattern: str | None, why: str, notes: list[str], faults: Faults) -> list[Clip]:
    """Return the clips with their places, which their names hold or are."""
    if pattern is None:
        notes.append(
            f"one place a file: {why}, so recordings of one place may lie in several parts, and scores may be too "
            "good; corpus.place_pattern finds the place in a file's name"
        )
        return clips
    placed, seen = [], re.compile(pattern)
    for clip in clips:
        found = seen.search(clip.clip_id)
        if found is None or not found[1]:
            what = f"has no place by corpus.place_pattern {pattern!r}"
            faults.add(f"{clip.clip_id}: {what}", clip.clip_id, what)
        else:
            placed.append(replace(clip, place=sys.intern(found[1])))
    return placed


def _split_by(clips: list[Clip], values: dict[str, str], splitting: Splitting, of: str, notes: list[str]) -> list[Clip]:
    """Return the clips with their splits. Raises ConfigError for values that stand for none."""
    counts = Counter(values.values())
    found = ", ".join(f"{value} ({count})" for value, count in sorted(counts.items()))
    test = splitting.test
    if test is None:
        if strange := sorted(set(counts) - set(SPLITS)):
            raise ConfigError(
                f"corpus.test: must say which values of {of} are the test split, because {strange[0]!r} is neither "
                f"train nor test; found {found}"
            )
        test = ("test",)
        if counts and "test" not in counts:
            raise ConfigError(f"corpus.test: no row of {of} is of the test split; found {found}")
    if counts and (unknown := [value for value in test if value not in counts]):
        raise ConfigError(f"corpus.test: {unknown[0]!r} is not among {of}; found {found}")
    if counts and set(counts) <= set(test):
        raise ConfigError(f"corpus.test: leaves no training split; {of}: {found}")
    trained = ", ".join(value for value in sorted(counts) if value not in test)
    notes.append(f"splits by {of}: test {', '.join(test)}; training {trained}")
    return [replace(clip, split="test" if values[clip.clip_id] in test else "train") for clip in clips]


def _listing(
    source: Path,
    clips: list[Clip],
    listed: int,
    splitting: Splitting,
    notes: list[str],
    *,
    made: bool,
    faults: Sequence,
) -> Listing:
    """Return a listing whose order and digest do not depend on the order of rows, with a test split where it is made.

    Raises CorpusError where no test split can be made.
    """
    clips = sorted(clips, key=lambda clip: clip.clip_id)
    if made and clips and not faults:
        clips = _made_split(source, clips, splitting)
        counts = Counter(clip.split for clip in clips)
        places = {split: len({clip.place for clip in clips if clip.split == split}) for split in SPLITS}
        notes.append(
            f"a test split was made by place (corpus.test_share {splitting.share:g}, corpus.test_seed "
            f"{splitting.seed}): {counts['test']} of {len(clips)} recordings, {places['test']} of "
            f"{places['test'] + places['train']} places; split.csv beside the clips has it"
        )
    clips.sort(key=lambda clip: clip.split == "test")
    digest = hashlib.sha256(b"clips\0")
    for clip in clips:
        digest.update("\0".join((clip.clip_id, clip.scene, clip.device, clip.place, clip.split, "\n")).encode())
    return Listing(clips, listed, digest, dict.fromkeys(SPLITS, str(source)), notes, made_split=made)


def _made_split(source: Path, clips: Sequence[Clip], splitting: Splitting) -> list[Clip]:
    """Return the clips, sorted by name, with `share` of each scene's in the test split, by place."""
    numbers = {place: number for number, place in enumerate(sorted({clip.place for clip in clips}))}
    if len(numbers) == 1:
        raise CorpusError(
            f"{source}: all recordings are of one place, {clips[0].place}: a test split by place is impossible. Give "
            "corpus.table.split, or recordings of more places"
        )
    groups = Counter((clip.scene, numbers[clip.place]) for clip in clips)
    advice = "Record more places in these scenes, or give the splits in a table (corpus.table.split)."
    counted = ((scene, place, count) for (scene, place), count in groups.items())
    part_of = divide(counted, {"test": splitting.share}, splitting.seed, advice=advice)
    splits: dict[str, Split] = {"train": "train", "test": "test"}
    return [replace(clip, split=splits[part_of[numbers[clip.place]]]) for clip in clips]
