"""What makes an artifact: the version of asc-ray, and the machine. The machine's name and its users are left out."""

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def program() -> str:
    """Return the version of asc-ray, and the commit if it runs from a checkout."""
    return ", commit ".join(filter(None, [version("asc-ray"), commit()]))


@cache
def commit() -> str:
    """Return the checkout's commit, with -dirty where files differ from it; empty without a checkout."""
    if not (CHECKOUT / ".git").exists():
        return ""
    describe = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that git does not trust
        return ""
    return found.stdout.strip()


def machine() -> str:
    """Return this machine's processor, cores and memory, and the GPU if this process has used one."""
    torch = sys.modules.get("torch")  # a process without torch has used none
    gpu = [torch.cuda.get_device_name()] if torch and torch.cuda.is_initialized() else []
    return ", ".join([_host(), *gpu])


@cache
def _host() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = next(filter(None, names), platform.processor() or platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB"
