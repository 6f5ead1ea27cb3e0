"""Downloads from a real server on this machine that cuts, refuses and lies as told."""

import hashlib
import itertools
import re
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from asc_ray.data import download as module
from asc_ray.data.archives import Archive
from asc_ray.data.download import SOURCES, PublicCorpus, download
from asc_ray.errors import ConfigError, UserError

TOP = "tiny-corpus"
FILES = {
    "audio/a.wav": np.random.default_rng(0).bytes(30_000),
    "audio/b.wav": np.random.default_rng(1).bytes(20_000),
    "audio/c.wav": np.random.default_rng(2).bytes(10_000),
    "README.md": b"licence",
    "evaluation_setup/fold1_train.csv": b"filename\tscene_label\n",
    "meta.csv": b"filename\tscene_label\tidentifier\tsource_label\n",
}
PACKED = {"audio.1.zip": [*FILES][:2], "audio.2.zip": [*FILES][2:3], "doc.zip": [*FILES][3:4], "meta.zip": [*FILES][4:]}
REAL_CHUNK, CHUNK = module.CHUNK, 1000


class Server(ThreadingHTTPServer):
    """`requests` are (file, Range header) in order of arrival; the other attributes are what it does wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.statuses: list[int] = []  # answers to the next requests
        self.cuts: list[int] = []  # bytes after which the next bodies end
        self.go_on = threading.Event()  # a cut body ends when this is set
        self.go_on.set()
        self.ranges = True
        self.lengths: bool | str = True  # or what it says instead
        self.etag: str | None = '"1"'

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/files"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, name = self.server, self.path.removeprefix("/files/").removesuffix("?download=1")
        wanted = self.headers.get("Range")
        server.requests.append((name, wanted))
        content = server.files.get(name)
        if server.statuses or content is None:
            self.send_error(server.statuses.pop(0) if server.statuses else 404)
            return
        start = 0
        if_range = self.headers.get("If-Range")
        same = if_range is None or (if_range == server.etag and not if_range.startswith("W/"))
        if wanted and server.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.lengths:
            length = server.lengths if isinstance(server.lengths, str) else str(len(content) - start)
            self.send_header("Content-Length", length)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(content[start:][:cut])
        if cut is not None:
            self.wfile.flush()
            server.go_on.wait(60)

    def log_message(self, *_):
        pass


def packed(folder: Path, name: str, files: dict[str, bytes]) -> bytes:
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return path.read_bytes()


def publish(monkeypatch, files: dict[str, bytes]) -> None:
    """Make `files` the corpus `tiny`, with the checksums they have now."""
    archives = tuple(Archive(name, hashlib.md5(content).hexdigest(), len(content)) for name, content in files.items())
    monkeypatch.setitem(SOURCES, "tiny", PublicCorpus("http://127.0.0.1:1/files", TOP, archives))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the corpus `tiny`."""
    monkeypatch.setattr(module, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(module, "CHUNK", CHUNK)
    monkeypatch.setattr("os.sync", lambda: None)  # it waits for what every other process writes
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "packed").mkdir()
    with Server() as server:
        for name, members in PACKED.items():
            files = {f"{TOP}/{member}": FILES[member] for member in members}
            server.files[name] = packed(tmp_path / "packed", name, files)
        publish(monkeypatch, server.files)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "corpus"


def fetch(server, out, **callbacks) -> bool:
    return download("tiny", out, base_url=server.url, **callbacks)


def held(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def assert_whole(out: Path) -> None:
    found = held(out)
    assert found.pop(".downloaded").count(b"\n") == len(PACKED)
    assert {line.split()[1] for line in found.pop(".sha256").decode().splitlines()} >= {*PACKED}
    assert found == FILES
    assert not (out / ".download").exists()


def part(out: Path, name: str, content: bytes) -> None:
    """What a killed run left."""
    (out / ".download").mkdir(parents=True, exist_ok=True)
    (out / ".download" / f"{name}.part").write_bytes(content)


def test_a_whole_download_and_a_second_run(server, out):
    seen = []
    assert fetch(server, out, on_progress=lambda *event: seen.append(event))
    assert_whole(out)
    assert server.requests == [(name, None) for name in PACKED]
    for name, content in server.files.items():
        done = [event[1] for event in seen if event[0] == name]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, len(content))
        assert {event[2] for event in seen if event[0] == name} == {len(content)}
    server.requests.clear()
    assert not fetch(server, out)
    assert server.requests == []
    assert_whole(out)


def test_a_cut_connection_is_resumed_where_it_stopped(server, out):
    half = len(server.files["audio.1.zip"]) // 2
    server.cuts = [half]
    notes, seen = [], []
    fetch(server, out, on_note=notes.append, on_progress=lambda *event: seen.append(event))
    assert_whole(out)
    # Up to one chunk short of the cut: urllib3 2 drops what it has of a chunk, urllib3 1 does not.
    stopped = max(done for name, done, _ in seen if name == "audio.1.zip" and done <= half)
    assert stopped > half - CHUNK
    assert server.requests[:2] == [("audio.1.zip", None), ("audio.1.zip", f"bytes={stopped}-")]
    assert len(server.requests) == len(PACKED) + 1
    assert sum("next attempt" in note for note in notes) == 1


def test_a_transfer_that_gets_on_is_not_given_up(server, out):
    server.cuts = [CHUNK] * 40
    fetch(server, out)
    assert_whole(out)
    assert server.requests[40] == ("audio.1.zip", f"bytes={40 * CHUNK}-")


@pytest.mark.parametrize("lengths", [True, False])
def test_a_server_without_ranges_sends_everything_again(server, out, lengths):
    server.ranges, server.lengths = False, lengths
    if lengths:
        server.cuts = [20_000]
    else:
        part(out, "audio.1.zip", server.files["audio.1.zip"][:20_000])
    fetch(server, out)
    assert_whole(out)
    assert len(server.requests) == len(PACKED) + lengths


def test_a_length_that_is_no_number_is_none(server, out):
    server.lengths = "many"
    fetch(server, out)
    assert_whole(out)


def test_another_version_on_the_server_is_not_appended(server, out):
    server.cuts = [20_000, 0, 0, 0]
    old, server.files["audio.1.zip"] = server.files["audio.1.zip"], b"an older file" * 4000
    with pytest.raises(UserError, match="attempts brought nothing new"):
        fetch(server, out)
    server.files["audio.1.zip"], server.etag = old, '"2"'
    server.requests.clear()
    fetch(server, out)
    assert_whole(out)
    assert server.requests[:2] == [("audio.1.zip", "bytes=20000-"), ("audio.2.zip", None)]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_ranges_do_not_need_an_etag(server, out, etag):
    server.etag, server.cuts, seen = etag, [20_000], []
    (out / ".download").mkdir(parents=True)
    (out / ".download" / "audio.1.zip.etag").write_text('"of an earlier version"')
    fetch(server, out, on_progress=lambda name, done, _: seen.append(done) if name == "audio.1.zip" else None)
    assert_whole(out)
    assert server.requests[1] == ("audio.1.zip", "bytes=20000-")
    assert seen == sorted(seen)  # the server did continue


def test_a_killed_run_is_continued(server, out, tmp_path, monkeypatch):
    content = np.random.default_rng(3).bytes(4 * REAL_CHUNK)
    server.files = {"audio.1.zip": packed(tmp_path, "large.zip", {f"{TOP}/audio/a.wav": content})}
    publish(monkeypatch, server.files)
    (archive,) = SOURCES["tiny"].archives
    server.cuts = [2 * REAL_CHUNK]
    server.go_on.clear()
    code = (
        "import sys; from pathlib import Path; from asc_ray.data.download import *;"
        f"SOURCES['tiny'] = PublicCorpus('', {TOP!r}, ({archive!r},));"
        "download('tiny', Path(sys.argv[1]), base_url=sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, out, server.url])
    file = out / ".download" / "audio.1.zip.part"
    while process.poll() is None and not (file.exists() and file.stat().st_size == 2 * REAL_CHUNK):
        time.sleep(0.01)
    with pytest.raises(UserError, match="another asc-ray run"):
        fetch(server, out)
    process.kill()
    assert process.wait() == -9
    server.go_on.set()
    fetch(server, out)
    assert (out / "audio" / "a.wav").read_bytes() == content
    assert server.requests == [("audio.1.zip", None), ("audio.1.zip", f"bytes={2 * REAL_CHUNK}-")]


def test_interrupted_anywhere_the_same_command_goes_on(server, out, tmp_path):
    class Stop(BaseException):
        pass

    for stop_at in itertools.count(0, 3):
        here, events = tmp_path / f"corpus{stop_at}", itertools.count()

        def count(*_, events=events, stop_at=stop_at):
            if next(events) == stop_at:
                raise Stop

        try:
            fetch(server, here, on_progress=count, on_note=count)
        except Stop:
            assert not (here / "meta.csv").exists()  # or a stage would take it for a corpus
            assert fetch(server, here)
            assert_whole(here)
        else:
            break
    assert stop_at > 60


@pytest.mark.parametrize("surplus", [b"", b"x"])
def test_a_part_with_nothing_left_to_ask_for(server, out, surplus):
    part(out, "audio.1.zip", server.files["audio.1.zip"] + surplus)
    length = len(server.files["audio.1.zip"] + surplus)
    fetch(server, out)
    assert_whole(out)
    again = [("audio.1.zip", None)] if surplus else []
    assert server.requests[1:-3] == again
    assert server.requests[0] == ("audio.1.zip", f"bytes={length}-")


def test_a_wrong_checksum_is_fetched_once_more(server, out):
    part(out, "audio.1.zip", b"some other file")
    fetch(server, out)
    assert_whole(out)
    assert server.requests[:3] == [("audio.1.zip", "bytes=15-"), ("audio.1.zip", None), ("audio.2.zip", None)]


def test_a_checksum_that_stays_wrong_is_refused(server, out, tmp_path):
    good = server.files["audio.2.zip"]
    right = hashlib.md5(good).hexdigest()
    server.files["audio.2.zip"] = packed(tmp_path, "other.zip", {f"{TOP}/audio/c.wav": b"tampered"})
    with pytest.raises(UserError) as caught:
        fetch(server, out)
    found = hashlib.md5(server.files["audio.2.zip"]).hexdigest()
    assert [text for text in ("audio.2.zip", right, found, "again later") if text not in str(caught.value)] == []
    assert server.requests == [("audio.1.zip", None), ("audio.2.zip", None), ("audio.2.zip", None)]
    assert not (out / "audio" / "c.wav").exists()
    assert not [name for name in ("", ".part", ".done") if (out / ".download" / f"audio.2.zip{name}").exists()]
    server.files["audio.2.zip"] = good
    server.requests.clear()
    fetch(server, out)
    assert_whole(out)
    assert [name for name, _ in server.requests] == [*PACKED][1:]  # audio.1 was unpacked by the first run


def test_no_zip_file_in_spite_of_its_checksum(server, out, monkeypatch):
    whole = server.files["audio.2.zip"]
    server.files["audio.2.zip"] = whole[:-100]
    publish(monkeypatch, server.files)
    with pytest.raises(UserError, match=r"audio\.2\.zip: not a whole zip file"):
        fetch(server, out)
    assert not (out / "audio" / "c.wav").exists()
    server.files["audio.2.zip"] = whole
    publish(monkeypatch, server.files)
    fetch(server, out)
    assert_whole(out)


@pytest.mark.parametrize("member", ["../evil", f"{TOP}/../evil", f"{TOP}/audio/../../evil", "{tmp}/evil"])
def test_a_member_that_leads_out_is_refused(server, out, tmp_path, monkeypatch, member):
    member = member.format(tmp=tmp_path)
    files = {f"{TOP}/audio/c.wav": b"good", member: b"evil"}
    server.files["audio.2.zip"] = packed(tmp_path, "evil.zip", files)
    publish(monkeypatch, server.files)
    with pytest.raises(UserError, match=re.escape(repr(member))) as caught:
        fetch(server, out)
    assert "audio.2.zip" in str(caught.value)
    assert not (out / "audio" / "c.wav").exists()
    assert not list(tmp_path.rglob("evil"))


def test_an_interrupted_unpacking_is_repaired(server, out):
    (out / ".download").mkdir(parents=True)
    (out / ".download" / "audio.1.zip").write_bytes(server.files["audio.1.zip"])
    (out / "audio").mkdir()
    (out / "audio" / "a.wav").write_bytes(FILES["audio/a.wav"][:1000])
    fetch(server, out)
    assert_whole(out)
    assert server.requests == [(name, None) for name in [*PACKED][1:]]


@pytest.mark.parametrize("status", [403, 404])
def test_what_the_server_refuses_is_an_error_at_once(server, out, status):
    server.statuses = [status]
    with pytest.raises(UserError, match=rf"files/audio\.1\.zip\?download=1: HTTP {status}"):
        fetch(server, out)
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(server, out):
    server.statuses = [429, 503, 500]
    fetch(server, out)
    assert_whole(out)
    assert len(server.requests) == len(PACKED) + 3


def test_a_server_that_stays_busy_or_is_not_there_is_an_error(server, out):
    server.statuses = [503] * 4
    with pytest.raises(UserError, match=r"audio\.1\.zip.*HTTP 503.*goes on"):
        fetch(server, out)
    assert len(server.requests) == 4
    with pytest.raises(UserError, match=r"audio\.1\.zip.*: \[Errno 111\] Connection refused; 4 attempts"):
        download("tiny", out, base_url="http://127.0.0.1:1")
    fetch(server, out)
    assert_whole(out)


def test_a_disk_too_small_is_said_before_anything_is_fetched(server, out, monkeypatch):
    monkeypatch.setitem(SOURCES, "tiny", PublicCorpus("", TOP, (Archive("audio.1.zip", "0" * 32, 10**18),)))
    with pytest.raises(UserError, match=r"GB free, 2150000000\.0 GB needed"):
        fetch(server, out)
    assert server.requests == []


def test_a_folder_with_something_else_in_it_is_left_alone(server, out):
    out.mkdir()
    (out / "note.txt").write_text("mine")
    for folder in (out, out / "note.txt"):
        with pytest.raises(UserError, match="not an empty folder"):
            fetch(server, folder)
    assert held(out) == {"note.txt": b"mine"}
    assert server.requests == []


def test_what_cannot_be_written_is_named(server, out, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/corpus"):
        fetch(server, tmp_path / "file" / "corpus")
    (out / ".download").mkdir(parents=True)
    (out / "audio").write_text("in the way")
    with pytest.raises(UserError, match=r"corpus/audio/a\.wav: a link or another thing stands on the way"):
        fetch(server, out)


def test_an_unknown_corpus_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'tau2022'.*known: tau22"):
        download("tau2022", tmp_path)


def test_without_requests_the_extra_is_named(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(UserError, match=re.escape("pip install 'asc-ray[download]'")):
        download("tau22", out)
    assert not out.exists()


def test_the_official_archives():
    source = SOURCES["tau22"]
    names = [archive.name.removeprefix(f"{source.top}.") for archive in source.archives]
    assert names == [*(f"audio.{i}.zip" for i in range(1, 17)), "doc.zip", "meta.zip"]
    assert all(re.fullmatch("[0-9a-f]{32}", archive.md5) for archive in source.archives)
    assert len({archive.md5 for archive in source.archives}) == 18
    # The record's own total is given as 25.6 GiB.
    assert sum(archive.size for archive in source.archives) / 2**30 == pytest.approx(25.6, abs=0.05)
    assert source.url == "https://zenodo.org/records/6337421/files"
