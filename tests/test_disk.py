"""Disks that are full or gone: one line says it, no half-written file stays, and the same command goes on."""

import json
import os
import shutil
import subprocess

import pyarrow as pa
import pytest
from conftest import TINY, command, joined
from safetensors.numpy import save_file
from store import Place

from asc_ray.artifacts import Artifact, stored_files
from asc_ray.cluster.sweep import _trial
from asc_ray.config.composition import load_config
from asc_ray.data.arrow import write_batch
from asc_ray.disk import disk_error
from asc_ray.files import write_atomically
from asc_ray.places import node_folder
from asc_ray.resources import Resources
from asc_ray.search.proposals import propose


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "small", tmp_path]
    if os.geteuid() or subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root may mount a file system, where the machine allows it")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_is_one_line_and_the_command_goes_on_when_there_is_room(small_disk):
    storage = small_disk / "storage"
    words = command("ingest", "--config", TINY, "--set", f"storage={storage}")
    full = subprocess.run(words, capture_output=True, text=True, env=joined(), check=False)
    assert full.returncode == 1
    assert full.stderr.startswith(f"asc-ray: storage {storage}: No space left on device (0 MB are free there, ")
    assert full.stderr.endswith("; make room, and the same command goes on from here\n")
    assert full.stderr.count("\n") == 1
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=99m", small_disk], check=True)
    done = subprocess.run(words, capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stderr


def test_a_node_without_room_for_what_it_brings_says_so_and_goes_on(small_disk, bucket, tmp_path_factory):
    place = Place(bucket.uri(small_disk.name), tmp_path_factory.mktemp("nodes"), bucket)
    made, own = (
        Artifact(node_folder(place.setting, disk), "clips", "tau22", "0123456789abcdef", {}, {})
        for disk in (place.disks, small_disk)
    )
    for number in range(3):
        (made.open_partial() / f"{number}.bin").write_bytes(bytes(2_000_000))
    made.finish({})
    with pytest.raises(OSError, match="No space left") as raised:
        stored_files(own.path)
    told = str(disk_error(raised.value, own.storage))
    assert told.startswith(f"data.cache {small_disk}, a node's copy of {place.setting}: No space left on device (")
    assert told.endswith("; make room, and the same command goes on from here")
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=99m", small_disk], check=True)
    assert len(stored_files(own.path)) == 3


WRITERS = {
    "write_atomically": lambda file: write_atomically(file, bytes(5_000_000)),
    "write_batch": lambda file: write_batch(pa.record_batch({"x": pa.array(range(600_000))}), file),
    "safetensors": lambda file: save_file({"x": pa.array(range(600_000)).to_numpy()}, file),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_s_error_is_told_as_the_disk_s(small_disk, writer):
    with pytest.raises(Exception) as raised:  # noqa: PT011, each library has its own
        WRITERS[writer](small_disk / "file")
    assert "No space left on device" in str(disk_error(raised.value, small_disk))
    if writer != "safetensors":
        assert not list(small_disk.iterdir())


def test_a_disk_that_became_read_only_is_told(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only") as raised:
        write_atomically(small_disk / "file", b"")
    told = str(disk_error(raised.value, small_disk))
    assert told.startswith(f"storage {small_disk}: Read-only file system")
    assert told.endswith("; mount it writable, and the same command goes on from here")


# Stands before libc: what is written to a file below the path in BROKEN meets a broken disk.
BROKEN_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ssize_t write(int fd, const void *data, size_t size) {
    char link[64], path[PATH_MAX] = "";
    const char *broken = getenv("BROKEN");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (broken && readlink(link, path, sizeof path - 1) > 0 && strncmp(path, broken, strlen(broken)) == 0) {
        errno = EIO;
        return -1;
    }
    return ((ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write"))(fd, data, size);
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_an_input_output_error_is_one_line_and_the_command_goes_on_afterwards(tmp_path):
    storage, library = tmp_path / "storage", tmp_path / "broken.so"
    (tmp_path / "broken.c").write_text(BROKEN_DISK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "broken.c", "-ldl"], check=True)
    words = command("ingest", "--config", TINY, "--set", f"storage={storage}")
    broken = joined() | {"LD_PRELOAD": str(library), "BROKEN": str(storage / "corpus")}
    failed = subprocess.run(words, capture_output=True, text=True, env=broken, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"asc-ray: storage {storage}: Input/output error (")
    assert failed.stderr.endswith("; look after the disk, and the same command goes on from here\n")
    assert failed.stderr.count("\n") == 1
    assert not list(storage.rglob("*.tmp"))
    done = subprocess.run(words, capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stderr


def test_an_error_that_is_none_of_the_disk_s_stays_what_it_is(tmp_path):
    assert disk_error(ValueError("a mistake"), tmp_path) is None
    assert disk_error(FileNotFoundError(2, "No such file or directory", str(tmp_path / "file")), tmp_path) is None


def test_a_deleted_folder_is_named(tmp_path):
    gone = tmp_path / "storage" / "clips" / "tau22-0123"
    with pytest.raises(OSError, match="No such file") as raised:
        (gone / "manifest.json").read_text()
    gone.parent.mkdir(parents=True)
    assert str(disk_error(raised.value, tmp_path / "storage")) == (
        f"{gone}: was deleted while the run worked; leave it there, and the same command goes on from here"
    )
    shutil.rmtree(tmp_path / "storage")
    assert str(disk_error("anything", tmp_path / "storage")).startswith(f"{tmp_path / 'storage'}: was deleted")


def test_a_disk_s_error_is_held_against_no_trial(tmp_path):
    """It would be recorded as the trial's own failure, and the search would go on without it."""

    class Gone:
        def open(self):
            raise OSError(28, os.strerror(28))

    class Wrong:
        def open(self):
            raise ZeroDivisionError("the trial's own")

    config = load_config(TINY, [])
    work = {"folder": tmp_path, "storage": tmp_path, "student": config.student, "sweep": config.sweep}
    work["resources"] = Resources()
    for source, noted in ((Gone(), False), (Wrong(), True)):
        with pytest.raises(Exception):  # noqa: B017, PT011
            _trial({"number": 0, "parameters": propose(config.sweep, 0, []), "seed": 0}, work | {"source": source})
        assert (tmp_path / "0000.error").exists() == noted


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    folder = tmp_path / "taken"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(folder, json.dumps({}))
    assert list(tmp_path.iterdir()) == [folder]
