"""Open the report of a finished run in a headless browser, check what it shows, and take pictures of it.

python docs/screenshots.py runs/demo/report/demo-<key> [FOLDER FOR PICTURES]

It needs `pip install playwright`, and a Chromium: Debian's package, or `playwright install chromium`.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asc_ray.artifacts import read_manifest
from asc_ray.evaluation.artifact import read_evaluation, read_scores
from asc_ray.evaluation.seeds import over_seeds

WIDTHS = (1280, 390)  # a desk's and a phone's
SCHEMES = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class NoBrowser(Exception):
    """Says why there is no browser to look with."""


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a headless Chromium of playwright's kind: the system's, else playwright's own. Raises NoBrowser."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise NoBrowser("playwright is not installed") from None
    with sync_playwright() as playwright:
        own = next(filter(None, map(shutil.which, BROWSERS)), None)
        try:
            found = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except Error as error:
            raise NoBrowser(f"no Chromium starts: {error.message.splitlines()[0]}") from None
        yield found
        found.close()


@contextmanager
def opened(browser: Any, url: str, width: int, scheme: str) -> Iterator[Any]:
    """Yield the page at `url` in a window of this width; assert at the end that the page reported no error."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"{request.url}: {request.failure}"))
    page.goto(url)
    yield page
    page.close()
    assert not errors, f"{url}: {errors}"


def accuracies(report: Path) -> dict[str, str]:
    """Return what the report in this folder must show as accuracy on the test split, by system, from the artifacts."""
    keys = dict(read_manifest(report)["inputs"])
    folder = report.parents[1] / "evaluation"

    def of(key: str) -> Path:
        return next(folder.glob(f"*-{key}"))

    found = {name: e.accuracy for name, e in read_scores(of(keys.pop("ensemble"))).systems.items()}
    for form, prefix in (("student fp32", "student"), ("student int8", "int8")):
        runs = [read_evaluation(of(key)) for name, key in keys.items() if name.startswith(prefix)]
        found[form] = over_seeds(runs)[0].accuracy
    return {name: f"{100 * accuracy:.2f}" for name, accuracy in found.items()}


def check_report(page: Any, report: Path) -> None:
    """Assert what a reader sees: the contents lead somewhere, the figures are the artifacts', nothing is cut off."""
    assert page.title().endswith("– report"), page.title()
    links = page.locator("nav a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    sections = page.locator("section").evaluate_all("sections => sections.map(section => '#' + section.id)")
    assert links == sections, f"contents {links}, sections {sections}"
    rows = page.locator("#overall tbody tr").evaluate_all(
        "rows => rows.map(row => [row.children[0].innerText, row.querySelector('b').innerText])"
    )
    assert {name.split(",")[0]: value for name, value in rows} == accuracies(report)
    assert page.locator("details[open]").count() == 0
    width, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= room, f"the page is {width} px wide in a window of {room}"
    for svg in page.locator("svg").all():
        assert svg.bounding_box()["width"] >= 900, "its text is too small to read"


def main(report: Path, pictures: Path | None) -> None:
    """Check the report in every width and color scheme, and write PNGs of it where a folder for them is given."""
    with browser() as found:
        for width in WIDTHS:
            for scheme in SCHEMES:
                with opened(found, (report / "report.html").absolute().as_uri(), width, scheme) as page:
                    check_report(page, report)
                    if pictures:
                        page.screenshot(path=pictures / f"report-{width}-{scheme}.png", full_page=True)
                print(f"{width} px, {scheme}: as it should be")


def from_command_line(main: Callable[[Path, Path | None], None]) -> None:
    """Call `main` with what is looked at and the folder for pictures; without a browser, say why nothing is checked."""
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    except NoBrowser as reason:
        print(f"not checked: {reason}")


if __name__ == "__main__":
    from_command_line(main)
