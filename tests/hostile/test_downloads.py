"""Archives from a server that lies, and folders that somebody has prepared."""

import hashlib
import os
import zipfile

import pytest
from refusal import refused
from test_download import FILES, TOP, Server, out, packed, publish, server  # noqa: F401

from asc_ray.data import download as module
from asc_ray.data.archives import Archive
from asc_ray.data.download import SOURCES, download

pytestmark = pytest.mark.timeout(60)
NAME = "audio.2.zip"


def archive(path, build):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        build(made)
    return path.read_bytes()


def encrypted(content):
    """The bit that says that an entry is, in both of its headers."""
    changed = bytearray(content)
    local, central = changed.index(b"PK\3\4"), changed.index(b"PK\1\2")
    changed[local + 6] |= 1
    changed[central + 8] |= 1
    return bytes(changed)


def compressed_oddly(content):
    changed = bytearray(content)
    local, central = changed.index(b"PK\3\4"), changed.index(b"PK\1\2")
    changed[local + 8 : local + 10] = changed[central + 10 : central + 12] = (93).to_bytes(2, "little")
    return bytes(changed)


def link(made):
    entry = zipfile.ZipInfo(f"{TOP}/audio/c.wav")
    entry.external_attr = 0o120777 << 16
    made.writestr(entry, "/etc/passwd")


def twice(made):
    made.writestr(f"{TOP}/audio/c.wav", b"one")
    made.writestr("audio/c.wav", b"other")


ONE = {f"{TOP}/audio/c.wav": b"sound"}
ARCHIVES = {
    "an encrypted entry": (lambda path: encrypted(packed(path, "x.zip", ONE)), "is encrypted"),
    "unknown compression": (lambda path: compressed_oddly(packed(path, "x.zip", ONE)), "is compressed in a way"),
    "a zip bomb": (
        lambda path: archive(path / "x.zip", lambda made: made.writestr(f"{TOP}/audio/c.wav", bytes(1 << 28))),
        "unpacks to 268,435,456 bytes",
    ),
    "a link for a file": (lambda path: archive(path / "x.zip", link), "is no plain file"),
    "a file twice": (lambda path: archive(path / "x.zip", twice), "is there twice"),
    "a name with an escape": (lambda path: packed(path, "x.zip", {f"{TOP}/\x1b[2J.wav": b"x"}), "leads out"),
    "a name of the folder": (lambda path: packed(path, "x.zip", {".": b"x"}), "leads out"),
    "a Windows drive": (lambda path: packed(path, "x.zip", {"/C:/x": b"x"}), "leads out"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_that_are_not_to_be_trusted(server, out, tmp_path, monkeypatch, kind):  # noqa: F811
    make, message = ARCHIVES[kind]
    server.files[NAME] = make(tmp_path)
    publish(monkeypatch, server.files)
    refused(lambda: download("tiny", out, base_url=server.url), NAME, message)
    assert not (out / "audio" / "c.wav").exists()


def test_a_body_longer_than_the_archive(server, out, monkeypatch):  # noqa: F811
    """It ends when the archive's size is reached, however long the server goes on."""
    source = SOURCES["tiny"]
    smaller = tuple(Archive(a.name, a.md5, a.size - 100 if a.name == NAME else a.size) for a in source.archives)
    monkeypatch.setitem(SOURCES, "tiny", module.PublicCorpus(source.url, source.top, smaller))
    refused(lambda: download("tiny", out, base_url=server.url), NAME, "more than the")
    assert not (out / ".download" / f"{NAME}.part").exists()


def test_an_archive_swapped_after_its_check(server, out, tmp_path, monkeypatch):  # noqa: F811
    """Another file under its name is not what was compared."""
    evil = packed(tmp_path, "evil.zip", {f"{TOP}/audio/c.wav": b"swapped"})
    original = module.unpack

    def swapped(path, *rest):
        if path.name == NAME:
            (tmp_path / "other").write_bytes(evil)
            os.replace(tmp_path / "other", path)
        original(path, *rest)

    monkeypatch.setattr(module, "unpack", swapped)
    refused(lambda: download("tiny", out, base_url=server.url), NAME, "checksum")
    assert not (out / "audio" / "c.wav").exists()


def test_sha256_is_what_it_was_when_the_archive_first_came(server, out, tmp_path, monkeypatch):  # noqa: F811
    """Two files of one MD5 can be made: what came first is remembered."""
    download("tiny", out, base_url=server.url)
    known = (out / ".sha256").read_text()
    assert hashlib.sha256(server.files[NAME]).hexdigest() in known
    again = tmp_path / "again"
    again.mkdir()
    (again / ".sha256").write_text(known.replace(hashlib.sha256(server.files[NAME]).hexdigest(), "0" * 64))
    refused(lambda: download("tiny", again, base_url=server.url), NAME, "when it first came")
    (again / ".sha256").write_text(known)
    assert download("tiny", again, base_url=server.url)
    assert (again / "audio" / "c.wav").read_bytes() == FILES["audio/c.wav"]


def folder_link(out, outside):  # noqa: F811
    (out / "audio").symlink_to(outside)


def file_link(out, outside):  # noqa: F811
    (out / "audio").mkdir()
    (out / "audio" / "a.wav").symlink_to(outside / "target")


def hard_link(out, outside):  # noqa: F811
    (out / "audio").mkdir()
    (outside / "target").write_text("mine")
    os.link(outside / "target", out / "audio" / "a.wav")


def pipe(out, outside):  # noqa: F811
    (out / "audio").mkdir()
    os.mkfifo(out / "audio" / "a.wav")


def scratch_link(out, outside):  # noqa: F811
    (out / ".download").rmdir()
    (out / ".download").symlink_to(outside)


def part_link(out, outside):  # noqa: F811
    (out / ".download" / "audio.1.zip.part").symlink_to(outside / "target")
    (outside / "target").write_text("mine")


def archive_link(out, outside):  # noqa: F811
    (out / ".download" / "audio.1.zip").symlink_to(outside / "target")
    (outside / "target").write_text("mine")


@pytest.mark.parametrize(
    "prepare",
    [folder_link, file_link, hard_link, pipe, scratch_link, part_link, archive_link],
    ids=lambda f: f.__name__,
)
def test_nothing_is_written_through_what_is_there_already(server, out, tmp_path, prepare):  # noqa: F811
    outside = tmp_path / "outside"
    outside.mkdir()
    (out / ".download").mkdir(parents=True)
    prepare(out, outside)
    before = {path: path.read_bytes() for path in outside.rglob("*")}
    refused(lambda: download("tiny", out, base_url=server.url), str(out))
    assert {path: path.read_bytes() for path in outside.rglob("*")} == before
