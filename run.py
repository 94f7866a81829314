"""One run: its folder, its checkpoints, and the command line. What is learnt, and how, is in `siri.py`, whose events are consumed
here: shown, written to files, and answered by checkpoints.

Sections: 1 files, 2 checkpoints, 3 the loop, 4 the command line. Presets and flags are in `tools/settings.py`, what is shown in
`tools/metrics.py`, how files are read and written in `tools/files.py`.

A run folder holds config.json (every setting as used), metrics.csv (a row for each iteration), results.json (evaluations),
skills.json (the bank), samples/ and checkpoints/. Only JSON, CSV and safetensors are ever read back. Every file is written aside
and renamed, and a checkpoint carries the hashes of its files. So a run can be killed at any moment and resumed to the same
result; a damaged checkpoint is named, and the one before is used.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import difflib
import errno
import io
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.check import check, missing

if sys.argv[1:] == ["--check"]:             # before the packages, which may be missing or broken
    sys.exit(check())
try:
    import fcntl

    import torch

    import envs
    import siri
    from policy import Policy, UserError
    from siri import PHASES, Config
    from skills import FLAG, NUMBER, TEXT, Form, count, misfit
    from tools import bench, compare, export, metrics, play, probe, report
    from tools.files import (
        OWN,
        checkpoints,
        damage,
        file_hash,
        latest_checkpoint,
        load_bank,
        load_results,
        phase_ends,
        read_json,
        read_skills,
        refuse_links,
        sync,
        write_json,
        write_text,
    )
    from tools.imitation import cold_start
    from tools.progress import Progress, Work
    from tools.ranks import Ranks, Torchrun, join
    from tools.settings import changes_of, choose_preset, flag, load_config, make_environment, resolve, run_name
    from tools.terminal import folded, printable, say
    from tools.track import Tracker, refuse_missing
except ModuleNotFoundError as error:
    sys.exit(missing(error.name))

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The user or the system asked the run to stop, and everything is saved."""


# ---- 1. Files ------------------------------------------------------------------------------------------------------

def add_result(folder: Path, result: dict[str, Any]) -> None:
    """Append an evaluation; a repeat (after a resume) of one with the same label, iteration, panel and settings replaces it.
    UserError as `load_results`."""
    def key(r: dict[str, Any]) -> list:
        return [r.get(name) for name in ("label", "iteration", "panel", "temperature", "settings")]

    path = folder / "results.json"
    results = load_results(folder) if path.exists() else []
    write_json(path, [r for r in results if key(r) != key(result)] + [result])


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Append an iteration's row to metrics.csv, numbers to six digits, the header before the first; on the disk when
    it returns."""
    path = folder / "metrics.csv"
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        f.flush()
        os.fsync(f.fileno())                        # before the checkpoint that counts this row


def save_sample(folder: Path, learner: siri.Learner, it: siri.Iteration) -> str:
    """A plain and a guided episode of one group, as text to read and as JSON for the report; returns the text."""
    if not it.groups:
        return ""
    text, data = metrics.sample(learner, it)
    (folder / "samples").mkdir(exist_ok=True)
    write_text(folder / "samples" / f"{it.number:04d}.txt", printable(text))
    write_json(folder / "samples" / f"{it.number:04d}.json", data)
    return text


def write_report(folder: Path, alive: bool) -> Path | None:
    """The page of a run that goes on (`alive`) or has ended. A fault in it ends no run: one warning, and None."""
    try:
        return report.write(folder, alive)
    except Exception as e:
        say(f"     warning: the report is not written ({' '.join(f'{type(e).__name__}: {e}'.split())})")
        return None


# ---- 2. Checkpoints --------------------------------------------------------------------------------------------------

def save_checkpoint(folder: Path, learner: siri.Learner) -> None:
    """Adapter (peft format), optimizer, progress and bank with their hashes, written aside and renamed: at any moment the
    folder holds a whole checkpoint. The last two are kept. UserError for values that are not finite: they are not saved.
    OSError for a full disk: what was half written goes."""
    root, bank, p = folder / "checkpoints", learner.bank.to_json(), learner.progress
    # 00000 before the base was evaluated, then iterations and ended phases: 00012-1 is in mining, and 00040-3 the finished run.
    name, aside = f"{p.iteration:05d}" + f"-{p.milestones - 1}" * (p.milestones > 0), root / "writing"
    # Nothing is learnt between two milestones but in iterations: what has this name is this very state, and stays if it is sound.
    if not damage(root / name):
        return
    moments = (x for state in learner.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    if not all(tensor.isfinite().all() for tensor in (*learner.policy.trainable, *moments)):
        raise UserError("the adapter or the optimizer has values that are not finite, and is not saved: resume with a lower --lr "
                        "and --distill-lr")
    try:
        write_checkpoint(aside, learner)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(root / name, ignore_errors=True)
    os.replace(aside, root / name)
    sync(root)
    write_json(folder / "skills.json", bank)
    kept = phase_ends(folder).values() if learner.cfg.keep_phases else ()
    for old in checkpoints(folder)[2:]:
        if all(old not in ends for ends in kept):
            shutil.rmtree(old)
    size, free = sum(path.stat().st_size for path in (root / name).iterdir()), shutil.disk_usage(root).free
    if free < 3 * size:
        say(f"     warning: {free / 2**20:.0f} MiB free for {root}, and a checkpoint takes {size / 2**20:.0f}; make room")


def write_checkpoint(aside: Path, learner: siri.Learner) -> None:
    """The files of a checkpoint, in a new folder; on the disk when it returns. OSError if they can't be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    state = {i: s | s.pop("__bnb_optimizer_quant_state__", {})                # where bitsandbytes nests its tensors
             for i, s in learner.optimizer.state_dict()["state"].items()}
    try:
        learner.policy.save_adapter(aside)          # not the base model: the adapter is all that is learnt
        save_file({f"{i}.{k}": torch.as_tensor(v).clone() for i, s in state.items() for k, v in s.items()},
                  aside / "optimizer.safetensors")
    except SafetensorError as e:
        raise OSError(errno.ENOSPC, str(e), str(aside)) from e
    write_text(aside / "progress.json", json.dumps(vars(learner.progress), default=vars))    # on one line: many token ids
    write_json(aside / "skills.json", learner.bank.to_json())
    write_json(aside / "manifest.json", {path.name: file_hash(path) for path in sorted(aside.iterdir())})
    # On the disk before it gets its name: after a power cut a checkpoint with a name is a whole one.
    for path in (*aside.iterdir(), aside):
        sync(path)


def load_progress(path: Path, vocab: int, n_skills: int) -> siri.Progress:
    """Progress as `save_checkpoint` wrote it. UserError naming what no run can have written."""
    # Ids go to the tokenizer and places to the bank: what would be out of range there is found here, with the file's name.
    token = Form(lambda x: type(x) is int and 0 <= x < vocab, f"a token id below {vocab}")
    tokens = Form(lambda x: isinstance(x, list) and bool(x) and all(map(token.holds, x)), f"token ids below {vocab}")
    told = Form(lambda x: isinstance(x, list) and bool(x) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(TEXT.holds, pair)) for pair in x), "pairs of action and result")
    flags = Form(lambda x: isinstance(x, list) and all(type(flag) is bool for flag in x), "a list of true and false")
    step = dict(prompt=tokens, response=tokens, action=flags, advantage=NUMBER, effect=NUMBER,
                skill=Form(lambda x: type(x) is int and -1 <= x < n_skills, f"a skill below {n_skills}"))
    forms = {f.name: count() for f in dataclasses.fields(siri.Progress)} | dict(
        phase=Form(lambda x: type(x) is int and 0 <= x < len(PHASES), "a phase"), seconds=NUMBER, solved=[TEXT], recent=[NUMBER],
        lengths={...: NUMBER}, wins=[dict(task=TEXT, goal=TEXT, steps=told)], guided=[[step]], finished=FLAG)
    data = read_json(path / "progress.json")
    problem = misfit(data, forms, "progress")
    if not problem and data["phase_start"] > data["iteration"]:
        problem = "phase_start is after iteration"
    if not problem and any(len(s["action"]) != len(s["response"]) for part in data["guided"] for s in part):
        problem = "guided: a step has not one action mark for each token"
    if problem:
        raise UserError(f"{path}/progress.json: {problem}; resume from another checkpoint, or begin anew (another version's?)")
    data["guided"] = [[siri.GuidedStep(**step) for step in part] for part in data["guided"]]
    return siri.Progress(**data)


def load_checkpoint(learner: siri.Learner, path: Path) -> None:
    """The inverse of `save_checkpoint`; the adapter was loaded with the policy. UserError naming a file that is not this
    program's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    saved = load_bank(path)             # its history; the constants are the configuration's, which flags may have changed
    learner.bank.skills, learner.bank.rejected = saved.skills, saved.rejected
    learner.progress = load_progress(path, learner.policy.vocab, len(saved.skills))
    state: dict[int, dict[str, Any]] = defaultdict(dict)
    try:
        for key, value in load_file(path / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            state[int(index)][name] = value.item() if value.dtype == torch.int64 else value  # bitsandbytes counts in int
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"{path}/optimizer.safetensors: not of this program ({e}); resume from another one") from e
    moment = "state1" if learner.cfg.four_bit else "exp_avg"
    if any(moment not in tensors for tensors in state.values()):        # 8-bit moments for 32-bit Adam, or the reverse
        state.clear()
        say("     the optimizer is another one with --4bit than without: its moments begin anew")
    learner.optimizer.load_state_dict({"state": dict(state), "param_groups": learner.optimizer.state_dict()["param_groups"]})


def take_back(folder: Path, learner: siri.Learner) -> None:
    """Bring the bank and the table of metrics to where the checkpoint is: what was written after it will be written again.
    Evaluations and samples stay: a repeat replaces them."""
    write_json(folder / "skills.json", learner.bank.to_json())
    table = folder / "metrics.csv"
    if table.exists():                              # a header and a line for each iteration; the last may be torn
        lines = table.read_bytes().decode(errors="replace").splitlines(keepends=True)            # ends are \r\n
        write_text(table, "".join(lines[:1 + learner.progress.iteration]))


# ---- 3. The loop: events in, files and lines out ---------------------------------------------------------------------

class Stop:
    """Signals: the first lets the iteration end and be saved. A second stops at once, and costs this iteration; not so under
    torchrun, which repeats a signal that it gets, and ends by itself what takes more than 30 s. (In a thread none is heard: Python
    gives them to the main one.)"""

    def __init__(self, ranks: Ranks) -> None:
        self.asked, self.once = False, isinstance(ranks, Torchrun)
        for which in SIGNALS if in_main_thread() else ():
            signal.signal(which, self.ask)

    def ask(self, number: int, frame: Any) -> None:
        if not self.asked:
            again = "" if self.once else "; once more stops now and repeats it on resuming"
            say(f"stopping after this iteration, or this evaluation{again}", sys.stderr)
        self.asked = True
        for which in SIGNALS if not self.once else ():
            signal.signal(which, signal.default_int_handler)


def in_main_thread() -> bool:
    """Whether signals can be handled here."""
    return threading.current_thread() is threading.main_thread()


@dataclass
class Watch:
    """Where a run can be watched from: its bars and lines, and its tracker."""
    progress: Progress
    tracker: Tracker


def consume(learner: siri.Learner, folder: Path, lock: Lock | None, stop: Stop, watch: Watch) -> None:
    """Train to the end. Rank 0, which has the lock, shows every event, writes it to the folder, and saves when the learner is
    whole. Raises Stopped once a signal came to any rank, UserError as `siri.train`, `record_iteration` and `Lock.check`, and
    OSError for a full disk."""
    p, ranks = learner.progress, learner.policy.ranks
    for event in siri.train(learner):
        stopping = any(ranks.gather(stop.asked))        # one decision, even if a signal comes in the meantime
        if lock:
            lock.check()
            record(folder, learner, event, watch, stopping)
        ended = isinstance(event, siri.Milestone) and event.reason or not is_whole(event)
        if stopping and not ended and not p.finished:
            raise Stopped(f"stopped before iteration {p.iteration}; {go_on(ranks, folder)}")


def is_whole(event: Any) -> bool:
    """Whether the learner can be saved at this event."""
    return not isinstance(event, siri.Evaluation) or event.label == siri.CURVE


def record(folder: Path, learner: siri.Learner, event: Any, watch: Watch, stopping: bool) -> None:
    """Show an event of training, write it down, and save. UserError and OSError as `consume`."""
    p = learner.progress
    if isinstance(event, siri.Evaluation):
        record_evaluation(folder, learner, watch, event)
    if isinstance(event, siri.Iteration):
        record_iteration(folder, learner, event, watch)
    # At a milestone always: an evaluation follows or has just been played, which is dear to repeat.
    due = isinstance(event, siri.Iteration) and p.iteration % learner.cfg.save_every == 0
    if isinstance(event, siri.Milestone) or due or stopping and is_whole(event):
        save_checkpoint(folder, learner)
    if isinstance(event, siri.Milestone) and event.reason:
        say(f"{PHASES[p.phase]} ends after {learner.age} iterations: {event.reason}")
        watch.tracker.log(p.iteration, {}, learner.bank)


def go_on(ranks: Ranks, folder: Path) -> str:
    """How a run that has stopped goes on."""
    return f"go on with: {'python' if ranks.size == 1 else 'torchrun ...'} siri.py --resume {folder}"


def record_iteration(folder: Path, learner: siri.Learner, it: siri.Iteration, watch: Watch) -> None:
    """An iteration's row of metrics, its lines, and now and then a sample. UserError when too many groups have been lost."""
    p, row = learner.progress, metrics.metrics_row(learner, it)
    shown = it.number % learner.cfg.sample_every == 0
    sample = save_sample(folder, learner, it) if shown else ""
    # The row goes to the disk before the checkpoint that counts it; on resuming, rows that no checkpoint counts are cut off.
    append_metrics(folder, row)
    watch.progress.iterated(row)
    watch.tracker.log(it.number, row, learner.bank if shown else None, sample)
    lines = [f"     mined: {skill.text}" for skill in it.mined] + [f"a group is lost: {cause}" for cause in it.failures]
    lines += [f"     {skill.state}: {skill.text}  ({metrics.utility(skill, learner.bank)})" for skill in it.judged]
    lines += [f"     warning: {text}" for text in metrics.warnings_of(row, learner.cfg)]
    for line in [*map(folded, lines), metrics.dense_line(row, watch.progress.eta())]:
        say(line)
    if shown:
        write_report(folder, alive=True)            # with the sample, and the row
    if siri.too_many_lost(p.failed_groups, p.groups):
        raise UserError(f"{p.failed_groups} of {p.groups} groups were lost (limit {siri.LOST_AT_MOST:.0%}); the last: "
                        f"{it.failures[-1]}; mend the environment or its data, or raise --max-prompt")


def record_evaluation(folder: Path, learner: siri.Learner, watch: Watch, played: siri.Evaluation) -> None:
    """An evaluation's entry in results.json, its line, and the report."""
    p, result = learner.progress, metrics.summarise(learner.env, learner.cfg, played)
    add_result(folder, result | dict(checkpoint=f"iteration {p.iteration}", iteration=p.iteration, env_steps=p.env_steps))
    watch.progress.evaluated(played)
    watch.tracker.evaluated(p.iteration, result)
    for line in (*metrics.lost_games(played), metrics.result_line(result)):
        say(line)
    write_report(folder, alive=True)


# ---- 4. Command line ---------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[..., None]] = {
    "report": compare.command, "export": export.command, "play": play.command, "bench": bench.command, "probe": probe.command}
ACTIONS = {     # without one: train
    "check": "can this machine install the requirements?",
    "resume": "go on with a run where it stopped; auto: with the run of these settings, or begin it",
    "eval": "play the panel with a run's last checkpoint",
    "with_skills": "with --eval: use the bank (ablation)",
    "report": "write RUN/report.html: one page with all that happened; of several runs: comparison.html beside the first",
    "export": "take a run home: its adapter, model card, skills and sample episodes, into a folder of their own",
    "to": "with --export: the folder, new or empty",
    "merge": "with --export: the whole model, the adapter merged into it",
    "play": "play in the terminal; with a run: watch its policy play",
    "probe": "will a --model do? minutes instead of days: its answers and skills, and how many are well formed",
    "bench": "measure speed and memory beside what people would use instead; writes bench.json"}


class Help(argparse.HelpFormatter):
    """Help as it is written: the examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text == EXAMPLES else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest flag."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ")[1].split()[0]
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, n=1)
            message = f"{word}: unknown flag" + (f"; did you mean {near[0]}?" if near else "; see --help")
        raise UserError(message)


EXAMPLES = """examples:
  python siri.py --env alfworld               train, as fits this machine
  python siri.py --env webshop --preset tiny  the other benchmark, on a laptop
  python siri.py --resume runs/NAME           go on with a run that was stopped"""


def make_parser(defaults: Config | None = None) -> Parser:
    """The command line: the actions, and a flag for each of Config's fields. The help shows these defaults."""
    defaults, width = defaults or Config(), min(100, shutil.get_terminal_size().columns)
    told = ("SIRI: an agent that learns from its own skills. [P] the SIRI paper, [R] the GiGPO release, [O] our choice. Defaults "
            f"are those of preset {defaults.preset} on {defaults.env}; add --preset NAME and --env NAME for another's.")
    parser = Parser(usage="python siri.py [action] [--setting value ...]", description=told, epilog=EXAMPLES, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=lambda prog: Help(prog, max_help_position=26, width=width))
    group = parser.add_argument_group("actions (without one: train)")
    for name, said in ACTIONS.items():
        how: dict[str, Any] = dict(metavar={"bench": "PARTS", "to": "FOLDER"}.get(name, "RUN"), default=None)
        if name in ("check", "with_skills", "merge"):
            how = dict(action="store_true", default=False)
        elif name == "probe":
            how = dict(action="store_const", const="", default=None)
        elif name == "report":
            how |= dict(nargs="+")
        elif name in ("play", "bench"):
            how |= dict(nargs="?", const="")
        group.add_argument(f"--{flag(name)}", help=said, **how)
    for f in dataclasses.fields(Config):
        if f.metadata["section"]:
            group = parser.add_argument_group(f.metadata["section"])
        form, kind = f.metadata["form"], type(f.default)
        said = f"{f.metadata['meaning']}; {form.words}" if form.words.startswith("one of") else f.metadata["meaning"]
        default = getattr(defaults, f.name)
        default = ("off", "on")[default] if kind is bool else default
        said = (said + f" (default {default})" * (default != "")).replace("%", "%%")
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__.upper())
        group.add_argument(f"--{flag(f.name)}", dest=f.name, help=said, **how)
    return parser


def defaults_in_force(argv: Sequence[str]) -> Config:
    """The settings that a command would have if only its preset and benchmark were given. UserError for others than there are."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in ("--preset", "--env"):
        known.add_argument(name)
    given = vars(known.parse_known_args([word for word in argv if word not in ("--help", "-h")])[0])
    preset, _ = choose_preset(given)
    return Config(**{**changes_of(preset, given.get("env", Config.env)), **given, "preset": preset})


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The actions (resume, eval, ...) and the settings that were given. UserError if bad."""
    given = vars(make_parser(defaults_in_force(argv) if {"--help", "-h"} & {*argv} else None).parse_args(argv))
    chosen = argparse.Namespace(**{name: given.pop(name) for name in ACTIONS})
    several = [f"--{name}" for name in ("resume", "eval", *COMMANDS) if getattr(chosen, name) is not None]
    if len(several) > 1:
        raise UserError(f"{' and '.join(several)}: give one of them")
    for name, action in (("with_skills", "eval"), ("to", "export"), ("merge", "export")):
        if getattr(chosen, name) and getattr(chosen, action) is None:
            raise UserError(f"--{flag(name)}: only together with --{action} RUN")
    if chosen.export is not None and not chosen.to:
        raise UserError(f"--export {chosen.export}: add --to FOLDER")
    if chosen.report is not None and given:
        raise UserError(f"--{flag(next(iter(given)))}: --report takes no settings")
    return chosen, given


class Lock:
    """A run folder, kept for this process until it ends; the lock goes with the process, however that ends. UserError if
    another process has it, or it can't be made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        refuse_links(folder)
        try:
            self.handle = open(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "w")
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{folder} is in use by another process; wait for it, or give another --name") from e
        except OSError as e:
            raise UserError(f"{folder}: cannot be locked ({e.strerror}); run in a folder of your own") from e

    def close(self) -> None:
        """Give it back."""
        self.handle.close()

    def holds(self) -> bool:
        """Whether the folder is not another one by now: removed, or begun again by another process."""
        try:
            return os.path.samestat(os.fstat(self.handle.fileno()), os.lstat(self.folder / "lock"))
        except OSError:
            return False

    def check(self) -> None:
        """UserError if it does not hold any more."""
        if not self.holds():
            raise UserError(f"{self.folder}: was removed or replaced while this run used it; nothing more is written there")


def prepare_folder(cfg: Config, held: ExitStack) -> Lock:
    """Make the run folder, lock it for `held`, and find out now whether it can be written to and has room. UserError if it
    can't be used, holds a run or what is not of a run, or has too little room (0.05 GiB compact, else 3 GiB)."""
    folder = Path("runs") / cfg.name
    strange = sorted(p.name for p in folder.glob("*") if p.name not in OWN)
    if strange:
        raise UserError(f"{folder}: holds other files ({', '.join(strange)[:100]}); give another --name")
    need, free = 0.05 if cfg.compact else 3.0, shutil.disk_usage("runs" if Path("runs").is_dir() else ".").free / 2**30
    if free < need:
        raise UserError(f"{folder}: {free:.2f} GiB free, checkpoints need {need} GiB; make room")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context(closing(Lock(folder)))
        if checkpoints(folder):
            raise UserError(f"{folder} already holds a run: go on with --resume {folder}, or give another --name")
        if left := [name for name in ("metrics.csv", "results.json", "samples") if (folder / name).exists()]:
            raise UserError(f"{folder}: holds {left[0]} of a run whose checkpoints are gone; move it away, or give another --name")
        (folder / "checkpoints").mkdir(exist_ok=True)
        write_json(folder / "config.json", dataclasses.asdict(cfg))
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); run in a folder of your own") from e
    return lock


@dataclass
class Run:
    """A run that is to begin or to go on, as every rank has to know it."""
    cfg: Config
    folder: Path
    reason: str                 # for its preset
    checkpoint: Path | None     # to go on from


def find_run(chosen: argparse.Namespace, given: dict[str, Any], held: ExitStack) -> tuple[Run, Lock]:
    """The run that the command line means, old or new; its folder is locked for `held`. UserError if it can't be used."""
    name, cfg = chosen.resume if chosen.eval is None else chosen.eval, None
    if name in (None, "auto"):
        cfg, reason = resolve(given)
        cfg.name = cfg.name or run_name(cfg)
    folder = Path(name) if cfg is None else Path("runs") / cfg.name
    if cfg and not (name and checkpoints(folder)):
        return Run(cfg, folder, reason, None), prepare_folder(cfg, held)
    if not checkpoints(folder):
        raise UserError(f"{folder}: holds no checkpoint; give a run folder such as runs/NAME, whole, or train a new one")
    lock = held.enter_context(closing(Lock(folder)))            # before anything is read, which another process may change
    run = Run(load_config(folder, given), folder, "saved with the run", latest_checkpoint(folder))
    if (folder / "results.json").exists():
        load_results(folder)                        # now, and not when the next evaluation has been played
    return run, lock


def load(run: Run, ranks: Ranks) -> tuple[envs.Environment, Policy]:
    """A run's environment and policy, on this rank. UserError for what can't be loaded, or is not the same on all ranks."""
    cfg = run.cfg
    if run.checkpoint and not run.checkpoint.exists():
        raise UserError(f"{run.checkpoint}: is not there; machines that go on with one run need a folder that all of them see")
    env = make_environment(cfg)
    say(folded(env.notice))
    if run.reason:
        say(f"preset {cfg.preset} ({run.reason}); model {cfg.model}, {'4-bit, ' if cfg.four_bit else ''}LoRA r {cfg.lora_r}; "
            f"{cfg.prompt_style} prompts\nvariant {cfg.variant}; seed {cfg.seed}; folder {run.folder}")
    policy = Policy(cfg, run.checkpoint, ranks)
    if ranks.size > 1:
        tasks = env.tasks("train")
        said = ranks.gather(dict(model=policy.base, panel=[task.id for task in siri.panel_tasks(cfg, env)],
                                 games=[len(tasks), *(tasks[i].id for i in range(0, len(tasks), len(tasks) // 100 + 1))],
                                 packages=[version(name) for name in ("torch", "transformers", "peft")]))
        for rank, other in enumerate(said):
            for what in other:
                if other[what] != said[0][what]:
                    raise UserError(f"rank {rank} has another {what} than rank 0; give all machines the same files and packages")
    return env, policy


def train_run(run: Run, lock: Lock | None, ranks: Ranks) -> None:
    """Train, from the beginning or from a checkpoint; rank 0, with the lock, keeps the folder. Raises Stopped and UserError, and
    KeyboardInterrupt for a second signal."""
    cfg, folder = run.cfg, run.folder
    begun = run.checkpoint is not None and bool(load_bank(run.checkpoint).skills)
    own = read_skills(Path(cfg.bank), cfg.bank_size) if cfg.bank and not begun else []
    env, policy = load(run, ranks)
    # What was found out at the start is kept: a run is resumed with the same batches, and on no other model.
    cfg.gen_tokens, cfg.update_tokens, cfg.base = policy.gen_tokens, policy.update_tokens, policy.base
    say(f"memory: batches of {policy.gen_tokens} tokens to generate, {policy.update_tokens} to update"
        + f"; {ranks.size} ranks share each iteration" * (ranks.size > 1))
    if policy.chat.before:
        say(f"the chat template asks for a system turn: every prompt begins with {policy.chat.before[0]['content']!r}")
    learner = siri.Learner.begin(cfg, env, policy)
    if run.checkpoint:
        load_checkpoint(learner, run.checkpoint)
    for condition, strategy in own:
        learner.bank.add(condition, strategy, learner.progress.iteration, cfg.bank)
    ranks.after = "; " + go_on(ranks, folder)
    try:
        if lock and run.checkpoint:
            take_back(folder, learner)
        elif lock:
            save_checkpoint(folder, learner)        # before the first evaluation, which takes hours on a large model
        if lock:
            write_json(folder / "config.json", dataclasses.asdict(cfg))
            if page := write_report(folder, alive=True):
                say(folded(f"report: {page}, kept up to date; open it in a browser"))
        try:
            with watched(learner, run, lock) as watch:
                if cfg.imitate and not learner.progress.milestones:
                    cold_start(learner, partial(record_evaluation, folder, learner, watch) if lock else lambda played: None)
                consume(learner, folder, lock, Stop(ranks), watch)
        except UserError as e:
            raise UserError(f"{e}; then go on with --resume {folder}") from e
        finally:
            if lock and lock.holds():
                write_report(folder, alive=False)
        if lock:
            say("\n".join(filter(None, [ranks.report(), metrics.results_block(folder, load_results(folder))])))
    except OSError as e:
        again = f"; then go on with --resume {folder}" if checkpoints(folder) else ""
        raise UserError(f"{e.filename or folder}: {e.strerror or e}; make room there{again}") from e
    except KeyboardInterrupt:
        after = go_on(ranks, folder) if checkpoints(folder) else "nothing was to be saved yet"
        raise KeyboardInterrupt(f"stopped at once; {after}") from None


@contextlib.contextmanager
def watched(learner: siri.Learner, run: Run, lock: Lock | None) -> Iterator[Watch]:
    """While a run is trained, it can be watched; what other ranks show goes nowhere, and they have no tracker."""
    cfg = learner.cfg if lock else dataclasses.replace(learner.cfg, track="none")
    with closing(Progress(learner)) as progress, closing(Tracker(
            cfg, run.folder, learner.progress.iteration if run.checkpoint else None)) as tracker:
        yield Watch(progress, tracker)


def evaluate_run(run: Run, lock: Lock | None, ranks: Ranks, with_skills: bool) -> None:
    """`--eval`: play the panel with a checkpoint, with the plain prompt or with the run's bank."""
    assert run.checkpoint is not None
    bank, label = (load_bank(run.checkpoint), "eval with skills") if with_skills else (None, "eval")
    # Nothing is trained: no probe of the memory that it would take.
    env, policy = load(dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, update_tokens=1), reason=""), ranks)
    with closing(Work()) as policy.tick:
        played = siri.evaluate(policy, env, siri.panel_tasks(run.cfg, env), run.cfg, label, bank)
    if lock:
        result = metrics.summarise(env, run.cfg, played)
        add_result(run.folder, result | dict(checkpoint=run.checkpoint.name, iteration=int(run.checkpoint.name.split("-")[0])))
        for line in (*metrics.lost_games(played), metrics.result_line(result), *metrics.kind_lines(result)):
            say(line)
        write_report(run.folder, alive=False)


def act(chosen: argparse.Namespace, given: dict[str, Any], held: ExitStack, ranks: Ranks) -> None:
    """Do what the command line asks for. Locks are given to `held`. Raises Stopped, UserError and KeyboardInterrupt."""
    for name, command in COMMANDS.items():
        if getattr(chosen, name) is not None:
            if ranks.size > 1:
                raise UserError(f"--{name}: is for one process; leave torchrun out")
            options = dict(to=chosen.to, merge=chosen.merge) if name == "export" else {}
            return command(getattr(chosen, name), given, **options)
    lock: Lock | None = None

    def find() -> dict[str, Any]:
        nonlocal lock
        run, lock = find_run(chosen, given, held)
        if chosen.eval is None:
            refuse_missing(run.cfg.track)
        return dict(cfg=dataclasses.asdict(run.cfg), folder=str(run.folder), reason=run.reason,
                    checkpoint=run.checkpoint and str(run.checkpoint))

    # What rank 0 finds holds for all: the preset by its device, the day, the last sound checkpoint.
    found = ranks.first(find)
    run = Run(Config(**found["cfg"]), Path(found["folder"]), found["reason"], found["checkpoint"] and Path(found["checkpoint"]))
    if chosen.eval is not None:
        evaluate_run(run, lock, ranks, chosen.with_skills)
    else:
        train_run(run, lock, ranks)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0; 2 after a UserError or an OSError, on one line of standard error; 130 when
    stopped, but 0 under torchrun, which would begin again."""
    before = {which: signal.getsignal(which) for which in SIGNALS} if in_main_thread() else {}
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                          # closed by whoever started it
            setattr(sys, name, open(os.devnull, "w"))
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # as standard error: no text ends a run by being unprintable
    ranks = Ranks()
    try:
        try:
            ranks = join()
        except (RuntimeError, ValueError) as e:
            raise UserError(f"the ranks that torchrun has started cannot find each other ({e}); see docs/several-gpus.md") from e
        if ranks.rank:                                          # rank 0 speaks for all
            sys.stdout = sys.stderr = open(os.devnull, "w")
        with ExitStack() as held:                               # another call in this process may want the folder
            chosen, given = parse_arguments(sys.argv[1:] if argv is None else argv)
            if chosen.check:
                return check()
            act(chosen, given, held, ranks)
        ranks.end("", lambda: None)
        return 0
    # Anything else that is raised is a fault of this program, and shows where it is.
    except UserError as e:
        return last_words(e, 2, ranks)
    except OSError as e:                                        # a full disk, a closed pipe: the machine's, and no fault here
        return last_words(f"{e.filename or 'output'}: {e.strerror or e}", 2, ranks)
    except Stopped as e:
        return last_words(e, 0 if isinstance(ranks, Torchrun) else 130, ranks)
    except KeyboardInterrupt as e:
        return last_words(str(e) or "stopped at once", 130, ranks)
    except Exception as e:
        if isinstance(ranks, Torchrun):
            ranks.end(f"{type(e).__name__}: {e}", partial(traceback.print_exc, file=sys.__stderr__))
        raise
    finally:
        ends = argv is None and "IPython" not in sys.modules    # a process that ends has nothing left to stop
        for which, handler in before.items():
            signal.signal(which, signal.SIG_IGN if ends else handler)


def last_words(text: object, status: int, ranks: Ranks) -> int:
    """Say on one line, whatever it quotes, why it ends; returns the exit status."""
    text = " ".join(str(text).split())

    def speak() -> None:
        with contextlib.suppress(OSError, ValueError):          # nobody may be listening
            say(f"siri: {text}", sys.stderr)

    ranks.end(text if status else "", speak)
    return status
