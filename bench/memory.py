"""The memory that the benchmarks report."""

import re
from pathlib import Path


def peak_memory() -> float:
    """Return this process' peak memory so far, in GB. `getrusage` would include the parent process' peak."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) / 1e6
