"""The files of a bank of impulse responses, which `audio/impulse.py` reads."""

from pathlib import Path
from typing import Any

from asc_ray.artifacts import file_sha256
from asc_ray.errors import UserError


def response_files(folder: Path) -> list[Path]:
    """Return the files of `folder` that a bank is made of, by name. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"impulse responses: {folder} is not a folder; name a folder of *.wav files, or none at all")
    paths = sorted((path for path in folder.iterdir() if path.suffix.lower() == ".wav"), key=lambda path: path.name)
    if not paths:
        raise UserError(f"impulse responses: {folder} holds no *.wav file; add some, or name no folder")
    return paths


def bank_identity(folder: Path | None) -> Any:
    """Return what tells a folder of impulse responses from others; None stands for the built-in ones."""
    if folder is None:
        return "built-in"
    try:
        return {file.name: file_sha256(file) for file in response_files(folder)}
    except OSError as error:
        raise UserError(f"impulse responses: {error.filename}: {error.strerror}; mend or remove it") from None
