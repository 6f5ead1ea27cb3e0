"""Disturb pipelines by faults drawn from a seed, give the same command again, and compare with an undisturbed run.

    python bench/chaos.py SEED PIPELINES [--faults 9] [--out FILE] [--kinds KIND ...]

A pipeline is that of tests/tiny.yaml with three teachers, two of them with two workers, and an export. It runs on a
local cluster of three raylets and tells a real MLflow server, which is reached through a proxy. In the end its
artifacts must equal those of the undisturbed run, MLflow must have one run a thing and none unfinished, no process and
no temporary file may be left, and nothing that was finished may have been made again.

A line of JSON for each fault goes to --out; counts by kind and stage are printed. The disk can be full only for root,
which may mount a file system of its own; the clock can jump only with Debian's faketime.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.tracking import MlflowClient
from tracking import Proxy, proxy, server

from asc_ray.artifacts import artifacts_in
from asc_ray.tracking.things import RUN_TAG, STORAGE_TAG

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "teachers.systems=[passt_dirfms_1, cpr_128k_fms_1, cpr_128k_dirfms_1]",
    "teachers.resources_for={cp_resnet: {workers: 2}}",
)
STAGES = ("corpus", "ingest", "teachers", "logits", "fuse", "sweep", "student", "qat", "evaluate", "report")
MOST_ATTEMPTS = 8  # in which a command gets no further
DISK_MB = 400
# So that a driver does not wait for a dead head longer than is needed to see that it ends.
RAY = {"RAY_gcs_rpc_server_reconnect_timeout_s": "30"}
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
print(cluster.address, cluster.head_node.all_processes["gcs_server"][0].process.pid, flush=True)
for line in sys.stdin:
    node = cluster.add_node(num_cpus=1)
    print("node", node.all_processes["raylet"][0].process.pid, flush=True)
"""


class Server(Proxy):
    """The way to MLflow, which can be slow or closed."""

    closed = False

    def answer(self) -> None:
        if self.closed:
            self.send_error(503)
            return
        try:
            super().answer()
        except OSError:  # nothing listens behind it, or the driver has been killed
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = lambda self: self.answer()


class World:
    """A cluster of three raylets, a tracking server, a disk, and the driver of one pipeline among them."""

    def __init__(self, folder: Path, storage: Path, uri: str, settings: Sequence[str] = SETTINGS) -> None:
        self.storage, self.uri, self.settings = storage, uri, settings
        self.log = folder / f"{storage.name}.log"
        self.driver: subprocess.Popen[bytes] | None = None
        self.jump: list[str] = []
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what it starts behind itself
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the driver would ignore it, too
        self.start_cluster()

    def stop(self) -> None:
        if self.driver is not None:
            kill(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
        self.stop_cluster()

    def start_cluster(self) -> None:
        self.cluster = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment(), start_new_session=True,
        )  # fmt: skip
        self.address, self.head = self._answer(r"([\d.]+:\d+) (\d+)")
        self.nodes = [self.add_node() for _ in range(2)]

    def add_node(self) -> int:
        assert self.cluster.stdin is not None
        self.cluster.stdin.write("\n")
        self.cluster.stdin.flush()
        return int(self._answer(r"(node) (\d+)")[1])

    def _answer(self, pattern: str) -> tuple[str, str]:
        assert self.cluster.stdout is not None
        found = next(match for line in self.cluster.stdout if (match := re.fullmatch(pattern, line.strip())))
        return found[1], found[2]

    def stop_cluster(self) -> None:
        below = descendants(self.cluster.pid)
        for pid in (self.cluster.pid, *below):
            kill(pid, signal.SIGKILL)
        self.cluster.wait()

    def go_on(self) -> None:
        """Give the pipeline's command, which is always the same."""
        settings = [f"storage={self.storage}", f"tracking.uri={self.uri}", *self.settings]
        self.words = ["--config", str(ROOT / "tests" / "tiny.yaml")]
        self.words += [word for setting in settings for word in ("--set", setting)]
        self.begun = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as out:
            self.driver = subprocess.Popen(
                [*self.jump, sys.executable, "-m", "asc_ray.cli", "pipeline", *self.words],
                stdout=out, stderr=out, env=environment() | {"RAY_ADDRESS": self.address}, start_new_session=True,
            )  # fmt: skip
        self.jump = []

    def output(self) -> str:
        """Return what the driver has printed since the command was last given."""
        with self.log.open("rb") as file:
            file.seek(self.begun)
            return file.read().decode(errors="replace")

    def stage(self) -> str:
        begun = re.findall(rf"^({'|'.join(STAGES)}) \.\.\.$", self.output(), re.MULTILINE)
        return begun[-1] if begun else "start"

    def position(self) -> int:
        return STAGES.index(stage) if (stage := self.stage()) in STAGES else -1

    def ended(self) -> bool:
        return self.driver is None or self.driver.poll() is not None

    def wait(self, seconds: float) -> bool:
        """Wait for the driver's end; False where it has not come."""
        assert self.driver is not None
        try:
            self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def workers(self) -> list[int]:
        return descendants(self.cluster.pid, "RayTrainWorker", "ray::_run", "ray::_trial", "ImplicitFunc")


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | RAY | {"PYTHONPATH": os.pathsep.join(paths)}


def descendants(root: int, *titles: str) -> list[int]:
    """Return the processes below `root`; with titles those alone that have one of them in their command line."""
    children: dict[int, list[int]] = {}
    named: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid = int(stat.parent.name)
            children.setdefault(int(stat.read_text().rsplit(")", 1)[1].split()[1]), []).append(pid)
            named[pid] = (stat.parent / "cmdline").read_text()
        except OSError:  # it ended meanwhile
            continue
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += [pid for pid in below if not titles or any(title in named.get(pid, "") for title in titles)]
        waiting += below
    return sorted(found)


def kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def stopped(pid: int, seconds: float) -> None:
    kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    kill(pid, signal.SIGCONT)


def to_driver(number: int) -> Callable[[World, random.Random], None]:
    def fault(world: World, draw: random.Random) -> None:
        assert world.driver is not None
        kill(world.driver.pid, number)
        world.wait(60)

    return fault


def driver_stopped(world: World, draw: random.Random) -> None:
    assert world.driver is not None
    stopped(world.driver.pid, draw.uniform(3, 15))


def worker_killed(world: World, draw: random.Random) -> None:
    if workers := world.workers():
        kill(draw.choice(workers), signal.SIGKILL)


def worker_stopped(world: World, draw: random.Random) -> None:
    if workers := world.workers():
        stopped(draw.choice(workers), draw.uniform(3, 10))


def controller_killed(world: World, draw: random.Random) -> None:
    if controllers := descendants(world.cluster.pid, "TrainController", "ray::Queue", "ray::Mailbox"):
        kill(draw.choice(controllers), signal.SIGKILL)


def raylet_killed(world: World, draw: random.Random) -> None:
    kill(world.nodes.pop(draw.randrange(2)), signal.SIGKILL)
    time.sleep(draw.uniform(0, 5))
    world.nodes.append(world.add_node())


def raylet_stopped(world: World, draw: random.Random) -> None:
    stopped(draw.choice(world.nodes), draw.uniform(3, 10))


def head_killed(world: World, draw: random.Random) -> None:
    kill(int(world.head), signal.SIGKILL)
    world.wait(120)
    world.stop_cluster()
    world.start_cluster()


def mlflow_slow(world: World, draw: random.Random) -> None:
    Server.delay = draw.uniform(0.2, 2)
    world.wait(15)
    Server.delay = 0.0


def mlflow_503(world: World, draw: random.Random) -> None:
    Server.closed = True
    world.wait(draw.uniform(5, 40))
    Server.closed = False


def mlflow_gone(world: World, draw: random.Random) -> None:
    behind, Server.behind = Server.behind, "http://127.0.0.1:9"
    world.wait(draw.uniform(5, 40))
    Server.behind = behind


def disk_full(world: World, draw: random.Random) -> None:
    ballast = world.storage.parent / "ballast"
    try:
        with ballast.open("wb") as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                        file.flush()
                except OSError:
                    continue
    except OSError:
        pass
    world.wait(60)
    ballast.unlink()


def clock_jumps(world: World, draw: random.Random) -> None:
    """End the driver, and let the next one live in another time."""
    to_driver(signal.SIGKILL)(world, draw)
    world.jump = ["faketime", "-f", draw.choice(["-1d", "+1d", "+400d"])]


FAULTS: dict[str, Callable[[World, random.Random], None]] = {
    "driver killed": to_driver(signal.SIGKILL),
    "driver: SIGTERM": to_driver(signal.SIGTERM),
    "driver: SIGHUP": to_driver(signal.SIGHUP),
    "driver: Ctrl-C": to_driver(signal.SIGINT),
    "driver stopped": driver_stopped,
    "worker killed": worker_killed,
    "worker stopped": worker_stopped,
    "controller killed": controller_killed,
    "raylet killed": raylet_killed,
    "raylet stopped": raylet_stopped,
    "head killed": head_killed,
    "MLflow slow": mlflow_slow,
    "MLflow answers 503": mlflow_503,
    "MLflow gone": mlflow_gone,
    "disk full": disk_full,
    "clock jumps": clock_jumps,
}


def disturbed(world: World, kinds: list[str], draw: random.Random, note: Callable[[dict[str, Any]], None]) -> None:
    """Run the pipeline to its end under these faults, one after the other, each in a stage that is drawn."""
    finished: dict[Path, int] = {}
    targets = sorted(draw.choices(range(len(STAGES)), k=len(kinds)))
    last, without_gain = "", 0
    for kind, target in [*zip(kinds, targets, strict=True), ("", len(STAGES))]:
        while True:
            if world.ended():
                again = [path for path, stamp in finished.items() if path.stat().st_mtime_ns != stamp]
                assert not again, f"finished things were made again: {again}"
                finished = {p: p.stat().st_mtime_ns for p in world.storage.glob("*/*/manifest.json")}
                if world.driver is not None and world.driver.returncode == 0:
                    resend = [sys.executable, "-m", "asc_ray.cli", "track", "--resend", *world.words]
                    subprocess.run(resend, env=environment(), check=True, stdout=subprocess.DEVNULL)
                    return
                state = f"{world.stage() if world.driver else ''} {len(finished)}"
                without_gain = without_gain + 1 if state == last else 0
                last = state
                assert without_gain < MOST_ATTEMPTS, f"the same command gets no further:\n{world.output()}"
                world.go_on()
            while not world.wait(0.05) and kind and world.position() < target:
                pass
            if kind and not world.ended():
                break
            if not kind:
                world.wait(600)
        world.wait(draw.uniform(0, 4))
        if world.ended():  # it was quicker: strike the next command
            world.go_on()
            world.wait(draw.uniform(5, 15))
        stage = world.stage()
        FAULTS[kind](world, draw)
        time.sleep(1.0)
        lines = world.output().strip().splitlines()
        note({
            "kind": kind,
            "stage": stage,
            "ended": world.driver.poll() if world.driver else None,
            "traceback": any(line.startswith("Traceback") for line in lines),
            "last": lines[-1] if lines else "",
        })  # fmt: skip


def differences(world: World, whole: Path) -> list[str]:
    """Return what is not as in the undisturbed run's storage, or was left behind."""
    found = []
    mine, theirs = ({a.path.name: a for a in artifacts_in(s)} for s in (world.storage, whole))
    if mine.keys() != theirs.keys():
        found.append(f"other artifacts: {sorted(mine.keys() ^ theirs.keys())}")
    for name in mine.keys() & theirs.keys():
        one, other = (content(artifact) for artifact in (mine[name], theirs[name]))
        found += [f"{name}: {key} differs" for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
    for pattern in ("**/*.tmp", "**/.*.tmp", "*/*.partial", ".ray"):
        found += [f"left behind: {path}" for path in world.storage.glob(pattern)]
    client = MlflowClient(world.uri)
    query = f"tags.`{STORAGE_TAG}` = '{world.storage}'"
    runs = client.search_runs([client.get_experiment_by_name("asc-ray").experiment_id], query, max_results=1000)
    if not runs:
        found.append("MLflow: no run")
    counts = Counter(run.data.tags[RUN_TAG] for run in runs)
    found += [f"MLflow: {count} runs of {thing}" for thing, count in counts.items() if count > 1]
    found += [f"MLflow: {r.info.run_name} is {r.info.status}" for r in runs if r.info.status != "FINISHED"]
    return found


def content(artifact: Any) -> dict[str, Any]:
    """Return what two runs agree about: facts without times, and the checksums of files that hold results."""
    files = artifact.manifest()["files"]
    kept = {name: entry["sha256"] for name, entry in files.items() if re.search(r"\.(safetensors|arrow|npy)$", name)}
    return kept | dict(leaves(artifact.facts()))


# Times of the work.
_OF_THE_MACHINE = re.compile(r"seconds|per_second|minutes_left")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries and lists with their paths."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            if not _OF_THE_MACHINE.search(str(name)):
                yield from leaves(part, f"{path}/{name}")
    else:
        yield path, value


def campaign(seed: int, pipelines: int, faults: int, kinds: list[str], out: Path | None) -> int:
    """Run the pipelines; return how many did not end as they must."""
    draw, wrong, begun = random.Random(seed), 0, time.monotonic()
    counts: Counter[tuple[str, str]] = Counter()
    bag: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        Server.behind = stack.enter_context(server(folder))
        uri = stack.enter_context(proxy(Server))
        spared = descendants(os.getpid())
        disks = folder / "disk"
        disks.mkdir()
        if "disk full" in kinds:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "chaos", disks], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", disks], check=False)
        for number in range(pipelines + 1):
            while len(bag) < faults:
                bag += draw.sample(kinds, len(kinds))
            drawn, bag = (bag[:faults], bag[faults:]) if number else ([], bag)
            world = World(folder, disks / str(number), uri)

            def note(fault: dict[str, Any], number: int = number) -> None:
                counts[fault["kind"], fault["stage"]] += 1
                print(" ", *(f"{name} {value!r:.150}" for name, value in fault.items()), flush=True)
                if out:
                    with out.open("a") as file:
                        file.write(json.dumps({"seed": seed, "pipeline": number, **fault}) + "\n")

            try:
                disturbed(world, drawn, draw, note)
                found = differences(world, disks / "0") if number else []
            except AssertionError as error:
                found = [str(error)]
            finally:
                world.stop()
            found += [f"still there: process {pid}" for pid in descendants(os.getpid()) if pid not in spared]
            what = f"pipeline {number}, {len(drawn)} faults" if number else "undisturbed"
            minutes = (time.monotonic() - begun) / 60
            print(f"{what}: {found or 'as it must be'}, {minutes:.1f} min", flush=True)
            wrong += bool(found)
            if number:
                shutil.rmtree(world.storage)
    table = pd.Series(counts, dtype=int).unstack(fill_value=0)
    print(table.reindex(columns=[stage for stage in ("start", *STAGES) if stage in table]).to_string())
    print(f"{sum(counts.values())} faults, {pipelines - wrong} of {pipelines} pipelines ended as undisturbed")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int)
    parser.add_argument("pipelines", type=int)
    parser.add_argument("--faults", type=int, default=9, help="for each pipeline")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=possible())
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    sys.exit(campaign(asked.seed, asked.pipelines, asked.faults, asked.kinds, asked.out) > 0)


def possible() -> list[str]:
    absent = {"disk full": os.geteuid() != 0, "clock jumps": shutil.which("faketime") is None}
    return [kind for kind in FAULTS if not absent.get(kind)]


if __name__ == "__main__":
    main()
