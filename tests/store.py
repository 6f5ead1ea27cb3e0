"""An S3 server as pip brings it (moto's), and storages on it and in folders."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem

from asc_ray.places import node_folder

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
SECRET = {"AWS_ACCESS_KEY_ID": "AKIAHUNTER2", "AWS_SECRET_ACCESS_KEY": "hunter2/of/the+store"}


@contextmanager
def s3_server(allowed: int | None = None) -> Iterator[int]:
    """The server's port; what it holds goes with it. After so many `allowed` requests it asks who somebody is."""
    words = [sys.executable, "-c", SERVER]
    own = os.environ if allowed is None else os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": str(allowed)}
    server = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=own
    )
    assert server.stdout is not None
    try:
        yield int(server.stdout.readline())
    finally:
        server.communicate()


@dataclass(frozen=True)
class Bucket:
    port: int
    name: str = "asc-ray"

    @property
    def query(self) -> str:
        return f"?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def uri(self, prefix: str) -> str:
        return f"s3://{self.name}/{prefix}{self.query}"

    def make(self) -> "Bucket":
        files, _ = FileSystem.from_uri(f"s3://{self.name}{self.query}&allow_bucket_creation=true")
        files.create_dir(self.name)
        return self

    def files(self, prefix: str) -> dict[str, bytes]:
        """All objects below a prefix, by name."""
        files, base = FileSystem.from_uri(self.uri(prefix))
        infos = files.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
        return {
            info.path.removeprefix(f"{base}/"): files.open_input_stream(info.path).read()
            for info in infos
            if info.is_file
        }

    def write(self, name: str, content: bytes) -> None:
        files, path = FileSystem.from_uri(self.uri(name))
        with files.open_output_stream(path) as sink:
            sink.write(content)

    def delete(self, name: str) -> None:
        files, path = FileSystem.from_uri(self.uri(name))
        files.delete_dir(path) if files.get_file_info(path).type.name == "Directory" else files.delete_file(path)


@dataclass(frozen=True)
class Place:
    """A storage, and nodes that work with it: a folder that all of them reach, or one on the server."""

    setting: str  # the configuration's `storage`
    disks: Path
    bucket: Bucket | None = None

    @property
    def uri(self) -> str:
        return self.setting

    def node(self, name: str) -> Path:
        """The folder in which a node has the storage."""
        return node_folder(self.setting, self.disks / name) if self.bucket else Path(self.setting)

    def settings(self, node: str) -> list[str]:
        """What a command on a node is given."""
        return [f"storage={self.setting}", *([f"data.cache={self.disks / node}"] if self.bucket else [])]
