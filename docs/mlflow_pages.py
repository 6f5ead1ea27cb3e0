"""Open MLflow's pages of a finished run in a headless browser, check what they show, and take pictures of them.

python docs/mlflow_pages.py runs/demo [FOLDER FOR PICTURES]

It starts `mlflow ui` itself, and needs what docs/screenshots.py needs.
"""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow.tracking import MlflowClient
from screenshots import browser, from_command_line

from asc_ray.tracking.config import default_uri

COLUMNS = ("test/accuracy", "test/unseen", "test/log_loss", "validation/accuracy")


@contextmanager
def ui(storage: Path) -> Iterator[str]:
    """Serve the storage's runs, and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryFile() as log:
        node = subprocess.Popen([*words, "--backend-store-uri", default_uri(storage)], stdout=log, stderr=log)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/#"
        finally:
            node.terminate()
            node.wait()


def runs_page(page: Any, address: str, experiment: str, kind: str) -> None:
    """Open the runs of one kind: as in docs/mlflow.md, with the parent unfolded."""
    query = quote(f"tags.`asc_ray.kind` = '{kind}'")
    page.goto(f"{address}/experiments/{experiment}/runs?workflowType=machine_learning&searchFilter={query}")
    page.locator(".ag-row button").first.click()  # unfolds the parent
    page.get_by_text("matching runs").wait_for()


def check_teachers(page: Any, address: str, experiment: str, scores: dict[str, float]) -> None:
    """Assert that the teachers stand in one table with their accuracy on the test split."""
    runs_page(page, address, experiment, "teacher")
    page.get_by_role("button", name="Columns").click()
    for name in COLUMNS:
        page.get_by_text(name, exact=True).last.click()
    page.keyboard.press("Escape")
    page.locator(".ag-header").get_by_text("test/accuracy").wait_for()
    page.wait_for_timeout(2000)
    cells = page.locator(".ag-row").evaluate_all(
        "rows => rows.map(row => [row.getAttribute('row-index'), row.innerText])"
    )
    rows: dict[str, str] = {}  # a table's fixed part and its scrolling part have each row once
    for number, text in cells:
        rows[number] = rows.get(number, "") + "\n" + text
    for name, accuracy in scores.items():
        row = next(text for text in rows.values() if name in text)
        assert any(abs(float(word) - accuracy) < 1e-3 for word in row.split() if _is_number(word)), (name, row)


def check_trials(page: Any, address: str, experiment: str) -> None:
    """Assert that trials can be compared by what was searched and by the objective."""
    runs_page(page, address, experiment, "trial")
    page.get_by_role("checkbox", name="Select all runs").check()
    page.get_by_test_id("runs-compare-button").click()
    page.get_by_text("Parallel Coordinates Plot").wait_for()
    for name in ("distillation.temperature", "final_objective"):
        assert page.get_by_text(name, exact=True).count(), name


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()


def main(storage: Path, pictures: Path | None) -> None:
    client = MlflowClient(default_uri(storage))
    experiment = client.get_experiment_by_name("asc-ray").experiment_id
    teachers = client.search_runs([experiment], "tags.`asc_ray.kind` = 'teacher'")
    scores = {run.info.run_name: run.data.metrics["test/accuracy"] for run in teachers}
    with browser() as found, ui(storage) as address:
        checks = {
            "teachers": lambda page: check_teachers(page, address, experiment, scores),
            "trials": lambda page: check_trials(page, address, experiment),
            "registry": lambda page: page.goto(f"{address}/models?workflowType=machine_learning"),
        }
        for name, check in checks.items():
            page = found.new_page(viewport={"width": 1900, "height": 640})  # with a memory of its own
            page.set_default_timeout(60_000)
            check(page)
            page.wait_for_timeout(3000)  # plots are drawn
            if pictures:
                page.screenshot(path=pictures / f"mlflow-{name}.png")
            page.close()
            print(f"{name}: as it should be")


if __name__ == "__main__":
    from_command_line(main)
