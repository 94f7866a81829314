"""A run in a tracker, for those who watch from elsewhere: `--track tensorboard`, `trackio` or `wandb`.

Each is a package of its own, which nothing else here needs: `pip install tensorboard`. All work without a network: TensorBoard's
files are in RUN/tensorboard; trackio keeps a database under ~/.cache/huggingface/trackio, or $TRACKIO_DIR; wandb writes to
RUN/wandb, and sends it while the run goes on only where one is logged in or $WANDB_MODE says so (else `wandb sync` does, later).
A run that is resumed goes on in the same log; an iteration that it has to repeat is there twice, with the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import math
import os
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from policy import UserError
from siri import Config
from skills import SkillBank
from tools.terminal import say

Table = tuple[list[str], list[list[Any]]]           # columns, rows


def tensorboard(cfg: Config, folder: Path, resumed: int | None) -> tuple[Callable, Callable]:
    """How TensorBoard logs, and how it ends."""
    from torch.utils.tensorboard import SummaryWriter

    # What was logged after the checkpoint is logged again; evaluations at its own step are not.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if resumed is None else resumed + 1)

    def log(step: int, values: Mapping[str, float], table: Table | None, text: str) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        if table:
            rows = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (table[0], *table[1])]
            writer.add_text("skills", "\n".join([rows[0], "|---" * len(table[0]) + "|", *rows[1:]]), step)
        if text:
            writer.add_text("sample", "\n".join("    " + line for line in text.splitlines()), step)     # as it is, not as Markdown
        writer.flush()

    writer.add_text("config", "\n".join(f"    {name} {value}" for name, value in dataclasses.asdict(cfg).items()), resumed or 0)
    return log, writer.close


def trackio(cfg: Config, folder: Path, resumed: int | None) -> tuple[Callable, Callable]:
    """How trackio logs, and how it ends."""
    import trackio
    run = trackio.init(project="siri", name=cfg.name, config=dataclasses.asdict(cfg), embed=False,
                       resume="never" if resumed is None else "allow")
    return like_wandb(run, trackio.Table, lambda text: trackio.Markdown(f"<pre>{escape(text)}</pre>")), trackio.finish


def wandb(cfg: Config, folder: Path, resumed: int | None) -> tuple[Callable, Callable]:
    """How wandb logs, and how it ends."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    earlier = sorted(folder.glob("wandb/*run-*")) if resumed is not None else []        # (offline-)run-DATE-ID
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    run = wandb.init(project="siri", name=cfg.name, dir=folder, config=dataclasses.asdict(cfg), mode=mode,
                     id=earlier[0].name.rpartition("-")[2] if earlier else None, resume="allow",
                     settings=wandb.Settings(console="off", silent=True))
    return like_wandb(run, wandb.Table, lambda text: wandb.Html(f"<pre>{escape(text)}</pre>")), run.finish


def like_wandb(run: Any, table_of: Callable, text_of: Callable) -> Callable:
    """How a run logs that has wandb's form."""
    def log(step: int, values: Mapping[str, float], table: Table | None, text: str) -> None:
        more = {"skills": table_of(columns=table[0], data=table[1])} if table else {}
        run.log({**values, **more, **({"sample": text_of(text)} if text else {})}, step=step)

    return log


TRACKERS = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}


def refuse_missing(name: str) -> None:
    """UserError if the tracker of this name is not installed."""
    if name != "none" and not ((spec := importlib.util.find_spec(name)) and spec.origin):
        raise UserError(f"--track {name}: is not installed; pip install {name}, or leave it out (--track none)")


def skill_table(bank: SkillBank) -> Table:
    """Every skill of the bank, with what is known of it."""
    return ["skill", "state", "utility", "standard error", "pairings", "mined in iteration"], [
        [s.text, s.state, bank.utility(s), bank.stderr(s), s.n, s.born] for s in bank.skills]


class Tracker:
    """The tracker of a run, or none. What fails in it is said once, and ends the tracking, not the run."""

    def __init__(self, cfg: Config, folder: Path, resumed: int | None) -> None:
        """`resumed`: the iteration of the checkpoint from which an earlier log goes on; None for a new run."""
        self.name, self.send, self.end = cfg.track, None, None
        if self.name != "none":
            self.send, self.end = self.guarded(lambda: TRACKERS[self.name](cfg, folder, resumed)) or (None, None)

    def guarded(self, work: Callable[[], Any]) -> Any:
        """Do this, or end the tracking. What a tracker prints is not ours to show."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return work()
        except Exception as e:      # of a network, a server, a disk, a package of another version: whatever it is, the run goes on
            self.send = self.end = None
            say(f"     warning: --track {self.name} failed and ends here, the run goes on ({type(e).__name__}: "
                f"{' '.join(str(e).split())[:200]})")

    def log(self, step: int, values: Mapping[str, Any], bank: SkillBank | None = None, text: str = "",
            under: str = "train") -> None:
        """Log numbers under this heading, the bank as a table and a sample as text; `step` is the iteration. A rate of nothing
        is left out."""
        if send := self.send:
            numbers = {f"{under}/{name}": value for name, value in values.items() if math.isfinite(value)}
            self.guarded(lambda: send(step, numbers, skill_table(bank) if bank and bank.skills else None, text))

    def evaluated(self, step: int, result: Mapping[str, Any]) -> None:
        """Log an entry of results.json, with its 95% interval."""
        low, high = result["interval"]
        shown = ("n", "success", "low", "high", "score", "score_se", "mean_steps", "invalid_rate", "failures", "seconds")
        self.log(step, {name: value for name, value in dict(result, low=low, high=high).items() if name in shown},
                 under=f"eval/{result['label'].replace(' ', '_')}")

    def close(self) -> None:
        """End the log."""
        if self.end:
            self.guarded(self.end)
