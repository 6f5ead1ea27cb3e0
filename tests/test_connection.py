"""The connection to Ray: whatever keeps it from being made, or ends it, is one line that says what to do."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import TINY, command, environment


def refused(tmp_path, address: str, *overrides: str, **variables: str) -> str:
    """Ingest on this cluster, which fails; return the line that the user reads."""
    settings = [f"storage={tmp_path}/s", f"cluster.address={address}", *overrides]
    done = subprocess.run(
        command("ingest", "--config", TINY, *(word for setting in settings for word in ("--set", setting))),
        capture_output=True, text=True, env=environment() | variables, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\[\d{4}-\d\d-\d\d ", line)]  # Ray's own log
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_head_that_is_not_there(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert refused(tmp_path, address).startswith(
            f"asc-ray: cluster.address {address}: cannot be reached ([Errno 111] Connection refused)"
        )


def test_a_head_that_takes_a_connection_and_never_answers(tmp_path):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        line = refused(tmp_path, address, "cluster.connect_seconds=3")
    assert f"{address}: does not answer within 3 seconds (cluster.connect_seconds)" in line
    assert "ray status" in line


def test_a_path_too_long_for_sockets(tmp_path):
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    line = refused(tmp_path, "local", RAY_TMPDIR=str(folder))
    assert "the path of Ray's folder is too long for its sockets" in line
    assert "set RAY_TMPDIR to a shorter one" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_of_another_user(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o500)
    assert "belongs to another user" in refused(tmp_path, "local", RAY_TMPDIR=str(folder))


DRIVER = """
import signal
import ray
import ray._private.worker
from asc_ray.cluster import connection
from asc_ray.errors import UserError
from asc_ray.resources import ClusterConfig

connection.SILENT_SECONDS = 8  # the head is asked every five

@ray.remote
def wait():
    signal.pause()

try:
    with connection.connected(ClusterConfig(), print):
        task = wait.remote()
        head = ray._private.worker._global_node
        print(head.gcs_address, head.all_processes["gcs_server"][0].process.pid, flush=True)
        ray.get(task)
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture(scope="module")
def driver():
    """A driver with an embedded cluster, where a task never ends; the cluster's address, and its head."""
    words = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        address, head = process.stdout.readline().split()
        yield process, address, int(head)
        process.kill()


@pytest.mark.parametrize("token", ["", "of another cluster, as long as this one is"])
def test_a_login_token_that_is_missing_or_wrong(driver, tmp_path, token):
    home = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"} | ({"RAY_AUTH_TOKEN": token} if token else {})
    line = refused(tmp_path, driver[1], **home)
    assert "it wants a login token, and this process has none or another; set RAY_AUTH_MODE to token" in line


def test_a_head_that_dies_ends_the_run_with_what_to_do(driver):
    process, _, head = driver
    os.kill(head, signal.SIGKILL)
    assert process.communicate()[0] == (
        "Ray's embedded cluster: its head has not answered for 8 seconds; the same command goes on from here, on any "
        "cluster\n"
    )
    assert process.returncode == 1


LEAVING = """
import os
import threading
import ray
from asc_ray.cluster.connection import Caller, connected
from asc_ray.resources import ClusterConfig

for kind in (threading.Thread, Caller):
    try:
        with connected(ClusterConfig(), print):
            kind(target=threading.Event().wait, daemon=True).start()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        print(ray.is_initialized(), flush=True)
os._exit(0)
"""


def test_ray_is_not_shut_down_under_a_thread_that_waits_for_it():
    """It would end the process with a code of its own, whatever the signal was."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.split() == ["False", "True"]
