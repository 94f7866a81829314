"""`python siri.py --check`: can this machine install the requirements? On the standard library, as nothing is installed yet."""

from __future__ import annotations

import shutil
import sys

WINDOWS = "ALFWorld's engine does not build on Windows: use WSL"


def wanting() -> list[str]:
    """A line for each thing that is missing, with the mend."""
    wrong = []
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        wrong.append(f"Python {sys.version.split()[0]} is not supported by TextWorld: use Python 3.10, 3.11 or 3.12")
    if not shutil.which("make") or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        wrong.append("ALFWorld's engine is compiled on installation and needs make and a C++ compiler: on Debian or Ubuntu "
                     "`sudo apt install build-essential`, on macOS `xcode-select --install`")
    if sys.platform == "win32":
        wrong.append(WINDOWS)
    if sys.prefix == sys.base_prefix or shutil.which("python") is None:
        wrong.append("no virtual environment is active (the engine's build calls `python`): "
                     "`python3 -m venv .venv && . .venv/bin/activate`")
    return wrong


def check() -> int:
    """Print what is wanting. Returns the exit status: 0, or 2 with a line on standard error for each thing."""
    wrong = wanting()
    for line in wrong:
        print(f"siri: {line}", file=sys.stderr)
    return 2 if wrong else 0


def missing(package: str | None) -> str:
    """What to say when a package can't be imported."""
    return f"siri: {WINDOWS if package == 'fcntl' else f'the package {package} is missing: run `pip install -r requirements.txt`'}"
