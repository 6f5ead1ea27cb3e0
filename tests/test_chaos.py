"""A short run of bench/chaos.py: ten faults, and the results of an unbroken run."""

import random
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
from chaos import FAULTS, Server, World, differences, disturbed
from tracking import proxy, server

# Without those that take a minute each, or root.
KINDS = [kind for kind in FAULTS if kind not in ("head killed", "disk full", "clock jumps", "MLflow slow")]


def test_ten_faults_change_no_result(finished, tmp_path):
    faults = []
    with server(tmp_path) as Server.behind, proxy(Server) as uri:
        world = World(tmp_path, tmp_path / "storage", uri, settings=())
        try:
            disturbed(world, KINDS[:10], random.Random(11), faults.append)
            found = differences(world, finished.storage)
        finally:
            world.stop()
    assert found == []
    assert [fault["kind"] for fault in faults] == KINDS[:10]
    ends = {fault["kind"]: fault["ended"] for fault in faults}
    assert [ends[f"driver{how}"] for how in (" killed", ": SIGTERM", ": SIGHUP", ": Ctrl-C")] == [-9, 143, 129, 130]
    assert not [fault["last"] for fault in faults if fault["traceback"]]
