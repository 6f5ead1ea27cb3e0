"""Entry of `ray job submit` for `asc-ray export`, where the storage is the cluster's; takes its arguments."""

from asc_ray.cli import main

main("export")
