"""lerobot's own environment: the peer that the benchmarks compare with runs its own code, with its own dependencies.

    .venv/bin/python benchmarks/peers.py        # makes .venv-lerobot, some minutes and gigabytes, once

    benchmark (.venv)  -- starts -->  benchmarks/peer_lerobot_*.py (.venv-lerobot)  -- JSON lines -->  benchmark

lerobot 0.4.4 is the newest for Python 3.11 and wants an older torch; the version of this project's own environment
is forced upon it, so that both sides run the same torch. PyPI's torchvision is built for CUDA and cannot be imported
beside a torch without it; `define_torchvision_operators` in a peer's script repairs that.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from harness import ROOT

FOLDER = ROOT / ".venv-lerobot"
MARK = FOLDER / "complete"
"""Written last: an environment without it was interrupted and is made again."""
LEROBOT = "0.4.4"
OVERRIDES = (
    f"torch=={metadata.version('torch')}",
    "torchvision==0.28.0",
    "torchcodec==0.11.1",
)
"""Forced versions; torchcodec 0.11 is the first that runs with Debian's ffmpeg and this torch."""
PACKAGES = (f"lerobot=={LEROBOT}", "grpcio", "protobuf")
"""grpcio and protobuf: what lerobot's transport needs and its base installation leaves out."""
TORCHVISION_REPAIR = """
import torch
_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def lerobot_python() -> Path | None:
    """The interpreter of lerobot's environment; None, and a printed hint, when it was not made (completely)."""
    python = FOLDER / "bin" / "python"
    if MARK.exists() and python.exists():
        return python
    print(f"no {FOLDER.name}: lerobot is not measured. To make it: .venv/bin/python benchmarks/peers.py")
    return None


def create(*, again: bool = False) -> Path:
    """Make the environment when it is missing (or always, with `again`); returns its interpreter. Blocks for minutes.

    Raises:
        subprocess.CalledProcessError: a package cannot be had or does not import; its output is on the terminal.
    """
    python = FOLDER / "bin" / "python"
    if MARK.exists() and not again:
        return python
    shutil.rmtree(FOLDER, ignore_errors=True)
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "uv"], check=True)
    overrides = FOLDER / "overrides.txt"
    overrides.write_text("\n".join(OVERRIDES) + "\n")
    subprocess.run(
        [
            str(FOLDER / "bin" / "uv"),
            "pip",
            "install",
            "--python",
            str(python),
            "--override",
            str(overrides),
            *PACKAGES,
        ],
        check=True,
        env={**os.environ, **_wheels()},
    )
    _install_ffmpeg(python)
    subprocess.run([str(python), "-c", TORCHVISION_REPAIR + "import torchvision, lerobot, grpc, datasets"], check=True)
    MARK.write_text(json.dumps({"lerobot": LEROBOT, "seconds": time.monotonic() - start}))
    return python


def size_mb() -> float:
    """Megabytes on disk of the environment."""
    return sum(path.lstat().st_size for path in FOLDER.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def _wheels() -> dict[str, str]:
    """pip's folders of wheels in uv's words: uv does not read pip's configuration. Here lies a torch without CUDA."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    found = (
        os.environ.get("PIP_FIND_LINKS") or subprocess.run(command, capture_output=True, text=True, check=False).stdout
    )
    return {"UV_FIND_LINKS": ",".join(found.split())} if found.strip() and "UV_FIND_LINKS" not in os.environ else {}


def _install_ffmpeg(python: Path) -> None:
    """torchcodec decodes with the system's ffmpeg; install it where we may, go on without where we may not."""
    works = [str(python), "-c", "import torchcodec.decoders"]
    if subprocess.run(works, capture_output=True, check=False).returncode == 0:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "install", "-y", "-qq", "ffmpeg"], check=True, env=quiet, stdout=subprocess.DEVNULL)
        subprocess.run(works, check=True)
    else:
        print("torchcodec finds no ffmpeg: videos are decoded by pyav. For torchcodec: sudo apt-get install ffmpeg")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make lerobot's own environment in .venv-lerobot.")
    parser.add_argument("--again", action="store_true", help="remove it and make it anew")
    options = parser.parse_args()
    start = time.monotonic()
    python = create(again=options.again)
    print(f"{python}: {size_mb():,.0f} MB, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
