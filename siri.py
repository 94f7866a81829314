"""SIRI: an agent that learns from its own skills, in one file from configuration to command line.

    python siri.py --env alfworld            train: warm-up, skill mining, internalization
    python siri.py --resume runs/NAME        go on where a run stopped
    python siri.py --eval runs/NAME          play a fixed panel with the plain prompt
    python siri.py --report runs/NAME        one page about a run; --play to play yourself; --bench to measure

Read it from top to bottom: configuration, policy, rollout, update, the three phases, evaluation, run folder,
command line. The mathematics is elsewhere and pure: `gigpo.py` (G1-G8), `skills.py` (S1-S6), `distill.py` (S7-S10);
the tasks are in `envs.py`. SIRI: arXiv 2606.02355. GiGPO: arXiv 2505.10978.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import difflib
import fcntl
import hashlib
import inspect
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence


def preflight() -> int:
    """`--check`: can this machine install the requirements? Runs before anything is installed, on the standard library.
    Returns the exit status: 0, or 2 with a line on standard error for each thing that is missing."""
    wrong = []
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        wrong.append(f"Python {sys.version.split()[0]} is not supported by TextWorld: use Python 3.10, 3.11 or 3.12")
    if not shutil.which("make") or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        wrong.append("ALFWorld's engine is compiled on installation and needs make and a C++ compiler: on Debian or Ubuntu "
                     "`sudo apt install build-essential`, on macOS `xcode-select --install`")
    if sys.platform == "win32":
        wrong.append("ALFWorld's engine does not build on Windows: use WSL")
    if sys.prefix == sys.base_prefix or shutil.which("python") is None:
        wrong.append("no virtual environment is active (the engine's build calls `python`): "
                     "`python3 -m venv .venv && . .venv/bin/activate`")
    for line in wrong:
        print(f"siri: {line}", file=sys.stderr)
    return 2 if wrong else 0


if __name__ == "__main__" and sys.argv[1:] == ["--check"]:
    sys.exit(preflight())

try:
    import numpy as np
    import torch
    from tqdm import tqdm

    import distill
    import envs
    import gigpo
    import skills
except ModuleNotFoundError as error:
    sys.exit(f"siri: the package {error.name} is missing: run `pip install -r requirements.txt`")

HERE = Path(__file__).resolve().parent
sys.modules.setdefault("siri", sys.modules[__name__])     # run as a script this is __main__, and notebooks/ import siri
PREFILL = 16384                             # padded prompt tokens read at once before generating: bounds their activations
END_TAGS = ("</action>", "</skill>")        # a response ends here
PHASES = ("warm-up", "mining", "internalize")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class UserError(Exception):
    """Something that the user can mend. The message is one line: what was wrong, and how to mend it."""


class Stopped(Exception):
    """The user or the system asked the run to stop, and everything is saved."""


# ---- 1. Configuration --------------------------------------------------------------------------------------
# [P] the SIRI paper, [R] the GiGPO release, [O] our choice where the paper's constant is not public.


@dataclass
class Config:
    """Every setting of a run. The command line has one flag for each field; presets are sets of overrides."""
    # task
    env: str = "alfworld"               # benchmark: alfworld or webshop
    alfworld_data: str = ""             # folder that holds json_2.1.1/; default $ALFWORLD_DATA, else generated games
    webshop_data: str = ""              # folder that holds items_shuffle*.json; default a generated catalogue
    webshop_size: str = "small"         # small (the first 1,000 products) [R] or full
    webshop_goals: str = "synthetic"    # synthetic [R] or human
    webshop_split: str = "original"     # goals 0-499 test, 500-1499 validation, the rest train; release: 500+ train [R]
    webshop_tagger: str = "auto"        # nouns of titles: stop-list or an installed spaCy model; auto: the latter if any
    observation: str = "text"           # WebShop's pages as text or text_rich
    compact: bool = False               # small generated worlds, one household or shop (the tiny policy's) [O]
    max_steps: int = 50                 # actions per episode; WebShop 15 [R]
    prompt_style: str = "full"          # full (instruct models) or compact (the tiny policy)
    history: int = 2                    # observation-action pairs in the prompt [R]
    # policy
    preset: str = "auto"                # paper, paper48, tiny or smoke; auto: paper with CUDA, else tiny
    model: str = "Qwen/Qwen2.5-7B-Instruct"   # hub id or local folder [P]
    four_bit: bool = True               # NF4 weights with bf16 compute; needs CUDA
    lora_r: int = 64                    # LoRA rank [R]
    lora_alpha: int = 128               # LoRA scale is alpha / r [O]
    max_prompt: int = 2048              # prompt tokens, WebShop 4096; longer ones lose history first, never the skill [R]
    max_response: int = 512             # sampled tokens per step [R]
    temperature: float = 1.0            # sampling temperature while training [R]
    eval_temperature: float = 0.4       # sampling temperature while evaluating [R]
    memory_gib: float = 22.0            # device memory that may be taken; CUDA only
    gen_tokens: int = 0                 # padded tokens, answers included, generated at once; 0: what fits into memory
    update_tokens: int = 0              # padded tokens per forward-backward pass (the gradient ignores it); 0: what fits
    # GiGPO
    groups: int = 4                     # tasks per iteration [O: the release has 16 on 8 GPUs]
    group_size: int = 8                 # rollouts per task [R]
    gamma: float = 0.95                 # discount of step returns, G4 [R]
    omega: float = 1.0                  # weight of the step advantage, G6 [R]
    norm: str = "std"                   # advantage norm, G2: std, WebShop mean [R]
    baseline: str = "trajectory"        # episode baseline over trajectories (paper) or steps (release), G2
    invalid_penalty: float = 0.2        # c of G6, subtracted from an invalid step's advantage; WebShop 1 [O]
    penalty_inside: bool = False        # the release's form: the penalty inside the normalised returns
    lr: float = 3e-6                    # AdamW learning rate [R]
    weight_decay: float = 0.01          # [R]
    grad_clip: float = 1.0              # gradient norm [R]
    clip: float = 0.2                   # ratio clip of G7 [R]
    dual_clip: float = 0.0              # dual clip for negative advantages, 0 is off [R: option, 3]
    kl_beta: float = 0.01               # G8 [R]
    minibatch: int = 256                # rows per optimizer step [R]
    # phase 0: warm-up
    warmup_max: int = 60                # iterations at most [O]
    n_req: int = 100                    # distinct tasks solved before phase 1 [P: rule, O: number]
    floor: float = 0.3                  # plain success (mean of the last 3 iterations) before phase 1 [O]
    # phase 1: mining and validation
    mining_max: int = 60                # iterations at most [O]
    mine_every: int = 2                 # I_mine, iterations between minings, S1 [O]
    mine_wins: int = 16                 # successful plain trajectories summarised per mining [O]
    skill_words: int = 40               # longest skill accepted [O]
    bank_size: int = 200                # skills that are not retired, at most [O]
    kappa: float = 2.0                  # prior weight of the utility, S5 [O]
    n_eval: int = 4                     # pairings before a verdict, S6 [O]
    tau_up: float = 0.05                # promoted above, S6 [O]
    tau_down: float = 0.0               # retired below, S6 [O]
    m_retire: int = 2                   # evaluations in a row below tau_down, S6 [O]
    top_k: int = 4                      # matching skills among which the bound chooses, S3 [O]
    ucb: float = 0.2                    # width of the confidence bound, S3 [O]
    active_req: int = 30                # active skills before phase 2 [O]
    # phase 2: internalization
    distill_max: int = 30               # iterations [O]
    distill_tokens: str = "action"      # action (paper) or response, S7
    pair_gain: bool = True              # gate also on the pair's own effect, S7 [O]
    a_max: float = 2.0                  # advantage that gets weight 1, S8, in standard deviations [O]
    lambda_max: float = 1.0             # S10 [O]
    lambda_warm: int = 3                # K_warm, iterations, S10 [O]
    distill_rows: int = 64              # gated steps per optimizer step [O]
    distill_epochs: int = 1             # passes over the gated steps of an iteration's window [O]
    distill_window: int = 12            # iterations whose guided steps are kept [O]
    distill_min: int = 64               # gated steps before any internalization [O]
    distill_lr: float = 1e-5            # learning rate of phase 2 [O]
    # run
    variant: str = "siri"               # siri, gigpo (no phases 1-2), no_warmup, random_skill, no_gate, no_advantage
    env_steps: int = 0                  # stop after this many training environment steps, 0: no limit
    panel: int = 0                      # games of the evaluation panel, 0: the whole split
    split: str = "valid_seen"           # split of the panel; WebShop test
    kl_warn: float = 1.0                # a mean KL above this (nats per token) gets a warning [O]
    entropy_warn: float = 0.01          # a mean entropy below this (nats per token) gets a warning [O]
    save_every: int = 1                 # iterations between checkpoints: so many are repeated after a crash, at most
    sample_every: int = 10              # iterations between sample episodes
    seed: int = 0
    name: str = ""                      # run folder under runs/; default from env, preset, variant and seed


TINY = dict(
    model="assets/tiny", four_bit=False, compact=True, prompt_style="compact", max_steps=10, lora_r=16, lora_alpha=32,
    max_prompt=512, max_response=24, eval_temperature=1.0, gen_tokens=65536, update_tokens=4096, groups=8, lr=2e-3,
    minibatch=4096, invalid_penalty=0.5, warmup_max=16, n_req=40, floor=0.4, mining_max=14, mine_every=1, mine_wins=32,
    n_eval=3, kappa=1.0, active_req=14, distill_max=8, distill_lr=1e-3, panel=120, sample_every=5)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},                                                           # one 24 GB GPU
    "paper48": dict(groups=8, memory_gib=44.0, four_bit=False),            # one 48 GB GPU, bf16
    "tiny": TINY,                                                          # a laptop, 10 minutes
    "smoke": TINY | dict(groups=2, group_size=4, warmup_max=2, n_req=1, floor=0.0, mining_max=2, n_eval=1,
                         mine_wins=4, distill_max=2, distill_min=1, active_req=1, panel=8,
                         tau_up=-1.0, tau_down=-1.0),                      # the whole path in a minute, for tests
}


# What differs on WebShop, by preset. Advantages (norm mean) are about five times as large there, and so is the penalty.
SHOP = dict(max_steps=15, max_prompt=4096, norm="mean", invalid_penalty=1.0, split="test")
TINY_SHOP = dict(max_steps=15, model="assets/tiny-webshop", split="test",
                 distill_tokens="response")                        # its thoughts name the choice that the action repeats
WEBSHOP = {"paper": SHOP, "paper48": SHOP, "smoke": TINY_SHOP,
           "tiny": TINY_SHOP | dict(minibatch=400, n_req=90, mining_max=10, tau_up=0.1, distill_max=6, distill_epochs=2,
                                    lambda_max=10.0)}              # of a response's tokens, one carries the choice
SPLITS = {"alfworld": ("train", "valid_seen", "valid_unseen"), "webshop": ("train", "validation", "test")}


def resolve(overrides: dict[str, Any], saved: dict[str, Any] = {}) -> tuple[Config, str]:
    """Preset, then the settings that a run was saved with, then the user's own, then checks. Returns the config and why
    this preset. UserError if bad."""
    cuda = torch.cuda.is_available()
    given, overrides = overrides, {**saved, **overrides}
    preset = overrides.get("preset", "auto")
    reason = "chosen by --preset"
    if preset == "auto":
        preset = "tiny"
        reason = "no CUDA device"
        if cuda:
            gib = torch.cuda.get_device_properties(0).total_memory / 2**30
            preset, reason = ("paper48" if gib > 40 else "paper"), f"CUDA device with {gib:.0f} GiB"
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown; choose one of auto, {', '.join(PRESETS)}")
    special = WEBSHOP[preset] if overrides.get("env") == "webshop" else {}
    cfg = Config(**{**PRESETS[preset], **special, **overrides, "preset": preset})
    for f, allowed in dict(env=tuple(SPLITS), webshop_size=("small", "full"), webshop_goals=("synthetic", "human"),
                           webshop_split=tuple(envs.SHOP_SPLITS), observation=("text", "text_rich"),
                           variant=("siri", "gigpo", "no_warmup", "random_skill", "no_gate", "no_advantage"),
                           norm=("std", "mean"), baseline=("trajectory", "steps"), prompt_style=("full", "compact"),
                           distill_tokens=("action", "response"),
                           split=SPLITS.get(cfg.env, ())).items():
        if getattr(cfg, f) not in allowed:
            raise UserError(f"--{flag(f)} {getattr(cfg, f)}: unknown; choose one of {', '.join(allowed)}")
    zero_ok = {"seed", "env_steps", "panel", "history", "warmup_max", "mining_max", "distill_max", "n_req", "floor",
               "weight_decay", "kl_beta", "dual_clip", "invalid_penalty", "omega", "kappa", "ucb", "lambda_warm",
               "lambda_max", "tau_up", "tau_down", "active_req", "alfworld_data", "name", "eval_temperature", "gen_tokens",
               "update_tokens"}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if isinstance(value, bool) or isinstance(value, str):
            continue
        if not -2**53 < value < 2**53 or (value < 0 and not f.name.startswith("tau")):      # nan is in no interval
            raise UserError(f"--{flag(f.name)} {str(value)[:20]}: must be a finite number below 2**53, not negative")
        if value == 0 and f.name not in zero_ok:
            raise UserError(f"--{flag(f.name)} 0: must be positive")
    for names, needed, there in (("alfworld_data", "--env alfworld", cfg.env == "alfworld"),
                                 ("webshop_data webshop_split webshop_tagger observation", "--env webshop", cfg.env == "webshop"),
                                 ("webshop_size webshop_goals", "--webshop-data", cfg.webshop_data)):
        for f in names.split():
            if not there and f in given and given[f] != getattr(Config, f):
                raise UserError(f"--{flag(f)} {getattr(cfg, f)}: has no effect without {needed}; add that, or leave it out")
    if cfg.variant != "gigpo" and cfg.group_size % 2:
        raise UserError(f"--group-size {cfg.group_size}: paired rollouts need an even group; use {cfg.group_size + 1}, "
                        "or --variant gigpo")
    if cfg.group_size < 2:
        raise UserError(f"--group-size {cfg.group_size}: a group advantage needs at least 2 rollouts")
    if cfg.four_bit and not cuda:
        raise UserError(f"4-bit weights need a CUDA device and none was found: add --no-4bit, or use --preset tiny "
                        f"(this is preset {preset})")
    if cfg.gamma > 1:
        raise UserError(f"--gamma {cfg.gamma}: a discount lies between 0 and 1")
    if 0 < cfg.dual_clip <= 1:
        raise UserError(f"--dual-clip {cfg.dual_clip}: must be above 1, or 0 for none")
    if cfg.tau_down > cfg.tau_up:
        raise UserError(f"--tau-down {cfg.tau_down}: must not be above --tau-up {cfg.tau_up}")
    if cfg.penalty_inside and cfg.baseline != "steps":
        raise UserError("--penalty-inside: the release's penalty is per step row; add --baseline steps")
    for f in ("alfworld_data", "webshop_data"):
        if cfg.compact and getattr(cfg, f):
            raise UserError(f"--{flag(f)} with a compact world: the tiny policy knows only its own small generated one; add "
                            "--preset paper (or --no-compact and a --model of your own)")
    if cfg.name and not re.fullmatch(r"\w[\w.+-]*", cfg.name):
        raise UserError(f"--name {cfg.name}: letters, digits and . _ + - only, beginning with a letter or digit")
    if cfg.prompt_style == "compact" and cfg.observation != "text":
        raise UserError("--observation text_rich: the tiny policy reads text only; add --prompt-style full and a --model of "
                        "your own")
    if cfg.env == "webshop" and cfg.webshop_tagger == "auto":
        cfg.webshop_tagger = envs.find_tagger()
    return cfg, reason


# ---- 2. The policy -----------------------------------------------------------------------------------------


class Policy:
    """A chat model with a LoRA adapter. The reference policy is the same model with the adapter switched off. UserError
    for a model or adapter that can't be loaded, has no chat template or does not fit into memory."""

    def __init__(self, cfg: Config, adapter: Path | None = None):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")    # batches of any length: no holes
        logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)     # on kernels for 4 bits without CUDA
        from peft import LoraConfig, PeftModel, get_peft_model
        from safetensors import SafetensorError
        from transformers import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig,
                                  PreTrainedTokenizerFast)
        from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")      # peft's to mend
        self.cfg = cfg
        self.device = "cuda" if torch.cuda.is_available() and not cfg.compact else "cpu"
        shipped = HERE / cfg.model                      # assets/tiny is found from any working directory
        source = str(shipped) if (shipped / "config.json").exists() else cfg.model
        local = Path(source).is_dir()
        if local and not (Path(source) / "config.json").exists():
            raise UserError(f"--model {cfg.model}: the folder has no config.json; it must be a model saved by "
                            "save_pretrained")
        kwargs: dict[str, Any] = dict(local_files_only=local, trust_remote_code=False)
        try:
            # AutoTokenizer would replace the pre-tokenizer of a custom fast tokenizer by Qwen2's own, silently.
            config = Path(source) / "tokenizer_config.json"
            custom = config.exists() and json.loads(config.read_text()).get("tokenizer_class") in (
                "TokenizersBackend", "PreTrainedTokenizerFast")
            self.tokenizer = (PreTrainedTokenizerFast if custom else AutoTokenizer).from_pretrained(source, **kwargs)
            if not self.tokenizer.chat_template:
                raise UserError(f"--model {cfg.model}: its tokenizer has no chat template; use an instruct model")
            quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                       bnb_4bit_compute_dtype=torch.bfloat16) if cfg.four_bit else None
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.bfloat16 if self.device == "cuda" else torch.float32, quantization_config=quant,
                device_map={"": self.device} if self.device == "cuda" else None, use_safetensors=True, **kwargs)
        except (OSError, ValueError, SafetensorError) as e:
            raise UserError(f"--model {cfg.model}: could not be loaded ({str(e).splitlines()[0]}); give a hub id that "
                            "this machine can reach, or a local folder") from e
        if self.device == "cuda":           # peft's prepare_model_for_kbit_training would also turn the bf16 embeddings
            model.gradient_checkpointing_enable({"use_reentrant": False})       # into fp32: 2.2 GiB more for a 7B model
            model.enable_input_require_grads()
        if adapter is None:
            torch.manual_seed(cfg.seed)
            self.model = get_peft_model(model, LoraConfig(
                r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=0.0, target_modules="all-linear",
                task_type="CAUSAL_LM"))
        else:
            try:
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    if not (adapter / name).exists():
                        raise OSError(f"{name} is missing")
                self.model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
                raise UserError(f"{adapter}: its adapter cannot be loaded ({' '.join(str(e).split())[:200]}); use another "
                                "checkpoint") from e
            saved = self.model.peft_config["default"]
            if (saved.r, saved.lora_alpha) != (cfg.lora_r, cfg.lora_alpha):
                raise UserError(f"--lora-r {cfg.lora_r} --lora-alpha {cfg.lora_alpha}: the adapter in {adapter} has {saved.r} "
                                f"and {saved.lora_alpha}, which cannot be changed; leave these flags out")
        self.model.eval()
        self.vocab = len(self.tokenizer)        # ids from here on are padding of the weight matrix, never sampled
        self.specials = sorted(set(self.tokenizer.all_special_tokens) | {
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}, key=len, reverse=True)
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        known = self.tokenizer.get_added_vocab()
        self.stops = sorted({e for e in ends if e is not None} | {known[t] for t in END_TAGS if t in known})
        spelled = not all(t in known for t in END_TAGS)             # tags of several tokens: found in the text instead
        self.closing = torch.tensor([i for t, i in self.tokenizer.get_vocab().items() if ">" in t and spelled],
                                    dtype=torch.long, device=self.device)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stops[0]
        self.model.generation_config = GenerationConfig(eos_token_id=self.stops, pad_token_id=self.pad)  # not the model's own
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.gen_tokens, self.update_tokens = cfg.gen_tokens, cfg.update_tokens
        self.fit()

    def fit(self) -> None:
        """Token budgets that were left open: from two probes of each kind of work, which give its bytes per token. UserError
        if the smaller one, 8 rows to generate or one to update, does not fit into `memory_gib`."""
        cfg, row = self.cfg, self.cfg.max_prompt + self.cfg.max_response
        if self.device == "cpu":
            self.gen_tokens, self.update_tokens = self.gen_tokens or 32768, self.update_tokens or 8192
            return
        total = torch.cuda.get_device_properties(0).total_memory
        limit = min(cfg.memory_gib * 2**30, torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
        torch.cuda.set_per_process_memory_fraction(limit / total)
        adam = sum(p.numel() for p in self.trainable) * (2 if cfg.four_bit else 8)      # bytes of optimizer state

        def generate(rows: int) -> None:
            self.sample([[0] * cfg.max_prompt] * rows, 1.0, 2)

        def update(rows: int) -> None:
            self.model.train()
            self.logprobs([Row([0] * cfg.max_prompt, [0] * cfg.max_response)] * rows)[0].sum().backward()
            self.model.zero_grad(set_to_none=True)
            self.model.eval()

        def peak(work: Callable[[int], None], rows: int) -> int:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            work(rows)
            return torch.cuda.max_memory_allocated()

        for budget, work, n in (("gen_tokens", generate, 8), ("update_tokens", update, 1)):    # 8 rows fill a PREFILL
            if getattr(self, budget):
                continue
            try:
                once = peak(work, n)
            except torch.OutOfMemoryError as e:
                raise UserError(f"--memory-gib {cfg.memory_gib}: {n} rows of {row} tokens do not fit; lower --max-prompt and "
                                f"--max-response{'' if cfg.four_bit else ', or add --4bit'}") from e
            try:
                twice = peak(work, 2 * n)
            except torch.OutOfMemoryError:
                twice = math.inf                                    # the budget is n rows
                self.model.zero_grad(set_to_none=True)
                self.model.eval()
            spare = .85 * limit - adam - once                       # the rest is for holes between allocations
            tokens = n * (cfg.max_prompt + (2 if work is generate else cfg.max_response))
            setattr(self, budget, int(tokens * (1 + max(0, spare) / (twice - once))))
        torch.cuda.empty_cache()

    def retry(self, budget: str, work: Callable[[], Any]) -> Any:
        """Do the work; each time the device runs out of memory, halve the token budget and do it again. UserError once
        the budget (tokens) is down to a single row."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                pass                            # not here: the traceback still holds the tensors
            tokens = getattr(self, budget)
            if tokens <= self.cfg.max_prompt + self.cfg.max_response:
                raise UserError("out of memory with a single row: lower --max-prompt and --max-response"
                                f"{'' if self.cfg.four_bit else ', or add --4bit'}")
            setattr(self, budget, tokens // 2)
            tqdm.write(f"     out of memory: {budget} is {tokens // 2} from here on; trying again")

    def neutralise(self, text: str) -> str:
        """Break every control token in text that comes from a task, an environment or a skill, so that it stays text."""
        text = text.encode(errors="replace").decode()       # JSON can hold half a character, which no tokenizer takes
        while any(t in text for t in self.specials):
            for t in self.specials:
                text = text.replace(t, t[0] + " " + t[1:])
        return text

    def encode(self, user: str) -> list[int]:
        """Token ids of a prompt: one user turn, and the header of the assistant's."""
        return self.tokenizer.apply_chat_template([{"role": "user", "content": self.neutralise(user)}],
                                                  add_generation_prompt=True, tokenize=True, return_dict=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, control tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def generate(self, prompts: Sequence[list[int]], temperature: float, max_new: int) -> list[list[int]]:
        """Sample one response per prompt (at most `max_new` ids, the stop token included), in batches of prompts of
        like length within `gen_tokens`. Temperature 0 is greedy. UserError if not even a single row fits into
        memory."""
        out: list[list[int]] = [[] for _ in prompts]
        length = [len(p) + max_new for p in prompts]

        def work() -> None:
            missing = [i for i, ids in enumerate(out) if not ids]
            for batch in microbatches(missing, length, self.gen_tokens):
                for i, ids in zip(batch, self.sample([prompts[i] for i in batch], temperature, max_new)):
                    out[i] = ids

        self.retry("gen_tokens", work)
        return out

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], temperature: float, max_new: int) -> list[list[int]]:
        """One batch of `generate`.

        Nothing but temperature shapes the distribution: no top-k, no top-p, no repetition penalty, so that the
        sampled policy is the one whose log-probabilities are trained. A response ends with a stop token, or with the
        token that completes an end tag.
        """
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
        ids, mask = self.pad_batch(prompts)                                                        # (B, T) left-padded
        start, ended = ids.shape[1], {}

        def closes_a_tag(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            done = torch.isin(ids[:, -1], self.closing)                                            # (B,)
            for b in done.nonzero().flatten().tolist():
                text = self.tokenizer.decode(ids[b, max(start, ids.shape[1] - 16):])
                done[b] = any(tag in text for tag in END_TAGS)
                if done[b]:
                    ended.setdefault(b, ids.shape[1] - start)
            return done

        config = GenerationConfig(
            do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0, max_new_tokens=max_new,
            eos_token_id=self.stops, pad_token_id=self.pad, use_cache=True,
            prefill_chunk_size=max(32, PREFILL // len(prompts)))
        tokens = self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config,
            logits_processor=LogitsProcessorList([self.mask_padded_vocabulary]),
            stopping_criteria=StoppingCriteriaList([closes_a_tag] if len(self.closing) else []))
        rows = tokens[:, start:].tolist()
        return [row[:min(ended.get(b, len(row)), next((k + 1 for k, t in enumerate(row) if t in self.stops), len(row)))]
                for b, row in enumerate(rows)]

    def mask_padded_vocabulary(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor: sets the scores (B, V) of ids that the tokenizer doesn't have to -inf, in place."""
        scores[:, self.vocab:] = -math.inf
        return scores

    def pad_batch(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-pad to (B, T) ids and attention mask."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(r)) + r for r in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device)
        return ids, mask

    def logprobs(self, rows: Sequence["Row"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (G7, G8, S9) and entropy, in nats at the training temperature, of every response token of
        the rows, end to end: two fp32 tensors of shape (N,). Only the first has a gradient."""
        model = self.model.get_base_model()
        ids, mask = self.pad_batch([r.prompt + r.response for r in rows])                       # (B, T)
        hidden = model.base_model(input_ids=ids, attention_mask=mask,
                                  position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False).last_hidden_state
        at = torch.cat([hidden[b, -len(r.response) - 1:-1] for b, r in enumerate(rows)])          # (N, H)
        targets = torch.tensor([t for r in rows for t in r.response], device=self.device)         # (N,)
        return gigpo.token_logprobs(at, model.get_output_embeddings(), targets,
                                    temperature=self.cfg.temperature, vocab=self.vocab)


def chunks(items: Sequence, size: int) -> Iterable[Sequence]:
    """Consecutive pieces of at most `size` items."""
    return (items[i:i + size] for i in range(0, len(items), size))


# ---- 3. Rollout: the one function that plays, for warm-up, pairs and evaluation ------------------------------


@dataclass
class Step:
    """One training row's origin: what the policy saw, what it sampled, what came of it."""
    prompt: list[int]
    response: list[int]         # sampled ids, the stop token included
    text: str
    action: str                 # what was sent to the environment; "" when unparsable
    observation: str
    anchor: str
    plain: list[int] | None     # the same step's prompt without the skill (S9); None when there was no skill
    result: str                 # the observation that followed
    reward: float = 0.0
    valid: bool = True
    advantage: float = 0.0      # G6


@dataclass
class Episode:
    """One rollout of a task, with a skill in its prompts or without (S4)."""
    task: envs.Task
    skill: skills.Skill | None
    steps: list[Step] = field(default_factory=list)
    success: bool = False
    score: float = 0.0          # 0..1; 1 is success


def fit_prompt(policy: Policy, task: envs.Task, state: envs.State, turns: list[envs.Turn],
               skill: str | None) -> list[int]:
    """The step's prompt ids within `max_prompt` tokens: history goes first, then the observation's tail, never the
    skill. UserError if the rest alone is longer."""
    cfg = policy.cfg
    for window in range(cfg.history, -1, -1):
        ids = policy.encode(envs.render_prompt(task.goal, state, turns, skill=skill, style=cfg.prompt_style,
                                               window=window, world=cfg.env))
        if len(ids) <= cfg.max_prompt:
            return ids
    keep = len(state.observation)
    while keep and len(ids) > cfg.max_prompt:
        keep //= 2
        cut = dataclasses.replace(state, observation=state.observation[:keep])
        ids = policy.encode(envs.render_prompt(task.goal, cut, turns, skill=skill, style=cfg.prompt_style, window=0,
                                               world=cfg.env))
    if len(ids) > cfg.max_prompt:
        raise UserError(f"--max-prompt {cfg.max_prompt}: too short for the task, the skill and the actions of {task.id} "
                        f"({len(ids)} tokens)")
    return ids


def rollout(policy: Policy, env: envs.Environment, plan: Sequence[tuple[envs.Task, Sequence[skills.Skill | None]]],
            temperature: float, failures: list[str] | None = None) -> list[list[Episode]]:
    """Play every group of the plan: a task, and for each of its rollouts a skill or None.

    All unfinished rollouts of all groups take their next step in one generation batch. An environment that raises, or
    reaches a state whose prompt can't be cut to `max_prompt`, loses its group: the group comes back empty and the cause
    is appended to `failures`. Groups come back in the plan's order. UserError for such a prompt of a first step, and for a
    row that doesn't fit into memory.
    """
    groups = [[Episode(task, s) for s in group_skills] for task, group_skills in plan]
    games, live = [], []
    broken: set[int] = set()

    def fail(g: int, error: Exception) -> None:
        broken.add(g)
        (failures if failures is not None else []).append(f"{plan[g][0].id}: {type(error).__name__}: {error}")

    def prompt(e: Episode, state: envs.State, turns: list[envs.Turn]) -> list[int]:
        return fit_prompt(policy, e.task, state, turns, e.skill.text if e.skill else None)

    for g, (task, _) in enumerate(plan):
        games.append(None)
        try:
            games[g] = env.open(task)
        except Exception as error:              # an environment may raise anything; the group is lost, the run is not
            fail(g, error)
            continue
        live += [(g, e, games[g].start, [], prompt(e, games[g].start, [])) for e in groups[g]]
    while live:
        responses = policy.generate([asked for *_, asked in live], temperature, policy.cfg.max_response)
        going = []
        for (g, e, state, turns, asked), ids in zip(live, responses):
            if g in broken:
                continue
            text = policy.decode(ids)
            action = envs.parse_action(text) or ""
            seen = turns + [envs.Turn(state.observation, action)]
            try:
                after = games[g].step(state, action)
            except Exception as error:
                fail(g, error)
                continue
            try:
                following = [] if after.done else prompt(e, after, seen)
            except UserError as error:
                fail(g, error)
                continue
            plain = fit_prompt(policy, e.task, state, turns, None) if e.skill else None
            e.steps.append(Step(asked, ids, text, action, state.observation, state.anchor, plain, after.observation,
                                after.reward, bool(action) and after.valid))
            e.success, e.score = after.success, after.score
            if not after.done:
                going.append((g, e, after, seen, following))
        live = [item for item in going if item[0] not in broken]
    for game in games:
        if game is not None:
            game.close()
    return [[] if g in broken else group for g, group in enumerate(groups)]


# ---- 4. Update: S10 over rows --------------------------------------------------------------------------------


def make_optimizer(policy: Policy) -> torch.optim.Optimizer:
    """AdamW [R] over the adapter; with 4-bit weights its moments are kept in 8 bits [O]."""
    cfg = policy.cfg
    if cfg.four_bit:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    return AdamW(policy.trainable, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=cfg.weight_decay)


@dataclass
class Row:
    """One response under one prompt. RL rows carry an advantage, internalization rows a gate per token (S7) and
    the step's weight (S8)."""
    prompt: list[int]
    response: list[int]
    advantage: float = 0.0
    gate: list[bool] | None = None
    weight: float = 0.0


def microbatches(rows: Sequence[int], length: Sequence[int], budget: int) -> Iterable[list[int]]:
    """Indices sorted by length (tokens) and cut where the padded size would exceed the token budget; a row above it
    is alone."""
    batch: list[int] = []
    for i in sorted(rows, key=lambda i: length[i]):
        if batch and (len(batch) + 1) * length[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def update(policy: Policy, optimizer: torch.optim.Optimizer, rl: list[Row], internal: list[Row], lam: float,
           cfg: Config, rng: np.random.Generator, bad: int = 0) -> dict[str, float]:
    """One iteration's optimizer steps on L = L_GiGPO + beta L_KL + lambda L_int (S10).

    Every RL row enters exactly one optimizer step, every internalization row `distill_epochs`. Rows without an
    advantage have no policy gradient and are not run, but their tokens count: the mean is over all sampled tokens. Each
    step divides by its own token counts, taken before splitting into micro-batches. A step whose loss or gradient is
    not finite changes nothing; `bad` is how many such steps in a row came before, and the third raises UserError.
    Returns kl and entropy in nats per token, clip_fraction per token, losses and grad_norm (before clipping) as means
    over the steps, and counts. UserError also if a single row doesn't fit into memory.
    """
    n_steps = max(1, math.ceil(len(rl) / cfg.minibatch))
    if internal:
        per_pass = math.ceil(len(internal) / cfg.distill_rows)
        n_steps = max(n_steps, per_pass * cfg.distill_epochs)
        order = np.concatenate([rng.permutation(len(internal)) for _ in range(cfg.distill_epochs)])
        int_split = np.array_split(order, n_steps)
    rl_split = np.array_split(rng.permutation(len(rl)), n_steps)
    rows = rl + internal
    length = [len(r.prompt) + len(r.response) for r in rows]
    signal = [i for i, r in enumerate(rl) if r.advantage != 0.0]

    def evaluate(which: Sequence[int]) -> dict[int, torch.Tensor]:
        out = {}
        with torch.no_grad():
            for batch in microbatches(which, length, policy.update_tokens):
                logp, _ = policy.logprobs([rows[i] for i in batch])
                out.update(zip(batch, logp.split([len(rows[i].response) for i in batch])))
        return out

    old = policy.retry("update_tokens", lambda: evaluate(signal)) if n_steps > 1 else None      # else the ratio is 1
    with policy.model.disable_adapter():
        reference = policy.retry("update_tokens", lambda: evaluate(signal)) if cfg.kl_beta else None

    def gradient(mine: list[int], theirs: list[int], n_rl: int, n_int: int) -> Counter:
        """Leave one optimizer step's gradient in the adapter. Returns sums over its tokens, and its losses."""
        optimizer.zero_grad(set_to_none=True)           # of a try that ran out of memory
        sums: Counter = Counter()
        for batch in microbatches(mine, length, policy.update_tokens):
            part = [rows[i] for i in batch]
            logp, entropy = policy.logprobs(part)                                                 # (N,)
            adv = torch.tensor([r.advantage for r in part for _ in r.response], device=logp.device)
            logp_old = torch.cat([old[i] for i in batch]) if old else logp.detach()
            loss = gigpo.clipped_surrogate(logp, logp_old, adv, clip=cfg.clip, dual_clip=cfg.dual_clip or None).sum()
            sums["pg_loss"] += loss.item() / n_rl
            sums["clipped"] += ((logp.detach() - logp_old).exp().sub(1).abs() > cfg.clip).sum().item()
            if reference:
                kl = gigpo.kl_k3(logp, torch.cat([reference[i] for i in batch])).sum()
                sums["kl"] += kl.item()
                loss = loss + cfg.kl_beta * kl
            sums["entropy"] += entropy.sum().item()
            sums["tokens"] += len(logp)
            (loss / n_rl).backward()
        for batch in microbatches(theirs, length, policy.update_tokens):
            part = [rows[i] for i in batch]
            logp, _ = policy.logprobs(part)
            gate = torch.tensor([g for r in part for g in r.gate], device=logp.device)
            weight = torch.tensor([r.weight for r in part for _ in r.response], device=logp.device)
            loss, _ = distill.internalization_loss(logp, weight, gate)
            sums["int_loss"] += loss.item() / n_int
            (lam * loss / n_int).backward()
        return sums

    total: Counter = Counter()
    policy.model.train()
    for k in range(n_steps):
        n_rl = sum(len(rl[i].response) for i in rl_split[k])
        mine = [int(i) for i in rl_split[k] if rl[i].advantage != 0.0]
        theirs = [len(rl) + int(i) for i in int_split[k]] if internal else []
        n_int = max(1, sum(sum(rows[i].gate) for i in theirs))          # S9 counts every gated token, w = 0 included
        theirs = [i for i in theirs if rows[i].weight > 0]
        total["rows"] += len(mine + theirs)
        total["row_tokens"] += sum(length[i] for i in mine + theirs)
        if mine or theirs:
            total.update(policy.retry("update_tokens", lambda: gradient(mine, theirs, n_rl, n_int)))
            norm = torch.nn.utils.clip_grad_norm_(policy.trainable, cfg.grad_clip).item()
            if math.isfinite(norm):
                optimizer.step()
                bad = 0
            else:                   # a loss that is not finite makes the gradient so
                bad += 1
                total["skipped"] += 1
            total["grad_norm"] += norm
        optimizer.zero_grad(set_to_none=True)
        if bad >= 3:
            raise UserError(f"three updates in a row had a gradient that is not finite (norm {norm}, losses "
                            f"{total['pg_loss']:.3g} and {total['int_loss']:.3g}): resume with a lower --lr and "
                            "--distill-lr, or with --no-4bit")
    policy.model.eval()
    tokens = max(total["tokens"], 1)
    return dict(pg_loss=total["pg_loss"] / n_steps, int_loss=total["int_loss"] / n_steps, kl=total["kl"] / tokens,
                entropy=total["entropy"] / tokens, clip_fraction=total["clipped"] / tokens,
                grad_norm=total["grad_norm"] / n_steps, optimizer_steps=n_steps, skipped_steps=total["skipped"],
                bad_steps=bad, rows=total["rows"],
                row_tokens=total["row_tokens"])


# ---- 5. The three phases -------------------------------------------------------------------------------------


@dataclass
class GuidedStep:
    """A step taken with a skill in its prompt, kept as it was until phase 2 decides whether to distil it."""
    prompt: list[int]           # the plain one of the same step, S9
    response: list[int]
    action: list[bool]          # of each response token: does it belong to the action?
    advantage: float            # G6, in standard deviations
    skill: int                  # its place in the bank
    effect: float               # of its pair, S4


@dataclass
class Progress:
    """Everything besides weights, optimizer and bank that a resumed run needs. JSON. Every random draw of iteration k
    is seeded by (seed, k), so the iteration number is the state of all random generators."""
    iteration: int = 0
    phase: int = 0
    phase_start: int = 0                                    # iteration in which the phase began
    cursor: int = 0                                         # training tasks drawn so far
    env_steps: int = 0
    groups: int = 0
    failed_groups: int = 0
    bad_steps: int = 0                                      # optimizer steps skipped in a row, up to now
    seconds: float = 0.0                                    # training time, evaluations excluded
    solved: list[str] = field(default_factory=list)         # distinct tasks solved without a skill, N_succ
    recent: list[float] = field(default_factory=list)       # plain success of the last iterations
    wins: list[dict] = field(default_factory=list)          # plain successes not yet mined: task, goal, steps
    guided: list[list[dict]] = field(default_factory=list)  # GuidedSteps of the last iterations
    finished: bool = False


class Run:
    """A training run: policy, environment, bank, progress and folder. With `resume`, a checkpoint, it goes on from
    there. UserError for what is wrong with data, model or checkpoint."""

    def __init__(self, cfg: Config, folder: Path, reason: str, resume: Path | None = None):
        self.cfg, self.folder, self.stopping = cfg, folder, False
        self.env = make_environment(cfg)
        self.train_tasks = self.env.tasks("train")
        self.panel = panel_tasks(cfg, self.env)
        print(self.env.notice)
        print(f"preset {cfg.preset} ({reason}); model {cfg.model}, "
              f"{'4-bit, ' if cfg.four_bit else ''}LoRA r {cfg.lora_r}; {cfg.prompt_style} prompts; variant {cfg.variant}; "
              f"seed {cfg.seed}; folder {folder}", flush=True)
        self.policy = Policy(cfg, resume)
        print(f"memory: batches of {self.policy.gen_tokens} tokens to generate, {self.policy.update_tokens} to update",
              flush=True)
        self.optimizer = make_optimizer(self.policy)
        self.bank = skills.SkillBank(kappa=cfg.kappa, tau_up=cfg.tau_up, tau_down=cfg.tau_down, n_eval=cfg.n_eval,
                                     m_retire=cfg.m_retire, top_k=cfg.top_k, ucb_c=cfg.ucb, max_size=cfg.bank_size)
        self.progress = Progress(phase=1 if cfg.variant == "no_warmup" else 0)
        if resume:
            load_checkpoint(self, resume)
            self.progress.finished &= self.last_phase() and bool(self.phase_done())     # this call's flags may grant more

    # -- one iteration: draw tasks, roll out, measure, update --

    def next_tasks(self) -> list[envs.Task]:
        """The next `groups` training tasks: a new seeded permutation of the split for every pass over it. The environment is
        told which come after them."""
        n, p, drawn = len(self.train_tasks), self.progress, []
        for cursor in range(p.cursor, p.cursor + 2 * self.cfg.groups):
            epoch, at = divmod(cursor, n)
            order = np.random.default_rng([self.cfg.seed, 1, epoch]).permutation(n)
            drawn.append(self.train_tasks[int(order[at])])
        p.cursor += self.cfg.groups
        self.env.prepare(drawn[self.cfg.groups:])
        return drawn[:self.cfg.groups]

    def iterate(self) -> dict[str, Any]:
        """One iteration of the current phase: mine, roll out, measure, update. Returns its row of metrics.csv.
        UserError where environments or updates keep failing."""
        cfg, p = self.cfg, self.progress
        started = time.perf_counter()
        torch.manual_seed(stable_seed(cfg.seed, "train", p.iteration))
        mined = self.mine() if p.phase == 1 and (p.iteration - p.phase_start) % cfg.mine_every == 0 else 0
        groups, failures = self.play()
        rolled = time.perf_counter()
        for group in groups:
            self.score(group)
        effects = [self.measure(group) for group in groups]
        rl = [Row(s.prompt, s.response, s.advantage) for group in groups for e in group for s in e.steps]
        internal, lam = self.internal_rows(groups, effects)
        for g in self.optimizer.param_groups:
            g["lr"] = cfg.distill_lr if internal else cfg.lr
        stats = update(self.policy, self.optimizer, rl, internal, lam, cfg, np.random.default_rng([cfg.seed, 2, p.iteration]),
                       p.bad_steps)
        p.bad_steps = stats.pop("bad_steps")
        ended = time.perf_counter()
        p.seconds += ended - started
        p.env_steps += len(rl)
        self.remember(groups)
        row = dict(
            iteration=p.iteration, phase=p.phase, seconds=p.seconds, env_steps=p.env_steps, failed_groups=len(failures),
            **group_stats(groups, self.env.scored), solved_tasks=len(p.solved), mined=mined, rejected=sum(self.bank.rejected.values()),
            **{f"skills_{state}": n for state, n in self.bank.counts().items()}, lam=lam, internal_rows=len(internal),
            lr=self.optimizer.param_groups[0]["lr"], **stats, rollout_s=rolled - started, update_s=ended - rolled,
            rollout_tokens_per_s=sum(len(r.response) for r in rl) / (rolled - started),
            update_tokens_per_s=stats["row_tokens"] / (ended - rolled), peak_gib=peak_gib())
        if p.iteration % cfg.sample_every == 0:
            save_samples(self, groups, effects)
        p.iteration += 1
        for text in warnings_of(row, cfg):
            tqdm.write(f"     warning: {text}")
        return row

    def play(self) -> tuple[list[list[Episode]], list[str]]:
        """Roll out the next groups: all plain in phase 0, else half of each with the task's skill (S3, S4). Returns the
        groups that were played to the end, and why the others were not."""
        cfg, p, half = self.cfg, self.progress, self.cfg.group_size // 2
        shuffle = np.random.default_rng([cfg.seed, 3, p.iteration]) if cfg.variant == "random_skill" else None
        plan = []
        for task in self.next_tasks():
            skill = self.bank.retrieve(task.goal, explore=p.phase == 1, shuffle=shuffle) if p.phase > 0 else None
            plan.append((task, [skill] * half + [None] * (cfg.group_size - half)))
        failures: list[str] = []
        groups = rollout(self.policy, self.env, plan, cfg.temperature, failures)
        self.count_failures(failures, len(groups))
        return [g for g in groups if g], failures

    def internal_rows(self, groups: list[list[Episode]], effects: list[float | None]) -> tuple[list[Row], float]:
        """What passes the gate of the last `distill_window` iterations' guided steps, those of phase 1 included, and
        lambda (S10). None before phase 2, and while fewer than `distill_min` rows have a weight."""
        cfg, p = self.cfg, self.progress
        fresh = [step for group, effect in zip(groups, effects) if effect is not None for step in self.guided(group, effect)]
        p.guided = (p.guided + [[vars(step) for step in fresh]])[-cfg.distill_window:]
        if p.phase < 2:
            return [], 0.0
        rows = [row for row in self.gate([GuidedStep(**step) for part in p.guided for step in part]) if any(row.gate)]
        if sum(row.weight > 0 for row in rows) < cfg.distill_min:
            return [], 0.0
        return rows, distill.lambda_schedule(p.iteration - p.phase_start + 1, cfg.lambda_max, cfg.lambda_warm)

    def remember(self, groups: list[list[Episode]]) -> None:
        """What later decisions rest on: tasks solved without a skill, recent plain success, wins to mine."""
        cfg, p = self.cfg, self.progress
        plain = [e for group in groups for e in group if e.skill is None]
        shortest = {e.task.id: e for e in sorted(plain, key=lambda e: -len(e.steps)) if e.success}
        p.solved += [task for task in shortest if task not in p.solved]
        if plain:                               # an iteration may lose all of its groups
            p.recent = (p.recent + [mean(e.success for e in plain)])[-3:]
        if cfg.variant != "gigpo" and p.phase < 2:
            p.wins = (p.wins + [dict(task=e.task.id, goal=e.task.goal, steps=[[s.action, s.result] for s in e.steps])
                                for e in shortest.values()])[-cfg.mine_wins:]

    def count_failures(self, failures: list[str], n_groups: int) -> None:
        """Count and report an iteration's lost groups. UserError when over 5% of all groups so far are lost (of 40,
        while there are fewer)."""
        p = self.progress
        p.groups += n_groups
        p.failed_groups += len(failures)
        for cause in failures:
            tqdm.write(f"a group is lost: {cause}")
        if p.failed_groups > 0.05 * max(p.groups, 40):
            raise UserError(f"{p.failed_groups} of {p.groups} groups were lost (limit 5%); the last: "
                            f"{failures[-1]}; mend the environment or its data, or raise --max-prompt, then --resume {self.folder}")

    def score(self, group: list[Episode]) -> None:
        """G1-G6 for one group; both halves of a pair share it, so an anchor compares guided with plain actions. Sets
        each step's `advantage`."""
        cfg = self.cfg
        advantages = gigpo.group_advantages(
            [[s.reward for s in e.steps] for e in group], [[s.anchor for s in e.steps] for e in group],
            [[s.valid for s in e.steps] for e in group], gamma=cfg.gamma, omega=cfg.omega, norm=cfg.norm,
            baseline=cfg.baseline, invalid_penalty=cfg.invalid_penalty, penalty_inside=cfg.penalty_inside)
        for e, a in zip(group, advantages):
            for s, value in zip(e.steps, a):
                s.advantage = float(value)

    def measure(self, group: list[Episode]) -> float | None:
        """S4-S6: the group's paired effect (success scale), recorded with its skill. None for a group without a
        skill."""
        guided = [e for e in group if e.skill is not None]
        if not guided:
            return None
        effect = skills.paired_effect([float(e.success) for e in guided],
                                      [float(e.success) for e in group if e.skill is None])
        skill, before, kappa = guided[0].skill, guided[0].skill.state, self.cfg.kappa
        if self.bank.record(skill, effect, self.progress.iteration) != before:
            error = skill.stderr(kappa)
            tqdm.write(f"     {skill.state}: {skill.text}  (utility {skill.utility(kappa):.2f}"
                       f"{'' if error is None else f'±{error:.2f}'}, n {skill.n})")
        return effect

    def mine(self) -> int:
        """S1: the current policy reads its own plain wins and writes one skill for each. Returns how many were accepted."""
        cfg, p = self.cfg, self.progress
        wins, p.wins = p.wins, []
        if not wins:
            return 0
        prompts = [self.policy.encode(skills.mining_prompt(w["goal"], w["steps"], cfg.prompt_style,
                                                           max_words=cfg.skill_words))[-4 * cfg.max_prompt:] for w in wins]
        accepted = 0
        for win, ids in zip(wins, self.policy.generate(prompts, cfg.temperature, max(cfg.max_response // 2, 24))):
            try:
                condition, strategy = skills.parse_skill(self.policy.decode(ids), max_words=cfg.skill_words)
                skill = self.bank.add(condition, strategy, p.iteration, win["task"])
                tqdm.write(f"     mined: {skill.text}")
                accepted += 1
            except skills.SkillRejected as e:
                self.bank.reject(e.reason)
        return accepted

    def guided(self, group: list[Episode], effect: float) -> list[GuidedStep]:
        """The steps of a group that had a skill in their prompt, with their action tokens (S7) and the pair's effect
        (S4)."""
        spread = 1.0 if self.cfg.norm == "std" else 5.0     # of returns 0 and 10, half of each: one scale for both norms
        pieces = lambda s: [self.policy.decode([t]) for t in s.response]
        return [GuidedStep(s.plain, s.response, distill.action_mask(pieces(s)), s.advantage / spread, e.skill.id, effect)
                for e in group if e.skill for s in e.steps]

    def gate(self, steps: Sequence[GuidedStep]) -> list[Row]:
        """S7-S8: an internalization row for each step, by what is known of its skill now. Its gate may be shut."""
        cfg, lengths = self.cfg, [len(s.response) for s in steps]
        if not steps:
            return []
        pad = lambda rows: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        gate = distill.action_gate(                                                                # (B, T)
            pad([s.action for s in steps]), torch.tensor([True] * len(steps)),
            torch.tensor([self.bank.skills[s.skill].utility(cfg.kappa) for s in steps]),
            torch.tensor([s.effect for s in steps]), response_mask=pad([[True] * n for n in lengths]),
            tokens=cfg.distill_tokens, require_pair_gain=cfg.pair_gain, gated=cfg.variant != "no_gate")
        weight = distill.advantage_weights(torch.tensor([s.advantage for s in steps]), cfg.a_max,
                                           uniform=cfg.variant == "no_advantage").tolist()         # (B,)
        return [Row(s.prompt, s.response, gate=is_open[:n].tolist(), weight=w)
                for s, is_open, w, n in zip(steps, gate, weight, lengths)]

    # -- the loop over phases --

    def phase_done(self) -> str:
        """Why the current phase ends now; empty while it goes on."""
        cfg, p = self.cfg, self.progress
        age = p.iteration - p.phase_start
        if cfg.env_steps and p.env_steps >= cfg.env_steps:
            return f"the budget of {cfg.env_steps} environment steps is spent"
        if age >= self.phase_limit(p.phase):
            return f"its budget of {age} iterations is spent"
        if p.phase == 0 and cfg.variant != "gigpo" and len(p.solved) >= cfg.n_req and len(p.recent) == 3 \
                and mean(p.recent) >= cfg.floor:
            return f"{len(p.solved)} distinct tasks solved, plain success {mean(p.recent):.2f}"
        if p.phase == 1 and len(self.bank.active) >= cfg.active_req:
            return f"{len(self.bank.active)} active skills"
        return ""

    def last_phase(self) -> bool:
        """Whether the run ends with the current phase."""
        cfg, p = self.cfg, self.progress
        return cfg.variant == "gigpo" or p.phase == 2 or 0 < cfg.env_steps <= p.env_steps

    def phase_limit(self, phase: int) -> int:
        """Iterations that a phase may take. The variants have the same total."""
        cfg = self.cfg
        limits = [cfg.warmup_max, cfg.mining_max, cfg.distill_max]
        return {"gigpo": [sum(limits), 0, 0],
                "no_warmup": [0, limits[0] + limits[1], limits[2]]}.get(cfg.variant, limits)[phase]

    def train(self) -> None:
        """From the first evaluation, or where a checkpoint left off, to the end of the last phase. Raises Stopped
        after a signal, and UserError."""
        p = self.progress
        if p.iteration == 0:
            self.evaluate("base")
            save_checkpoint(self)
        total = p.iteration + self.phase_limit(p.phase) - (p.iteration - p.phase_start) + sum(
            self.phase_limit(k) for k in range(p.phase + 1, 3))
        with tqdm(total=total, initial=p.iteration, desc=PHASES[p.phase], unit="it", dynamic_ncols=True) as bar:
            self.loop(bar)

    def loop(self, bar: tqdm) -> None:
        """Iterate and end phases until the run is finished, saving every `save_every` iterations. Raises Stopped
        before the next iteration once a signal came."""
        p = self.progress
        while not p.finished:
            if self.stopping:
                raise Stopped(f"stopped before iteration {p.iteration}; go on with: python siri.py --resume {self.folder}")
            if reason := self.phase_done():
                save_checkpoint(self)
                self.end_phase(reason, bar)
                continue
            row = self.iterate()
            append_metrics(self.folder, row)
            bar.set_description(PHASES[p.phase], refresh=False)
            bar.set_postfix(plain=f"{row['success_plain']:.2f}", skill=f"{row['success_skill']:.2f}",
                            tok_s=f"{row['rollout_tokens_per_s']:.0f}", refresh=False)
            bar.update()
            tqdm.write(dense_line(row))
            if p.iteration % self.cfg.save_every == 0 or self.stopping:
                save_checkpoint(self)
        bar.total = bar.n

    def stop(self, number: int, frame: Any) -> None:
        """Signal handler: finish the iteration and save. A second signal stops at once, and costs this iteration."""
        self.stopping = True
        for which in SIGNALS:
            signal.signal(which, signal.default_int_handler)
        tqdm.write("stopping after this iteration; once more stops now and repeats it on resuming", file=sys.stderr)

    def end_phase(self, reason: str, bar: tqdm) -> None:
        """Evaluate what the phase reached, say why it ended, move on."""
        cfg, p = self.cfg, self.progress
        tqdm.write(f"{PHASES[p.phase]} ends after {p.iteration - p.phase_start} iterations: {reason}")
        if self.last_phase():
            self.evaluate("final")
            p.finished = True
            save_checkpoint(self)
            return
        bar.total -= self.phase_limit(p.phase) - (p.iteration - p.phase_start)
        self.evaluate(("after warm-up", "phase 1 plain")[p.phase])
        if p.phase == 1:
            self.evaluate("phase 1 with skills", with_skills=True)
        p.phase += 1
        p.phase_start = p.iteration
        save_checkpoint(self)

    def evaluate(self, label: str, with_skills: bool = False) -> None:
        """Play the panel, add the result to results.json and print its line."""
        result = evaluate(self.policy, self.env, self.panel, self.cfg, label, self.bank if with_skills else None)
        result |= dict(checkpoint=f"iteration {self.progress.iteration}", iteration=self.progress.iteration,
                       env_steps=self.progress.env_steps)
        add_result(self.folder, result)
        tqdm.write(result_line(result))


def warnings_of(row: dict[str, Any], cfg: Config) -> list[str]:
    """What keeps a run from learning, by an iteration's metrics, and the likely mend."""
    found = []
    if row["skipped_steps"]:
        found.append(f"{row['skipped_steps']} updates skipped, as their gradient was not finite; if it goes on, lower --lr")
    if row["groups"] and row["zero_signal_groups"] == row["groups"]:
        found.append("no group had a signal, as all of its rollouts did equally well; easier tasks or a larger --group-size "
                     "help")
    if row["kl"] > cfg.kl_warn:
        found.append(f"KL {row['kl']:.2f} is above {cfg.kl_warn}, the policy is far from its reference; raise --kl-beta or "
                     "lower --lr")
    if row["rows"] and row["entropy"] < cfg.entropy_warn:
        found.append(f"entropy {row['entropy']:.4f} is below {cfg.entropy_warn}, the policy hardly explores; lower --lr or "
                     "raise --temperature")
    return found


def group_stats(groups: list[list[Episode]], scored: bool) -> dict[str, Any]:
    """Success, length and validity of an iteration's rollouts, and their scores where the environment gives any. Rates
    of no rollouts are nan; lengths are in actions."""
    episodes = [e for group in groups for e in group]
    plain, guided = [[e for e in episodes if (e.skill is None) == without] for without in (True, False)]
    steps = [s for e in episodes for s in e.steps]
    scores = {f"score_{name}{tail}": value for name, part in (("plain", plain), ("skill", guided))
              for tail, value in zip(("", "_se"), mean_se(e.score for e in part))} if scored else {}
    return dict(groups=len(groups), success_plain=mean(e.success for e in plain), n_plain=len(plain),
                success_skill=mean(e.success for e in guided), n_skill=len(guided), **scores,
                mean_steps=len(steps) / max(len(episodes), 1), invalid_rate=mean(not s.valid for s in steps),
                zero_signal_groups=sum(all(s.advantage == 0 for e in g for s in e.steps) for g in groups))


# ---- 6. Evaluation ---------------------------------------------------------------------------------------------


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% Wilson interval of a success rate; (0, 1) for n = 0.

    >>> [round(x, 3) for x in wilson(5, 10)]
    [0.237, 0.763]
    """
    if n == 0:
        return 0.0, 1.0
    p, d = successes / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return centre - half, centre + half


def evaluate(policy: Policy, env: envs.Environment, panel: Sequence[envs.Task], cfg: Config, label: str,
             bank: skills.SkillBank | None = None) -> dict[str, Any]:
    """Play every game of the panel once. Without a bank, the plain prompt and nothing else; the bank is for the ablation.

    The same games and the same seed whatever the checkpoint, and the state of training is left as it was. Returns an
    entry of results.json: rates with n and their 95% Wilson interval, seconds; a game that was lost (`rollout`) counts
    as not solved. UserError as `rollout`, and if all were lost.
    """
    torch.manual_seed(stable_seed(0, "evaluate"))
    failures: list[str] = []
    episodes, started = [], time.perf_counter()
    parts = [*chunks(panel, max(1, cfg.groups * cfg.group_size))]
    for tasks, following in zip(parts, [*parts[1:], []]):
        env.prepare(following)
        plan = [(t, [bank.retrieve(t.goal, explore=False) if bank else None]) for t in tasks]
        groups = rollout(policy, env, plan, cfg.eval_temperature, failures)
        episodes += [g[0] if g else Episode(t, None) for g, t in zip(groups, tasks)]
    for cause in failures:
        tqdm.write(f"a game is lost, counted as not solved: {cause}")
    if len(failures) == len(panel):
        raise UserError(f"every game of the panel was lost; the last: {failures[-1]}; mend the environment or its data, or "
                        "raise --max-prompt")

    def summary(part: list[Episode]) -> dict[str, Any]:
        wins, n = sum(e.success for e in part), len(part)
        steps = [s for e in part for s in e.steps]
        score = dict(zip(("score", "score_se"), mean_se(e.score for e in part))) if env.scored else {}
        return dict(n=n, successes=wins, success=wins / n, interval=wilson(wins, n), **score,
                    mean_steps=len(steps) / n, invalid_rate=mean(not s.valid for s in steps))

    kinds: dict[str, list[Episode]] = defaultdict(list)
    for e in episodes:
        kinds[e.task.kind].append(e)
    return dict(label=label, notice=env.notice, versions={p: version(p) for p in ("torch", "transformers", "peft")},
                panel=f"{env.name} {panel[0].split}, {len(panel)} games", skills=bank is not None,
                temperature=cfg.eval_temperature, seconds=time.perf_counter() - started, failures=len(failures),
                **summary(episodes), kinds={k: summary(v) for k, v in sorted(kinds.items())},
                outcomes={e.task.id: e.success for e in episodes})


def panel_tasks(cfg: Config, env: envs.Environment) -> list[envs.Task]:
    """The first `panel` tasks of the split, in its order; 0 means all."""
    tasks = env.tasks(cfg.split)
    return [tasks[i] for i in range(min(cfg.panel or len(tasks), len(tasks)))]


def result_line(r: dict[str, Any], width: int = 20) -> str:
    """An evaluation on one line: success with its 95% Wilson interval, score ± standard error if there is one, n,
    actions per episode, share of invalid steps."""
    lo, hi = r["interval"]
    score = f"score {r['score']:.3f}±{r['score_se']:.3f}  " if "score" in r else ""
    return (f"{r['label']:<{width}} success {r['success']:.3f} [{lo:.3f}, {hi:.3f}]  {score}n {r['n']}  "
            f"steps {r['mean_steps']:.1f}  invalid {r['invalid_rate']:.3f}")


def results_block(folder: Path) -> str:
    """What the run reached: one line per evaluation, and the last one per task type. UserError as `load_results`."""
    results = load_results(folder)
    lines = [f"results of {folder} ({results[-1]['panel']}; success with 95% Wilson interval)"]
    lines += ["  " + result_line(r) for r in results]
    lines += ["per task type, " + results[-1]["label"], *kind_lines(results[-1])]
    return "\n".join(lines)


def kind_lines(result: dict[str, Any]) -> list[str]:
    """One line per task type."""
    width = max(map(len, result["kinds"]))
    return ["  " + result_line(dict(r, label=kind), width) for kind, r in result["kinds"].items()]


# ---- 7. The run folder: config, metrics, samples, checkpoints --------------------------------------------------


def stable_seed(*parts: Any) -> int:
    """A 63-bit seed from anything printable, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; nan for none."""
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def mean_se(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error (unbiased deviation / sqrt n); nan for none, and the error nan for one."""
    values = list(values)
    return mean(values), float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def peak_gib() -> float:
    """Peak memory so far, in GiB: of the device where one is used, else the process's resident memory."""
    if torch.cuda.is_initialized():             # the tiny preset stays on the CPU, whatever the machine has
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename: a reader never sees half a file. UTF-8. OSError where the folder can't be written
    to."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8", errors="replace")
    sync(aside)
    os.replace(aside, path)


def write_json(path: Path, data: Any) -> None:
    """The data as JSON, by `write_text`."""
    write_text(path, json.dumps(data, indent=1))


def read_json(path: Path) -> Any:
    """What a JSON file holds. UserError if it can't be read as JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e}); is this a run folder?") from e


def load_results(folder: Path) -> list[dict[str, Any]]:
    """A run's evaluations. UserError if the file holds something else."""
    path = folder / "results.json"
    results, known = read_json(path), {"label", "iteration", "panel", "n", "success", "interval", "kinds"}
    if not isinstance(results, list) or not results or not all(isinstance(r, dict) and known <= set(r) for r in results):
        raise UserError(f"{path}: holds no evaluations; move it away, and evaluate again with --eval {folder}")
    return results


def add_result(folder: Path, result: dict[str, Any]) -> None:
    """Append an evaluation; one with the same label, iteration and panel (a repeat after a resume) is replaced.
    UserError as `load_results`."""
    path = folder / "results.json"
    results = load_results(folder) if path.exists() else []
    same = lambda r: (r["label"], r["iteration"], r["panel"]) == (result["label"], result["iteration"], result["panel"])
    write_json(path, [r for r in results if not same(r)] + [result])


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Append an iteration's row to metrics.csv, numbers to six digits, the header before the first; on the disk when
    it returns."""
    path = folder / "metrics.csv"
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        f.flush()
        os.fsync(f.fileno())                        # before the checkpoint that counts this row


def dense_line(r: dict[str, Any]) -> str:
    """An iteration on one line: success ± standard error (n), kl and H in nats per token, seconds of rollout +
    update."""
    rate = lambda p, n: f"{p:.2f}±{math.sqrt(p * (1 - p) / n):.2f} (n {n})" if n else "-"
    score = lambda name: f" score {r[name]:.2f}±{r[name + '_se']:.2f}" if name in r and not math.isnan(r[name]) else ""
    text = (f"{r['iteration']:4d} {PHASES[r['phase']]:<11} "
            f"plain {rate(r['success_plain'], r['n_plain'])}{score('score_plain')}  "
            f"skill {rate(r['success_skill'], r['n_skill'])}{score('score_skill')}  steps {r['mean_steps']:.1f}  "
            f"invalid {r['invalid_rate']:.2f}  solved {r['solved_tasks']}  kl {r['kl']:.3f}  H {r['entropy']:.2f}  "
            f"{r['rollout_s']:.0f}+{r['update_s']:.0f}s")
    if r["phase"] > 0:
        text += f"  skills {r['skills_candidate']}c {r['skills_active']}a {r['skills_retired']}r"
    if r["phase"] == 2:
        text += f"  lambda {r['lam']:.2f}  gated {r['internal_rows']}"
    return text


def save_samples(run: Run, groups: list[list[Episode]], effects: list[float | None]) -> None:
    """A plain and a guided episode of one group: prompts are in the code, here is what was seen, thought, done, and what it was
    worth. As text to read, and as JSON with every token and its weight for the report."""
    if not groups:
        return
    p, decode = run.progress, run.policy.decode
    group, effect = max(zip(groups, effects), key=lambda pair: len({e.success for e in pair[0]}))
    shown = {e.skill is None: e for e in group}.values()                      # one plain and one guided episode
    out, episodes = [], []
    for e in shown:
        out.append(f"# iteration {p.iteration}, {PHASES[p.phase]}, {e.task.id}\n# {e.task.goal}\n"
                   f"# skill: {e.skill.text if e.skill else 'none'}\n# {'success' if e.success else 'failure'}\n")
        out += [f"[{t}] {s.observation}\n  {s.text}\n  reward {s.reward:g}  advantage {s.advantage:+.2f}"
                f"{'' if s.valid else '  INVALID'}\n" for t, s in enumerate(e.steps)]
        weights = ([[row.weight * is_open for is_open in row.gate] for row in run.gate(run.guided([e], effect))] if e.skill
                   else [[0.0] * len(s.response) for s in e.steps])
        episodes.append(dict(skill=e.skill.text if e.skill else None, success=e.success, steps=[dict(
            observation=s.observation, text=s.text, pieces=[decode([t]) for t in s.response], weights=w, reward=s.reward,
            advantage=s.advantage, valid=s.valid) for s, w in zip(e.steps, weights)]))
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    write_text(folder / f"{p.iteration:04d}.txt", "\n".join(out))
    write_json(folder / f"{p.iteration:04d}.json", dict(
        iteration=p.iteration, phase=p.phase, task=group[0].task.id, goal=group[0].task.goal, episodes=episodes))


def save_checkpoint(run: Run) -> None:
    """Adapter (peft format), optimizer, progress and bank with their hashes, written aside and renamed: at any moment the
    folder holds a whole checkpoint. The last two are kept."""
    from safetensors.torch import save_file
    root = run.folder / "checkpoints"
    name, aside = f"{run.progress.iteration:05d}-{run.progress.phase}", root / "writing"
    shutil.rmtree(aside, ignore_errors=True)
    run.policy.model.save_pretrained(aside)
    state = {i: s | s.pop("__bnb_optimizer_quant_state__", {})                 # where bitsandbytes nests its tensors
             for i, s in run.optimizer.state_dict()["state"].items()}
    save_file({f"{i}.{k}": torch.as_tensor(v).clone() for i, s in state.items() for k, v in s.items()},
              aside / "optimizer.safetensors")
    write_text(aside / "progress.json", json.dumps(vars(run.progress)))       # on one line: it holds many token ids
    write_json(aside / "skills.json", run.bank.to_json())
    write_json(aside / "manifest.json", {p.name: file_hash(p) for p in sorted(aside.iterdir())})
    for path in (*aside.iterdir(), aside):
        sync(path)
    shutil.rmtree(root / name, ignore_errors=True)
    os.replace(aside, root / name)
    sync(root)
    write_json(run.folder / "skills.json", run.bank.to_json())
    for old in checkpoints(run.folder)[2:]:
        shutil.rmtree(old)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex; OSError if it can't be read."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*-[0-9]"), reverse=True)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files; empty if they are as they were written."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        wrong = [name for name, digest in manifest.items() if file_hash(checkpoint / name) != digest]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as e:
        return f"manifest.json, or a file that it names: {type(e).__name__}: {e}"
    missing = {"adapter_model.safetensors", "optimizer.safetensors", "progress.json", "skills.json"} - set(manifest)
    return f"damaged: {', '.join([*wrong, *sorted(missing)])}" if wrong or missing else ""


def latest_checkpoint(folder: Path) -> Path:
    """The newest sound checkpoint of a run. Says so if that is not the newest. UserError if there is none."""
    found = checkpoints(folder)
    for path in found:
        if not (problem := damage(path)):
            return path
        print(f"siri: {path} cannot be used ({problem}); trying the one before", file=sys.stderr)
    raise UserError(f"{folder}: holds no {'sound ' if found else ''}checkpoint; give a run folder such as runs/NAME")


def lock(folder: Path) -> Any:
    """Keep the folder for this process until it ends; the lock goes with the process, however that ends. UserError if
    another process has it, or it can't be made."""
    try:
        handle = (folder / "lock").open("w")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"{folder} is in use by another process; wait for it, or give another --name") from e
    except OSError as e:
        raise UserError(f"{folder}: cannot be locked ({e.strerror}); run in a folder of your own") from e
    return handle


def load_bank(path: Path) -> skills.SkillBank:
    """The bank in a checkpoint or run folder. UserError naming what is malformed in skills.json."""
    try:
        return skills.SkillBank.from_json(read_json(path / "skills.json"))
    except ValueError as e:
        raise UserError(f"{path}/skills.json: {e}; use another checkpoint") from e


def load_progress(path: Path, vocab: int, n_skills: int) -> Progress:
    """Progress as `save_checkpoint` wrote it. UserError naming the fields that no run can have written."""
    data = read_json(path / "progress.json")
    count = lambda x: type(x) is int and 0 <= x < 2**53
    number = lambda x: type(x) in (int, float) and -math.inf < x < math.inf
    text = lambda x: isinstance(x, str)
    each = lambda holds, at_least=0: lambda x: isinstance(x, list) and len(x) >= at_least and all(map(holds, x))
    tokens = each(lambda x: count(x) and x < vocab, at_least=1)
    record = lambda fields: lambda x: isinstance(x, dict) and set(x) == set(fields) and all(
        holds(x[name]) for name, holds in fields.items())
    win = record(dict(task=text, goal=text, steps=each(lambda x: each(text)(x) and len(x) == 2, at_least=1)))
    step = record(dict(prompt=tokens, response=tokens, action=each(lambda x: type(x) is bool), advantage=number,
                       skill=lambda x: count(x) and x < n_skills, effect=number))
    rules = {f.name: count for f in dataclasses.fields(Progress)} | dict(
        phase=lambda x: count(x) and x < len(PHASES), seconds=number, solved=each(text), recent=each(number), wins=each(win),
        guided=each(each(lambda x: step(x) and len(x["action"]) == len(x["response"]))), finished=lambda x: type(x) is bool)
    wrong = sorted(set(data) ^ set(rules)) if isinstance(data, dict) else ["no fields"]
    wrong = wrong or [name for name, holds in rules.items() if not holds(data[name])]
    if not wrong and data["phase_start"] > data["iteration"]:
        wrong = ["phase_start"]
    if wrong:
        raise UserError(f"{path}/progress.json: missing or malformed: {', '.join(wrong)[:200]}; resume from another "
                        "checkpoint, or begin anew if an earlier version wrote it")
    return Progress(**data)


def load_checkpoint(run: Run, path: Path) -> None:
    """The inverse of `save_checkpoint`; the adapter was loaded with the policy. Later rows of metrics.csv are cut off.
    UserError naming a file that is not this program's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    saved = load_bank(path)             # its history; the constants are the configuration's, which flags may have changed
    run.bank.skills, run.bank.rejected = saved.skills, saved.rejected
    run.progress = load_progress(path, run.policy.vocab, len(saved.skills))
    state: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    try:
        for key, value in load_file(path / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            state[int(index)][name] = value.item() if value.dtype == torch.int64 else value  # bitsandbytes counts in int
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"{path}/optimizer.safetensors: not of this program ({e}); resume from another one") from e
    moment = "state1" if run.cfg.four_bit else "exp_avg"
    if any(moment not in tensors for tensors in state.values()):        # 8-bit moments for 32-bit Adam, or the reverse
        state.clear()
        tqdm.write("     the optimizer is another one with --4bit than without: its moments begin anew")
    run.optimizer.load_state_dict({"state": dict(state), "param_groups": run.optimizer.state_dict()["param_groups"]})
    write_json(run.folder / "skills.json", run.bank.to_json())
    metrics = run.folder / "metrics.csv"
    if metrics.exists():                            # a header and a line for each iteration; the last may be torn
        lines = metrics.read_bytes().decode(errors="replace").splitlines(keepends=True)          # ends are \r\n
        write_text(metrics, "".join(lines[:1 + run.progress.iteration]))


# ---- 8. Command line -------------------------------------------------------------------------------------------


def flag(name: str) -> str:
    """The command-line name of a Config field."""
    return "4bit" if name == "four_bit" else name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest flag."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ")[1].split()[0]
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, n=1)
            message = f"{word}: unknown flag" + (f"; did you mean {near[0]}?" if near else "; see --help")
        raise UserError(message)


@cache
def make_parser() -> tuple[Parser, list[str]]:
    """The command line: the actions, whose names are returned too, and a flag for each of Config's fields."""
    parser = Parser(usage="python siri.py [action] [--setting value ...]", description=__doc__.split("\n\n")[0],
                    epilog="[P] the SIRI paper, [R] the GiGPO release, [O] our choice. Defaults are the paper preset's.",
                    allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120))
    actions = parser.add_argument_group("actions (without one: train)")
    actions.add_argument("--check", action="store_true", default=False, help="can this machine install the requirements?")
    actions.add_argument("--resume", metavar="RUN", default=None, help="go on with a run where it stopped")
    actions.add_argument("--eval", metavar="RUN", default=None, help="play the panel with a run's last checkpoint")
    actions.add_argument("--with-skills", action="store_true", default=False, help="with --eval: use the bank (ablation)")
    actions.add_argument("--report", metavar="RUN", default=None, help="write RUN/report.html: one page with all that happened")
    actions.add_argument("--play", metavar="RUN", nargs="?", const="", default=None,
                         help="play in the terminal, or watch the policy of a run (default: the base policy)")
    actions.add_argument("--bench", metavar="PARTS", nargs="?", const="", default=None,
                         help="measure speed and memory beside what people would use instead; writes bench.json")
    kinds, fields = {"int": int, "float": float, "str": str}, {f.name: f for f in dataclasses.fields(Config)}
    for line in inspect.getsource(Config).splitlines():         # its comments are the help: a section, or a field's meaning
        if section := re.fullmatch(r"    # (.*)", line):
            group = parser.add_argument_group(section[1])
        elif found := re.fullmatch(r"    (\w+): .*?# (.*)|    (\w+): .*", line):
            f = fields[found[1] or found[3]]
            said = f"{found[2] or f.name} (default {f.default!r})".replace("%", "%%").replace("(default '')", "")
            kind = (dict(action=argparse.BooleanOptionalAction) if f.type == "bool" else
                    dict(type=kinds[f.type], metavar=f.type.upper()))
            group.add_argument(f"--{flag(f.name)}", dest=f.name, help=said, **kind)
    return parser, [action.dest for action in actions._group_actions]


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The actions (resume, eval, ...) and the settings that were given. UserError if bad."""
    parser, actions = make_parser()
    given = vars(parser.parse_args(argv))
    chosen = argparse.Namespace(**{name: given.pop(name) for name in actions})
    several = [f"--{name}" for name in ("resume", "eval", "report", "play", "bench") if getattr(chosen, name) is not None]
    if len(several) > 1:
        raise UserError(f"{' and '.join(several)}: give one of them")
    return chosen, given


def make_environment(cfg: Config) -> envs.Environment:
    """The environment of these settings. UserError with what `envs.make` finds wrong."""
    data = cfg.webshop_data if cfg.env == "webshop" else cfg.alfworld_data
    shop = dict(size=cfg.webshop_size, goals=cfg.webshop_goals, split=cfg.webshop_split, observation=cfg.observation,
                tagger=cfg.webshop_tagger) if cfg.env == "webshop" else {}
    try:
        return envs.make(cfg.env, data=data, compact=cfg.compact, max_steps=cfg.max_steps, seed=cfg.seed, **shop)
    except (ValueError, ImportError, OSError) as e:
        raise UserError(str(e)) from e


def load_config(folder: Path, changes: dict[str, Any]) -> Config:
    """The settings that a run was saved with, changed by the flags of this call. UserError if they are malformed or
    don't go together."""
    path = folder / "config.json"
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise UserError(f"{path}: holds no settings; is this a run folder?")
    kinds = {f.name: ("int", "float") if f.type == "float" else (f.type,) for f in dataclasses.fields(Config)}
    wrong = [f"{name} {value!r}"[:60] for name, value in saved.items() if type(value).__name__ not in kinds.get(name, ())]
    if wrong:
        raise UserError(f"{path}: unknown or malformed settings {', '.join(wrong)}; is it of another version?")
    for f in ("webshop_split", "webshop_size", "webshop_goals") if saved.get("env") == "webshop" else ():
        old = saved.get(f, getattr(Config, f))
        if changes.get(f, old) != old:
            raise UserError(f"--{flag(f)} {changes[f]}: {folder} was trained with {old}, and may have seen goals that would be "
                            "held out; leave it out")
    try:
        return resolve(changes, saved)[0]
    except UserError as e:
        raise UserError(f"{e} (with the settings in {path})") from e


def prepare_folder(cfg: Config) -> tuple[Path, Any]:
    """Make and lock the run folder, and find out now whether it can be written to and has room. Returns folder and
    lock. UserError if it can't be used, holds a run, or has too little room (0.05 GiB compact, else 3 GiB)."""
    folder = Path("runs") / cfg.name
    if any((folder / "checkpoints").glob("[0-9]*")):
        raise UserError(f"{folder} already holds a run: go on with --resume {folder}, or give another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        held = lock(folder)
        write_json(folder / "config.json", dataclasses.asdict(cfg))
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); run in a folder of your own") from e
    need = 0.05 if cfg.compact else 3.0
    free = shutil.disk_usage(folder).free / 2**30
    if free < need:
        shutil.rmtree(folder)
        raise UserError(f"{folder}: {free:.2f} GiB free, checkpoints need {need} GiB; make room")
    return folder, held


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0; 2 after a UserError, on one line of standard error; 130 when
    stopped."""
    folder, held, before = None, None, {which: signal.getsignal(which) for which in SIGNALS}
    try:
        chosen, given = parse_arguments(sys.argv[1:] if argv is None else argv)
        if chosen.check:
            return preflight()
        if chosen.with_skills and chosen.eval is None:
            raise UserError("--with-skills: only together with --eval RUN")
        if chosen.report is not None:
            if given:
                raise UserError(f"--{flag(next(iter(given)))}: --report takes no settings")
            from notebooks import report
            print(report.write(Path(chosen.report)))
            return 0
        if chosen.bench is not None:
            from notebooks import bench
            bench.main([name for name in chosen.bench.split(",") if name], resolve(given)[0])
            return 0
        if chosen.play is not None:
            from notebooks import play
            place = Path(chosen.play) if chosen.play else None
            play.main(load_config(place, given) if place else resolve(given)[0], place)
            return 0
        if chosen.eval is not None:
            place = Path(chosen.eval)
            checkpoint = latest_checkpoint(place)
            held = lock(place)
            cfg = load_config(place, given)
            env = make_environment(cfg)
            print(env.notice)
            bank = load_bank(checkpoint) if chosen.with_skills else None
            label = "eval with skills" if bank else "eval"
            policy = Policy(dataclasses.replace(cfg, update_tokens=1), checkpoint)      # nothing is trained: no probe of it
            result = evaluate(policy, env, panel_tasks(cfg, env), cfg, label, bank)
            result |= dict(checkpoint=str(checkpoint.name), iteration=int(checkpoint.name.split("-")[0]))
            add_result(place, result)
            print("\n".join([result_line(result), *kind_lines(result)]))
            return 0
        if chosen.resume is not None:
            folder = Path(chosen.resume)
            checkpoint = latest_checkpoint(folder)
            held = lock(folder)
            cfg = load_config(folder, given)
            if (folder / "results.json").exists():
                load_results(folder)                # now, and not when the next evaluation has been played
            run = Run(cfg, folder, "saved with the run", checkpoint)
            write_json(folder / "config.json", dataclasses.asdict(cfg))
        else:
            cfg, reason = resolve(given)
            cfg.name = cfg.name or f"{cfg.env}-{cfg.preset}-{cfg.variant}-seed{cfg.seed}"
            folder, held = prepare_folder(cfg)
            run = Run(cfg, folder, reason)
        for which in SIGNALS:
            signal.signal(which, run.stop)
        run.train()
        print(results_block(run.folder))
        return 0
    except UserError as e:
        print(f"siri: {' '.join(str(e).split())}", file=sys.stderr)         # one line, whatever it quotes
        return 2
    except Stopped as e:
        print(f"siri: {e}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        resume = f"; go on with: python siri.py --resume {folder}" if folder else ""
        print(f"siri: stopped at once{resume}", file=sys.stderr)
        return 130
    finally:
        if held:
            held.close()                            # another call in this process may want the folder
        for which, handler in before.items():           # a process that ends has nothing left to stop
            signal.signal(which, signal.SIG_IGN if argv is None else handler)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # as standard error: no text ends a run by being unprintable
    sys.exit(main())
