"""What a plan asks of a corpus, kept in the storage: an unchanged corpus is not read again.

A kept reading counts only while the stamps of all metadata files, of every folder with clips and of some clips are
those that it was made under: size, inode and both times, in nanoseconds. A clip that is overwritten in place leaves
its folder as it was. Where many are, some are looked at; a single one is noticed, by its size, when the corpus is read
anew, as by `asc-ray ingest`.
"""

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from asc_ray.artifacts import content_key, read_record, write_record
from asc_ray.data.config import CorpusConfig
from asc_ray.data.corpus import Corpus, read_corpus, table_files
from asc_ray.data.division import grouped
from asc_ray.data.recordings import cut_following, following

READINGS = "readings"  # the storage's folder
READER = 1  # raise it when a corpus is read in another way, so that earlier readings are not used
TICK = 2.0  # seconds; of FAT's clock, the slowest. A file that changes twice within a tick may have one stamp for both
SOME = 64  # clips whose own stamps are kept, evenly spread over the corpus


@dataclass(frozen=True)
class Reading:
    """What a plan asks of a corpus.

    `groups`: the training clips by scene and place, and how many they are: numbers of `labels` and of the places, in
    the order in which the clips first appear. `heard`: the devices of each place's training clips, as the sum of 2^n
    over their numbers n in `devices`. `followed`: whether a training clip is followed by another second of its
    recording; `first`: the first one's id. `stamps` is empty where the reading cannot be kept. `corpus`: the clips,
    unless the reading was kept by an earlier command.
    """

    fingerprint: str
    labels: tuple[str, ...]
    devices: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    heard: tuple[int, ...]
    followed: bool
    first: str
    stamps: Mapping[str, Any]
    corpus: Corpus | None = None

    def devices_of(self, heard: Iterable[int]) -> tuple[str, ...]:
        """Return the devices of some places, given as in `heard`."""
        together = reduce(or_, heard, 0)
        return tuple(device for number, device in enumerate(self.devices) if together >> number & 1)


def new_reading(config: CorpusConfig) -> Reading:
    """Read the whole corpus in `config.path`. Raises as `read_corpus` does."""
    assert config.path is not None
    began, before = time.time(), _tables(config)
    corpus = read_corpus(config.path, config)
    train = [clip for clip in corpus.clips if clip.split == "train"]
    places = dict.fromkeys(clip.place for clip in train)
    numbers = [{name: n for n, name in enumerate(names)} for names in (corpus.labels, places, corpus.devices)]
    named = zip(*((clip.scene, clip.place, clip.device) for clip in train), strict=True)
    scene, place, device = (np.array([of[name] for name in own]) for of, own in zip(numbers, named, strict=True))
    heard = [0] * len(places)
    for at, own, _ in grouped(place, device):
        heard[at] |= 1 << own
    if train[0].recording:
        recordings = {name: n for n, name in enumerate({clip.recording: None for clip in train})}
        numbered = np.array([(recordings[clip.recording], clip.second) for clip in train])
        after = cut_following(numbered[:, 0], numbered[:, 1])
    else:
        after = following(pa.chunked_array([[clip.clip_id for clip in train]], pa.string()), scene, place)
    return Reading(
        fingerprint=corpus.fingerprint,
        labels=corpus.labels,
        devices=corpus.devices,
        groups=tuple(grouped(scene, place)),
        heard=tuple(heard),
        followed=bool((after != np.arange(len(train))).any()),
        first=train[0].clip_id,
        stamps=_stamps(config, corpus, before, began),
        corpus=corpus,
    )


def kept_reading(storage: Path, config: CorpusConfig) -> Reading | None:
    """Return the reading that an earlier command kept; None where there is none, or the corpus is not as it was."""
    record = read_record(_file(storage, config))
    try:
        if record is None or record["tables"] != _tables(config):
            return None
        if any(_stamp(_root(config) / name) != stamp for name, stamp in record["audio"].items()):
            return None
        return Reading(
            fingerprint=record["fingerprint"],
            labels=tuple(record["labels"]),
            devices=tuple(record["devices"]),
            groups=tuple(zip(*record["groups"], strict=True)),
            heard=tuple(record["heard"]),
            followed=record["followed"],
            first=record["first"],
            stamps={name: record[name] for name in ("tables", "audio")},
        )
    except (KeyError, TypeError, AttributeError, ValueError):  # a record of another kind
        return None


def keep(storage: Path, config: CorpusConfig, reading: Reading | None) -> None:
    """Keep a reading for the next command, or none; the caller holds the storage's lock."""
    file = _file(storage, config)
    if reading is None or not reading.stamps:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(exist_ok=True)
    names = ("fingerprint", "labels", "devices", "heard", "followed", "first")
    groups = {"groups": list(zip(*reading.groups, strict=True))}  # three columns are shorter than many rows
    write_record(file, {name: getattr(reading, name) for name in names} | groups | dict(reading.stamps))


def _file(storage: Path, config: CorpusConfig) -> Path:
    """Return the file of this corpus' reading: another folder, list, rule or version has another."""
    asked: dict[str, Any] = {"path": _root(config), "train_split": config.train_split and config.train_split.absolute()}
    asked |= config.model_dump(mode="json", exclude={*asked, "shard_clips", "impulse_responses", "demo"})
    versions = {"reader": READER, "program": version("asc-ray")}
    return storage / READINGS / f"{content_key(**asked, **versions)}.json"


def _root(config: CorpusConfig) -> Path:
    assert config.path is not None
    return config.path.absolute()


def _stamps(config: CorpusConfig, corpus: Corpus, tables: list[list[int]], began: float) -> dict[str, Any]:
    """Return the stamps of a corpus whose reading `began` then, when its tables had the stamps `tables`.

    They are empty where a change might not show in them: while files change, and where clips are bad, for one may be
    mended in place, or are links into other folders.
    """
    if corpus.bad or corpus.linked:
        return {}
    names = {clip.file.rpartition("/")[0] for clip in corpus.clips} | set(corpus.folders)
    names |= {clip.file for clip in corpus.clips[:: -(-len(corpus.clips) // SOME)]}
    audio = {name: _stamp(corpus.root / name) for name in sorted(names)}
    stamps = [*filter(None, tables), *audio.values()]
    if not all(stamps) or _tables(config) != tables:
        return {}
    settled = max(max(stamp[1:3]) for stamp in stamps) < (began - TICK) * 1e9
    return {"tables": tables, "audio": audio} if settled else {}


def _tables(config: CorpusConfig) -> list[list[int]]:
    """Return the stamps of all files that may be a table of the corpus; empty for one that is not there."""
    return [_stamp(file) for file in table_files(_root(config), config)]


def _stamp(path: Path) -> list[int]:
    """Return what shows that a file or folder is as it was: size, both times in ns, inode; empty for none.

    It is opened first, because a network file system then asks its server and not its own memory.
    """
    with suppress(OSError):
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(opened)
        finally:
            os.close(opened)
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return []
