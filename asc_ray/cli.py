"""The command line `asc-ray`: each command parses its options, calls the work and prints.

This module is long because it holds every command, and nothing else.
"""

import atexit
import gc
import io
import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from asc_ray.errors import ConfigError, UserError
from asc_ray.shown import masked, printable

STAGE, STUDENTS, LOOK, MODEL = "Stages, in their order", "Several students", "Look and check", "The finished model"
FIRST = "corpus"  # of the commands; typer lists groups behind all others


class _InOrder(typer.core.TyperGroup):
    """Lists the commands in the order of the work."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != FIRST)


app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teachers, fusion, search, distillation and int8 for tiny acoustic scene classifiers.",
)
corpus_app = typer.Typer(no_args_is_help=True, help="Make or fetch a corpus.")
app.add_typer(corpus_app, name=FIRST, rich_help_panel=STAGE)
config_app = typer.Typer(no_args_is_help=True, help="Show a configuration, all presets, all keys.")
app.add_typer(config_app, name="config", rich_help_panel=LOOK)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"asc-ray {version('asc-ray')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


class Target(StrEnum):
    """What `export` writes."""

    onnx = "onnx"
    c = "c"
    tflite = "tflite"
    dcase2025 = "dcase2025"


ConfigOption = Annotated[str, typer.Option("--config", "-c", help="A YAML file, or the name of a preset.")]
SetOption = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY.PATH=VALUE", help="Override one key; may be repeated.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run, resume and be skipped; write and start nothing.")
]
DEFAULT_CONFIG = "demo"
NARROWEST = 60  # columns of a table of states without the artifacts' paths

_HELP = {
    "ingest": "Decode the corpus into the memory-mapped clip store.",
    "teachers": "Train the ensemble's systems.",
    "logits": "Store every teacher's logits over every clip.",
    "fuse": "Learn the fusion (eq. 4) on held-out places and write the soft targets.",
    "sweep": "Search the student's configuration on the validation part.",
    "student": "Train the student from the soft targets, with student.seeds=n n of them at once.",
    "specialize": "Fine-tune the student for each device, if student.specialize says so.",
    "qat": "Train the student for int8 and convert it.",
    "evaluate": "Score teachers, fusion and both students on the test split.",
    "report": "Write the HTML report.",
}


def _stage_command(stage: str) -> Callable[..., None]:
    def command(
        config: ConfigOption = DEFAULT_CONFIG,
        set: SetOption = [],  # noqa: B006
        dry_run: DryRunOption = False,
    ) -> None:
        # `ingest` also makes the demo's corpus, which it reads.
        _run(config, set, ("corpus", "ingest") if stage == "ingest" else (stage,), dry_run)

    return command


for _stage, _text in _HELP.items():
    app.command(_stage, help=_text, rich_help_panel=STAGE)(_stage_command(_stage))


@app.command(rich_help_panel=STAGE)
def pipeline(
    config: ConfigOption = DEFAULT_CONFIG,
    set: SetOption = [],  # noqa: B006
    dry_run: DryRunOption = False,
) -> None:
    """Run every stage, from the corpus to the report."""
    from asc_ray.plan import STAGES

    _run(config, set, STAGES, dry_run)


@app.command("table", rich_help_panel=STUDENTS)
def make_table(
    number: Annotated[
        str,
        typer.Argument(
            help="2, 3, 4 or 5 of the paper, mark, specialize, subsets, or a YAML file in the form of configs/tables/."
        ),
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    set: SetOption = [],  # noqa: B006
    dry_run: DryRunOption = False,
) -> None:
    """Train, evaluate and compare the students of one of the paper's tables, beside its figures on TAU22."""
    from asc_ray.comparison import preview_table, run_table
    from asc_ray.places import named
    from asc_ray.progress import Progress
    from asc_ray.report.table import markdown

    progress = Progress()
    if dry_run:
        _show_preview(*preview_table("tables", number, config, set, progress))
        return
    artifact, comparison = run_table("tables", number, config, set, progress)
    typer.echo(markdown(comparison))
    typer.echo(f"table   {named(artifact.path / 'table.html')}   (also .md, .csv)")


@app.command("figure", rich_help_panel=STUDENTS)
def make_figure(
    number: Annotated[str, typer.Argument(help="2 (energies of the clips) or 3 (confusions) of the paper.")],
    config: ConfigOption = DEFAULT_CONFIG,
    set: SetOption = [],  # noqa: B006
    dry_run: DryRunOption = False,
) -> None:
    """Draw one of the paper's figures, training what it shows."""
    from asc_ray.comparison import FIGURE, draw_energies, preview_table, run_table
    from asc_ray.config.composition import load_config
    from asc_ray.places import named
    from asc_ray.progress import Progress

    progress = Progress()
    if number not in ("2", "3") and not Path(number).suffix:
        raise ConfigError(f"{number}: no such figure; known: 2, 3, or a YAML file in the form of configs/figures/")
    if number == "2" and dry_run:
        _run(config, set, ("corpus", "ingest"), dry_run)
        return
    if dry_run:
        _show_preview(*preview_table("figures", number, config, set, progress))
        return
    if number == "2":
        artifact = draw_energies(load_config(config, set), progress)
    else:
        artifact, _ = run_table("figures", number, config, set, progress)
    typer.echo(f"figure  {named(artifact.path / FIGURE)}")


@app.command(rich_help_panel=LOOK)
def status(
    config: ConfigOption = DEFAULT_CONFIG,
    set: SetOption = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what is done, running and missing, and where."""
    from asc_ray.config.composition import load_config
    from asc_ray.places import named
    from asc_ray.plan import Plan
    from asc_ray.status import states

    plan = Plan(load_config(config, set))
    found = list(states(plan))
    if as_json:
        whole = {"name": plan.config.name, "storage": str(plan.config.storage), "artifacts": found}
        typer.echo(json.dumps(whole, indent=1, default=lambda state: state.as_json()))
        return
    longest = max(len(named(state.path)) if state.path else 0 for state in found)
    console = _console(longest + 2 * NARROWEST)
    table = Table(
        Column("stage", no_wrap=True),
        Column("what", overflow="fold"),
        Column("state", overflow="fold"),
        title=f"{plan.config.name}: {plan.config.storage}",
        box=None,
    )
    # Paths where they leave room for the rest; in narrow windows keys, with which the folders' names end.
    keys = longest > console.width - NARROWEST
    table.add_column("key" if keys else "where", no_wrap=True, min_width=16 if keys else longest)
    for state in found:
        where = (state.key if keys else named(state.path)) if state.path else ""
        table.add_row(state.stage, state.name, Text(printable(state.text())), Text(printable(where)))
    console.print(table)


@app.command(rich_help_panel=LOOK)
def track(
    resend: Annotated[bool, typer.Option("--resend", help="Send it now.")] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    set: SetOption = [],  # noqa: B006
) -> None:
    """Say how much MLflow has not been told yet; exit code 1 if --resend could not tell all of it."""
    from asc_ray.config.composition import load_config
    from asc_ray.lock import exclusive
    from asc_ray.tracking.runs import resend as send
    from asc_ray.tracking.runs import waiting

    settings = load_config(config, set)
    if resend:
        with exclusive(settings.folder):
            send(settings.tracking, settings.folder, typer.echo)
    left = waiting(settings.tracking, settings.folder)
    typer.echo(
        f"{settings.storage}: MLflow was told everything"
        if not left
        else f"{settings.storage}: {left} records wait for MLflow"
    )
    if resend and left:
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def verify(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Bundles, artifacts, or storages with all their artifacts; the last two by URI, too.",
        ),
    ],
) -> None:
    """Check exported bundles, and artifacts, or all in a storage, against their manifests; exit code 1 for damage."""
    from asc_ray.artifacts import artifacts_in, read_manifest
    from asc_ray.places import opened
    from asc_ray.runtime import CHECKSUMS, FRONTEND

    problems: list[str] = []
    for folder in map(opened, folders):
        try:
            if any((folder / name).is_file() for name in (CHECKSUMS, FRONTEND)):
                _verify_bundle(folder)
            elif artifacts := artifacts_in(folder):
                problems += _verify_storage(folder, artifacts)
            else:
                _verify_artifact(folder, read_manifest(folder))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n  ".join(problems))


def _verify_storage(storage: Path, artifacts: list[Any]) -> list[str]:
    """Check all artifacts, print what was checked, and return what is wrong."""
    from asc_ray.places import is_kept, named

    problems, size = [], 0
    for artifact in artifacts:
        try:
            size += _verify_artifact(artifact.path, artifact.manifest())
        except UserError as error:
            problems.append(str(error))
    stages = ", ".join(f"{count} {stage}" for stage, count in Counter(each.stage for each in artifacts).items())
    typer.echo(
        f"{named(storage)}: {len(artifacts)} artifacts checked ({stages}), {len(problems)} damaged, {size / 1e6:.1f} MB"
    )
    if not is_kept(storage) and (unfinished := len(list(storage.glob("*/*.partial")))):
        typer.echo(f"{storage}: {unfinished} unfinished, not checked: the run that goes on with them checks them")
    return problems


def _verify_artifact(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Print what was checked, and return the bytes of the artifact's files. Raises UserError where one is damaged."""
    from asc_ray.artifacts import damaged_files
    from asc_ray.places import named

    where = named(folder)
    files, damaged = manifest["files"], damaged_files(folder)
    for line in damaged:
        typer.echo(f"{where}/{line}", err=True)
    size = sum(entry["bytes"] for entry in files.values())
    typer.echo(f"{where}: {len(files) - len(damaged)} of {len(files)} files as written, {size / 1e6:.1f} MB")
    if damaged:
        raise UserError(
            f"{where}: {len(damaged)} damaged file(s). Delete the artifact's folder and run the stage again: it is "
            "made anew, equal"
        )
    return size


def _verify_bundle(folder: Path) -> None:
    from asc_ray.runtime import C_FORM
    from asc_ray.runtime import verify as verify_bundle

    found = verify_bundle(folder)
    for name, size in found["files"].items():
        typer.echo(f"{folder}/{name}: {size:,} bytes")
    typer.echo(f"{folder}: as exported; {found['labels']} labels; the model names noise")
    if (folder / C_FORM).exists():
        from asc_ray.embedded.folder import verify_c

        form = verify_c(folder)
        what = (
            f"{form.differ} of {form.clips} clips of noise get another scene than onnxruntime's"
            if form
            else "not compiled, because this machine has no make or cc"
        )
        typer.echo(f"{folder / C_FORM}: what asc-ray makes of the model; {what}")


@app.command(rich_help_panel=LOOK)
def complexity(
    model: Annotated[str, typer.Argument(help="A preset (sm1, cp_mobile, passt, ...), or a YAML file with a model.")],
    limit: Annotated[
        list[str], typer.Option(metavar="NAME=NUMBER", help="bytes=128000 (of int8) and macs=30e6 are the defaults.")
    ] = [],  # noqa: B006
    scenes: Annotated[int, typer.Option(min=2, help="How many the classifier tells apart.")] = 10,
) -> None:
    """Count a network's parameters, MACs, bytes and activations; exit code 1 if it is over a limit."""
    from asc_ray.config.composition import checked, network_preset
    from asc_ray.models.complexity import peak_activations
    from asc_ray.models.registry import build
    from asc_ray.students.cost import exceeded, input_shape, network_cost
    from asc_ray.training.config import Recipe

    limits = _limits(limit)
    recipe = checked(Recipe, network_preset(model), model)
    if recipe.model.name == "module":
        raise ConfigError(f"{model}: names code of your own; this command counts the networks that asc-ray has")
    shape = input_shape(recipe)
    cost = network_cost(recipe, scenes)
    peak = peak_activations(build(recipe.model, scenes), shape)
    table = Table("layer", "kind", "output", "parameters", "MACs", title=f"{model}: input {shape}", box=None)
    for column in table.columns[3:]:
        column.justify = "right"
    for layer in cost.layers:
        if layer.parameters or layer.macs:
            row = (layer.name, layer.kind, "x".join(map(str, layer.output_shape[1:])))
            table.add_row(*row, f"{layer.parameters:,}", f"{layer.macs:,}")
    _console().print(table)
    typer.echo(f"parameters        {cost.parameters:,}")
    typer.echo(f"MACs              {cost.macs:,}")
    for title, sizes in (("parameters, bytes", cost.bytes), ("peak activations", peak)):
        typer.echo(f"{title:<18}" + ", ".join(f"{dtype} {size:,}" for dtype, size in sizes.items()))
    if over := exceeded(limits, cost):
        raise UserError(f"{model}: over the limits: {'; '.join(over)}")
    typer.echo(f"within the limits: {limits.bytes:,} bytes as int8, {limits.macs:,} MACs")


def _limits(given: list[str]) -> Any:
    from pydantic import ValidationError

    from asc_ray.students.config import Limits

    try:
        return Limits.model_validate(dict(text.split("=", 1) for text in given))
    except (ValueError, ValidationError):
        raise ConfigError(
            f"--limit {' '.join(given)}: expected bytes=NUMBER or macs=NUMBER, whole and above 0"
        ) from None


@config_app.command("show")
def show_config(
    below: Annotated[str, typer.Argument(metavar="[KEY]", help="Show only this section or value.")] = "",
    config: ConfigOption = DEFAULT_CONFIG,
    set: SetOption = [],  # noqa: B006
) -> None:
    """Print the whole configuration as YAML, and where each value comes from."""
    from asc_ray.config.origins import shown

    typer.echo(shown(config, set, below), nl=False)


@config_app.command("presets")
def list_presets() -> None:
    """List all presets, and what each is."""
    from asc_ray.config.reference import KINDS, presets

    console = _console()
    for folder, title in KINDS.items():
        console.print(Text(f"{_plain(title)}:", "bold"))
        for name, about in presets(folder).items():
            console.print(Padding(Text.assemble((name, "cyan"), f"  {_plain(about)}"), (0, 0, 0, 2), expand=False))
        console.print()


@config_app.command("keys")
def list_keys(
    below: Annotated[str, typer.Argument(metavar="[KEY]", help="List only this key and those below it.")] = "",
) -> None:
    """List all keys with what they may be, their default and their meaning."""
    from asc_ray.config.reference import find_keys

    console = _console()
    for key in find_keys(below):
        text = Text.assemble((key.key, "cyan"), f"  {_plain(key.allowed)}")
        if key.default or key.required:
            text.append(f"; default {_plain(key.default)}" if key.default else "; must be given")
        if key.of:
            text.append(f"; with {key.of}", "dim")
        console.print(text)
        if key.meaning:
            console.print(Padding(_plain(key.meaning), (0, 0, 0, 4), expand=False), markup=False)


def _plain(markdown: str) -> str:
    return markdown.replace("`", "")


def _console(width: int = 200) -> Console:
    """Return a console for tables, `width` columns wide where a log file or a pipe has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


@app.command(rich_help_panel=MODEL)
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="The folder or URI of a finished int8 training, or the ID of a run in MLflow."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet, or is empty.")],
    name: Annotated[str, typer.Option(help="Name of the registered model in MLflow.")] = "asc-ray",
    license: Annotated[str, typer.Option(help="License of the model, for its card, such as CC-BY-4.0.")] = "",
    target: Annotated[
        list[Target],
        typer.Option(
            help="c: also a folder of C for microcontrollers; RUN may then be a bundle, too. tflite: also the float32 "
            "student for TensorFlow Lite. dcase2025: the challenge's inference package alone; RUN is then the folder "
            "of a student or of a specialized one. May be repeated."
        ),
    ] = [Target.onnx],  # noqa: B006
    config: ConfigOption = DEFAULT_CONFIG,
    set: SetOption = [],  # noqa: B006
) -> None:
    """Write a finished int8 student as one folder: models, front end, labels, card and checksums; register it."""
    from asc_ray.config.composition import load_config
    from asc_ray.progress import Progress
    from asc_ray.runtime import is_bundle
    from asc_ray.stages.export import export_bundle, export_c

    if target == [Target.c] and is_bundle(Path(run)) and not (Path(run) / "manifest.json").exists():
        export_c(Path(run), out, Progress())
        typer.echo(f"C  {out}   ({out}/README.md says how to compile it)")
        return
    if Target.dcase2025 in target:
        if set_of := [other.value for other in target if other is not Target.dcase2025]:
            raise UserError(f"--target: dcase2025 is a package of its own; leave out {', '.join(set_of)}")
        from asc_ray.stages.challenge import export_challenge

        export_challenge(run, out, license, Progress())
        typer.echo(f"package  {out}   ({out}/README.md says how it is used)")
        return
    settings = load_config(config, set)
    forms = {"in_c": Target.c in target, "in_tflite": Target.tflite in target}
    export_bundle(run, out, name, license, settings.tracking.uri, settings.folder, Progress(), **forms)
    typer.echo(f"bundle  {out}   (asc-ray predict {out} FILES, asc-ray verify {out})")


@app.command(rich_help_panel=MODEL)
def predict(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[BUNDLE|RUN] FILES|DIR|-",
            help="A folder that `asc-ray export` made, else the model that the package brings answers; and recordings, "
            "folders of them, or -: raw PCM on standard input.",
        ),
    ],
    by: Annotated[
        str,
        typer.Option(
            "--with", metavar="bundle|ensemble", help="ensemble: the teachers and the fusion of RUN, a run's storage."
        ),
    ] = "bundle",
    format: Annotated[str, typer.Option(help="table, jsonl, or csv: DCASE's output.csv.")] = "table",
    per_second: Annotated[bool, typer.Option("--per-second", help="Answer for every second, too.")] = False,
    rate: Annotated[int, typer.Option(min=1, help="Sample rate of raw PCM, in Hz.")] = 32_000,
    channels: Annotated[int, typer.Option(min=1, help="Channels of raw PCM (signed, 16 bits, little endian).")] = 1,
    code: Annotated[
        list[str],
        typer.Option(metavar="MODULE", help="A module of the ensemble's networks of your own code, which may run."),
    ] = [],  # noqa: B006
) -> None:
    """Name the scenes of recordings; exit code 1 if one cannot be read."""
    from asc_ray import places
    from asc_ray import predict as prediction

    if format not in prediction.FORMATS:
        raise ConfigError(f"--format {format}: allowed are {', '.join(prediction.FORMATS)}")
    opened: prediction.Model
    if code and by != "ensemble":
        raise ConfigError(f"--code {code[0]}: a bundle runs no code; it goes with --with ensemble")
    if by == "bundle":
        from asc_ray.runtime import EXAMPLE, Bundle, is_bundle

        # What is not there was meant as a model, if recordings are behind it.
        given = is_bundle(paths[0]) or (len(paths) > 1 and str(paths[0]) != "-" and not paths[0].exists())
        opened = Bundle(paths.pop(0) if given else EXAMPLE)
        if not given:
            names = ", ".join(opened.labels)
            typer.echo(f"asc-ray: by the example model, which knows {names}; a BUNDLE before FILES answers", err=True)
    elif by == "ensemble":
        from asc_ray.ensemble.stored import StoredEnsemble

        opened = StoredEnsemble(places.opened(paths.pop(0)), code)
    else:
        raise ConfigError(f"--with {by}: allowed are bundle, ensemble")
    if not paths:
        raise ConfigError("predict: no recordings are given; name files or folders behind the model, or - for a stream")
    if Path("-") in paths:
        if len(paths) > 1:
            raise ConfigError("-: standard input is one stream; give it alone")
        with suppress(KeyboardInterrupt):  # Ctrl-C ends a live stream
            prediction.predict_live(opened, sys.stdin.buffer, rate, channels, format)
        return
    # On a terminal the answers themselves show the progress.
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), disable=sys.stdout.isatty() or not sys.stderr.isatty()) as bars:
        task = bars.add_task("recordings")

        def on_file(total: int) -> None:
            bars.update(task, total=total) if total else bars.advance(task)

        prediction.predict_files(opened, paths, format, per_second, on_file)


@corpus_app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet, or is empty.")],
    config: ConfigOption = DEFAULT_CONFIG,
    set: SetOption = [],  # noqa: B006
) -> None:
    """Write the synthetic demo corpus, in the layout of TAU22."""
    from asc_ray.config.composition import load_config
    from asc_ray.data.demo import make_demo_corpus

    make_demo_corpus(out, load_config(config, set).corpus.demo)
    typer.echo(f"{out}: a synthetic corpus; use it with --set corpus.path={out}")


@corpus_app.command("download")
def download_corpus(
    name: Annotated[str, typer.Argument(help="tau22: TAU Urban Acoustic Scenes 2022 Mobile, development.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet, is empty, or holds a part of it.")],
) -> None:
    """Fetch a public corpus (tau22: 27.5 GB, for non-commercial use); once stopped, the same command goes on."""
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    from asc_ray.data.download import download

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(highlight=False, soft_wrap=True)) as bars:

        def show(archive: str, done: int, total: int) -> None:
            if archive not in tasks:
                tasks[archive] = bars.add_task(archive.split(".", 1)[1], completed=done, total=total)
            bars.update(tasks[archive], completed=done)

        fetched = download(name, out, on_progress=show, on_note=lambda text: bars.console.print(text, markup=False))
    done = "downloaded" if fetched else "nothing to do, the download is complete"
    typer.echo(f"{out}: {done}; use it with --set corpus.path={out}")


def _run(config: str, overrides: list[str], stages: tuple[str, ...], dry_run: bool) -> None:
    from asc_ray.config.composition import load_config
    from asc_ray.progress import Progress
    from asc_ray.run import refuse, run, where_things_are

    if dry_run:
        from asc_ray.plan import Plan
        from asc_ray.preview import preview

        plan = Plan(load_config(config, overrides))
        refuse(plan, [stage for stage in stages if plan.missing(stage)])
        _show_preview(plan, list(preview(plan, stages)))
        return
    progress = Progress()
    plan = run(load_config(config, overrides), stages, progress)
    for line in where_things_are(plan):
        progress.console.print(line, markup=False)


def _show_preview(plan: Any, steps: list[Any]) -> None:
    from asc_ray.lock import is_locked
    from asc_ray.preview import duration

    table = Table("stage", Column("what", overflow="fold"), "would", "resources", "time alone", box=None)
    table.title = f"{plan.config.name}: {plan.config.storage}"
    for step in steps:
        takes = "" if step.does in ("skip", "leave out") else duration(step.seconds)
        table.add_row(step.state.stage, step.state.name, step.does, step.resources, takes)
    _console().print(table)
    counts = Counter(step.does for step in steps)
    would = ", ".join(f"{does} {count}" for does, count in counts.items()) or "do nothing"
    typer.echo(f"would {would}; nothing was written")
    if known := [step.seconds for step in steps if step.seconds is not None]:
        typer.echo(
            f"{len(known)} trainings, one after the other: about {duration(sum(known))}, at the speed of those seen in "
            "this storage"
        )
    if is_locked(plan.config.folder):
        typer.echo("another run is at work in this storage; until it ends, this command would not start")


# Signals that end a run as Ctrl-C does, and what a user is told.
INTERRUPTS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "hung up"}
_LINES = "\n\t"


def main(*command: str) -> None:
    """Run the console command; a user's mistake becomes one message on standard error and an exit code.

    `command` comes before the given arguments: a job of one stage is `main("teachers")`.
    """
    sys.argv[1:1] = command
    # Imports make a million lasting objects; searching them for garbage would take two seconds.
    gc.set_threshold(200_000)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):  # a file's name may not be valid text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    received = [signal.SIGINT]

    def interrupt(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt  # an exit code, as of SystemExit, would not come through a call of Ray

    # `ray job stop` and a shutdown send SIGTERM, a closed terminal SIGHUP. Under nohup SIGHUP stays ignored.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"asc-ray: {masked(printable(error, keep=_LINES))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code != 128 + signal.SIGINT:  # into which typer turns Ctrl-C
            raise
        print(f"asc-ray: {INTERRUPTS[received[-1]]}; the same command goes on from here", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(128 + received[-1])  # at once: threads may still wait for Ray, and must not see it go
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "asc_ray":
            raise
        print(f"asc-ray: {error.name} is not installed; this needs pip install 'asc-ray[train]'", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:  # our own bug: show the whole traceback, but no passwords
        print(masked(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
