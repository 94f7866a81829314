"""From flags to a configuration: presets, what a run was saved with, the user's own settings, and what does not go together.

Fields, meanings and bounds are declared in `siri.Config`. `python tools/settings.py` writes them, and the presets, as a page
(docs/settings.md).
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
import torch

import envs
import siri
from policy import UserError, device_gib, free_memory
from siri import SPLITS, Config
from skills import misfit
from tools import worlds
from tools.files import read_json

TINY = dict(
    model="assets/tiny", four_bit=False, compact=True, prompt_style="compact", max_steps=10, lora_r=16, lora_alpha=32,
    max_prompt=512, max_response=24, eval_temperature=1.0, gen_tokens=65536, update_tokens=4096, groups=8, lr=1e-3,
    minibatch=160, old="sampler", invalid_penalty=0.5, warmup_max=16, n_req=40, floor=0.4, mining_max=14, mine_every=1,
    mine_wins=32, n_eval=3, kappa=1.0, active_req=14, lambda_max=5.0, distill_max=8, distill_lr=5e-4, distill_decay=True,
    panel=120, sample_every=5)
SMOKE = TINY | dict(groups=2, group_size=4, warmup_max=2, n_req=1, floor=0.0, mining_max=2, n_eval=1, mine_wins=4,
                    distill_max=2, distill_min=1, active_req=1, panel=8, tau_up=-1.0, tau_down=-1.0)
PAPER = dict(pair_gain=False)       # the paper's gate asks for the skill's utility alone, and the study did not favour more
PAPER48 = PAPER | dict(groups=8, four_bit=False)
SMALL = PAPER | dict(model="Qwen/Qwen2.5-1.5B-Instruct", four_bit=False)    # GiGPO's second size, so there are published figures
SHOP = dict(max_steps=15, max_prompt=4096, norm="mean", split="test")
# The tiny shopper's thought names the choice that its action repeats, so whole responses are distilled [O].
TINY_SHOP = dict(model="assets/tiny-webshop", max_steps=15, split="test", distill_tokens="response")
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "small": dict(alfworld=SMALL, webshop=SMALL | SHOP),                # one GPU of less than 20 GiB, bf16
    "paper": dict(alfworld=PAPER, webshop=PAPER | SHOP),                # from 20 GiB: one 24 GB GPU
    "paper48": dict(alfworld=PAPER48, webshop=PAPER48 | SHOP),          # from 39 GiB: A100-40GB, 48 GB; bf16
    # A laptop, 10 minutes. Of an action's tokens one or two carry the choice, of a whole response's one, hence these lambdas.
    "tiny": dict(alfworld=TINY, webshop=TINY | TINY_SHOP | dict(
        n_req=90, mining_max=10, tau_up=0.1, lambda_max=10.0, distill_max=6, distill_epochs=2)),
    "smoke": dict(alfworld=SMOKE, webshop=SMOKE | TINY_SHOP)}           # the whole path in a minute, for tests


def flag(name: str) -> str:
    """The command-line name of a Config field."""
    return "4bit" if name == "four_bit" else name.replace("_", "-")


def choose_preset(settings: dict[str, Any]) -> tuple[str, str]:
    """The preset of these settings, by the device's memory where none is given, and why it is that. UserError for a preset or a
    benchmark that there isn't."""
    preset, reason, world = settings.get("preset", "auto"), "chosen by --preset", settings.get("env", Config.env)
    if preset == "auto":
        gib = device_gib()
        preset = ("paper48" if gib >= 39 else "paper" if gib >= 20 else "small") if gib else "tiny"
        reason = f"CUDA device with {gib:.0f} GiB" if gib else "no CUDA device"
        if gib and world in GET and not has_data(settings) and not settings.get("generated"):
            reason = f"{reason}, for which preset {preset} is made, but no data: {GET[world]}, then the same command"
            preset = "tiny"
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: must be one of {', '.join(('auto', *PRESETS))}")
    if world not in SPLITS and not worlds.is_own(world):
        raise UserError(f"--env {world}: must be one of {', '.join(SPLITS)}, or FILE.py:Class (docs/own-environment.md)")
    return preset, reason


def resolve(given: dict[str, Any], saved: dict[str, Any] | None = None) -> tuple[Config, str]:
    """Preset, then the settings that a run was saved with, then the user's own, then checks. Returns the config and why
    this preset. UserError if bad."""
    settings = {**(saved or {}), **given}
    preset, reason = choose_preset(settings)
    cfg = Config(**{**changes_of(preset, settings.get("env", Config.env)), **settings, "preset": preset})
    for f in dataclasses.fields(cfg):
        value, form = getattr(cfg, f.name), f.metadata["form"]
        if problem := form.problem(value):
            raise UserError(f"--{flag(f.name)} {str(value)[:20]}: must be {problem}")
    for name, problem in conflicts(cfg, given):
        value = getattr(cfg, name)
        raise UserError(f"--{flag(name)}{'' if isinstance(value, bool) else f' {value}'}: {problem}")
    if worlds.is_own(cfg.env):
        cfg.env_hash = worlds.same_file(cfg.env, cfg.env_hash)
    cfg.date = cfg.date or datetime.date.today().isoformat()
    if cfg.env == "webshop" and cfg.webshop_tagger == "auto":
        cfg.webshop_tagger = envs.find_tagger()
    return cfg, reason


def changes_of(preset: str, world: str) -> dict[str, Any]:
    """What a preset changes. An environment of one's own has ALFWorld's, with its own length and its own last split. UserError for
    a class that can't be found."""
    if not worlds.is_own(world):
        return PRESETS[preset][world]
    own = worlds.find(world)
    return PRESETS[preset]["alfworld"] | dict(max_steps=own.max_steps, split=own.splits[-1])


def run_name(cfg: Config) -> str:
    """The run folder's name, if none is given: from environment, preset, variant and seed."""
    world = re.sub(r"[^\w.+-]+", "-", cfg.env.rpartition("/")[2].replace(".py:", "-")).lstrip(".+-")
    return f"{world}-{cfg.preset}-{cfg.variant}-seed{cfg.seed}"


GET = dict(alfworld="get the games with `alfworld-download`, and set $ALFWORLD_DATA or give --alfworld-data",
           webshop="get WebShop's items_*.json, and give --webshop-data")


def has_data(settings: dict[str, Any]) -> bool:
    """Whether the benchmark's own data is named: by a flag, or for ALFWorld by the environment."""
    if settings.get("env", Config.env) == "webshop":
        return bool(settings.get("webshop_data"))
    return bool(settings.get("alfworld_data") or envs.alfworld_data_variable())


def conflicts(cfg: Config, given: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What does not go together: a field, and what is wrong with it and how to mend it. A setting without effect is refused
    where it is given, and not where a run was saved with it."""
    own = "add --preset paper (or --no-compact and a --model of your own)"
    for names, needed, there in (
            ("alfworld_data", "--env alfworld", cfg.env == "alfworld"),
            ("webshop_data webshop_split webshop_tagger observation", "--env webshop", cfg.env == "webshop"),
            ("webshop_size webshop_goals", "--webshop-data", cfg.webshop_data),
            ("generated", "--env alfworld or webshop", cfg.env in SPLITS), ("eval_panel", "--eval-every", cfg.eval_every)):
        for name in names.split():
            if not there and given.get(name, getattr(Config, name)) != getattr(Config, name):
                yield name, f"has no effect without {needed}; add that, or leave it out"
    splits = SPLITS[cfg.env] if cfg.env in SPLITS else worlds.find(cfg.env).splits
    rules = [
        ("split", cfg.split not in splits, f"must be one of {', '.join(splits)}"),
        ("group_size", cfg.group_size % 2 and 1 in siri.VARIANTS[cfg.variant].phases,
         f"paired rollouts need an even group; use {cfg.group_size + 1}, or --variant gigpo"),
        ("bank", cfg.bank and 1 not in siri.VARIANTS[cfg.variant].phases, f"variant {cfg.variant} has no skills; leave it out"),
        ("mine_every", not cfg.mine_every and not cfg.bank and 1 in siri.VARIANTS[cfg.variant].phases,
         "there would be no skills at all; add --bank FILE, or mine now and then"),
        ("four_bit", cfg.four_bit and not torch.cuda.is_available(),
         f"4-bit weights need a CUDA device and none was found: add --no-4bit, or use --preset tiny (this is preset {cfg.preset})"),
        ("groups", cfg.groups * cfg.group_size > 10**5, "more than 100,000 rollouts in an iteration are kept in memory; lower it"),
        ("max_prompt", cfg.max_prompt + cfg.max_response > 10**6, "more than 1,000,000 tokens in a row; lower it"),
        ("lora_r", cfg.lora_r > 10**4, "larger than any layer; lower it"),
        ("distill_epochs", cfg.distill_epochs > 1000, "more than 1,000 passes ruin the policy; lower it"),
        ("preset", cfg.env in SPLITS and cfg.preset in ("small", "paper", "paper48") and not cfg.generated
         and not has_data(vars(cfg))
         and (torch.cuda.is_available() or cfg.model == PRESETS[cfg.preset][cfg.env].get("model", Config.model)),
         f"it would train for days on generated games: {GET.get(cfg.env)}; or add --generated to want just that"),
        ("generated", cfg.generated and has_data(vars(cfg)), "data is given, too; leave one out, or unset $ALFWORLD_DATA"),
        ("imitate", cfg.imitate and cfg.compact, f"the tiny policy has been taught already; leave it out, or {own}"),
        ("dual_clip", 0 < cfg.dual_clip <= 1, "must be above 1, or 0 for none"),
        ("tau_down", cfg.tau_down > cfg.tau_up, f"must not be above --tau-up {cfg.tau_up}"),
        ("penalty_inside", cfg.penalty_inside and cfg.baseline != "steps",
         "the release's penalty is per step row; add --baseline steps"),
        ("alfworld_data", cfg.compact and cfg.alfworld_data, f"the tiny policy knows only its own small household; {own}"),
        ("webshop_data", cfg.compact and cfg.webshop_data, f"the tiny policy knows only its own small shop; {own}"),
        ("observation", cfg.prompt_style == "compact" and cfg.observation != "text",
         "the tiny policy reads text only; add --prompt-style full and a --model of your own"),
        ("name", cfg.name and not re.fullmatch(r"\w[\w.+-]*", cfg.name),
         "letters, digits and . _ + - only, beginning with a letter or digit")]
    yield from ((name, problem) for name, wrong, problem in rules if wrong)


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings that a run was saved with. UserError if one is malformed."""
    path = folder / "config.json"
    saved = read_json(path)
    forms = {f.name: f.metadata["form"] for f in dataclasses.fields(Config)}
    there = {name: forms[name] for name in forms if isinstance(saved, dict) and name in saved}
    if problem := misfit(saved, there, "settings"):
        raise UserError(f"{path}: {problem}; not a run of this version: begin a new one, or go on with the version that made it")
    return saved


def load_config(folder: Path, changes: dict[str, Any]) -> Config:
    """The settings that a run was saved with, changed by the flags of this call. UserError if they are malformed or
    don't go together."""
    path, saved = folder / "config.json", saved_settings(folder)
    if "env" not in changes and worlds.lies_in(saved.get("env", Config.env), folder):
        raise UserError(f"{path}: env is {saved['env']}, code within the run folder, which is not executed; move it out and "
                        "give --env")
    for f in ("webshop_split", "webshop_size", "webshop_goals") if saved.get("env") == "webshop" else ():
        old = saved.get(f, getattr(Config, f))
        if changes.get(f, old) != old:
            raise UserError(f"--{flag(f)} {changes[f]}: {folder} was trained with {old}, and may have seen goals that would be "
                            "held out; leave it out")
    try:
        return resolve(changes, saved)[0]
    except UserError as e:
        raise UserError(f"{e} (with the settings in {path})") from e


def make_environment(cfg: Config) -> envs.Environment:
    """The environment of these settings. UserError with what `envs.make` or `worlds.make` finds wrong."""
    if worlds.is_own(cfg.env):
        return worlds.make(cfg)
    data = cfg.webshop_data if cfg.env == "webshop" else cfg.alfworld_data
    shop = dict(size=cfg.webshop_size, goals=cfg.webshop_goals, split=cfg.webshop_split, observation=cfg.observation,
                tagger=cfg.webshop_tagger) if cfg.env == "webshop" else {}
    if data and cfg.env == "webshop" and cfg.webshop_size == "full":
        size = sum(path.stat().st_size for path in Path(os.path.expanduser(data)).glob("items_*.json") if "_1000" not in path.name)
        if 7 * size > (free := free_memory()):      # measured on catalogues of 5,000 and 20,000 products: 6 to 8 bytes a byte
            raise UserError(f"--webshop-size full: {size / 2**30:.1f} GiB of files in {data} take about {7 * size / 2**30:.0f} GiB "
                            f"of memory, and {free / 2**30:.1f} are free; use --webshop-size small")
    try:
        return envs.make(cfg.env, data=data, compact=cfg.compact, max_steps=cfg.max_steps, seed=cfg.seed, **shop)
    except (ValueError, ImportError, OSError) as e:
        raise UserError(str(e)) from e


def page() -> str:
    """The whole page: a table for each group of settings, and what each preset changes."""
    lines = ["# Settings", "", "Made from `siri.Config` by `python tools/settings.py`. The command line has a flag for each; "
             "a switch is turned off with no- before its name. [P] the SIRI paper, [R] the GiGPO release, [O] our choice. "
             "Presets, below, change some."]
    for f in dataclasses.fields(Config):
        if f.metadata["section"]:
            lines += ["", f"## {f.metadata['section']}", "", "| flag | default | meaning | value |", "|---|---|---|---|"]
        default = "" if f.default == "" else f"`{f.default}`"
        lines.append(f"| `--{flag(f.name)}` | {default} | {f.metadata['meaning']} | {f.metadata['form'].words} |")
    lines += ["", "## What the presets change", "", "| preset | benchmark | settings |", "|---|---|---|"]
    for preset, by_world in PRESETS.items():
        for world, changes in by_world.items():
            lines.append(f"| {preset} | {world} | {', '.join(f'`{flag(k)} {v}`' for k, v in changes.items()) or 'none'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(page(), encoding="utf-8")
