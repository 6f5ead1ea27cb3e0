"""What a storage promises, in a folder and on an S3 server alike: `one` and `other` are nodes that work with it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, command, environment
from store import Bucket, Place, s3_server

from asc_ray import artifacts, claims, remote
from asc_ray.artifacts import (
    Artifact,
    artifacts_in,
    damaged_files,
    input_folder,
    read_manifest,
    stored_file,
    stored_files,
    write_record,
)
from asc_ray.config.composition import load_config
from asc_ray.data.clip import Clip
from asc_ray.data.clips import CLIP_SAMPLES, open_clips, write_clips
from asc_ray.data.pieces import finished_pieces, known_files, note_piece, piece_file
from asc_ray.disk import DiskError
from asc_ray.errors import ConfigError, UserError
from asc_ray.lock import exclusive, is_locked
from asc_ray.objects import told
from asc_ray.places import named, node_folder, opened, place_of
from asc_ray.plan import FAILED, failure
from asc_ray.search.config import TRIALS
from asc_ray.search.course import ended_trials, result_of
from asc_ray.search.trials import TrialResult
from asc_ray.status import state_of
from asc_ray.training.checkpoints import load_checkpoint, save_checkpoint
from asc_ray.training.folder import PROGRESS

KEY = "0123456789abcdef"
BIG = bytes(range(256)) * 8192  # of a size that is compared once a node


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path) -> Place:
    if request.param == "folder":
        return Place(str(tmp_path / "storage"), tmp_path)
    bucket: Bucket = request.getfixturevalue("bucket")
    return Place(bucket.uri(tmp_path.name), tmp_path / "nodes", bucket)


@pytest.fixture
def store(bucket, tmp_path) -> Place:
    return Place(bucket.uri(tmp_path.name), tmp_path / "nodes", bucket)


def artifact(place: Place, node: str, stage: str = "clips", name: str = "tau22") -> Artifact:
    return Artifact(place.node(node), stage, name, KEY, {"a": 1}, {})


@pytest.fixture(autouse=True)
def _nodes_are_processes(monkeypatch):
    """A node's process does not know what another has seen."""
    monkeypatch.setattr(remote, "_seen", set())


def made(place: Place, node: str = "one", **of: str) -> Artifact:
    own = artifact(place, node, **of)
    folder = own.open_partial()
    (folder / "deep").mkdir()
    (folder / "small.txt").write_text("small")
    (folder / "deep" / "big.bin").write_bytes(BIG)
    (folder / "scratch.txt").write_text("scratch")
    own.finish({"clips": 3}, scratch=("scratch.txt",))
    return own


def test_what_one_node_finished_another_reads(place):
    before = artifact(place, "other")
    assert not before.complete
    made(place)
    assert before.complete
    assert before.facts() == {"clips": 3}
    assert [file.read_bytes() for file in stored_files(before.path)] == [BIG, b"small"]
    assert stored_file(before.path, "small.txt").read_text() == "small"
    assert read_manifest(before.path)["files"].keys() == {"small.txt", "deep/big.bin"}
    assert damaged_files(before.path) == []
    assert [own.path for own in artifacts_in(place.node("third"))] == [artifact(place, "third").path]
    assert input_folder(place.node("fourth"), "clips", KEY) == artifact(place, "fourth").path
    with pytest.raises(UserError, match=r"clips\S*: nothing with the key beef"):
        input_folder(place.node("fourth"), "clips", "beef")


def test_an_artifact_is_there_when_its_manifest_is_and_not_before(place, monkeypatch):
    """Whatever a driver had written when it died."""
    own = artifact(place, "one")
    (own.open_partial() / "small.txt").write_text("small")

    def dies(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "write_record", dies)
    with pytest.raises(KeyboardInterrupt):
        own.finish({})
    monkeypatch.undo()
    for node in ("one", "other"):
        there = artifact(place, node)
        assert not there.complete
        assert artifacts_in(place.node(node)) == []
        with pytest.raises(UserError, match="not a finished artifact"):
            stored_files(there.path)
    assert state_of(artifact(place, "one"), "ingest").state == "interrupted"
    own.finish({})
    assert artifact(place, "other").complete


def test_who_asks_while_an_artifact_is_committed_stops_nothing(place, monkeypatch):
    """Another process of the node may see the manifest before the folder has its name."""
    write, asked = artifacts.write_record, []

    def committed(path, content):
        write(path, content)
        if path.name == artifacts.MANIFEST:
            asked.append(artifact(place, "one").complete)

    monkeypatch.setattr(artifacts, "write_record", committed)
    own = made(place)
    assert asked == [place.bucket is not None]
    assert own.complete
    assert [file.read_bytes() for file in stored_files(own.path)] == [BIG, b"small"]
    assert not own.partial.exists()


def test_many_workers_may_open_one_unfinished_artifact_at_once(place):
    """As the ranks of one training do, on one node or several."""
    with ThreadPoolExecutor(12) as pool:
        opened = pool.map(lambda n: artifact(place, f"node-{n % 3}").open_partial(), range(12))
        assert all((folder / artifacts.STARTED).is_file() for folder in opened)


def test_what_was_deleted_is_made_again(place):
    made(place)
    other = artifact(place, "other")
    stored_files(other.path)
    if place.bucket:
        place.bucket.delete(f"{place.disks.parent.name}/clips/{other.path.name}")
    else:
        shutil.rmtree(other.path)
    remote._seen.clear()  # a command has begun since
    assert not artifact(place, "other").complete
    assert not other.path.exists()
    made(place, "other")
    assert artifact(place, "one").complete


def test_a_damaged_file_is_named_and_never_read(place):
    own = made(place)
    if place.bucket:
        place.bucket.write(f"{place.disks.parent.name}/clips/{own.path.name}/small.txt", b"smell")
    else:
        (own.path / "small.txt").write_text("smell")
    reader = artifact(place, "other")
    with pytest.raises(UserError, match=r"small\.txt.*: .*checksum differs.*[Dd]elete the .*run its stage again"):
        stored_files(reader.path)
    assert damaged_files(reader.path) != []


def test_a_node_s_damaged_copy_is_brought_again(store):
    made(store)
    reader = artifact(store, "other")
    for name in ("small.txt", "deep/big.bin"):
        file = stored_file(reader.path, name)
        content = bytearray(file.read_bytes())
        content[2] ^= 1
        file.write_bytes(content)
        assert stored_file(reader.path, name).read_bytes() in (b"small", BIG)


def test_pieces_that_one_node_made_are_not_made_again(place):
    ids = np.array([f"clip-{number}" for number in range(10)])
    folder = artifact(place, "one").open_partial()
    for first in (0, 5):
        file = piece_file(folder, "shard", first)
        file.write_bytes(bytes([first]) * 100)
        note_piece(file, ids[first : first + 5], {"bad": []})
    lost = piece_file(folder, "shard", 7)  # a worker died between the piece and its record
    lost.write_bytes(b"lost")
    remote.push(lost)
    other = artifact(place, "other")
    assert state_of(other, "ingest").progress == {"shards": 2}
    found = finished_pieces(other.open_partial(), "shard", ids)
    assert [record["first"] for record in found] == [0, 5]
    # They stay where they are: where there is no common folder, in the storage.
    here = [] if place.bucket else ["shard-000000000.arrow", "shard-000000005.arrow"]
    assert [file.name for file in sorted(other.partial.glob("*.arrow"))] == here
    other.finish({}, scratch=("*.json",), known=known_files(found))
    assert [file.read_bytes()[0] for file in stored_files(artifact(place, "one").path, "shard-*")] == [0, 5]
    if place.bucket:  # and of what the building needed nothing is left
        assert place.bucket.files(f"{place.disks.parent.name}/clips/{other.path.name}").keys() == {
            "manifest.json", "shard-000000000.arrow", "shard-000000005.arrow",
        }  # fmt: skip


def test_what_the_storage_lacks_is_no_part_of_an_artifact(place):
    """Deleted while the artifact was made: there is no manifest that promises it."""
    own = artifact(place, "one")
    file = piece_file(own.open_partial(), "shard", 0)
    file.write_bytes(BIG)
    record = note_piece(file, ["a"], {})
    file.unlink()
    remote.forget(file)
    with pytest.raises(DiskError, match=r"shard-000000000\.arrow\S*: is missing; was it deleted\? Run its stage again"):
        own.finish({}, scratch=("*.json",), known=known_files([record]))
    assert not artifact(place, "other").complete


def test_a_node_that_streams_brings_indexes_and_parts_of_shards(store):
    clips = [Clip(f"{number}.wav", "park", "a", "rome-1", "train") for number in range(5)]
    pcm = np.random.default_rng(0).integers(-999, 999, (5, CLIP_SAMPLES)).astype(np.int16)
    own = artifact(store, "one")
    for first in (0, 3):
        some = slice(first, first + 3)
        write_clips(piece_file(own.open_partial(), "shard", first), clips[some], pcm[some], ["park"], ["a"], "f00d")
    own.finish({})
    there = artifact(store, "other").path
    streaming = open_clips(there, whole=False)
    assert (streaming.pcm(np.array([4, 1, 2, 0])) == pcm[[4, 1, 2, 0]]).all()
    assert sorted(path.suffix for path in there.iterdir()) == [".index", ".index", ".json"]
    mapped = open_clips(there)
    assert mapped.scene.tolist() == [0] * 5
    assert not list(there.glob("*.arrow"))
    assert (mapped.pcm(np.arange(5)) == pcm).all()
    assert len(list(there.glob("*.arrow"))) == 2
    assert store.bucket is not None
    name = f"{store.disks.parent.name}/clips/{own.path.name}/shard-000000003.arrow"
    remote._reader.cache_clear()
    store.bucket.write(name, store.bucket.files(name.rpartition("/")[0])["shard-000000003.arrow"][:-70_000])
    with pytest.raises(UserError, match=r"clips/tau22-\w+/shard-000000003\.arrow\S*: the samples of 4\.wav are not as"):
        streaming.pcm(np.array([4]))
    assert (streaming.pcm(np.array([1])) == pcm[1]).all()
    store.bucket.delete(name)
    remote._reader.cache_clear()
    with pytest.raises(DiskError, match=r"clips/tau22-\w+/shard-000000003\.arrow\S*: is missing"):
        streaming.pcm(np.array([3]))


def test_a_training_goes_on_on_another_node(place):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder = artifact(place, "one").open_partial() / "checkpoints"
    history = []
    for accuracy in (0.5, 0.1, 0.2, 0.3):
        history.append({"validation_macro_accuracy": accuracy})
        save_checkpoint(folder, model, optimizer, history)
    there = artifact(place, "other").open_partial() / "checkpoints"
    checkpoint = load_checkpoint(there)
    assert checkpoint is not None
    assert checkpoint.epoch == 4
    assert torch.equal(checkpoint.model["weight"], model.state_dict()["weight"])
    assert checkpoint.optimizer.keys() == {"0.momentum_buffer", "1.momentum_buffer"}
    names = ["epoch-00001", "epoch-00003", "epoch-00004"]  # the best and the last two
    assert sorted(path.name for path in there.iterdir()) == names
    (there / names[-1] / "model.safetensors").write_bytes(b"damaged")
    if place.bucket:  # its report was sent last: without it there is no checkpoint
        place.bucket.delete(f"{place.disks.parent.name}/clips/tau22-{KEY}/checkpoints/{names[-1]}/meta.json")
        there = artifact(place, "third").open_partial() / "checkpoints"
    earlier = load_checkpoint(there)
    assert earlier is not None
    assert earlier.epoch == 3


def test_trials_notes_and_failures_are_seen_from_every_node(place):
    own = artifact(place, "one", "sweep", "sweep")
    folder = own.open_partial() / TRIALS
    folder.mkdir()
    for number in (0, 1):
        result = TrialResult(number=number, parameters={}, curve=(0.5,), state="complete")
        write_record(folder / result_of(number), result.model_dump(mode="json"))
    other = artifact(place, "other", "sweep", "sweep")
    assert [trial.number for trial in ended_trials(other)] == [0, 1]
    assert state_of(other, "sweep").progress == {"trials": 2}

    teacher = artifact(place, "one", "teachers", "passt")
    write_record(teacher.open_partial() / FAILED, {"error": "diverged"})
    seen = artifact(place, "other", "teachers", "passt")
    assert failure(seen) == "diverged"
    assert state_of(seen, "teachers").text() == "failed: diverged"
    (teacher.partial / FAILED).unlink()
    remote.forget(teacher.partial / FAILED)
    assert failure(seen) is None
    for epoch in (1, 2):
        note = {"epoch": epoch, "epochs": 9, "loss": 1.0, "validation_accuracy": 0.5, "clips_per_second": 1.0}
        write_record(teacher.partial / PROGRESS, {**note, "minutes_left": 5.0})
        os.utime(seen.partial / PROGRESS, (0, 0)) if (seen.partial / PROGRESS).exists() and place.bucket else None
        assert state_of(seen, "teachers").progress["epoch"] == epoch


def test_the_time_at_which_work_began_is_that_of_the_first_node(place):
    began = artifact(place, "one").open_partial() / ".started"
    os.utime(began, (1e9, 1e9))
    other = made(place, "other")
    if not place.bucket:
        assert other.made()["began"].startswith("2001-09-09")
    assert other.made()["began"] <= other.made()["ended"]


def test_an_object_is_there_whole_or_not_at_all_when_a_signal_comes(store):
    """Arrow makes an object of what was sent when a stream is closed, however it comes to be closed."""
    interrupted = []

    def interrupt(*_: object) -> None:
        interrupted.append(True)
        raise KeyboardInterrupt

    folder = artifact(store, "one").open_partial()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(4):
            file = folder / f"{number}.bin"
            file.write_bytes(bytes(32 << 20))
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.03 * (number + 1))
                remote.push(file)
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted
    sizes = {name: info.size for name, info in remote.listed(folder).items() if name.endswith(".bin")}
    assert set(sizes.values()) == {32 << 20}, sizes


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that cannot be read")
def test_no_object_is_made_of_a_file_that_cannot_be_read_to_its_end(store):
    folder = artifact(store, "one").open_partial()
    (folder / "broken").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        remote.push(folder / "broken")
    assert "broken" not in remote.listed(folder)


def test_what_was_there_stays_when_the_store_refuses_what_is_sent(tmp_path, monkeypatch):
    """A claim that cannot be renewed for a moment must not be taken for one that another run has removed."""
    import boto3

    allowed = [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]
    denied = [{"Effect": "Deny", "Action": "s3:PutObject", "Resource": "*"}]
    with s3_server(allowed=5) as port:
        at = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"}
        files, users = boto3.client("s3", **at), boto3.client("iam", **at)
        files.create_bucket(Bucket="asc-ray")
        files.put_object(Bucket="asc-ray", Key="x/clips/record.json", Body=b"before")
        users.create_user(UserName="reader")
        key = users.create_access_key(UserName="reader")["AccessKey"]
        policy = json.dumps({"Version": "2012-10-17", "Statement": [*allowed, *denied]})
        users.put_user_policy(UserName="reader", PolicyName="reads", PolicyDocument=policy)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        record = Place(Bucket(port).uri("x"), tmp_path, Bucket(port)).node("one") / "clips" / "record.json"
        record.parent.mkdir(parents=True)
        record.write_text("after")
        with pytest.raises(DiskError, match="access is denied"):
            remote.push(record)
        assert remote.refreshed(record).read_text() == "before"


def test_an_object_s_name_leads_out_of_no_folder(store):
    """As somebody may give it who can write there."""
    import boto3

    bucket = store.bucket
    assert bucket is not None
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{bucket.port}")
    folder = f"{store.disks.parent.name}/clips/tau22-{KEY}"
    for name in ("../../../evil.json", "/evil.json", "a/../../evil.json"):
        client.put_object(Bucket=bucket.name, Key=f"{folder}/{name}", Body=b"evil")
    other = artifact(store, "other")
    state_of(other, "ingest")
    finished_pieces(other.open_partial(), "*", [])
    load_checkpoint(other.partial)
    assert not list(store.disks.parent.rglob("evil*"))


# The lock.

HOLDER = """
import sys
from pathlib import Path
from asc_ray.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(place: Place, node: str = "one", *before: str) -> subprocess.Popen:
    words = [*before, sys.executable, "-c", HOLDER, str(place.node(node))]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_two_drivers_on_one_storage_are_refused(place):
    process = holder(place)
    with (
        pytest.raises(UserError, match=rf"another asc-ray run is working there \(process {process.pid} on ") as refused,
        exclusive(place.node("other")),
    ):
        pass
    assert str(refused.value).startswith(f"storage {place.setting}: ")
    assert is_locked(place.node("other"))
    process.communicate()
    assert not is_locked(place.node("other"))
    with exclusive(place.node("other")):
        pass


def test_a_killed_driver_holds_up_nobody_on_its_machine(place):
    process = holder(place)
    process.kill()
    process.wait()
    assert not is_locked(place.node("one"))
    with exclusive(place.node("one")):
        assert is_locked(place.node("one"))
    if place.bucket:
        assert place.bucket.files(f"{place.disks.parent.name}/.lock") == {}


def of_another_machine(store: Place, monkeypatch) -> None:
    """What is known of processes there is nothing."""
    monkeypatch.setattr(claims, "_process", lambda pid: None)


def test_a_driver_of_another_machine_that_renews_its_claim_is_waited_for_and_then_refused(store, monkeypatch):
    of_another_machine(store, monkeypatch)
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.5)
    said: list[str] = []
    with (
        exclusive(store.node("one")),
        pytest.raises(UserError, match="another asc-ray run is working there"),
        exclusive(store.node("other"), said.append),
    ):
        pass
    assert len(said) == 1
    assert "waiting, at most 60 s, whether another run is still at work (process" in said[0]


def test_a_driver_of_another_machine_that_was_killed_holds_it_up_for_the_lease(store, monkeypatch):
    process = holder(store)
    process.kill()
    process.wait()
    of_another_machine(store, monkeypatch)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 3.0)
    said: list[str] = []
    with exclusive(store.node("other"), said.append):
        assert len(said) == 1
    assert store.bucket is not None
    assert store.bucket.files(f"{store.disks.parent.name}/.lock") == {}


def test_of_drivers_that_start_at_once_one_works_at_most(place):
    at_work, most, refused = 0, 0, 0
    lock = threading.Lock()

    def drive(number: int) -> None:
        nonlocal at_work, most, refused
        try:
            with exclusive(place.node(str(number))):
                with lock:
                    at_work += 1
                    most = max(most, at_work)
                time.sleep(0.5)
                with lock:
                    at_work -= 1
        except UserError:
            refused += 1

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 1
    assert refused >= 3


def test_a_driver_that_stood_still_ends_where_another_took_over(store, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.2)

    def stands_still() -> None:
        with exclusive(store.node("one")):
            remote.forget(store.node("one") / claims.CLAIMS)
            time.sleep(60)

    with pytest.raises(UserError, match="another run took it over, because this one was silent for 60 seconds"):
        stands_still()


# Names, and errors in one line.


def test_a_node_s_folder_says_which_uri_it_is_of(tmp_path):
    for uri in ("s3://bucket/a/b", "gs://bucket", "s3://bucket/a?region=eu-1&scheme=http"):
        folder = node_folder(uri, tmp_path)
        assert folder.parent == tmp_path
        assert named(folder) == uri
        path = folder / "clips" / f"tau22-{KEY}.partial" / "shard-0.arrow"
        assert place_of(path) == (uri, f"clips/tau22-{KEY}/shard-0.arrow")
    assert named(folder / "clips") == "s3://bucket/a/clips?region=eu-1&scheme=http"
    inside = opened(f"s3://bucket/a/int8/student-{KEY}")
    assert inside.parents[1] == opened("s3:/bucket/a/")
    assert inside.parts[-2:] == ("int8", f"student-{KEY}")
    for folder in (tmp_path, tmp_path / "s3:" / "bucket", tmp_path / "50%"):
        assert place_of(folder) is None
        assert named(folder) == str(folder)
        assert opened(str(folder)) == folder


MLFLOW = "tracking.uri=http://mlflow:5000"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["storage=s3://bucket/x"], r"tracking\.uri: must be given where storage is a URI"),
        (["storage=s3://me:hunter2@bucket/x", MLFLOW], "has a login; leave it out: credentials come from the env"),
        (["storage=abfs://container:hunter2@account.dfs.core.windows.net/x", MLFLOW], "has a login"),
        (["storage=s3://bucket/x?secret_key=hunter2", MLFLOW], "has a login"),
        (["storage=s3:///", MLFLOW], "names no bucket"),
        (["storage=ftp://host/x", MLFLOW], "ftp:// is not known here; allowed is a folder, or a URI of s3, gs"),
        (["storage=file:///x", MLFLOW], "file:// is not known here"),
    ],
)
def test_a_storage_that_cannot_be_is_refused_with_the_configuration(given, told):
    with pytest.raises(ConfigError, match=told) as refused:
        load_config(TINY, given)
    assert "hunter2" not in str(refused.value)


def test_no_server_is_asked_before_a_configuration_is_used():
    config = load_config(TINY, ["storage=s3://no-such-bucket/x/", MLFLOW])
    assert config.storage == "s3://no-such-bucket/x"
    assert named(config.folder) == "s3://no-such-bucket/x"
    assert config.model_dump(mode="json")["storage"] == "s3://no-such-bucket/x"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://no-such-bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http", "there is no such bucket; make it"),
        ("s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http", "it cannot be reached; see whether it runs"),
        ("s3://bucket/x?no_such_word=1", "no_such_word"),
    ],
)
@pytest.mark.parametrize("stage", ["status", "ingest"])
def test_a_store_that_is_not_there_is_one_line(bucket, tmp_path, uri, told, stage):
    uri = uri.format(port=bucket.port)
    words = command(
        stage, "--config", TINY, "--set", f"storage={uri}", "--set", f"tracking.uri=sqlite:///{tmp_path}/m.db"
    )
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("asc-ray: storage")
    assert uri.partition("?")[0] in done.stderr
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_denied_request_is_one_line(tmp_path):
    with s3_server(allowed=2) as port:
        uri = Bucket(port).make().uri("x")
        for stage in ("status", "ingest"):
            words = command(
                stage, "--config", TINY, "--set", f"storage={uri}", "--set", f"tracking.uri=sqlite:///{tmp_path}/m.db"
            )
            done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
            assert done.returncode == 1
            assert done.stderr.startswith(f"asc-ray: storage {uri}: access is denied; give this process and every node")
            assert done.stderr.count("\n") == 1


def test_an_error_of_the_store_comes_through_other_libraries_words(store):
    from asc_ray.disk import disk_error

    with pytest.raises(DiskError) as raised, told(store.uri):
        raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode 7")
    text = f"RayTaskError(ValueError): Traceback\n  File x\nasc_ray.disk.DiskError: {raised.value}\nand more"
    for error in (raised.value, text, RuntimeError(text)):
        assert str(disk_error(error, store.node("one"))) == str(raised.value)


def test_signals_are_as_they_were():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
