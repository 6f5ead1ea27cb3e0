"""Acoustic scene classification: teachers, fusion, search, distillation and int8.

`asc_ray.results(storage)` is a table of what a storage holds.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "results":  # imported when it is asked for: a device has neither pandas nor torch
        from asc_ray.report.results import results

        return results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
