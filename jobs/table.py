"""Entry of `ray job submit` for a table of the paper, as in `jobs/table.py 4`; takes what `asc-ray table` takes."""

from asc_ray.cli import main

main("table")
