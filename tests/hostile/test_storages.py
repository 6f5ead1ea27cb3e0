"""Artifacts and locks of a storage that others can write to."""

import json
import os
import subprocess
import sys
import threading
from functools import partial

import pytest
from refusal import refused, replaced, sparse

from asc_ray import lock
from asc_ray.artifacts import Artifact, damaged_files, read_manifest, read_record, stored_files, write_record
from asc_ray.lock import LOCK, exclusive, is_locked

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def artifact(tmp_path):
    made = Artifact(tmp_path / "storage", "clips", "demo", "0" * 16, {}, {})
    (made.open_partial() / "data.arrow").write_bytes(b"content")
    made.finish({})
    return made.path


def manifest(**changes):
    def damage(folder):
        document = read_manifest(folder)
        write_record(folder / "manifest.json", {k: v for k, v in document.items() if k != "checksum"} | changes)

    return damage


raw = partial(replaced, "manifest.json")
ENTRY = {"bytes": 7, "sha256": "0" * 64}
MANIFESTS = {
    "a name above": (manifest(files={"../x": ENTRY}), "is not as it was written"),
    "an absolute name": (manifest(files={"/etc/passwd": ENTRY}), "is not as it was written"),
    "a file without its size": (manifest(files={"x": {}}), "is not as it was written"),
    "files in a list": (manifest(files=["x"]), "is not as it was written"),
    "no stage": (manifest(stage=None), "is not as it was written"),
    "facts that are none": (manifest(facts=3), "is not as it was written"),
    "a changed word": (
        raw(lambda path: path.write_text('{"stage": "clips"}')),
        "is not as it was written",
    ),
    "100,000 levels": (
        raw(lambda path: path.write_text("[" * 100_000)),
        "is not as it was written",
    ),
    "a pipe": (raw(os.mkfifo), "is not as it was written"),
    "a device": (raw(lambda path: path.symlink_to("/dev/zero")), "is not as it was written"),
    "20 GB": (raw(sparse), "is not as it was written"),
    "a folder": (raw(os.mkdir), "is not as it was written"),
    "links to themselves": (raw(lambda path: path.symlink_to(path)), "no manifest.json"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_strangers_manifest(artifact, kind):
    damage, message = MANIFESTS[kind]
    assert stored_files(artifact)
    damage(artifact)
    refused(lambda: stored_files(artifact), str(artifact), message)
    refused(lambda: damaged_files(artifact), str(artifact), message)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), sparse])
def test_a_file_of_an_artifact_that_is_none(artifact, make):
    replaced("data.arrow", make)(artifact)
    refused(lambda: stored_files(artifact), "data.arrow: ")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), sparse])
def test_state_of_a_killed_run_that_is_none_is_as_if_it_were_not_there(tmp_path, make):
    make(tmp_path / "clock.json")
    assert read_record(tmp_path / "clock.json") is None


HOLD = """
import sys, time
from pathlib import Path
from asc_ray.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def storage(tmp_path):
    folder = tmp_path / "storage"
    folder.mkdir()
    return folder


@pytest.fixture
def held(storage):
    """The storage while another process works there, and that process."""
    words = [sys.executable, "-c", HOLD, str(storage)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in\n"
        yield process
        process.kill()


def enter(storage):
    with exclusive(storage):
        pass


def test_the_owner_is_named(storage, held):
    owner = json.loads((storage / LOCK).read_text())
    assert owner["pid"] == held.pid
    refused(lambda: enter(storage), f"process {held.pid} on {os.uname().nodename}, since {owner['since'][:10]}")
    assert is_locked(storage)


def test_the_lock_ends_with_its_process_however_that_dies(storage, held):
    held.kill()
    held.wait()
    assert not is_locked(storage)
    enter(storage)


@pytest.mark.parametrize("replace", [False, True], ids=["deleted", "replaced"])
def test_the_lock_outlives_its_file(storage, held, replace):
    (storage / LOCK).unlink()
    if replace:
        (storage / LOCK).write_text("{}")
    refused(lambda: enter(storage), "another asc-ray run is working there")


def test_an_owner_that_is_none_is_not_shown(storage, held):
    (storage / LOCK).write_text('{"host": "\\u001b[2J", "pid": 1, "since": "now"}')
    assert "\x1b" not in refused(lambda: enter(storage), "process 1 on \\x1b[2J")


@pytest.mark.parametrize("to", ["target", "/etc/passwd", LOCK])
def test_the_lock_is_not_followed_through_a_link(storage, tmp_path, to):
    (storage / LOCK).symlink_to(to)
    refused(lambda: enter(storage), LOCK, "delete it", code=2)
    assert not (storage / "target").exists()
    assert not is_locked(storage)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file(storage, make):
    make(storage / LOCK)
    refused(lambda: enter(storage), str(storage), code=2)
    assert not is_locked(storage)


@pytest.mark.parametrize(("error", "message"), [("ENOLCK", "without locks"), ("EOPNOTSUPP", "without locks")])
def test_a_file_system_without_locks_is_told_from_one_that_is_locked(storage, monkeypatch, error, message):
    import errno

    def refuse(*_):
        raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

    monkeypatch.setattr(lock.fcntl, "fcntl", refuse)
    refused(lambda: enter(storage), message, code=2)


def test_who_asks_for_the_state_makes_no_driver_refuse(storage):
    """`status`, in many processes' place by threads, while drivers start and end: none is refused."""
    ended = threading.Event()

    def ask():
        while not ended.is_set():
            is_locked(storage)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(500):
            enter(storage)
    finally:
        ended.set()
        for asker in askers:
            asker.join()


def test_a_file_closed_in_the_same_process_ends_no_lock(storage):
    with exclusive(storage):
        assert is_locked(storage)
        (storage / LOCK).open().close()
        words = [sys.executable, "-c", HOLD, str(storage)]
        other = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert "another asc-ray run is working there" in other.stderr
