"""Corpora as one table or a folder a scene: read alike however they are written, and each bad input one clear line."""

import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile as sf
from conftest import noise
from pydantic import ValidationError

from asc_ray.config.composition import load_config
from asc_ray.data import tables
from asc_ray.data.clip import Clip
from asc_ray.data.config import CorpusConfig
from asc_ray.data.corpus import Corpus, read_corpus
from asc_ray.data.reading import TICK, keep, kept_reading, new_reading
from asc_ray.data.shards import write_shard, write_store
from asc_ray.errors import ConfigError, CorpusError, UserError
from asc_ray.plan import Plan

COLUMNS = ("file", "label", "mic", "site", "part")
ROWS = [
    (f"{scene}/{scene}-{place}-{take}.wav", scene, mic, f"{scene}-{place}", "test" if place == 3 else "train")
    for scene in ("bus", "park")
    for place in range(4)
    for take, mic in enumerate(("x", "y"))
]
TABLE = {"file": "meta.csv", "path": "file", "scene": "label", "device": "mic", "place": "site", "split": "part"}


def written(
    rows=ROWS, delimiter: str = ",", end: str = "\n", quote: str = "", mark: str = "", columns=COLUMNS
) -> bytes:
    lines = [delimiter.join(f"{quote}{value}{quote}" for value in row) for row in (columns, *rows)]
    return (mark + "".join(line + end for line in lines)).encode()


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "corpus"
    for name, *_ in ROWS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not decoded here")
    (root / "meta.csv").write_bytes(written())
    return root


def config(**changes) -> CorpusConfig:
    table = TABLE | {key: changes.pop(key) for key in list(changes) if key in TABLE}
    return CorpusConfig.model_validate({"layout": "table", "table": table} | changes)


def told(corpus: Corpus, word: str) -> str:
    return next(note for note in corpus.notes if word in note)


def test_a_table_says_what_recordings_are(root):
    corpus = read_corpus(root, config())
    assert corpus.clips[0] == Clip("bus/bus-0-0.wav", "bus", "x", "bus-0", "train")
    assert [clip.clip_id for clip in corpus.clips] == sorted(r[0] for r in ROWS if r[4] == "train") + sorted(
        r[0] for r in ROWS if r[4] == "test"
    )
    assert (corpus.labels, corpus.devices, corpus.made_split) == (("bus", "park"), ("x", "y"), False)


PARQUET = pa.table({name: [row[n] for row in ROWS] for n, name in enumerate(COLUMNS)})
WRITTEN = {
    "rows in another order": written(ROWS[::-1]),
    "tabs": written(delimiter="\t"),
    "semicolons": written(delimiter=";"),
    "CRLF": written(end="\r\n"),
    "a byte order mark": written(mark="\ufeff"),
    "quotes": written(quote='"'),
    "quotes and CRLF": written(quote='"', end="\r\n"),
    "blanks": written([tuple(f" {value} " for value in row) for row in ROWS]),
    "names with ./": written([(f"./{row[0]}", *row[1:]) for row in ROWS]),
    "columns more": written([(*row, "of no use") for row in ROWS], columns=(*COLUMNS, "more")),
    "an empty line": written() + b"\n",
}


@pytest.mark.parametrize("how", WRITTEN)
def test_how_a_table_is_written_changes_nothing(root, how):
    expected = read_corpus(root, config())
    (root / "meta.csv").write_bytes(WRITTEN[how])
    found = read_corpus(root, config())
    assert (found.clips, found.fingerprint) == (expected.clips, expected.fingerprint)


def test_parquet_is_the_same_corpus_also_with_dictionaries_and_numbers(root):
    expected = read_corpus(root, config())
    table = PARQUET.set_column(1, "label", PARQUET["label"].dictionary_encode())
    pyarrow.parquet.write_table(table, root / "meta.parquet")
    assert read_corpus(root, config(file="meta.parquet")).fingerprint == expected.fingerprint
    folds = PARQUET.set_column(4, "part", pa.array([5 if row[4] == "test" else 1 for row in ROWS]))
    pyarrow.parquet.write_table(folds, root / "meta.parquet")
    assert read_corpus(root, config(file="meta.parquet", test=[5])).clips == expected.clips


def test_a_path_may_be_made_of_columns(root):
    rows = [(Path(row[0]).name, *row[1:]) for row in ROWS]
    expected = read_corpus(root, config())
    (root / "meta.csv").write_bytes(written(rows))
    assert read_corpus(root, config(path="{label}/{file}")).clips == expected.clips


def test_folds_are_splits_by_the_values_that_are_named(root):
    (root / "meta.csv").write_bytes(written([(*row[:4], row[3][-1]) for row in ROWS]))
    corpus = read_corpus(root, config(test=[3, 2]))
    assert {clip.place[-1] for clip in corpus.clips if clip.split == "test"} == {"2", "3"}
    assert told(corpus, "splits by").endswith("test 3, 2; training 0, 1")
    assert read_corpus(root, config(test=[2, 3])).fingerprint == corpus.fingerprint
    assert read_corpus(root, config(test=[3])).fingerprint != corpus.fingerprint


def test_splits_that_leave_the_clips_in_one_order_have_two_fingerprints(root):
    found = set()
    for place in ("3", "2"):
        rows = [(*row[:4], "test" if row[1] == "park" and row[3][-1] >= place else "train") for row in sorted(ROWS)]
        (root / "meta.csv").write_bytes(written(rows))
        corpus = read_corpus(root, config())
        assert [clip.clip_id for clip in corpus.clips] == [row[0] for row in rows]
        found.add(corpus.fingerprint)
    assert len(found) == 2


def test_columns_that_are_not_there_are_said_once_and_mean_one_device_and_one_place_a_file(root):
    corpus = read_corpus(root, config(device=None, place=None))
    assert corpus.devices == ("a",)
    assert all(clip.place == clip.clip_id for clip in corpus.clips)
    assert [sum(word in note for note in corpus.notes) for word in ("one device", "one place a file")] == [1, 1]
    corpus = read_corpus(root, config(place=None, place_pattern=r"-(\d)-"))
    assert {clip.place for clip in corpus.clips} == {"0", "1", "2", "3"}
    assert not any("one place a file" in note for note in corpus.notes)


def test_a_test_split_is_made_by_place_from_seed_and_share_whatever_the_order_of_rows(root):
    corpus = read_corpus(root, config(split=None))
    tested, trained = ({clip.place for clip in corpus.clips if clip.split == s} for s in ("test", "train"))
    assert not tested & trained
    assert Counter(place.partition("-")[0] for place in tested) == {"bus": 1, "park": 1}
    assert corpus.made_split
    assert "a test split was made by place (corpus.test_share 0.25, corpus.test_seed 0): 4 of 16" in told(
        corpus, "made by"
    )
    (root / "meta.csv").write_bytes(written(ROWS[::-1]))
    assert read_corpus(root, config(split=None)).clips == corpus.clips
    half = read_corpus(root, config(split=None, test_share=0.5))
    assert Counter(clip.split for clip in half.clips) == {"train": 8, "test": 8}
    others = {read_corpus(root, config(split=None, test_seed=seed)).fingerprint for seed in range(8)}
    assert len(others) > 2


def test_folders_are_scenes_or_splits_of_scenes(root):
    (root / "meta.csv").unlink()
    (root / "bus" / "deeper").mkdir()
    (root / "bus/bus-0-0.wav").rename(root / "bus/deeper/one.FLAC")
    (root / "bus" / ".hidden.wav").write_bytes(b"x")
    (root / "park" / "notes.txt").write_bytes(b"x")
    (root / "empty").mkdir()
    (root / "dirs").mkdir()
    (root / "dirs" / "response.wav").write_bytes(b"x")
    corpus = read_corpus(root, CorpusConfig(layout="folders"))
    assert len(corpus.clips) == len(ROWS)
    assert {(clip.clip_id, clip.scene) for clip in corpus.clips} >= {("bus/deeper/one.FLAC", "bus")}
    assert told(corpus, "no recordings").endswith("1 .txt")
    for split in ("Train", "Val", "Test"):
        shutil.copytree(root, root.parent / "split" / split, ignore=shutil.ignore_patterns("dirs"))
    corpus = read_corpus(root.parent / "split", CorpusConfig(layout="folders", test=("Test",)))
    assert (corpus.labels, Counter(clip.split for clip in corpus.clips)) == (("bus", "park"), {"train": 32, "test": 16})
    assert {clip.clip_id.partition("/")[0] for clip in corpus.clips if clip.split == "test"} == {"Test"}
    assert "training Train, Val" in told(corpus, "splits by")


def rows(*changed):
    """The table with these rows instead of its first."""
    return lambda root: (root / "meta.csv").write_bytes(written([*changed, *ROWS[1:]]))


def gone(name):
    return lambda root: (root / name).unlink()


FIRST = ROWS[0]
BAD_TABLES = {  # what is done to it, keys, what the message says
    "unknown column": (None, {"scene": "scene"}, "meta.csv: corpus.table.scene: no column 'scene'; found 'file', 'lab"),
    "unknown column of a path": (None, {"path": "{nr}/{file}"}, r"corpus.table.path: no column 'nr'"),
    "a column twice": (
        lambda root: (root / "meta.csv").write_bytes(written(columns=("file", "label", "label", "site", "part"))),
        {"device": None},
        "the column label is there twice",
    ),
    "no scene": (rows((FIRST[0], "", *FIRST[2:])), {}, "meta.csv line 2: no value for label"),
    "no place": (rows((*FIRST[:3], "", FIRST[4])), {}, "meta.csv line 2: no value for site"),
    "listed twice": (rows(FIRST, FIRST), {}, r"meta.csv line 3: bus/bus-0-0.wav is listed a second time"),
    "listed twice, by another spelling": (rows(FIRST, (f"./{FIRST[0]}", *FIRST[1:])), {}, "is listed a second time"),
    "file missing": (gone(FIRST[0]), {}, r"1 problem.*\n  bus/bus-0-0.wav: no such file\n.*on_bad_clip=skip"),
    "outside": (rows(("../bus-0-0.wav", *FIRST[1:])), {}, r"\.\./bus-0-0.wav: leads out of the corpus folder"),
    "absolute": (rows(("/etc/passwd", *FIRST[1:])), {}, "/etc/passwd: leads out of the corpus folder"),
    "unknown splits": (
        rows((*FIRST[:4], "eval")),
        {},
        r"corpus.test: must say which values of the column part of meta.csv are the test split, because 'eval'",
    ),
    "another case of split": (rows((*FIRST[:4], "Train")), {}, "because 'Train' is neither train nor test"),
    "no test split": (
        lambda root: (root / "meta.csv").write_bytes(written([(*row[:4], "train") for row in ROWS])),
        {},
        r"corpus.test: no row of the column part of meta.csv is of the test split; found train \(16\)",
    ),
    "a test value that is not there": (None, {"test": ["6"]}, r"'6' is not among .*; found test \(4\), train \(12\)"),
    "all is test": (None, {"test": ["test", "train"]}, "corpus.test: leaves no training split"),
    "one place": (
        lambda root: (root / "meta.csv").write_bytes(written([(*row[:3], "here", row[4]) for row in ROWS])),
        {"split": None},
        "meta.csv: all recordings are of one place, here: a test split by place is impossible",
    ),
    "one place of a scene": (
        lambda root: (root / "meta.csv").write_bytes(
            written([(*row[:3], "here" if row[1] == "bus" else row[3], row[4]) for row in ROWS])
        ),
        {"split": None},
        r"bus: 1 place\(s\); clips train 8, test 0\nRecord more places",
    ),
    "a scene of the test split alone": (
        rows((FIRST[0], "tram", *FIRST[2:4], "test"), *[r for r in ROWS[1:] if False]),
        {},
        "scene 'tram' is in the test split and not in the training split",
    ),
    "no table": (gone("meta.csv"), {}, r"meta.csv: No such file or directory; name the corpus' table"),
    "an empty table": (lambda root: (root / "meta.csv").write_bytes(b""), {}, "found an empty file"),
    "no row": (lambda root: (root / "meta.csv").write_bytes(written([])), {}, "meta.csv: no row"),
    "an unreadable Parquet": (
        lambda root: (root / "meta.parquet").write_bytes(b"PAR1 and no more"),
        {"file": "meta.parquet"},
        r"meta.parquet: cannot be read as Parquet \(",
    ),
    "Latin-1": (lambda root: (root / "meta.csv").write_bytes(written() + b"caf\xe9,"), {}, "not UTF-8 text"),
    "a value too many": (rows((*FIRST, "more")), {}, "meta.csv line 2: 6 values, and 5 columns"),
    "an open quote": (rows(('"' + FIRST[0], *FIRST[1:])), {}, "meta.csv line 17: unexpected end of data"),
    "steering a terminal": (rows((FIRST[0], "bus\x1b[2J", *FIRST[2:])), {}, "line 2: control characters in label"),
    "a name without its place": (
        None,
        {"place": None, "place_pattern": r"bus-(\d)"},
        r"8 problem.*\n  park/park-0-0.wav: has no place by corpus.place_pattern",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TABLES)
def test_a_bad_table_is_named_in_a_line(root, what):
    change, changes, message = BAD_TABLES[what]
    if change:
        change(root)
    with pytest.raises((ConfigError, CorpusError)) as caught:
        read_corpus(root, config(**changes))
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_parquet_file_of_too_many_rows_is_not_read(root, monkeypatch):
    pyarrow.parquet.write_table(PARQUET, root / "meta.parquet")
    monkeypatch.setattr(tables, "MOST_ROWS", 15)
    with pytest.raises(CorpusError, match=r"meta.parquet: 16 rows; allowed are 15"):
        read_corpus(root, config(file="meta.parquet"))


def test_scenes_that_differ_in_case_are_told(root):
    (root / "meta.csv").write_bytes(written([(*row[:1], "Park" if row[1] == "park" and "x" in row else row[1], *row[2:])
                                             for row in ROWS]))  # fmt: skip
    assert "Park, park" in told(read_corpus(root, config()), "upper and lower case")


def test_missing_files_are_left_out_and_listed(root):
    (root / FIRST[0]).unlink()
    corpus = read_corpus(root, config(on_bad_clip="skip"))
    assert [str(bad) for bad in corpus.bad] == ["bus/bus-0-0.wav: no such file"]
    assert len(corpus.clips) == len(ROWS) - 1


BAD_FOLDERS = {
    "no folder": (shutil.rmtree, {}, "corpus: No such file or directory; corpus.path names a folder of scenes"),
    "no recording": (lambda root: [shutil.rmtree(root / name) for name in ("bus", "park")], {}, "no recording in any"),
    "a recording in no folder": (
        lambda root: (root / "stray.wav").write_bytes(b"x"), {}, "stray.wav: lies in no folder of a scene"
    ),
    "an unknown split": (None, {"test": ("Test",)}, "lies in no folder of a scene|'Test' is not among the folders"),
    "a link to a folder": (lambda root: (root / "tram").symlink_to(root / "bus"), {}, "tram: is a symbolic link to a"),
    "a link out": (
        lambda root: (root / "bus/link.wav").symlink_to("/etc/passwd"), {}, "bus/link.wav: leads out of the corpus"
    ),
    "a link to another": (
        lambda root: (root / "bus/link.wav").symlink_to(root / "bus/bus-0-0.wav"), {}, "is one file with bus/link.wav"
    ),
    "a scene of one file": (
        lambda root: [(root / "tram").mkdir(), (root / "tram/one.wav").write_bytes(b"x")], {}, r"tram: 1 place\(s\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_bad_folders_are_named_in_a_line(root, what):
    change, changes, message = BAD_FOLDERS[what]
    if change:
        change(root)
    with pytest.raises((ConfigError, CorpusError)) as caught:
        read_corpus(root, CorpusConfig(layout="folders", **changes))
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layout": "table"}, "table: is missing"),
        ({"table": TABLE}, "table: is given, but layout is tau"),
        ({"layout": "folders", "train_split": "split5.csv"}, "train_split: is a list of TAU's layout"),
        ({"test": [5]}, "test: with `layout: tau`"),
        ({"layout": "folders", "test": []}, "an empty list"),
        ({"layout": "table", "table": TABLE | {"split": None}, "test": [5]}, "give table.split, too"),
        ({"layout": "folders", "place_pattern": "("}, "is no regular expression"),
        ({"layout": "folders", "place_pattern": "user"}, "has no group"),
        ({"layout": "table", "table": TABLE, "place_pattern": "(user)"}, "place_pattern: the metadata say the places"),
        ({"segment_seconds": 2.0}, "2.0; allowed is 1.0"),
        ({"layout": "table", "table": TABLE | {"scene": " "}}, "an empty text; give a column's name"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        CorpusConfig.model_validate(keys)


@pytest.mark.parametrize("key", ["layout=folders", "segment_seconds=1.0"])
def test_the_demo_s_corpus_is_read_as_it_is(tmp_path, key):
    with pytest.raises(UserError, match=rf"corpus\.{key.partition('=')[0]}: says how to read corpus\.path"):
        Plan(load_config("demo", [f"storage={tmp_path}", f"corpus.{key}"]))


STALE = {
    "a row changed": lambda root: (root / "meta.csv").write_bytes(written().replace(b"bus-0,", b"bus-9,", 1)),
    "a scene more": lambda root: (root / "tram").mkdir(),
    "a file more": lambda root: (root / "bus" / "new.wav").write_bytes(b"x"),
    "a file more, in a folder without files": lambda root: (root / "hollow" / "new.wav").write_bytes(b"x"),
}


@pytest.mark.parametrize("what", STALE)
def test_a_kept_reading_is_stale_when_the_table_or_a_folder_changes(root, tmp_path, what):
    (root / "hollow").mkdir()
    by_table, by_folders = (own.model_copy(update={"path": root}) for own in (config(), CorpusConfig(layout="folders")))
    time.sleep(TICK + 0.1)
    for one in (by_table, by_folders):
        keep(tmp_path, one, new_reading(one))
    kept = [kept_reading(tmp_path, one) for one in (by_table, by_folders)]
    assert [own.fingerprint for own in kept if own] == [new_reading(one).fingerprint for one in (by_table, by_folders)]
    for other in ({"test_seed": 1}, {"test_share": 0.4}, {"place_pattern": "(.)"}, {"segment_seconds": 1.0}):
        assert kept_reading(tmp_path, by_folders.model_copy(update=other)) is None
    STALE[what](root)
    stale = by_table if what == "a row changed" else by_folders
    assert kept_reading(tmp_path, stale) is None


# --- Public corpora, as small copies of their layout ------------------------------------------------------------------

TAU2019 = [  # binaural; meta.csv of the development set
    (f"audio/{scene}-{city}-{place}-{number}-a.wav", scene, f"{city}-{place}", "a")
    for scene in ("airport", "tram")
    for place, city in enumerate(("barcelona", "helsinki", "lisbon", "milan", "vienna"))
    for number in range(2)
]
TAU2020 = [
    (f"audio/{scene}-{city}-{place}-{place}-{device}.wav", scene, f"{city}-{place}", device)
    for scene in ("airport", "tram")
    for place, city in enumerate(("barcelona", "helsinki", "lisbon", "milan", "vienna"))
    for device in ("a", "b", "s1")
]


def recording(file: Path, seconds: float, rate: int, channels: int = 1) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sf.write(file, noise(channels, round(seconds * rate), seed=sum(map(ord, str(file.name)))).T, rate)


def tau(root: Path, rows: list[tuple[str, ...]], rate: int, channels: int) -> None:
    (root / "evaluation_setup").mkdir(parents=True)
    for name, *_ in rows:
        recording(root / name, 10, rate, channels)
    tested = [row for row in rows if "vienna" in row[0]]
    for name, columns, own in (
        ("meta", ("filename", "scene_label", "identifier", "source_label"), rows),
        ("evaluation_setup/fold1_train", ("filename", "scene_label"), [row[:2] for row in rows if row not in tested]),
        ("evaluation_setup/fold1_evaluate", ("filename", "scene_label"), [row[:2] for row in tested]),
        ("evaluation_setup/fold1_test", ("filename",), [row[:1] for row in tested]),
    ):
        (root / f"{name}.csv").write_bytes(written(own, delimiter="\t", columns=columns))


def cochlscene(root: Path) -> None:
    for split, count in (("Train", 6), ("Val", 1), ("Test", 2)):
        for scene in ("Bus", "CrowdedIndoor"):
            for number in range(count):
                recording(root / split / scene / f"{scene}_{split}_{number}.wav", 10, 44_100)


def esc50(root: Path) -> None:
    rows = [
        (f"{fold}-{1000 * fold + n}-{take}-{target}.wav", fold, target, scene, "False", 1000 * fold + n, take)
        for target, scene in enumerate(("dog", "rain"))
        for fold in range(1, 6)
        for n in range(2)
        for take in "AB"
    ]
    for name, *_ in rows:
        recording(root / "audio" / name, 5, 44_100)
    (root / "meta").mkdir()
    columns = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    (root / "meta/esc50.csv").write_bytes(written(rows, columns=columns))


def urbansound8k(root: Path) -> None:
    rows = [
        (f"{1000 * fold + n}-{kind}-0-0.wav", 1000 * fold + n, 0.0, length, 1, fold, kind, name)
        for kind, name in ((3, "dog_bark"), (8, "siren"))
        for fold in range(1, 11)
        for n, length in enumerate((4.0, 0.317551))
    ]
    for name, _, _, length, _, fold, *_ in rows:
        recording(root / f"audio/fold{fold}" / name, length, 44_100, channels=2)
    (root / "metadata").mkdir()
    columns = ("slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class")
    (root / "metadata/UrbanSound8K.csv").write_bytes(written(rows, columns=columns))


PUBLIC = {  # preset, what is made, scenes, devices, places, training and test clips, files left out, a note
    "TAU 2019": ("tau_10s", lambda root: tau(root, TAU2019, 48_000, 2), "airport tram", "a", 5, (160, 40), 0, "stereo"),
    "TAU 2020": (
        "tau_10s",
        lambda root: tau(root, TAU2020, 44_100, 1),
        "airport tram",
        "a b s1",
        5,
        (240, 60),
        0,
        "441",
    ),
    "CochlScene": ("cochlscene", cochlscene, "Bus CrowdedIndoor", "a", 18, (140, 40), 0, "44100"),
    "ESC-50": ("esc50", esc50, "dog rain", "a", 10, (160, 40), 0, "44100"),
    "UrbanSound8K": ("urbansound8k", urbansound8k, "dog_bark siren", "a", 10, (72, 8), 20, "stereo"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_corpus_is_read_by_its_preset(tmp_path, name):
    preset, make, scenes, devices, many, clips, bad, note = PUBLIC[name]
    root = tmp_path / "corpus"
    make(root)
    found = load_config(f"corpora/{preset}", [f"corpus.path={root}", f"storage={tmp_path}"])
    plan = Plan(found)  # which divides the training split
    assert plan.source is not None
    corpus = plan.source.corpus
    assert corpus is not None
    assert (" ".join(corpus.labels), " ".join(corpus.devices), len(corpus.bad)) == (scenes, devices, bad)
    counts = Counter(clip.split for clip in corpus.clips)
    assert (counts["train"], counts["test"]) == clips
    places = {split: {clip.place for clip in corpus.clips if clip.split == split} for split in counts}
    assert not places["train"] & places["test"]
    assert sum(map(len, places.values())) == many
    few = replace(corpus, clips=corpus.clips[:12])
    assert write_store(few, tmp_path / "store") == []
    report = write_shard(root, few.clips, few.labels, few.devices, tmp_path / "one.arrow", fingerprint="")
    assert any(note in own for own in report.notes)
