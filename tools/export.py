"""A run taken home: `python siri.py --export runs/NAME --to FOLDER` writes what it takes to use it without this program.

FOLDER gets the LoRA adapter of the last sound checkpoint, or with `--merge` the whole model; tokenizer and chat template; a
generation_config that samples as the run's evaluations did; a model card; skills.jsonl and trajectories.jsonl. docs/export.md
has the schema, and how to serve it. Only JSON, text and safetensors are written, aside first and then renamed.
"""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import envs
from policy import NF4, Chat, UserError, attach_adapter, keep_quiet, load_base, load_tokenizer, one_line, same_base, source_of
from siri import PHASES, Config
from skills import ANYTHING, COUNT, FLAG, SkillBank
from tools import worlds
from tools.files import latest_checkpoint, load_bank, read_json, sync, write_json, write_text
from tools.metrics import wilson
from tools.report import read_metrics, read_results, read_samples
from tools.settings import flag, saved_settings
from tools.terminal import printable, say

PROGRESS = {"iteration": COUNT, "env_steps": COUNT, "finished": FLAG, ...: ANYTHING}
TOLD = ("env", "preset", "variant", "seed", "model", "base", "four_bit", "lora_r", "lora_alpha", "prompt_style", "history",
        "max_steps", "max_prompt", "max_response", "temperature", "eval_temperature", "groups", "group_size", "lr", "distill_lr",
        "kl_beta", "lambda_max", "date")                # settings on the card
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)             # that it takes for --max-lora-rank
BESIDE = 64 * 2**20                                     # bytes for all that is not weights; a large tokenizer takes 20 MiB
UNQUANTISED = ("The run had its base in 4 bits (NF4). The adapter is merged into the base's own, unquantised weights: close to the "
               "policy that was evaluated, but not the same.")
SOURCE = "https://arxiv.org/abs/2606.02355"


@dataclass
class Base:
    """What is known of a base model without its weights."""
    source: str                     # hub id or folder
    config: Any
    tokenizer: Any                  # with the chat template as the run had it
    chat: Chat
    sampling: dict[str, Any]        # a generation_config

    @property
    def on_hub(self) -> bool:
        return not Path(self.source).is_dir()


@dataclass
class Taken:
    """A run as its files tell it. `rows` are the iterations that the checkpoint has seen."""
    folder: Path
    cfg: Config
    checkpoint: Path
    progress: dict[str, Any]
    rows: list[dict[str, float]]
    results: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    bank: SkillBank

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.+-]", "-", self.cfg.name or self.folder.resolve().name)


# ---- 1. What is there ----------------------------------------------------------------------------------------------

def read_run(folder: Path, model: str | None) -> Taken:
    """All that is taken of a run, on the base model of another place if one is given. UserError as the readers of its files, and
    for an environment of one's own that is not there, whose prompts the card shows."""
    checkpoint, settings = latest_checkpoint(folder), saved_settings(folder)
    cfg = Config(**settings | ({"model": model} if model else {}))
    if worlds.is_own(cfg.env):
        worlds.same_file(cfg.env, cfg.env_hash)
        worlds.enter_prompts(worlds.World(worlds.find(cfg.env), cfg.seed, cfg.max_steps))
    progress = read_json(checkpoint / "progress.json", PROGRESS)
    rows, _ = read_metrics(folder / "metrics.csv")
    return Taken(folder, cfg, checkpoint, progress, rows[:progress["iteration"]], read_results(folder / "results.json"),
                 read_samples(folder / "samples"), load_bank(checkpoint))


def read_base(cfg: Config) -> Base:
    """The base without its weights. UserError if it can't be read, or is another one than the run's."""
    from transformers import AutoConfig, GenerationConfig
    source, how = source_of(cfg.model)
    try:
        tokenizer, config = load_tokenizer(source, how), AutoConfig.from_pretrained(source, **how)
        try:
            ends = GenerationConfig.from_pretrained(source, **how).eos_token_id
        except OSError:                                             # it has none of its own
            ends = config.get_text_config().eos_token_id
    except Exception as e:                                          # others' code raises as anything
        raise UserError(f"--model {cfg.model}: could not be read ({one_line(e)}); give with --model where the run's base is "
                        "now: a hub id that this machine can reach, or a local folder") from e
    same_base(cfg, source, config)
    chat = Chat(tokenizer, cfg, set(ends if isinstance(ends, list) else [ends]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else chat.stops[0]
    sampling: dict[str, Any] = dict(eos_token_id=chat.stops, pad_token_id=pad, max_new_tokens=cfg.max_response)
    if cfg.eval_temperature:                            # nothing else shapes what a policy samples from
        sampling |= dict(do_sample=True, temperature=cfg.eval_temperature, top_k=0, top_p=1.0)
    if unused := list(range(chat.vocab, config.get_text_config().vocab_size)):          # rows that pad the weights, never trained
        sampling |= dict(suppress_tokens=unused)
    return Base(source, config, tokenizer, chat, sampling)


def weights_dtype(cfg: Config, base: Base) -> torch.dtype:
    """What a merged model is saved in: bf16 from a GPU, which is what a policy has there, else as its base."""
    return torch.bfloat16 if device_of(cfg) == "cuda" else base.config.dtype or torch.float32


def device_of(cfg: Config) -> str:
    """Where a policy of these settings lives on this machine."""
    return "cuda" if torch.cuda.is_available() and not cfg.compact else "cpu"


def refuse(to: Path, run: Taken, base: Base, merge: bool) -> None:
    """UserError for a folder that can't be written to, for a base from which this can't be made, and without room for it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file
    if to.is_symlink() or to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"--to {to}: is there already; give a new or empty folder")
    if not to.resolve().parent.is_dir():
        raise UserError(f"--to {to}: {to.resolve().parent} is not there; make it first")
    if to.resolve().is_relative_to(run.folder.resolve()):
        raise UserError(f"--to {to}: is in the run's own folder; give another place")
    if merge and getattr(base.config, "quantization_config", None):
        raise UserError(f"--merge: the weights of {run.cfg.model} are quantised already, and would be rounded again; leave it out")
    if not merge and find_adapter_config_file(base.source):
        raise UserError(f"--export {run.folder}: {run.cfg.model} holds an adapter of its own, which the run has as part of its "
                        "base; add --merge")
    size = (run.checkpoint / "adapter_model.safetensors").stat().st_size
    if merge:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(base.config)
        size = sum(p.numel() for p in model.parameters()) * weights_dtype(run.cfg, base).itemsize
    need, free = size + BESIDE, shutil.disk_usage(to.resolve().parent).free
    if free < need:
        raise UserError(f"--to {to}: takes {need / 2**30:.2f} GiB, and {free / 2**30:.2f} are free; make room")


# ---- 2. The folder -------------------------------------------------------------------------------------------------

def write(to: Path, run: Taken, base: Base, merge: bool) -> None:
    """Write the folder aside and rename it. UserError as `attach_adapter` and `load_base`; OSError if it can't be written.
    Nothing half written stays."""
    from transformers import GenerationConfig
    aside = to.resolve().with_name(f"{to.resolve().name}.writing")
    try:
        aside.mkdir()
    except FileExistsError as e:
        raise UserError(f"{aside}: is there, from an export that was killed or is at work; remove it") from e
    try:
        (write_merged if merge else write_adapter)(aside, run, base)
        base.tokenizer.save_pretrained(aside)
        GenerationConfig(**base.sampling).save_pretrained(aside)
        write_text(aside / "README.md", card(run, base, merge))
        write_lines(aside / "skills.jsonl", skill_lines(run.bank))
        write_lines(aside / "trajectories.jsonl", trajectory_lines(run.samples))
        for path in (*aside.iterdir(), aside):
            sync(path)
        aside.replace(to.resolve())
        sync(to.resolve().parent)
    except Exception as e:
        if "(os error " in str(e):                      # as safetensors and tokenizers tell of a full disk
            raise OSError(errno.EIO, one_line(e), str(aside)) from e
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_adapter(aside: Path, run: Taken, base: Base) -> None:
    """The adapter, and a configuration that names the base as the run was told it, not where this machine has it."""
    shutil.copyfile(run.checkpoint / "adapter_model.safetensors", aside / "adapter_model.safetensors")
    config = read_json(run.checkpoint / "adapter_config.json", {...: ANYTHING})
    write_json(aside / "adapter_config.json",
               config | dict(base_model_name_or_path=run.cfg.model, revision=(base.on_hub and run.cfg.base) or None))


def write_merged(aside: Path, run: Taken, base: Base) -> None:
    """The base, in full precision whatever the run had, with the adapter merged into it."""
    device = device_of(run.cfg)
    _, model, _ = load_base(replace(run.cfg, four_bit=False), device, 1)
    merged = attach_adapter(model, run.cfg, run.checkpoint).merge_and_unload()
    merged.to(weights_dtype(run.cfg, base)).save_pretrained(aside)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line; null for what is not a number, which JSON does not have."""
    tame = lambda line: json.loads(json.dumps(line), parse_constant=lambda _: None)
    write_text(path, "".join(json.dumps(tame(line), allow_nan=False) + "\n" for line in lines))


def skill_lines(bank: SkillBank) -> Iterable[dict[str, Any]]:
    """Every skill that was accepted, with its account."""
    for skill in bank.skills:
        known = skill.to_dict(bank.kappa, bank.ema)
        yield {name: known[name] for name in ("id", "condition", "strategy", "state", "utility", "stderr")} | dict(
            pairings=skill.n, born=skill.born, source=skill.source, effects=known["effects"])


def trajectory_lines(samples: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Every episode of the samples, each step with the action that was read from its text."""
    for sample in samples:
        for e in sample["episodes"]:
            yield dict(iteration=sample["iteration"], phase=PHASES[sample["phase"]], task=sample["task"], goal=sample["goal"],
                       skill=e["skill"], success=e["success"],
                       steps=[dict(action=envs.parse_action(step["text"]), **step) for step in e["steps"]])


# ---- 3. The model card ---------------------------------------------------------------------------------------------

def plain(text: Any) -> str:
    """Others' text on one line of a page, that can't be markup.

    >>> plain("a|b <i>")
    'a\\\\|b &lt;i>'
    """
    return re.sub(r"([|\\`*_\[\]])", r"\\\1", " ".join(printable(text).split())).replace("<", "&lt;")


def licence(base: Base) -> dict[str, str]:
    """What the base's own card says of its licence, in the words of the hub's front matter."""
    from transformers.utils import cached_file
    try:
        text = Path(cached_file(base.source, "README.md")).read_text(encoding="utf-8", errors="replace")
    except OSError:                                     # no card, or no way to it
        text = ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    said = dict(re.findall(r"^(license(?:_name|_link)?): *([\w.:/-]+) *$", front[1], re.MULTILINE)) if front else {}
    return said if "license" in said else dict(license="other", license_name="see-the-base-model")


def front_matter(run: Taken, base: Base, merge: bool) -> str:
    """The card's YAML, as the hub reads it; JSON's values are YAML's."""
    # The hub refuses a base_model that is no id of its own.
    of_hub = dict(base_model=run.cfg.model, base_model_relation="finetune" if merge else "adapter") if base.on_hub else {}
    facts = of_hub | dict(library_name="transformers" if merge else "peft", pipeline_tag="text-generation", **licence(base),
                          tags=["siri", "agent", "reinforcement-learning", run.cfg.env, *([] if merge else ["lora"])])
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in facts.items())


def result_table(run: Taken) -> str:
    """Every evaluation of the run. Those of the exported checkpoint are marked."""
    if not run.results:
        return "The run was not evaluated."
    lines = ["| evaluation | this checkpoint | panel | prompt | temperature | success [95% Wilson interval] | n | score ± s.e. |",
             "|---|---|---|---|---|---|---|---|"]
    for r in run.results:
        lo, hi = wilson(r["successes"], r["n"])
        this = "yes" if r["iteration"] == run.progress["iteration"] else "no"
        score = f"{r['score']:.3f} ± {r['score_se']:.3f}" if {"score", "score_se"} <= set(r) else "-"
        lines.append(f"| {plain(r['label'])} | {this} | {plain(r['panel'])} | "
                     f"{'with skills' if r['skills'] else 'plain'} | {plain(r.get('temperature', '-'))} | "
                     f"{r['successes'] / max(r['n'], 1):.3f} [{max(lo, 0):.3f}, {hi:.3f}] | {r['n']} | {score} |")
    return "\n".join(lines)


def usage(run: Taken, base: Base, merge: bool) -> str:
    """A program that answers one prompt as the policy would."""
    from transformers import PreTrainedTokenizerFast
    cfg, chat = run.cfg, base.chat
    # AutoTokenizer goes by the model's type, and would put that type's own pre-tokenizer into another one's tokenizer.
    kind = "PreTrainedTokenizerFast" if type(base.tokenizer) is PreTrainedTokenizerFast else "AutoTokenizer"
    how = '"."' if merge else json.dumps(cfg.model) + (f", revision={json.dumps(cfg.base)}" if base.on_hub and cfg.base else "")
    quantised = cfg.four_bit and not merge
    names = ["AutoModelForCausalLM", kind, *(["BitsAndBytesConfig"] if quantised else []), *([] if merge else ["GenerationConfig"])]
    dtype = "auto" if merge else "float32" if cfg.compact else "bfloat16"
    more = ("" if cfg.compact else ', device_map="auto"') + (", quantization_config=quantised" if quantised else "")
    load = [f'model = AutoModelForCausalLM.from_pretrained({how}, dtype="{dtype}"{more})'
            + ("     # on a CPU float32" if dtype == "bfloat16" and not quantised else "")]
    if quantised:                                       # as the run had it
        load.insert(0, f"quantised = BitsAndBytesConfig({', '.join(f'{name}={value!r}' for name, value in NF4.items())})")
    if not merge:
        load += ['model = PeftModel.from_pretrained(model, ".")',
                 'model.generation_config = GenerationConfig.from_pretrained(".")     # and not the base\'s own']
    ends = [tag for tag in ("</action>", "</skill>") if tag not in base.tokenizer.get_added_vocab()]
    stop = f", stop_strings={json.dumps(ends)}, tokenizer=tokenizer" if ends else ""
    return "\n".join([
        *([] if merge else ["from peft import PeftModel"]), f"from transformers import {', '.join(sorted(names))}", "",
        f'tokenizer = {kind}.from_pretrained(".")                # in this folder', *load,
        'prompt = "..."                                          # the form is below',
        f'turns = {json.dumps(chat.before)} + [{{"role": "user", "content": prompt}}]',
        'asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        f"said = model.generate(**asked.to(model.device){stop})",
        'print(tokenizer.decode(said[0, asked["input_ids"].shape[1]:]))'])


def serving(run: Taken, merge: bool) -> str:
    """Lines of a shell: vLLM, and the hub."""
    rank = next((r for r in VLLM_RANKS if r >= run.cfg.lora_r), run.cfg.lora_r)
    serve = "vllm serve ." if merge else (
        f"vllm serve {shlex.quote(run.cfg.model)} --enable-lora --max-lora-rank {rank} --lora-modules {run.name}=. "
        "--chat-template chat_template.jinja")
    return f"{serve}\nhf upload YOU/{run.name} ."


def training(run: Taken) -> str:
    """Which phases the checkpoint has seen, with what."""
    phases = Counter(PHASES[int(row["phase"])] for row in run.rows)
    versions = next((r["versions"] for r in reversed(run.results) if isinstance(r.get("versions"), dict)), {})
    counted = f" ({', '.join(f'{name} {n}' for name, n in phases.items())})" if phases else ""
    return (f"Checkpoint {run.checkpoint.name}, after {run.progress['iteration']} iterations{counted} and "
            f"{run.progress['env_steps']:,} environment steps; the run has {'' if run.progress['finished'] else 'not '}finished. "
            f"Versions: {', '.join(plain(f'{k} {v}') for k, v in versions.items()) or 'not recorded'}.")


def card(run: Taken, base: Base, merge: bool) -> str:
    """The whole model card."""
    cfg = run.cfg
    notices = [plain(r["notice"]) for r in run.results[-1:] if "notice" in r] or ["The run did not record which data it played."]
    if cfg.compact:
        notices.append("**A tiny policy in a small generated world: its scores are not benchmark scores.**")
    if merge and cfg.four_bit:
        notices.append(f"**{UNQUANTISED}**")
    kind = "A model" if merge else f"A LoRA adapter (rank {cfg.lora_r}, alpha {cfg.lora_alpha})"
    where = "" if base.on_hub else ", a local folder" + (" of the program" if cfg.compact else "")
    rows = "\n".join(f"| `{flag(name)}` | {plain(getattr(cfg, name))} |" for name in TOLD if getattr(cfg, name) != "")
    return f"""---
{front_matter(run, base, merge)}---

# {run.name}

{kind} that acts in {cfg.env}, trained by reinforcement learning from its own skills ([SIRI]({SOURCE})).
Base: {plain(cfg.model)}{where}. The base's licence holds for it; where none is named above, see the base model.

{chr(10).join(f"> {notice}{chr(10)}" for notice in notices)}
## Results

{result_table(run)}

## Use

```python
{usage(run, base, merge)}
```

A response ends with `</action>`. Served, with that as a stop string that stays in the text, and on the hub:

```bash
{serving(run, merge)}
```

The prompt of each step is one user turn of this form; history holds the last {cfg.history} observations and actions, and skill is
empty: what the skills advise has been learnt.

```text
{envs.PROMPTS.get((cfg.env, cfg.prompt_style), envs.PROMPTS["own", cfg.prompt_style])}
```

## Training

{training(run)}

| setting | value |
|---|---|
{rows}

## Data

- `skills.jsonl`: {len(run.bank.skills)} skills that the policy wrote, with what each was worth in pairs of rollouts.
- `trajectories.jsonl`: {sum(len(s["episodes"]) for s in run.samples)} episodes, only the samples that the run kept \
(a group's plain and guided one, every {cfg.sample_every} iterations), not all that it played.
"""


def command(run: str, given: dict[str, Any], to: str, merge: bool) -> None:
    """`--export`: write the folder, and say what is in it. UserError as `read_run`, `read_base`, `refuse` and `write`; OSError
    for a full disk."""
    if wrong := [name for name in given if name != "model"]:
        raise UserError(f"--{flag(wrong[0])}: --export takes no settings but --model")
    keep_quiet()
    taken = read_run(Path(run), given.get("model"))
    base = read_base(taken.cfg)
    refuse(Path(to), taken, base, merge)
    write(Path(to), taken, base, merge)
    what = f"the whole model in {str(weights_dtype(taken.cfg, base)).removeprefix('torch.')}" if merge else "the LoRA adapter"
    say(f"{to}: {what} of {taken.checkpoint}, with tokenizer and model card (README.md)")
    if merge and taken.cfg.four_bit:
        say("     " + UNQUANTISED)
    say(f"     skills.jsonl: {len(taken.bank.skills)} skills; trajectories.jsonl: {sum(len(s['episodes']) for s in taken.samples)} "
        "episodes, only the samples that the run kept, not all that it played")
