import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime
from importlib.metadata import version

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asc_ray import provenance
from asc_ray.artifacts import Artifact, content_key, damaged_files, read_manifest
from asc_ray.errors import UserError
from asc_ray.lock import exclusive, is_locked

VALUES = st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.none(), min_size=2)


def make(tmp_path, key="0123"):
    return Artifact(tmp_path, "teachers", "one", key, {"epochs": 3}, {"clips": "abcd"})


@given(VALUES)
def test_a_key_follows_content_and_not_order(config):
    turned = dict(reversed(config.items()))
    assert content_key(stage="x", config=config) == content_key(stage="x", config=turned)
    changed = {**config, next(iter(config)): ["another value"]}
    assert content_key(stage="x", config=config) != content_key(stage="x", config=changed)


def test_an_artifact_is_complete_only_when_finished(tmp_path):
    artifact = make(tmp_path)
    folder = artifact.open_partial()
    (folder / "weights").write_bytes(b"12345")
    (folder / "scratch").mkdir()
    (folder / "scratch" / "state").write_bytes(b"x")
    assert not artifact.complete
    artifact.finish({"accuracy": 0.5}, scratch=("scratch",))
    assert artifact.complete
    assert not artifact.partial.exists()
    manifest = read_manifest(artifact.path)
    assert manifest["inputs"] == {"clips": "abcd"}
    assert manifest["facts"] == {"accuracy": 0.5}
    assert list(manifest["files"]) == ["weights"]
    assert damaged_files(artifact.path) == []


def test_damage_is_found_and_named(tmp_path):
    artifact = make(tmp_path)
    folder = artifact.open_partial()
    for name in ("kept", "changed", "gone"):
        (folder / name).write_text(name)
    artifact.finish({})
    (artifact.path / "changed").write_text("chinged")
    (artifact.path / "gone").unlink()
    assert damaged_files(artifact.path) == ["changed: checksum differs", "gone: missing"]


def test_a_folder_without_manifest_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        read_manifest(tmp_path)


def test_another_key_is_another_folder(tmp_path):
    assert make(tmp_path, "aa").path != make(tmp_path, "bb").path


def test_a_storage_has_one_run_at_a_time_and_the_lock_dies_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from asc_ray.lock import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match=f"process {other.pid}"), exclusive(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    assert not is_locked(tmp_path)
    with exclusive(tmp_path):
        assert is_locked(tmp_path)


def test_a_manifest_says_when_by_what_and_on_what_it_was_made(tmp_path):
    """And no key depends on it; the time goes on where a killed run's folder is taken up."""
    artifact, before = make(tmp_path), time.time()
    folder = artifact.open_partial()
    os.utime(folder / ".started", (1.5e9, 1.5e9))
    artifact.open_partial()
    artifact.finish({})
    made = artifact.made()
    assert made["began"] == "2017-07-14T02:40:00+00:00"
    ended = datetime.fromisoformat(made["ended"]).timestamp()
    assert int(before) <= ended <= (artifact.path / "manifest.json").stat().st_mtime
    assert made["program"].split(",")[0] == version("asc-ray")
    assert re.search(r", \d+ cores, \d+ GiB$", made["machine"])
    assert platform.node() not in made["machine"]
    assert not list(artifact.path.glob(".started"))


def test_the_program_s_commit_is_that_of_its_own_checkout_alone(tmp_path, monkeypatch):
    """Not of a repository that the package is installed within."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    monkeypatch.setattr(provenance, "commit", provenance.commit.__wrapped__)
    assert provenance.program() == version("asc-ray")
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert provenance.program() == version("asc-ray"), "no commit yet"
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout[:12]
    assert provenance.program() == f"{version('asc-ray')}, commit {head}"
    (tmp_path / "file").write_text("2")
    assert provenance.program() == f"{version('asc-ray')}, commit {head}-dirty"
    (tmp_path / "within").mkdir()
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path / "within")
    assert provenance.program() == version("asc-ray")
