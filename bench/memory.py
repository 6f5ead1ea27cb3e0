"""The memory that the benchmarks report."""

import re
from pathlib import Path


def peak_memory(pid: int | str = "self") -> float:
    """Return a process' peak memory so far, in GB. `getrusage` would include the parent process' peak."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found.group(1)) / 1e6 if found else 0.0  # a process that has ended has none
