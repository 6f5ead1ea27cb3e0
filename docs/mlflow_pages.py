"""Open MLflow's pages of a finished run in a headless browser, check what they show, and take pictures of them.

python docs/mlflow_pages.py runs/demo [FOLDER FOR PICTURES]

The run has an exported model. The script starts `mlflow ui` itself, and needs what docs/screenshots.py needs.
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
UNWANTED = ("Dataset", "Source", "Models")  # they push the columns above out of the picture
SEARCHED = ("optimizer.learning_rate", "distillation.label_weight", "distillation.temperature", "augment.dir.p")
HEIGHTS = {"teachers": 704, "trials": 600, "registry": 560}
OBJECTIVE = "final_objective"


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


def close_assistant(page: Any) -> None:
    """Close the panel that MLflow opens beside its pages on the first visit."""
    page.locator("[data-component-id='mlflow.assistant.chat_panel.close']").click()


def runs_page(page: Any, address: str, experiment: str, kind: str, order: str) -> None:
    """Open the runs of one kind, the largest of a metric first, as docs/mlflow.md says."""
    query = quote(f"tags.`asc_ray.kind` = '{kind}'")
    runs = f"{address}/experiments/{experiment}/runs?workflowType=machine_learning&searchFilter={query}"
    page.goto(f"{runs}&orderByKey={quote(f'metrics.`{order}`')}&orderByAsc=false")
    close_assistant(page)
    page.get_by_text("matching runs").wait_for()


def check_teachers(page: Any, address: str, experiment: str, scores: dict[str, float]) -> None:
    """Assert that the teachers stand in one table with their accuracy on the test split, the best one first."""
    runs_page(page, address, experiment, "teacher", "test/accuracy")
    page.get_by_role("button", name="Columns").click()
    tree = page.get_by_test_id("column-selector-tree")
    metrics = tree.locator("[class*='tree-treenode']").filter(has_text="Metrics (")
    metrics.wait_for()
    if (folded := metrics.locator("[class*='switcher_close']")).count():  # by MLflow's release and the number of them
        folded.click()
    for name in (*UNWANTED, *COLUMNS):
        tree.get_by_text(name, exact=True).click()
    page.keyboard.press("Escape")
    page.locator(".ag-header").get_by_text("test/accuracy").wait_for()
    page.wait_for_timeout(2000)
    cells = page.locator(".ag-row").evaluate_all(
        "rows => rows.map(row => [row.getAttribute('row-index'), row.innerText])"
    )
    rows: dict[int, str] = {}  # a table's fixed part and its scrolling part have each row once
    for number, text in cells:
        rows[int(number)] = rows.get(int(number), "") + "\n" + text
    best = sorted(scores, key=lambda name: -scores[name])
    assert len(rows) == len(scores), rows
    for number, name in enumerate(best):
        accuracy = scores[name]
        shown = [float(word) for word in rows[number].split() if _is_number(word)]
        assert any(abs(value - accuracy) < 1e-3 for value in shown), (name, rows[number])


def check_trials(page: Any, address: str, experiment: str) -> None:
    """Assert that trials can be compared by what was searched and by the objective."""
    runs_page(page, address, experiment, "trial", OBJECTIVE)
    page.get_by_role("checkbox", name="Select all runs").check()
    page.get_by_test_id("runs-compare-button").click()
    page.get_by_text("Parallel Coordinates Plot").wait_for()
    page.get_by_test_id("clear-button").click()
    parameters, metrics = page.get_by_role("combobox").all()[:2]
    for box, names in ((parameters, SEARCHED), (metrics, (OBJECTIVE,))):
        for name in names:
            box.click(force=True)
            page.keyboard.type(name)
            page.keyboard.press("Enter")
        page.keyboard.press("Escape")
    for name in (*SEARCHED, OBJECTIVE):
        page.locator(".js-plotly-plot").get_by_text(name, exact=True).wait_for()


def check_registry(page: Any, address: str, champion: Any) -> None:
    """Assert that the champion's page leads to its run, and tells what made it the champion."""
    page.goto(f"{address}/models/{champion.name}/versions/{champion.version}?workflowType=machine_learning")
    close_assistant(page)
    page.get_by_text("@ champion").wait_for()
    page.locator(f"a[href*='{champion.run_id}']").first.wait_for()
    page.get_by_text(champion.tags["asc_ray.validation"], exact=True).wait_for()


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()


def main(storage: Path, pictures: Path | None) -> None:
    client = MlflowClient(default_uri(storage))
    experiment = client.get_experiment_by_name("asc-ray").experiment_id
    teachers = client.search_runs([experiment], "tags.`asc_ray.kind` = 'teacher'")
    champion = client.get_model_version_by_alias("asc-ray", "champion")
    scores = {run.info.run_name: run.data.metrics["test/accuracy"] for run in teachers}
    with browser() as found, ui(storage) as address:
        checks = {
            "teachers": lambda page: check_teachers(page, address, experiment, scores),
            "trials": lambda page: check_trials(page, address, experiment),
            "registry": lambda page: check_registry(page, address, champion),
        }
        for name, check in checks.items():
            page = found.new_page(viewport={"width": 1200, "height": HEIGHTS[name]})  # with a memory of its own
            page.set_default_timeout(60_000)
            check(page)
            page.mouse.move(0, 0)  # or a figure's whole number is laid over others
            page.wait_for_timeout(3000)  # plots are drawn
            if pictures:
                page.screenshot(path=pictures / f"mlflow-{name}.png")
            page.close()
            print(f"{name}: as it should be")


if __name__ == "__main__":
    from_command_line(main)
