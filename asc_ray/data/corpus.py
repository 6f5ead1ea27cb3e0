"""A corpus: what its metadata say, and the checks on them and on its files."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from asc_ray.data.clip import Clip, Split, second_id
from asc_ray.data.config import CorpusConfig
from asc_ray.data.faults import EXAMPLES, BadClip, Faults
from asc_ray.data.layouts import SPLITS, Listing, Splitting, read_folders, read_table, read_tau, tau_files
from asc_ray.errors import CorpusError


@dataclass(frozen=True)
class Corpus:
    root: Path
    clips: tuple[Clip, ...]  # training clips, then test clips, each in the order of their split file or of their names
    labels: tuple[str, ...]  # sorted
    devices: tuple[str, ...]  # sorted
    fingerprint: str  # sha256 of the metadata and of every listed file's name and size (and seconds, if it is cut)
    bad: tuple[BadClip, ...]  # files left out, with on_bad_clip="skip"
    notes: tuple[str, ...] = ()  # what a user should know about a corpus that can be used
    linked: bool = False  # whether a clip's file is a symbolic link
    folders: tuple[str, ...] = ()  # that were searched for files
    made_split: bool = False  # whether the test split was made here


_AS_TAU22 = CorpusConfig()


def read_corpus(root: Path, config: CorpusConfig = _AS_TAU22) -> Corpus:
    """Read and check the metadata of the corpus in `root`; no audio is decoded. `config.path` is not used.

    With `segment_seconds` the headers of all recordings are read, and its clips are their seconds.

    `train_split` lists the training clips, by file name and scene, instead of fold1_train.csv; a relative path counts
    from the working directory or, where it leads nowhere, from the corpus' evaluation_setup.

    Raises ConfigError, and CorpusError with every offending row and file. Absent and empty audio files, and recordings
    that cannot be cut, are bad clips: refused, or left out and recorded in `Corpus.bad`. Everything else wrong with the
    corpus is refused in either case.
    """
    faults, stripped = Faults(), Counter[str]()
    listing = _listing(root, config, faults, stripped)
    clips, digest = listing.clips, listing.digest
    sizes, linked = _file_sizes(root, [clip.clip_id for clip in clips], faults)
    for name, size in sizes.items():
        digest.update(f"{name}\0{size}\n".encode())
    bad = [BadClip(name, "empty file" if size == 0 else "no such file") for name, size in sizes.items() if not size]
    notes = [*listing.notes]
    if config.segment_seconds:
        seconds = _seconds(root, [name for name, size in sizes.items() if size], bad, notes)
        digest.update(json.dumps(seconds).encode())
        clips = [own for clip in clips for own in _cut(clip, seconds)]
    if config.on_bad_clip == "skip":
        left_out = {clip.clip_id for clip in bad}
        clips = [clip for clip in clips if clip.clip_id not in left_out]
    for clip in bad if config.on_bad_clip == "refuse" else ():
        faults.add_clip(clip)
    scenes = _scenes(clips, listing.split_files, faults)
    faults.refuse(root, listing.listed, skippable=bool(bad) and len(faults) == len(bad))
    return Corpus(
        root=root,
        clips=tuple(clips),
        labels=tuple(sorted(scenes)),
        devices=tuple(sorted({clip.device for clip in clips})),
        fingerprint=digest.hexdigest(),
        bad=tuple(bad),
        notes=(*notes, *_notes(clips, stripped)),
        linked=linked,
        folders=listing.folders,
        made_split=listing.made_split,
    )


def table_files(root: Path, config: CorpusConfig) -> list[Path]:
    """Return the files that may be the corpus' metadata."""
    if config.layout == "tau":
        return tau_files(root, config.train_split)
    return [root / config.table.file] if config.table else []


def _listing(root: Path, config: CorpusConfig, faults: Faults, stripped: Counter[str]) -> Listing:
    """Return what the metadata say. Rows that cannot be clips go to the faults."""
    if config.layout == "tau":
        return read_tau(root, config.train_split, faults, stripped)
    splitting = Splitting(config.test, config.test_share, config.test_seed)
    if config.table:
        listing = read_table(root, config.table, splitting, config.place_pattern, faults, stripped)
    else:
        listing = read_folders(root, splitting, config.place_pattern, faults)
    faults.refuse(root, listing.listed, skippable=False)  # there is no test split yet, which would be a fault more
    return listing


def _seconds(root: Path, names: Sequence[str], bad: list[BadClip], notes: list[str]) -> dict[str, int]:
    """Return how many seconds each recording is cut into; those that cannot be cut go to `bad`."""
    from asc_ray.data.decode import BadAudio, whole_seconds  # here, because only recordings that are cut need torch

    found, rest, longer = {}, 0.0, 0
    for name in names:
        try:
            found[name], left = whole_seconds(root / name)
        except BadAudio as error:
            bad.append(BadClip(name, str(error)))
            continue
        rest, longer = rest + left, longer + (left > 0)
    notes.append(
        f"{len(found)} recordings were cut into {sum(found.values())} seconds; at the end of {longer} of them less "
        f"than a second is left over, {rest:.1f} s together, and not used"
    )
    return found


def _cut(clip: Clip, seconds: Mapping[str, int]) -> Iterator[Clip]:
    """Yield the seconds of a recording; the recording itself where it has none, because it is bad."""
    name = clip.clip_id
    if name not in seconds:
        yield clip
        return
    for second in range(seconds[name]):
        yield Clip(second_id(name, second), clip.scene, clip.device, clip.place, clip.split, name, second)


def _scenes(clips: Sequence[Clip], files: Mapping[Split, str], faults: Faults) -> set[str]:
    """Return the scenes of the training clips; a split without clips and scenes only of the test split are faults."""
    scenes = {split: {clip.scene for clip in clips if clip.split == split} for split in SPLITS}
    for split in SPLITS:
        if not scenes[split]:
            faults.add(f"{files[split]}: no usable clip in the {split} split")
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
            entry = folder.pop(base, None) if folder else None  # with what it keeps of its file, which is more than it
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
