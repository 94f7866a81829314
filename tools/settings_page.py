"""Writes docs/settings.md from `siri.Config` and the presets: `python tools/settings_page.py`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run import PRESETS, flag  # noqa: E402
from siri import Config  # noqa: E402


def page() -> str:
    """The whole page: a table for each group of settings, and what each preset changes."""
    lines = ["# Settings", "", "Made from `siri.Config` by `python tools/settings_page.py`. The command line has a flag for each; "
             "a switch is turned off with no- before its name. [P] the SIRI paper, [R] the GiGPO release, [O] our choice. "
             "Defaults are the paper preset's."]
    for f in dataclasses.fields(Config):
        if f.metadata["section"]:
            lines += ["", f"## {f.metadata['section']}", "", "| flag | default | meaning | value |", "|---|---|---|---|"]
        default = "" if f.default == "" else f"`{f.default}`"
        lines.append(f"| `--{flag(f.name)}` | {default} | {f.metadata['meaning']} | {f.metadata['form'].words} |")
    lines += ["", "## What the presets change", "", "| preset | benchmark | settings |", "|---|---|---|"]
    for preset, worlds in PRESETS.items():
        for world, changes in worlds.items():
            lines.append(f"| {preset} | {world} | {', '.join(f'`{flag(k)} {v}`' for k, v in changes.items()) or 'none'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(page(), encoding="utf-8")
