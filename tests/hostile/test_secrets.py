"""Nothing that is written, logged or printed holds what opens a server; nothing in the package runs what it reads."""

import ast
import csv
import io
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY
from refusal import refused

import asc_ray
from asc_ray.config.composition import load_config
from asc_ray.evaluation.scores import evaluate
from asc_ray.plan import dump
from asc_ray.report.card import Card, render_card
from asc_ray.report.table import ComparedRow, Comparison, comma_separated, markdown
from asc_ray.shown import in_csv, in_markdown, masked, path_in_csv, printable
from asc_ray.tracking.config import TrackingConfig
from asc_ray.tracking.runs import Tracker
from asc_ray.tracking.things import Thing

pytestmark = pytest.mark.timeout(120)
URIS = [
    "http://me:hunter2@host:5000",
    "https://hunter2@host/path",
    "postgresql://me:hunter2@host/mlflow",
    "postgresql://me:a:b@hunter2@host/mlflow",
    "postgresql://host/mlflow?user=me&password=hunter2",
    "https://host/?api_token=hunter2&x=1",
    "http://me:pa'hunter2@host",
    "https://host/?sv=1&sig=hunter2",
    "mysql+pymysql://me:%68unter2@host/db?ssl_key=hunter2",
]


@pytest.mark.parametrize("uri", URIS)
def test_a_secret_is_masked_wherever_it_stands(uri):
    told = masked(f"cannot reach {uri}")
    assert "unter2" not in told
    assert "host" in told
    assert "hunter2" not in masked("login of hunter2 refused", "http://me:%68unter2@host")
    config = load_config(TINY, [f"tracking.uri={uri}"])
    assert config.tracking.uri == uri
    assert "unter2" not in str(dump(config))
    assert "unter2" not in config.model_dump_json()


def test_what_has_no_secret_stays_as_it_is():
    for text in ("sqlite:////storage/mlflow.db", "http://host:5000", "a@b.c wrote: x=1, monkeys=2 at /a/b"):
        assert masked(text) == text.replace("monkeys=2", "monkeys=***")


def test_a_masked_configuration_says_so(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"base": str(TINY), "tracking": {"uri": "http://***@host"}}))
    refused(lambda: load_config(tmp_path / "c.yaml"), "its login was taken out when it was written", code=2)


class Refusing(BaseHTTPRequestHandler):
    """An MLflow server that knows nobody."""

    def do_GET(self):
        self.send_error(401, "who is hunter2")

    do_POST = do_GET

    def log_message(self, *_):
        pass


def test_a_server_that_refuses_is_named_without_its_login(tmp_path):
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        uri = f"http://me:hunter2@127.0.0.1:{server.server_port}"
        said = []
        with closing(Tracker(TrackingConfig(uri=uri, required=True, wait_seconds=0.0), tmp_path, said.append)) as t:
            told = refused(t.greet, "MLflow at http://***@127.0.0.1", "401")
            t.start(Thing("teacher", "k", "teacher"))
        server.shutdown()
        thread.join()
    assert "hunter2" not in told
    assert len(said) == 2
    assert "hunter2" not in "".join(said)
    assert not [path for path in tmp_path.rglob("*.jsonl") if b"hunter2" in path.read_bytes()]


def test_text_from_anywhere_is_fit_for_where_it_is_shown():
    assert printable("a\x1b[2Jb\u202e\ud800\n") == "a\\x1b[2Jb\\u202e\\ud800\\n"
    assert printable("two\nlines", keep="\n") == "two\nlines"
    assert printable("Straße 音") == "Straße 音"
    assert [in_csv(text) for text in ("=1+1", "@x", "-1", "+1", "park")] == ["'=1+1", "'@x", "'-1", "'+1", "park"]
    assert path_in_csv("=x.wav") == "./=x.wav"
    assert in_markdown("a|b <img> *c* [d](e)") == "a\\|b \\<img\\> \\*c\\* \\[d\\](e)"


ODD = ("<img src=x onerror=y>", "=1+1", "a|b")  # devices, or scenes


def odd_scores():
    """Of a corpus whose devices and scenes are called what no page and no table should obey."""
    rows = np.repeat(np.arange(len(ODD)), 2)
    return evaluate(np.eye(len(ODD))[rows] * 5, rows, [ODD[row] for row in rows], ODD, frozenset(ODD[1:]))


def test_odd_names_are_text_in_every_table():
    scores = odd_scores()
    row = ComparedRow(name="@row", parameters=1, macs=1, scores=(scores, None))
    compared = Comparison(title="<b>", corpus="+corpus", training_clips=[1], unseen_devices=ODD, rows=[row])
    shown = markdown(compared)
    assert "<img" not in shown.replace("\\<img", "")
    assert "<b>" not in shown
    assert shown.count(" | ") == shown.replace("a\\|b", "").count(" | ")
    cells = [cell for line in csv.reader(io.StringIO(comma_separated(compared))) for cell in line]
    assert {"'=1+1", "'@row", "'+corpus"} <= set(cells)
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+"))]


def test_odd_names_are_text_in_a_card():
    scores = odd_scores()
    figures = dict.fromkeys(("parameters", "macs", "file_bytes", "peak_activations", "sample_rate"), 1)
    sizes = dict.fromkeys(("int8", "float32", "int32"), 0)
    agreement = {"differ": 0, "clips": 1, "largest_difference": 0.0}
    card = render_card(
        Card(
            title="t", version="1", network="n", labels=ODD, input=(1, 1, 2, 3), bytes=sizes, scores=scores,
            float_scores=None, unseen=ODD[1:], validation=0.5, agreement=agreement, corpus="<b>", fingerprint="f",
            recipe="", license="<b>", corpus_notes=ODD, splits={"train": (1, 1)},
            lineage={"<b>": "key"}, operators=(), **figures,
        )
    )  # fmt: skip
    assert "<img" not in card.replace("\\<img", "")
    assert "<b>" not in card
    assert "| (a\\|b) |" in card


RUNS = {"eval", "exec", "compile", "__import__"}
READERS = {
    "pickle.load", "pickle.loads", "torch.jit.load", "torch.export.load", "torch.package.PackageImporter",
    "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "dill.load", "cloudpickle.load",
    "torch.hub.load", "marshal.loads", "shelve.open", "os.system", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(Path(asc_ray.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_nothing_runs_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert name not in RUNS | READERS
        if name == "torch.load":
            assert keywords["weights_only"] == "True"
        if name in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle", "False") == "False"
        assert keywords.get("shell") != "True"
