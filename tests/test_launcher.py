"""`ray up cluster.yaml` from a fresh home: what the file says, and the whole of it on machines made of namespaces."""

import json
import shlex
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY
from ray.autoscaler._private.util import prepare_config, validate_config

from asc_ray.config.composition import load_config
from asc_ray.plan import Plan

FILE = yaml.safe_load((ROOT / "cluster.yaml").read_text())
SETUP, HEAD, WORKER = (
    FILE[name] for name in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
)
TOKEN = "~/.ray/auth_token"


def test_the_cluster_file_is_valid_by_ray_s_own_schema(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # the local provider keeps state in the home folder
    validate_config(prepare_config(FILE))
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config({**FILE, "max_workerz": 3}))


def test_the_commands_start_one_cluster_with_one_token():
    for command in (*SETUP, *HEAD, *WORKER):
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert FILE["file_mounts"][TOKEN] == TOKEN
    head, worker = shlex.split(HEAD[-1]), shlex.split(WORKER[-1])
    assert "RAY_AUTH_MODE=token;" in worker
    assert "RAY_AUTH_MODE=token" in head
    assert "--port=6379" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker


def test_the_cluster_file_sends_what_the_package_is_built_from():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    texts = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    built_from = texts | {*wheel["packages"], *wheel["force-include"]}
    assert {remote: local for remote, local in FILE["file_mounts"].items() if remote != TOKEN} == {
        f"~/asc-ray/{name}": name for name in built_from
    }


def test_the_setup_leaves_a_private_token_an_environment_and_ray_in_the_path(tmp_path):
    """All of it but the download of packages, in a fresh home."""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o644)
    python = tmp_path / "bin" / "python3.11"  # an environment's own Python makes environments, too
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    commands = [command for command in SETUP if "pip install" not in command]
    assert len(commands) == len(SETUP) - 1
    for command in commands:
        environment = {"HOME": str(tmp_path), "PATH": f"{python.parent}:/usr/bin:/bin"}
        subprocess.run(["bash", "-c", command], env=environment, check=True, cwd=tmp_path)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert (tmp_path / "asc-ray-env" / "bin" / "pip").is_file()
    assert (tmp_path / ".local" / "bin" / "ray").readlink() == tmp_path / "asc-ray-env" / "bin" / "ray"


# Of a machine: its folder, the environment with Ray, the checkout, and the folder that all machines share.
BOOT = """
set -e
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1" /home
mount --bind "$4" /mnt
mount --bind "$3" /home/ubuntu/checkout
mount --bind -o ro "$2" /home/ubuntu/asc-ray-env
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /run/sshd "$2"
mount --bind /home/ubuntu/asc-ray-env "$2"
ip link set lo up
exec "$(command -v sshd)" -D -e -f /dev/null -h /home/key -o PidFile=none -o StrictModes=no -o UsePAM=no
"""
USERS = """\
ubuntu:*:0:0::/home/ubuntu:/bin/bash
sshd:*:1:65534::/run/sshd:/bin/false
"""
NAMESPACES = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str:
    """Return what this machine lacks to be several."""
    tools = [name for name in ("unshare", "nsenter", "ip", "ssh", "sshd", "rsync") if not shutil.which(name, path=PATH)]
    if not tools and subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode:
        return "the right to make namespaces (root has it)"
    return ", ".join(tools)


class Machine:
    """A network, processes, mounts and a home of its own, as a fresh user has it; all end with `process`."""

    def __init__(self, folder: Path, key: Path, shared: Path) -> None:
        home = folder / "ubuntu"
        shutil.copytree("/etc/skel", home)
        for name in ("asc-ray-env", "checkout", ".ssh"):
            (home / name).mkdir()
        for file in (folder / "key", home / ".ssh" / "id_ed25519"):
            shutil.copy(key, file)
        shutil.copy(key.with_suffix(".pub"), home / ".ssh" / "authorized_keys")
        (folder / "passwd").write_text(USERS)
        self.home = home
        with (folder / "sshd.log").open("w") as log:
            self.process = subprocess.Popen(
                [*NAMESPACES, "sh", "-c", BOOT, "sh", folder, sys.prefix, ROOT, shared],
                stdout=log,
                stderr=log,
                env={"PATH": PATH},
            )
        while "Server listening" not in (said := (folder / "sshd.log").read_text()):  # then all is mounted
            assert self.process.poll() is None, said
            time.sleep(0.01)
        self.pid = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().strip()

    def words(self, command: str) -> list[str]:
        """Return what runs `command` there."""
        words = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "env", "-i", "HOME=/home/ubuntu"]
        return [*words, f"PATH=/home/ubuntu/asc-ray-env/bin:{PATH}", "RAY_AUTH_MODE=token", "bash", "-c", command]

    def run(self, command: str) -> str:
        done = subprocess.run(
            self.words(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}"
        return done.stdout

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def runs_ray(self) -> bool:
        return "ray/core/src/ray" in self.run("ps -eo args")


def nodes(head: Machine) -> set[str]:
    """Return the addresses of the live nodes."""
    said = head.run("ray list nodes --filter state=ALIVE --format json || echo []")
    return {node["node_ip"] for node in json.loads(said[said.index("[") :])}


def half_done(finished, shared: Path) -> Path:
    """Return a storage that has everything but the int8 model and what is made of it."""
    ignored = shutil.ignore_patterns("int8", "evaluation", "report", "mlflow.db")
    return Path(shutil.copytree(finished.storage, shared / "storage", ignore=ignored))


def whole(storage: Path) -> bool:
    plan = Plan(load_config(TINY, [f"storage={storage}"]))
    return all(artifact.complete for group in plan.by_stage().values() for artifact in group)


def eventually(condition, otherwise) -> None:
    """Wait, ten minutes at most, and fail with what `otherwise` says."""
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, otherwise()
        time.sleep(2)


@pytest.fixture
def machines(tmp_path):
    """A laptop, a head and a worker in one network, and the folder that all three see as /mnt."""
    if lacks := missing():
        pytest.skip(f"needs {lacks}")
    key, shared = tmp_path / "key", tmp_path / "shared"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    shared.mkdir()
    addresses = {"head": FILE["provider"]["head_ip"], "worker": FILE["provider"]["worker_ips"][0]}
    with ExitStack() as stack:
        made = {}
        for name in ("laptop", *addresses):
            made[name] = Machine(tmp_path / name, key, shared)
            stack.callback(made[name].end)
        laptop = made["laptop"]
        laptop.run("ip link add br0 type bridge && ip addr add 192.0.2.1/24 dev br0 && ip link set br0 up")
        for name, address in addresses.items():
            link = ["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", made[name].pid]
            subprocess.run(["nsenter", f"--target={laptop.pid}", "--net", *link], check=True)
            laptop.run(f"ip link set {name} master br0 up")
            made[name].run(f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")
            made[name].run("ip route add default via 192.0.2.1")
        yield *made.values(), shared


@pytest.mark.campaign
def test_a_first_cluster_goes_up_runs_the_pipeline_and_goes_down(machines, finished):
    """By the commands of docs/cluster.md; of the file, the second worker and the installation are left out."""
    laptop, head, worker, shared = machines
    provider = FILE["provider"] | {"worker_ips": FILE["provider"]["worker_ips"][:1]}
    setup = [command for command in SETUP if "python" not in command and "pip" not in command]
    assert len(setup) == len(SETUP) - 2
    file = FILE | {"max_workers": 1, "provider": provider, "setup_commands": setup}
    (laptop.home / "cluster.yaml").write_text(yaml.safe_dump(file))
    storage = half_done(finished, shared)

    laptop.run("ray get-auth-token --generate")
    laptop.run("cd ~/checkout && ray up --yes ~/cluster.yaml")
    eventually(lambda: len(nodes(head)) == 2, lambda: head.run("tail -n 50 /tmp/ray/session_latest/logs/monitor.*"))

    tunnel = subprocess.Popen(laptop.words("ray dashboard ~/cluster.yaml"), stdin=subprocess.PIPE)
    submit = "ray job submit --address http://localhost:8265"
    eventually(lambda: "succeeded" in laptop.run(f"{submit} -- true || true"), lambda: "no dashboard")
    job = f"python jobs/pipeline.py --config tests/tiny.yaml --set storage=/mnt/{storage.name}"
    said = laptop.run(f"cd / && {submit} --working-dir ~/checkout -- {job}")
    assert f"/mnt/{storage.name}/report/" in said
    assert whole(storage)

    other = "RAY_AUTH_TOKEN=" + "f" * 64
    assert "refused" in laptop.run(f"{other} {submit} -- true || echo refused")
    tunnel.kill()
    tunnel.wait()

    laptop.run("cd ~/checkout && ray down --yes ~/cluster.yaml")
    for machine in (head, worker):  # a worker notices within a minute that its head has gone
        eventually(lambda machine=machine: not machine.runs_ray(), lambda machine=machine: machine.run("ps -ef"))


# Starts the command here and, by ssh, on the other node, in the same folder with the same path, and ends as they did.
SRUN = """#!/bin/bash
[[ $1 == --cpu-bind=none ]] && shift
ssh -o StrictHostKeyChecking=no OTHER "cd $PWD && PATH=$PATH RAY_AUTH_MODE=$RAY_AUTH_MODE $(printf '%q ' "$@")" &
"$@" && wait $!
"""


@pytest.mark.campaign
def test_the_batch_script_makes_one_cluster_of_its_nodes(machines, finished):
    """Without Slurm, of which two commands are stood in for."""
    _, head, worker, shared = machines
    storage = half_done(finished, shared)
    own = head.home / "bin"
    own.mkdir()
    (own / "srun").write_text(SRUN.replace("OTHER", FILE["provider"]["worker_ips"][0]))
    (own / "scontrol").write_text(f"#!/bin/sh\nprintf '%s\\n' {FILE['provider']['head_ip']} node-2\n")
    for command in own.iterdir():
        command.chmod(0o755)
    head.run("ray get-auth-token --generate")
    (worker.home / ".ray").mkdir()
    shutil.copy(head.home / ".ray" / "auth_token", worker.home / ".ray")  # the nodes of Slurm share a home
    slurm = "export PATH=$HOME/bin:$PATH SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST=node-[1-2]; cd ~/checkout"
    said = head.run(f"{slurm}; deploy/slurm.sh --config tests/tiny.yaml --set storage=/mnt/{storage.name}")
    assert f"/mnt/{storage.name}/report/" in said
    assert whole(storage)
    assert not head.runs_ray()
    assert not worker.runs_ray()
