"""What code this is, and on what machine it runs: goes into published policies and into results."""

import platform
import subprocess
from pathlib import Path

import sop


def code_version() -> str:
    """What trained a policy: the version of this package and, in a checkout, its commit (`+`: with changes)."""
    git = ["git", "-C", str(Path(sop.__file__).parent)]
    ours = _output([*git, "ls-files", "__init__.py"])  # not so in a checkout that merely contains our installation
    commit = _output([*git, "describe", "--always", "--dirty=+", "--abbrev=12"]) if ours else ""
    return f"sop {sop.__version__} {commit}".strip()


def _output(command: list[str]) -> str:
    """What a program prints; nothing when it fails or is not there."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
