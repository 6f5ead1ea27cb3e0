"""Every shell command of README and docs, as it stands there, runs, or is taken by the program that it calls.

bash runs the pages' blocks, with programs in the path that note how they were called and do nothing. Each call is then
made in this process: what trains says what it would do (`--dry-run`), the others work on a finished run, and a program
that is not ours, or takes long, shows that it knows the options.
"""

import argparse
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path

import click.testing
import pytest
import soundfile as sf
import typer.main
import typer.testing
from conftest import ROOT, noise
from test_docs import CURRENT
from test_layouts import PUBLIC

from asc_ray.cli import app
from asc_ray.runtime import EXAMPLE

SHELL = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.M | re.S)
NOTED = ("asc-ray", "docker", "kubectl", "mlflow", "mypy", "pip", "pytest", "python", "ray", "ruff", "sbatch")
NEITHER = {
    "add-apt-repository": "changes the system",
    "apt": "changes the system",
    "arecord": "records with a microphone",
    "docker push": "sends to a registry",
    "kubectl get": "asks a Kubernetes",
    "kubectl port-forward": "asks a Kubernetes",
    "mypy": "is what `make test` calls beside pytest",
    "pip install boto3": "fetches",
    "pip install torch": "fetches",
    "pytest": "runs this test",
    "ruff": "is what `make test` calls beside pytest",
}
NOTE = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" END >> "$CALLS"
"""
BEFORE = 'set -e; sudo() { "$@"; }\n'


class Parsed(Exception):
    """Ends a script behind its command line."""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder like a checkout with its environment, whose programs note how they were called."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name in {*NOTED, *(each for each in NEITHER if " " not in each)}:
        (programs / name).write_text(NOTE)
        (programs / name).chmod(0o755)
    for name in ("bash", "head", "make", "sh"):
        (programs / name).symlink_to(shutil.which(name) or name)
    for name in (".installed", ".installed-dev"):  # what `make` would install is there
        (tmp_path / "venv" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(script: str, folder: Path) -> list[list[str]]:
    """Return the words of every call that bash makes of `script`, whose absolute paths lie below `folder`."""
    script = re.sub(r"(?<=[ =])/(data|shared)/", rf"{folder}/\1/", script)
    noted = folder / "calls"
    noted.write_text("")
    environment = {"PATH": str(folder / "venv" / "bin"), "HOME": str(folder), "CALLS": str(noted), "VENV": "venv"}
    done = subprocess.run(
        ["bash", "-c", BEFORE + script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [call.split("\0") for call in noted.read_text().split("\0END\0")[:-1]]


def shows_help(command: click.Command, words: list[str]) -> None:
    """Assert that a program knows the commands and options before any `--`."""
    done = click.testing.CliRunner().invoke(command, [*words, "--help"])
    assert done.exit_code == 0, done.output


def run(words: list[str]) -> None:
    command = typer.main.get_command(app).commands[words[0]]
    if words[0] in ("corpus", "export"):  # one fetches 27.5 GB, the other one takes as long as tests/test_export.py
        words = [*words, "--help"]
    elif any(parameter.name == "dry_run" for parameter in command.params):
        words = [*words, "--dry-run"]
    done = typer.testing.CliRunner().invoke(app, words, input=noise(1).tobytes())
    later = "which is not done; run" in str(done.exception)  # the page's line before it makes what it needs
    assert later or done.exit_code == 0, f"{done.output}\n{done.exception}"


def parse(script: str, words: list[str]) -> None:
    """Run a script until it has read its command line."""
    read = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        read(parser, words)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / script).parent))
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def check(words: list[str]) -> None:
    """Assert that a call is a right one."""
    call = " ".join(words)
    if any(f"{call} ".startswith(f"{each} ") for each in NEITHER):
        return
    program, *rest = words
    match program:
        case "asc-ray":
            run(rest)
        case "docker" | "kubectl":
            assert (ROOT / rest[rest.index("-f") + 1]).is_file()
        case "sbatch":
            script = next(number for number, word in enumerate(rest) if not word.startswith("-"))
            assert (ROOT / rest[script]).is_file()
            run(["pipeline", *rest[script + 1 :]])  # which it passes its options to
        case "python" if rest[0].startswith("jobs/"):
            assert (ROOT / rest[0]).is_file()
            run([Path(rest[0]).stem, *rest[1:]])
        case "python":
            parse(rest[0], rest[1:])
        case "mlflow":
            from mlflow.cli import cli

            shows_help(cli, rest)
        case "ray":
            from ray.scripts.scripts import cli

            end = rest.index("--") if "--" in rest else len(rest)
            shows_help(cli, rest[:end])
            if job := rest[end + 1 :]:
                check(job)
        case "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert rest[0] == "install"
            assert rest[1].partition("[")[2].rstrip("]") in extras
        case _:
            raise AssertionError(f"{program}: what is it?")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_shell_command_of_the_pages(checkout, finished, bucket):
    (checkout / "runs").mkdir()
    (checkout / "runs" / "demo").symlink_to(finished.storage)
    (checkout / "bundle").symlink_to(EXAMPLE)
    (corpus,) = (finished.storage / "corpus").iterdir()
    for place in ("DIR", "shared/tau22", "data/TAU-urban-acoustic-scenes-2022-mobile-development"):
        (checkout / place).parent.mkdir(exist_ok=True)
        (checkout / place).symlink_to(corpus)
    for place, name in (("ESC-50-master", "ESC-50"), ("TAU-2020", "TAU 2020")):
        PUBLIC[name][1](checkout / place)
    (student,) = (finished.storage / "students").iterdir()
    (checkout / "runs/tau_10s/students").mkdir(parents=True)
    (checkout / "runs/tau_10s/students/student-KEY").symlink_to(student)
    (checkout / "recordings").mkdir()
    sf.write(checkout / "recordings" / "noise.wav", noise(1)[0], 32_000)

    found: dict[tuple[str, ...], None] = {}
    for page in CURRENT:
        text = page.read_text()
        for name, content in re.findall(r"`(\w+\.yaml)`[^\n]*:\n\n```yaml\n(.*?)^```", text, re.M | re.S):
            (checkout / name).write_text(content)
        found |= dict.fromkeys(map(tuple, calls("\n".join(SHELL.findall(text)), checkout)))
    assert len(found) > 50
    for words in found:
        try:
            check([word.replace("s3://BUCKET/PREFIX", bucket.uri("pages")) for word in words])
        except (Exception, SystemExit) as error:
            raise AssertionError(" ".join(words)) from error
    unused = [each for each in NEITHER if not any(" ".join(words).startswith(each) for words in found)]
    assert unused == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("asc-rai status", "asc-rai: command not found"),
        ("asc-ray status --set student.optimizer.epoch=3", "student.optimizer.epoch: unknown key"),
        ("asc-ray pipeline --confg small", "No such option: --confg"),
        ("asc-ray predict no-such-bundle recordings/", "no-such-bundle"),
        ("make rum", "No rule to make target 'rum'"),
        ("make run CONFIG=smal", "smal"),
        ("mlflow ui --backend-uri sqlite:///x.db", "No such option '--backend-uri'"),
        ("mlflow model serve", "No such command 'model'"),
        ("pip install '.[benches]'", "benches"),
        ("python bench/clips.py CLIPS --bach 3", "unrecognized arguments: --bach 3"),
        ("python bench/no_such.py", "No such file"),
        ("ray down --forcibly cluster.yaml", "No such option '--forcibly'"),
        ("ray job submit --address http://localhost:8265 -- python jobs/pipelin.py", "jobs/pipelin.py"),
        ("ray job submit --address http://localhost:8265 -- python jobs/pipeline.py --config smal", "smal"),
        ("sbatch --nodes=2 deploy/slurm.sh --config tau22 --jsn", "No such option: --jsn"),
        ("kubectl apply -f deploy/kuberay/rayjobs.yaml", "deploy/kuberay/rayjobs.yaml"),
    ],
)
def test_a_wrong_command_is_found(checkout, capsys, wrong, why):
    def check_all() -> None:
        for words in calls(wrong, checkout):
            check(words)

    with pytest.raises((AssertionError, SystemExit, OSError)) as raised:
        check_all()
    assert why in f"{raised.value}{capsys.readouterr().err}"
