"""The rows of a corpus' tables, each with its place in the file; what is wrong with a row goes to the faults."""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from asc_ray.data.faults import Faults
from asc_ray.errors import CorpusError
from asc_ray.files import open_plain, read_plain
from asc_ray.runtime import fit_label
from asc_ray.shown import printable

MOST_BYTES = 1 << 32  # of a table; TAU22's have up to 20 MB, those of 17 million clips 2 GB
MOST_ROWS = 1 << 26  # of a Parquet file, whose size says little of them
DELIMITERS = {",": "commas", ";": "semicolons", "|": "bars", " ": "blanks"}
TAU_LAYOUT = (
    "Expected a corpus in the TAU22 layout: "
    "meta.csv, evaluation_setup/fold1_train.csv, evaluation_setup/fold1_evaluate.csv, audio/; corpus.layout names "
    "others"
)

Rows = Iterator[tuple[str, dict[str, str]]]  # ("line 7", the values by column)


def tau_rows(file: Path, columns: tuple[str, ...], digest, faults: Faults, stripped: Counter[str]) -> Rows:
    """Yield the rows of a tab-separated file without quotes, as TAU's are; its bytes go into `digest`.

    Raises CorpusError for a file that is no such table.
    """
    content, text = _text(file, f". {TAU_LAYOUT}")
    digest.update(f"{file.name}\0{len(content)}\n".encode() + content)
    reader = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        found = [name.strip() for name in reader.fieldnames or ()]
        _check_columns(file, columns, found)
        reader.fieldnames = found
        numbered = ((f"line {reader.line_num}", row) for row in reader)
        yield from _sound(file, numbered, columns, {"filename"}, faults, stripped)
    except csv.Error as error:
        raise CorpusError(f"{file} line {reader.line_num + 1}: {error}") from None


def table_rows(file: Path, columns: Mapping[str, str], names: set[str], faults: Faults, stripped: Counter[str]) -> Rows:
    """Yield the rows of a CSV of any delimiter, with or without quotes, or of a Parquet file.

    `columns` are those that are needed, each with the key of the configuration that names it; those of `names` hold
    names of files. Raises CorpusError for a file that cannot be read or lacks one.
    """
    read = _parquet_rows if file.suffix.lower() == ".parquet" else _csv_rows
    yield from _sound(file, read(file, columns), list(columns), names, faults, stripped)


def _csv_rows(file: Path, columns: Mapping[str, str]) -> Rows:
    _, text = _text(file)
    head = text.partition("\n")[0]
    # The delimiter that finds the columns; commas where none does, for the message.
    readings = {delimiter: _cells(head, delimiter) for delimiter in (",", "\t", ";", "|")}
    delimiter = next((one for one, found in readings.items() if set(columns) <= set(found)), None)
    if delimiter is None:
        _check_named(file, columns, max(readings.values(), key=len))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter or ",", strict=True)
    try:
        found = [name.strip() for name in next(reader)]
        _check_named(file, columns, found)
        for row in reader:
            if not row:
                continue
            if len(row) != len(found):
                raise CorpusError(
                    f"{file} line {reader.line_num}: {len(row)} values, and {len(found)} columns; put a value that "
                    "holds the delimiter in quotes"
                )
            yield f"line {reader.line_num}", dict(zip(found, row, strict=True))
    except csv.Error as error:
        raise CorpusError(f"{file} line {reader.line_num}: {error}") from None


def _cells(head: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _parquet_rows(file: Path, columns: Mapping[str, str]) -> Rows:
    try:
        with open_plain(file) as opened:
            about = pyarrow.parquet.read_metadata(opened)
            _check_named(file, columns, about.schema.to_arrow_schema().names)
            if about.num_rows > MOST_ROWS:
                raise CorpusError(f"{file}: {about.num_rows:,} rows; allowed are {MOST_ROWS:,}")
            opened.seek(0)
            table = pyarrow.parquet.read_table(opened, columns=list(columns))
            table = pa.table({name: table[name].cast(pa.string()) for name in columns})
    except CorpusError:
        raise
    except OSError as error:
        raise CorpusError(f"{file}: {error.strerror or _first_line(error)}; name the corpus' table") from None
    except Exception as error:  # a cut or forged file may raise anything
        raise CorpusError(f"{file}: cannot be read as Parquet ({_first_line(error)})") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", row


def _first_line(error: Exception) -> str:
    return printable(next(iter(str(error).splitlines()), "") or type(error).__name__)[:200]


def _text(file: Path, expected: str = "; name the corpus' table") -> tuple[bytes, str]:
    """Return a file's bytes, and its text without a byte order mark. Raises CorpusError."""
    try:
        content = read_plain(file, MOST_BYTES)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CorpusError(f"{file}: {error.strerror or error}{expected}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file}: not UTF-8 text ({error})") from error
    if lone := re.search(r"\r(?!\n)", text):
        line = text.count("\n", 0, lone.start()) + 1
        raise CorpusError(
            f"{file} line {line}: a carriage return without a line feed; save the file with \\n at line ends"
        )
    return content, text


def _sound(
    file: Path,
    rows: Iterable[tuple[str, Mapping[str, str | None]]],
    columns: Sequence[str],
    names: set[str],
    faults: Faults,
    stripped: Counter[str],
) -> Rows:
    """Yield the rows that have a value in all of these columns; the others go to the faults.

    Blanks around a value would turn it into another scene, device or place, so they are removed and counted by column.
    Names of files lose `./` and doubled slashes.
    """
    for where, found in rows:
        row: dict[str, Any] = dict(found)
        for column in columns:
            value = found[column] or ""
            row[column] = value.strip()
            if value != row[column]:
                stripped[column] += 1
        if empty := [column for column in columns if not row[column]]:
            faults.add(f"{file.name} {where}: no value for {', '.join(empty)}")
            continue
        if odd := [column for column in columns if not _shown(row[column], column in names)]:
            shown = printable(row[odd[0]][:80])
            faults.add(f"{file.name} {where}: control characters in {', '.join(odd)}: {shown}")
            continue
        for name in names & row.keys():
            row[name] = tidy(row[name])
        yield where, row


def tidy(name: str) -> str:
    """Return a file's name without `./` and doubled slashes."""
    return str(PurePosixPath(name)) if "//" in name or "./" in name else name


def _shown(value: str, is_name: bool) -> bool:
    """Whether a value can be shown without steering a terminal; only a file's name may have other odd characters."""
    if is_name:
        return len(value) <= 1000 and not any(unicodedata.category(c) == "Cc" for c in value)
    return fit_label(value)


def _check_named(file: Path, columns: Mapping[str, str], found: Sequence[str]) -> None:
    """Raise CorpusError where a column that the configuration names is missing or there twice."""
    for column, key in columns.items():
        if column not in found:
            raise CorpusError(
                f"{file}: {key}: no column {column!r}; found {', '.join(map(repr, found)) or 'an empty file'}"
            )
        if list(found).count(column) > 1:
            raise CorpusError(f"{file}: the column {column} is there twice; keep one")


def _check_columns(file: Path, columns: tuple[str, ...], found: Sequence[str]) -> None:
    """Raise CorpusError where a column of TAU's is missing or there twice, with the cause if it shows."""
    if twice := [column for column in columns if found.count(column) > 1]:
        raise CorpusError(f"{file}: the column {twice[0]} is there twice; keep one")
    missing = [column for column in columns if column not in found]
    if not missing:
        return
    cause = ""
    bare = [name.strip("\"'") for name in found]
    if set(columns) <= set(bare):
        cause = ". The names are in quotes: write the tables without them"
    for delimiter, name in DELIMITERS.items():
        if len(found) == 1 and set(columns) <= {part.strip("\"' ") for part in found[0].split(delimiter)}:
            cause = f". The columns are separated by {name}: write the file with tabs"
    raise CorpusError(
        f"{file}: missing column(s) {', '.join(missing)}; found {', '.join(map(repr, found)) or 'an empty file'}, "
        f"expected tab-separated columns {', '.join(columns)}{cause}"
    )
