"""Corpora from a stranger: every row and file that cannot be is named, and nothing is waited for."""

import os
import re
from functools import partial

import numpy as np
import pytest
import soundfile as sf
from refusal import refused, replaced, sparse

from asc_ray.audio.impulse import ImpulseBank
from asc_ray.audio.recording import Recording
from asc_ray.data.config import CorpusConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.decode import decode
from asc_ray.data.layouts import META_COLUMNS
from asc_ray.errors import UserError

pytestmark = pytest.mark.timeout(60)
ROWS = [(f"audio/{place}-{clip}.wav", "park", f"place-{place}", "a") for place in range(4) for clip in range(2)]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "corpus"
    (root / "audio").mkdir(parents=True)
    (root / "evaluation_setup").mkdir()
    for name, *_ in ROWS:
        (root / name).write_bytes(b"not decoded here")
    write(root, ROWS)
    return root


def write(root, rows, header="filename\tscene_label\tidentifier\tsource_label"):
    text = "\n".join([header, *("\t".join(row) for row in rows), ""])
    (root / "meta.csv").write_text(text, encoding="utf-8", newline="")
    for name, some in (("fold1_train", rows[:4]), ("fold1_evaluate", rows[4:])):
        lines = ["filename\tscene_label", *("\t".join(row[:2]) for row in some), ""]
        (root / "evaluation_setup" / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8", newline="")


def row(column, value):
    """The first row with another value."""

    def damage(root):
        first = list(ROWS[0])
        first[column] = value
        write(root, [tuple(first), *ROWS[1:]])

    return damage


def linked_folder(root):
    (root / "loop").symlink_to(root / "loop")
    row(0, "loop/x.wav")(root)


def closed(root):
    write(root, [("x" * 300 + "/a.wav", *ROWS[0][1:]), *ROWS[1:]])


table, clip = (partial(replaced, name) for name in ("meta.csv", ROWS[0][0]))
CORPORA = {
    "a table in a pipe": (table(os.mkfifo), "meta.csv: a named pipe, and not a plain file"),
    "a table in a device": (table(lambda path: path.symlink_to("/dev/zero")), "a device, and not a plain file"),
    "a table in a folder": (table(os.mkdir), "meta.csv: a folder, and not a plain file"),
    "a table behind links to themselves": (table(lambda path: path.symlink_to(path)), "meta.csv: Too many levels"),
    "a table of 20 GB": (table(sparse), "meta.csv: 21,474,836,480 bytes"),
    "a table that is no text": (table(lambda path: path.write_bytes(b"\xff\xfe")), "meta.csv: not UTF-8 text"),
    "a lone carriage return": (row(1, "pa\rrk"), "meta.csv line 2: a carriage return without a line feed"),
    "a field of a megabyte": (row(1, "x" * 1_000_000), "meta.csv line 2: field larger than field limit"),
    "a zero byte in a label": (row(1, "pa\0rk"), "meta.csv line 2: control characters in scene_label: pa\\x00rk"),
    "an escape in a label": (row(1, "\x1b[2Jpark"), "control characters in scene_label: \\x1b[2Jpark"),
    "a label that turns the line": (row(1, "\u202epark"), "control characters in scene_label: \\u202epark"),
    "an escape in a device": (row(3, "a\x1b]0;x\x07"), "control characters in source_label"),
    "an escape in a place": (row(2, "pl\x9bace"), "control characters in identifier"),
    "a label of 10,000 characters": (row(1, "x" * 10_000), "control characters in scene_label"),
    "a zero byte in a name": (row(0, "audio/\0.wav"), "control characters in filename: audio/\\x00.wav"),
    "an escape in a name": (row(0, "audio/\x1b[2J.wav"), "control characters in filename: audio/\\x1b[2J.wav"),
    "a name of 10,000 characters": (row(0, "x" * 10_000), "control characters in filename"),
    "a folder's name too long": (closed, "File name too long"),
    "a column twice": (
        lambda root: write(root, [(*r, "x") for r in ROWS], "\t".join([*META_COLUMNS, "filename"])),
        "meta.csv: the column filename is there twice",
    ),
    "a name above": (row(0, "audio/../../x.wav"), "leads out of the corpus folder"),
    "an absolute name": (row(0, "/etc/passwd"), "leads out of the corpus folder"),
    "a clip behind a link that leads out": (clip(lambda path: path.symlink_to("/etc/passwd")), "leads out"),
    "a clip behind links to themselves": (clip(lambda path: path.symlink_to(path)), "through symbolic links to itself"),
    "a folder behind links to themselves": (linked_folder, "through symbolic links to itself"),
    "a clip in a pipe": (clip(os.mkfifo), "audio/0-0.wav: no such file"),
    "a clip in a folder": (clip(os.mkdir), "audio/0-0.wav: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CORPORA)
def test_a_strangers_corpus(root, kind):
    damage, message = CORPORA[kind]
    assert len(read_corpus(root).clips) == 8
    damage(root)
    refused(lambda: read_corpus(root), str(root), message)


def test_rows_of_nothing_are_not_all_told(root):
    (root / "meta.csv").write_text("\t".join(META_COLUMNS) + "\n" + "x\n" * 50_000)
    with pytest.raises(UserError) as caught:
        read_corpus(root)
    assert len(str(caught.value)) < 200_000
    assert re.search(r"\n  and \d+ more\n", str(caught.value))


def test_a_corpus_behind_links_to_themselves(tmp_path):
    (tmp_path / "corpus").symlink_to(tmp_path / "corpus")
    refused(lambda: read_corpus(tmp_path / "corpus"), "meta.csv: Too many levels of symbolic links")


def test_a_split_in_a_pipe(root):
    os.mkfifo(root / "evaluation_setup" / "mine.csv")
    with pytest.raises(UserError, match=r"no such file|named pipe"):
        read_corpus(root, CorpusConfig(train_split=root / "evaluation_setup" / "mine.csv"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_recordings_and_responses_that_are_no_files(tmp_path, make):
    make(tmp_path / "a.wav")
    results = decode([tmp_path / "a.wav"], np.zeros((1, 32_000), np.int16))
    assert "not a plain file" in str(results[0])
    refused(lambda: ImpulseBank.load(tmp_path, 32_000), "a.wav: unreadable", "not a plain file")


def test_more_channels_than_a_recorder_has(tmp_path):
    """A second of 1,024 channels at 1 MHz would take 4 GB, from a file of 20 kB."""
    sf.write(tmp_path / "a.wav", np.zeros((10, 1024), np.float32), 1_000_000, subtype="FLOAT")
    with pytest.raises(UserError, match="1024 channels; allowed are 128"):
        Recording(tmp_path / "a.wav")


def test_a_response_in_a_header_of_gigabytes(tmp_path):
    sf.write(tmp_path / "a.wav", [0.1] * 100, 32_000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = (10**9).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    refused(lambda: ImpulseBank.load(tmp_path, 32_000), "a.wav: a rate of 1000000000 Hz")
