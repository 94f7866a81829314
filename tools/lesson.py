"""What every notebook begins with: it stands in the repository, has what it needs, and draws alike.

On the standard library until `start` has run, since on a fresh machine of Colab's nothing else is installed before.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def requirements(torch: str) -> list[str]:
    """The lines of requirements.txt, with the torch that is installed in place of the one that is asked for."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    return [f"torch=={torch}" if line.startswith("torch==") else line for line in lines if line]


def start() -> None:
    """Go to the repository; in Colab, install what is missing there. Then: figures with readable text, sums in one order.
    CalledProcessError if something can't be installed; pip has then said why."""
    os.chdir(ROOT)                                  # so that a notebook runs from any folder
    if "google.colab" in sys.modules:
        # Colab's torch fits its GPUs and is loaded already: pip is told to keep it.
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *requirements(version("torch"))], check=True)
    import matplotlib.pyplot as plt
    import torch

    warnings.filterwarnings("ignore", message="IProgress not found")        # no progress bars here
    torch.set_num_threads(1)                        # sums in one order: a repeat gives the same numbers
    plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})       # points


def show(thing: Any) -> None:
    """Print the source of a function or a class, as it is in its module now."""
    print(inspect.getsource(thing))
