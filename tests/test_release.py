"""A release: its version is the same everywhere, and its wheel is whole and runs where there is no checkout."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
import yaml
from conftest import ROOT

COMMANDS = (
    (("--help",), "Teachers, fusion, search"),
    (("status",), "runs/demo"),
    (("complexity", "sm1"), "within the limits"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (file,) = folder.iterdir()
    return file


def pip(python, *arguments):
    subprocess.run([python, "-m", "pip", *map(str, arguments), "--quiet"], check=True)


def runs_without_the_checkout(python, script, installed, cwd, environment):
    """Check that `python` imports the copy in the folder `installed`, and run COMMANDS by the entry point."""

    def said(*command):
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout

    code = "import asc_ray, asc_ray.config.composition as c; print(asc_ray.__file__, c.PRESETS, sep='\\n')"
    assert said(python, "-c", code).splitlines() == [
        str(installed / "asc_ray" / "__init__.py"),
        str(installed / "asc_ray" / "configs"),
    ]
    for arguments, expected in COMMANDS:
        assert expected in said(script, *arguments)
    assert not list(cwd.iterdir())


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## ([\d.]+) - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert (citation["version"], str(citation["date-released"])) == newest.groups()
    assert project["version"] == citation["version"]
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Homepage"]


def test_the_wheel_holds_the_package_and_the_presets_and_nothing_else(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "asc_ray").rglob("*") if path.is_file()}
    presets = {f"asc_ray/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert presets
    assert files == {name for name in package if "__pycache__" not in name} | presets


def test_the_installed_wheel_runs_without_the_checkout(wheel, tmp_path):
    """With the dependencies of this environment, whose own asc-ray stands behind the wheel's."""
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip(sys.executable, "install", "--no-deps", "--target", installed, wheel)
    environment = os.environ | {"PYTHONPATH": str(installed)}
    runs_without_the_checkout(sys.executable, installed / "bin" / "asc-ray", installed, empty, environment)


@pytest.mark.campaign
def test_the_wheel_installs_and_runs_in_a_fresh_environment(wheel, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip(python, "install", "--no-compile", f"{wheel}[train]")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    installed = tmp_path / "env" / "lib" / version / "site-packages"
    runs_without_the_checkout(python, python.with_name("asc-ray"), installed, empty, environment)
