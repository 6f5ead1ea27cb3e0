"""The checks on a corpus's metadata, and splits by place."""

import lzma
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import coded
from hypothesis import given, settings
from hypothesis import strategies as st

from asc_ray.data.clip import Clip
from asc_ray.data.config import CorpusConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.division import grouped, partition
from asc_ray.errors import ConfigError, CorpusError

TAU22 = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "tau22"

META = [
    ("audio/p1.wav", "park", "rome-1", "a"),
    ("audio/p2.wav", "park", "rome-1", "s1"),
    ("audio/m1.wav", "metro", "rome-2", "a"),
    ("audio/p3.wav", "park", "oslo-3", "a"),
    ("audio/p4.wav", "park", "oslo-3", "s4"),
    ("audio/m2.wav", "metro", "oslo-4", "s4"),
]
TRAIN, TEST = META[:3], META[3:]


def table(path: Path, header: str, rows) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in [header.split(), *rows]))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "audio").mkdir(parents=True)
    (root / "evaluation_setup").mkdir()
    for name, *_ in META:
        (root / name).write_bytes(b"not decoded here")
    write_meta(root, META)
    write_train(root, [row[:2] for row in TRAIN])
    write_test(root, [row[:2] for row in TEST])
    return root


def write_meta(root, rows):
    table(root / "meta.csv", "filename scene_label identifier source_label", rows)


def write_train(root, rows):
    table(root / "evaluation_setup" / "fold1_train.csv", "filename scene_label", rows)


def write_test(root, rows):
    table(root / "evaluation_setup" / "fold1_evaluate.csv", "filename scene_label", rows)


def test_a_sound_corpus_is_read_in_file_order(root):
    corpus = read_corpus(root)
    assert [clip.clip_id for clip in corpus.clips] == [row[0] for row in META]
    assert corpus.clips[1] == Clip("audio/p2.wav", "park", "s1", "rome-1", "train")
    assert corpus.labels == ("metro", "park")
    assert corpus.devices == ("a", "s1", "s4")
    assert corpus.bad == ()


def test_clips_of_meta_in_no_split_are_left_alone(root):
    write_meta(root, [*META, ("audio/unused.wav", "park", "rome-9", "a")])
    assert len(read_corpus(root).clips) == len(META)


def test_a_test_file_without_labels_takes_them_from_meta(root):
    expected = read_corpus(root).clips
    (root / "evaluation_setup" / "fold1_evaluate.csv").unlink()
    table(root / "evaluation_setup" / "fold1_test.csv", "filename", [row[:1] for row in TEST])
    assert read_corpus(root).clips == expected


def test_fingerprint_follows_metadata_names_and_sizes(root):
    first = read_corpus(root).fingerprint
    assert read_corpus(root).fingerprint == first
    (root / "audio/p1.wav").write_bytes(b"another length")
    second = read_corpus(root).fingerprint
    write_meta(root, [*META[:-1], (*META[-1][:3], "s5")])
    assert len({first, second, read_corpus(root).fingerprint}) == 3


def symlink_out(root):
    outside = root.parent / "outside.wav"
    outside.write_bytes(b"x")
    (root / "audio/p1.wav").unlink()
    (root / "audio/p1.wav").symlink_to(outside)


def folder_symlink_out(root):
    (root / "audio").rename(root.parent / "elsewhere")
    (root / "audio").symlink_to(root.parent / "elsewhere")


def rename(old, new):
    def change(root):
        rows = [(new if row[0] == old else row[0], *row[1:]) for row in META]
        write_meta(root, rows)
        write_train(root, [row[:2] for row in rows[:3]])

    return change


def without_place(root):
    write_meta(root, [("audio/p1.wav", "park", "", "a"), *META[1:]])


STRUCTURAL = {
    "no meta.csv": (lambda root: (root / "meta.csv").unlink(), ["meta.csv", "TAU22 layout"]),
    "no train file": (lambda root: (root / "evaluation_setup/fold1_train.csv").unlink(), ["fold1_train.csv"]),
    "no test file": (lambda root: (root / "evaluation_setup/fold1_evaluate.csv").unlink(), ["fold1_test.csv"]),
    "missing columns": (
        lambda root: table(root / "meta.csv", "filename scene_label", [row[:2] for row in META]),
        ["missing column(s) identifier, source_label", "'filename', 'scene_label'"],
    ),
    "commas": (lambda root: (root / "meta.csv").write_text("filename,scene_label\n"), ["'filename,scene_label'"]),
    "empty file": (lambda root: (root / "meta.csv").write_text(""), ["an empty file"]),
    "not text": (lambda root: (root / "meta.csv").write_bytes(b"\xff\xfe\x00"), ["not UTF-8"]),
    "empty value": (without_place, ["meta.csv line 2", "identifier"]),
    "absent from meta": (lambda root: write_meta(root, META[1:]), ["fold1_train.csv line 2", "audio/p1.wav"]),
    "twice in meta": (lambda root: write_meta(root, [*META, META[0]]), ["meta.csv line 8", "second time"]),
    "twice in a split": (
        lambda root: write_train(root, [row[:2] for row in [*TRAIN, TRAIN[0]]]),
        ["fold1_train.csv line 5", "second time"],
    ),
    "in both splits": (
        lambda root: write_test(root, [row[:2] for row in [*TEST, TRAIN[0]]]),
        ["fold1_evaluate.csv line 5", "in the train split too"],
    ),
    "label only in test": (
        lambda root: write_train(root, [row[:2] for row in TRAIN[:2]]),
        ["'metro' is in the test split"],
    ),
    "empty split": (lambda root: write_test(root, []), ["fold1_evaluate.csv", "no usable clip"]),
    "labels contradict": (
        lambda root: write_train(root, [("audio/p1.wav", "metro"), *(row[:2] for row in TRAIN[1:])]),
        ["fold1_train.csv line 2", "'metro' here and 'park' in meta.csv"],
    ),
    "parent folder": (rename("audio/p1.wav", "audio/../../p1.wav"), ["audio/../../p1.wav", "out of the corpus"]),
    "absolute": (rename("audio/p1.wav", "/etc/hostname"), ["/etc/hostname", "out of the corpus"]),
    "symlink out": (symlink_out, ["audio/p1.wav", "out of the corpus"]),
    "folder symlink out": (folder_symlink_out, ["audio/p1.wav", "out of the corpus"]),
}


@pytest.mark.parametrize("on_bad_clip", ["refuse", "skip"])
@pytest.mark.parametrize("case", STRUCTURAL)
def test_structural_faults_are_always_refused(root, case, on_bad_clip):
    damage, expected = STRUCTURAL[case]
    damage(root)
    with pytest.raises(CorpusError) as caught:
        read_corpus(root, CorpusConfig(on_bad_clip=on_bad_clip))
    assert [text for text in expected if text not in str(caught.value)] == []


def test_bad_clips_are_refused_or_skipped_and_recorded(root):
    (root / "audio/p1.wav").unlink()
    (root / "audio/p4.wav").write_bytes(b"")
    with pytest.raises(CorpusError, match="2 problem") as caught:
        read_corpus(root)
    assert "audio/p1.wav: no such file" in str(caught.value)
    assert "audio/p4.wav: empty file" in str(caught.value)
    assert "on_bad_clip=skip" in str(caught.value)
    corpus = read_corpus(root, CorpusConfig(on_bad_clip="skip"))
    assert {(clip.clip_id, clip.reason) for clip in corpus.bad} == {
        ("audio/p1.wav", "no such file"),
        ("audio/p4.wav", "empty file"),
    }
    assert [clip.clip_id for clip in corpus.clips] == ["audio/p2.wav", "audio/m1.wav", "audio/p3.wav", "audio/m2.wav"]


def test_skipping_may_not_lose_a_class(root):
    (root / "audio/m1.wav").unlink()
    with pytest.raises(CorpusError, match="'metro'"):
        read_corpus(root, CorpusConfig(on_bad_clip="skip"))


def test_symlinks_inside_the_corpus_are_fine_where_each_file_has_one_name(root):
    (root / "audio/p1.wav").rename(root / "audio/real.wav")
    (root / "audio/p1.wav").symlink_to(root / "audio/real.wav")
    assert len(read_corpus(root).clips) == len(META)


def test_every_offending_file_is_listed_however_many(root):
    extra = [(f"audio/x{i}.wav", "park", "rome-5", "a") for i in range(100)]
    write_meta(root, [*META, *extra])
    write_train(root, [row[:2] for row in [*TRAIN, *extra]])
    for i in range(50, 100):
        (root / f"audio/x{i}.wav").write_bytes(b"not decoded here")
    with pytest.raises(CorpusError, match="50 problem") as caught:
        read_corpus(root)
    assert all(f"audio/x{i}.wav: no such file" in str(caught.value) for i in range(50))


def rewrite(root, change):
    for file in (root / "meta.csv", *(root / "evaluation_setup").iterdir()):
        file.write_bytes(change(file.read_bytes()))


def more_clips(root):
    extra = [(f"audio/x{i}.wav", "park", "rome-5", "a") for i in range(50)]
    write_meta(root, [*META, *extra])
    write_train(root, [row[:2] for row in [*TRAIN, *extra]])
    for name, *_ in extra:
        (root / name).write_bytes(b"not decoded here")


def quoted_names(content):
    return re.sub(rb"(audio/\w+\.wav)", rb'"\1"', content)


WHOLE = {
    "quoted names": (quoted_names, "56 of 56 clips: no such file .*The names are in quotes"),
    "all in quotes": (lambda c: re.sub(rb"([^\t\n]+)", rb'"\1"', c), "missing column.* in quotes: write the tables"),
    "backslashes": (lambda c: c.replace(b"audio/", b"audio\\"), r"56 of 56 clips: no such file .*write them with /"),
    "another folder": (lambda c: c.replace(b"audio/", b"sound/"), "56 of 56 clips: no such file .*Is this the corpus'"),
    "commas": (lambda c: c.replace(b"\t", b","), "missing column.* separated by commas: write the file with tabs"),
    "semicolons, quoted": (
        lambda c: re.sub(rb"([^\t\n]+)", rb'"\1"', c).replace(b"\t", b";"),
        "missing column.* separated by semicolons: write the file with tabs",
    ),
    "lone carriage returns": (lambda c: c.replace(b"\n", b"\r"), r"meta\.csv line 1: a carriage return without"),
    "one lone carriage return": (
        lambda c: c.replace(b"\nmetro", b"\rmetro").replace(b"audio/m1.wav", b"audio/\rm1.wav"),
        r"meta\.csv line 4: a carriage return without",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_fault_of_the_whole_corpus_is_told_once_with_its_cause(root, case):
    more_clips(root)
    change, message = WHOLE[case]
    rewrite(root, change)
    with pytest.raises(CorpusError, match=message) as caught:
        read_corpus(root)
    assert len(str(caught.value).splitlines()) < 6


def test_dos_line_ends_are_read(root):
    expected = read_corpus(root).clips
    rewrite(root, lambda content: content.replace(b"\n", b"\r\n"))
    assert read_corpus(root).clips == expected


# --- one file, one name; one scene, one spelling ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./audio/p1.wav", "audio//p1.wav", "audio/./p1.wav", ".//audio/p1.wav"])
def test_names_of_one_file_are_one_name(root, name):
    expected = read_corpus(root).clips
    rename("audio/p1.wav", name)(root)
    assert read_corpus(root).clips == expected
    write_meta(root, [*META, (name, *META[0][1:])])
    with pytest.raises(CorpusError, match=r"meta\.csv line 8: audio/p1\.wav is listed a second time"):
        read_corpus(root)
    write_meta(root, META)
    write_test(root, [*(row[:2] for row in TEST), (name, "park")])
    with pytest.raises(CorpusError, match=r"audio/p1\.wav is in the train split too"):
        read_corpus(root)


def symbolic_link(root):
    (root / "audio/p3.wav").unlink()
    (root / "audio/p3.wav").symlink_to("p1.wav")
    return "audio/p3.wav: is one file with audio/p1.wav"


def hard_link(root):
    (root / "audio/p3.wav").unlink()
    os.link(root / "audio/p1.wav", root / "audio/p3.wav")
    return "audio/p3.wav: is one file with audio/p1.wav"


def linked_folder(root):
    (root / "same").symlink_to("audio")
    rows = [("same/p1.wav" if row[0] == "audio/p3.wav" else row[0], *row[1:]) for row in META]
    write_meta(root, rows)
    write_test(root, [row[:2] for row in rows[3:]])
    return "same/p1.wav: is one file with audio/p1.wav"


@pytest.mark.parametrize("link", [symbolic_link, hard_link, linked_folder])
def test_a_file_with_two_names_is_in_no_two_places(root, link):
    message = link(root)
    with pytest.raises(CorpusError, match=message):
        read_corpus(root)


def test_blanks_around_values_make_no_other_scene_device_or_place(root):
    expected = read_corpus(root).clips
    rows = [list(row) for row in META]
    rows[0] = ["audio/p1.wav ", "park ", " rome-1", "a\u00a0"]
    rows[1][2] = "rome-1  "
    write_meta(root, rows)
    write_train(root, [("audio/p1.wav", "park "), *(row[:2] for row in TRAIN[1:])])
    header = root / "meta.csv"
    header.write_text(header.read_text().replace("scene_label\t", " scene_label \t", 1))
    corpus = read_corpus(root)
    assert corpus.clips == expected
    assert corpus.notes == (
        "blanks around values were taken away, by column: filename 1, scene_label 2, identifier 2, source_label 1",
    )
    assert read_corpus(root).fingerprint == corpus.fingerprint


def test_a_blank_value_is_no_value(root):
    write_meta(root, [("audio/p1.wav", "park", "  ", "a"), *META[1:]])
    with pytest.raises(CorpusError, match=r"meta\.csv line 2: no value for identifier"):
        read_corpus(root)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (("audio/p1.wav", "Park", "rome-1", "a"), "scenes .*: Park, park"),
        (("audio/p1.wav", "park", "rome-1", "A"), "devices .*: A, a"),
        (("audio/p1.wav", "park", "Rome-1", "a"), "places .*: Rome-1, rome-1"),
    ],
)
def test_names_that_differ_in_case_alone_are_said(root, row, what):
    write_meta(root, [row, *META[1:]])
    write_train(root, [row[:2], *(own[:2] for own in TRAIN[1:])])
    (note,) = read_corpus(root).notes
    assert re.search(f"warning: {what}$", note)


def test_places_of_both_splits_are_said(root):
    assert read_corpus(root).notes == ()
    write_meta(root, [*META[:3], ("audio/p3.wav", "park", "rome-1", "a"), *META[4:]])
    (note,) = read_corpus(root).notes
    assert note.startswith("warning: 1 of 3 places of the test split are in the training split, too (rome-1)")


def test_a_corpus_of_one_scene_is_said(root):
    rows = [(row[0], "park", *row[2:]) for row in META]
    write_meta(root, rows)
    write_train(root, [row[:2] for row in rows[:3]])
    write_test(root, [row[:2] for row in rows[3:]])
    (note,) = read_corpus(root).notes
    assert "the corpus has one scene, park" in note


# --- partition --------------------------------------------------------------------------------------------------------


def clips_of(sizes: dict[str, list[int]]) -> list[Clip]:
    """One place for each size."""
    return [
        Clip(f"{scene}-{place}-{i}", scene, "a", f"{scene}-{place}", "train")
        for scene, places in sizes.items()
        for place, size in enumerate(places)
        for i in range(size)
    ]


@settings(max_examples=60)
@given(
    sizes=st.dictionaries(
        st.sampled_from(["park", "metro", "bus"]), st.lists(st.integers(1, 30), min_size=3, max_size=25), min_size=1
    ),
    share=st.floats(0.05, 0.45),
    seed=st.integers(0, 2**32),
)
def test_partition_properties(sizes, share, seed):
    clips = clips_of(sizes)
    parts = partition(*coded(clips), {"fusion": share, "validation": share}, seed)
    assert list(parts) == ["train", "fusion", "validation"]
    assert sorted(index for part in parts.values() for index in part) == list(range(len(clips)))
    owners = defaultdict(set)
    for name, part in parts.items():
        assert part.tolist() == sorted(part)
        assert {clips[i].scene for i in part} == set(sizes)
        for i in part:
            owners[clips[i].place].add(name)
    assert all(len(names) == 1 for names in owners.values())
    counts = {name: Counter(clips[i].scene for i in part) for name, part in parts.items()}
    for scene, places in sizes.items():
        for name, wanted in (("fusion", share), ("validation", share), ("train", 1 - 2 * share)):
            # Off by one place at most in the part itself, and by the places the other two took too many.
            assert abs(counts[name][scene] - wanted * sum(places)) <= 2 * max(places)
    again = partition(*coded(clips), {"fusion": share, "validation": share}, seed)
    assert all((again[name] == part).all() for name, part in parts.items())


@given(codes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300)), min_size=1))
def test_groups_come_in_the_order_of_first_appearance(codes):
    expected = [(*group, count) for group, count in Counter(codes).items()]
    assert list(grouped(*np.array(codes).T)) == expected


def test_shares_of_one_are_folds_without_a_train_part():
    clips = clips_of({"park": [4] * 10, "metro": [4] * 10})
    folds = partition(*coded(clips), {f"fold{k}": 0.2 for k in range(5)}, seed=0)
    assert {name: len(part) for name, part in folds.items()} == {f"fold{k}": 16 for k in range(5)}


def test_the_seed_matters():
    clips = clips_of({"park": list(range(1, 21))})
    held_out = {tuple(partition(*coded(clips), {"validation": 0.2}, seed)["validation"]) for seed in range(5)}
    assert len(held_out) == 5


def test_a_place_of_two_scenes_goes_as_a_whole():
    clips = clips_of({"park": [5] * 6, "metro": [5] * 6})
    clips += [Clip(f"both-{scene}-{i}", scene, "a", "both", "train") for scene in ("park", "metro") for i in range(5)]
    for seed in range(10):
        parts = partition(*coded(clips), {"validation": 0.3}, seed)
        assert sum(any(clips[i].place == "both" for i in part) for part in parts.values()) == 1
        assert all({clips[i].scene for i in part} == {"park", "metro"} for part in parts.values())


def test_too_few_places_are_refused_with_counts():
    clips = clips_of({"park": [5] * 6, "metro": [7, 3]})
    with pytest.raises(CorpusError, match=r"metro: 2 place\(s\)"):
        partition(*coded(clips), {"fusion": 0.2, "validation": 0.2}, seed=0)


@pytest.mark.parametrize("shares", [{"train": 0.5}, {"x": 0.0}, {"x": 1.5}, {"x": 0.6, "y": 0.6}, {"x": -0.1}])
def test_shares_that_are_no_shares(shares):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        partition(*coded(clips_of({"park": [5] * 6})), shares, seed=0)


@pytest.fixture(scope="module")
def tau22(tmp_path_factory) -> Path:
    """TAU22 by name: the official 50 % training subset and test split, each clip a file of one byte."""
    if not TAU22.is_dir():
        pytest.skip("no TAU22 lists here")
    root = tmp_path_factory.mktemp("tau22")
    (root / "audio").mkdir()
    (root / "evaluation_setup").mkdir()
    meta = []
    for source, target in {"split50": "fold1_train", "split5": "split5", "test": "fold1_evaluate"}.items():
        text = lzma.decompress((TAU22 / f"{source}.csv.xz").read_bytes()).decode()
        (root / "evaluation_setup" / f"{target}.csv").write_text(text)
        if source == "split5":
            continue
        for line in text.splitlines()[1:]:
            name, scene = line.split("\t")
            _, city, place, *_, device = name.removesuffix(".wav").split("-")
            meta.append((name, scene, f"{city}-{place}", device))
            (root / name).write_bytes(b".")
    write_meta(root, meta)
    return root


def test_the_real_names_of_tau22(tau22):
    corpus = read_corpus(tau22)
    counts = Counter(clip.split for clip in corpus.clips)
    assert counts == {"train": 69_800, "test": 29_680}
    assert len(corpus.labels) == 10
    assert corpus.devices == ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6")
    trained, tested = ({clip.device for clip in corpus.clips if clip.split == split} for split in ("train", "test"))
    assert tested - trained == {"s4", "s5", "s6"}
    train = [clip for clip in corpus.clips if clip.split == "train"]
    parts = partition(*coded(train), {"fusion": 0.12, "validation": 0.12}, seed=0)
    places = {part: {train[i].place for i in rows} for part, rows in parts.items()}
    assert not places["train"] & places["fusion"]
    assert not places["train"] & places["validation"]
    assert not places["fusion"] & places["validation"]
    for part in ("fusion", "validation"):
        assert len({train[i].scene for i in parts[part]}) == 10
        assert len(parts[part]) / len(train) == pytest.approx(0.12, abs=0.02)


@pytest.mark.parametrize("given", ["split5.csv", "evaluation_setup/split5.csv"])
def test_a_training_subset_by_name(tau22, given, monkeypatch):
    monkeypatch.chdir(tau22)
    whole, subset = read_corpus(tau22), read_corpus(tau22, CorpusConfig(train_split=Path(given)))
    names = {clip.clip_id for clip in subset.clips if clip.split == "train"}
    assert len(names) == 6_980
    assert names < {clip.clip_id for clip in whole.clips if clip.split == "train"}
    assert [clip for clip in subset.clips if clip.split == "test"] == [c for c in whole.clips if c.split == "test"]
    assert subset.fingerprint != whole.fingerprint


def test_a_training_subset_must_exist_and_hold_no_test_clip(root):
    with pytest.raises(ConfigError, match=r"corpus.train_split: none\.csv: no such file, nor in .*evaluation_setup"):
        read_corpus(root, CorpusConfig(train_split=Path("none.csv")))
    table(root / "evaluation_setup" / "mine.csv", "filename scene_label", [row[:2] for row in (*TRAIN, TEST[0])])
    with pytest.raises(CorpusError, match=r"audio/p3.wav is in the train split too"):
        read_corpus(root, CorpusConfig(train_split=Path("mine.csv")))
