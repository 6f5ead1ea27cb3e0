"""The tiny configuration, run once for all tests that look at what it leaves behind."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import settings
from mlflow.tracking import MlflowClient
from store import SECRET, Bucket, s3_server
from torch import nn

from asc_ray.artifacts import Artifact, file_sha256, read_manifest, write_record
from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.data.arrow import map_batch, write_batch
from asc_ray.data.clip import Clip
from asc_ray.data.clips import map_pcm
from asc_ray.data.corpus import Corpus
from asc_ray.data.samples import checksums, write_index
from asc_ray.data.shards import write_store
from asc_ray.models.config import DSFlexiNetConfig
from asc_ray.models.registry import build
from asc_ray.tracking.config import default_uri
from asc_ray.training.dataset import IMPULSE_RESPONSES, save_bank

# A deadline would be an assertion on time: a machine with other work to do misses any.
settings.register_profile("asc-ray", deadline=None)
settings.load_profile("asc-ray")

# Worker processes of pytest-xdist ignore Ctrl-C, and the pipelines they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# As the workers of the presets: sums split over threads can differ in the last bit from one call to the next.
torch.set_num_threads(1)

# Before any cluster starts: nodes have the credentials of the tests' S3 server in their environment.
os.environ |= SECRET | {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "tiny.yaml"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "asc_ray.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of a user without a cluster: each command starts one, and takes it along when it ends or is killed."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@cache
def cluster() -> tuple[subprocess.Popen, str]:
    """One for all commands of this process that need none of their own, and its address: it halves their time.

    In a process of its own: Ray leaves the login of a test's own cluster in this one's environment.
    """
    words = [sys.executable, "-c", CLUSTER]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    )
    assert process.stdout is not None
    address = next(line.strip() for line in process.stdout if re.fullmatch(r"[\d.]+:\d+", line.strip()))
    return process, address


def joined() -> dict[str, str]:
    """Of a user with a cluster of two CPUs."""
    return environment() | {"RAY_ADDRESS": cluster()[1]}


def coded(clips: Sequence[Clip]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the clips' scenes as numbers, their places as numbers, and the scenes."""
    labels, scene = np.unique([clip.scene for clip in clips], return_inverse=True)
    return scene, np.unique([clip.place for clip in clips], return_inverse=True)[1], labels.tolist()


def noise(count: int, samples: int = 32_000, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((count, samples), dtype=np.float32)


@pytest.fixture
def canary(tmp_path) -> Iterator[Path]:
    """What a payload would write if anything ran it; no test may find it."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "a payload ran"


BUNDLE_LABELS = ("airport", "bus", "metro", "park")
BUNDLE_FRONTEND = FrontendConfig(mels=64, hop=1000)


@dataclass(frozen=True)
class Int8Training:
    """Of the smallest student with random weights: its artifact's folder, and the model that it has left there."""

    path: Path
    model: nn.Module


@pytest.fixture(scope="session")
def int8_training(tmp_path_factory) -> Int8Training:
    from asc_ray.int8 import conversion, preparation
    from asc_ray.int8.onnx_form import export_onnx

    artifact = Artifact(tmp_path_factory.mktemp("int8"), "int8", "student", "0123456789abcdef", {}, {})
    folder = artifact.open_partial()
    torch.manual_seed(0)
    shape = (1, BUNDLE_FRONTEND.mels, BUNDLE_FRONTEND.frames(32_000))
    fake = preparation.prepare(build(DSFlexiNetConfig(size="sm1"), len(BUNDLE_LABELS)), torch.zeros(2, *shape))
    preparation.set_training(fake, True)
    for _ in range(3):
        fake(torch.randn(8, *shape))
    model = conversion.convert(fake)
    export_onnx(model, folder / "model.onnx")
    artifact.finish({})
    return Int8Training(artifact.path, model)


@pytest.fixture
def bundle(int8_training, tmp_path) -> Path:
    """A fresh bundle that may be damaged."""
    from asc_ray.int8.bundle import seal, write_bundle

    folder = tmp_path / "bundle"
    folder.mkdir()
    write_bundle(folder, int8_training.path, BUNDLE_LABELS, BUNDLE_FRONTEND)
    (folder / "card.md").write_text("# Of a test")
    seal(folder)
    return folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[Bucket]:
    """A bucket on an S3 server."""
    with s3_server() as port:
        yield Bucket(port).make()


@pytest.fixture(scope="session", autouse=True)
def _no_cluster_stays():
    yield
    if cluster.cache_info().currsize:
        cluster()[0].communicate()


@cache
def _database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(default_uri(Path(folder))).search_experiments()
        return (Path(folder) / "mlflow.db").read_bytes()


def new_storage(storage: Path) -> Path:
    """An empty storage with MLflow's database, which takes four seconds to make."""
    storage.mkdir(parents=True, exist_ok=True)
    (storage / "mlflow.db").write_bytes(_database())
    return storage


def processes(title):
    """Process ids below this one with the title that Ray gave them."""
    children, titles = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            titles[int(stat.parent.name)] = (stat.parent / "cmdline").read_text()
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = set(), [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found |= {pid for pid in below if title in titles[pid]}
        waiting += below
    return found


def clip_store(storage: Path, corpus: Corpus, shard_clips: int = 64, responses: Path | None = None) -> Path:
    """A finished clip store of the corpus, as `ingest` leaves it, without a cluster."""
    artifact = Artifact(storage, "clips", "clips", "0123456789abcdef", {}, {})
    folder = artifact.open_partial()
    write_store(replace(corpus, fingerprint="f00d"), folder, shard_clips)
    save_bank(ImpulseBank.load(responses), folder / IMPULSE_RESPONSES)
    artifact.finish({})
    return artifact.path


def relabel_test_clips(storage):
    """Give all clips of the test split the first scene: who looks at them comes to other results."""
    for file in storage.glob("clips/*/shard-*.arrow"):
        batch = map_batch(file)
        test = batch["split"].dictionary_decode().to_numpy(zero_copy_only=False) == "test"
        scene = np.where(test, 0, batch["scene"].indices.to_numpy()).astype(np.int32)
        scenes = pa.DictionaryArray.from_arrays(pa.array(scene), batch["scene"].dictionary)
        write_batch(batch.set_column(1, "scene", scenes).replace_schema_metadata(batch.schema.metadata), file)
        write_index(file, checksums(map_pcm(file)))
    for folder in storage.glob("clips/*"):
        reseal(folder)


def reseal(folder: Path) -> None:
    """Have an artifact's manifest say of its files what they are now."""
    manifest = read_manifest(folder)
    files = {name: folder / name for name in manifest["files"] if (folder / name).is_file()}
    entries = {name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for name, f in files.items()}
    write_record(folder / "manifest.json", manifest | {"files": entries})


@dataclass(frozen=True)
class Run:
    storage: Path
    output: str

    @property
    def arguments(self) -> tuple[object, ...]:
        return "--config", TINY, "--set", f"storage={self.storage}"


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Run:
    """A pipeline that ran from the corpus to the report without a break; one for all of pytest's worker processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole"
    folder.mkdir(exist_ok=True)
    run, output = Run(folder / "storage", ""), folder / "output"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.is_file():
            done = subprocess.run(
                command("pipeline", *run.arguments), capture_output=True, text=True, env=environment(), check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            output.write_text(done.stdout)
    return Run(run.storage, output.read_text())
