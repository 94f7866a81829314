"""Makes assets/tiny/: the small policy that `python siri.py --env alfworld` starts from on a laptop.

    python notebooks/make_tiny.py                 about 20 minutes on one core

A Qwen2 network of about a million parameters learns, by imitation, to read the compact prompt, to act in it, to follow a
skill and to write one. Its teacher is a player with common sense, no memory and no luck, in *other* households than the
ones that siri.py plays in: the policy learns how to search, never where things are. Where they are is what reinforcement
learning and skills have to find out afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs                                                          # noqa: E402
import skills                                                        # noqa: E402

CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CONTROL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<action>", "</action>", "<skill>", "</skill>"]
WORD = r"<\|?/?\w+\|?>|[a-z]+|[0-9]+|->|[^\s\w]"


# ---- 1. The teacher ----------------------------------------------------------------------------------------
GOALS = (   # goal sentence -> (verb of the process, where it happens); the order matters
    (r"put a clean (?P<obj>\w+) in (?P<place>\w+)", "clean", "sinkbasin"),
    (r"put a hot (?P<obj>\w+) in (?P<place>\w+)", "heat", "microwave"),
    (r"put a cool (?P<obj>\w+) in (?P<place>\w+)", "cool", "fridge"),
    (r"put (?:a|two) (?P<obj>\w+) in (?P<place>\w+)", None, None),
    (r"look at (?P<obj>\w+) under the (?P<place>desklamp)", None, None),
)


def skill_text(target: str, place: str) -> str:
    """A skill as this player understands it."""
    return f"when the task needs {target} -> look in {place} first"


def visible(state: envs.State) -> list[str]:
    """The commands that the compact prompt shows."""
    return [a for a in state.admissible if a not in ("help", "inventory", "look") and not a.startswith("examine")]


def demonstrate(goal: str, state: envs.State, history: list[envs.Turn], skill: str | None, rng: random.Random,
                slip: float = 0.0) -> tuple[str, str]:
    """The next (thought, action). With probability `slip` the action is a random visible one."""
    thought, action = decide(goal, visible(state), [turn.action for turn in history[-2:]], skill, rng)
    return thought, (rng.choice(visible(state)) if rng.random() < slip else action)


def decide(goal: str, can: list[str], did: list[str], skill: str | None, rng: random.Random) -> tuple[str, str]:
    """Sub-goal and action from the commands `can` and the last two actions `did`."""
    wish, verb, machine = next((m, verb, machine) for pattern, verb, machine in GOALS
                               if (m := re.fullmatch(pattern, goal)))
    target, place = wish["obj"], wish["place"]

    def first(*patterns: str) -> str:
        """The first command that matches the first pattern that matches any; else whatever can be done."""
        return next((c for p in patterns for c in can if re.fullmatch(p, c)), None) or rng.choice(can)

    # 1. Something in the hand? A command tells, or a `take` that the last two turns still show.
    held = next((m[1] for c in can if (m := re.match(r"(?:move|heat|clean|cool) (\w+) \d", c))), None)
    if held is None and not (did and did[-1].startswith("move")):
        held = next((m[1] for d in did if (m := re.match(r"(?:take|heat|clean|cool) (\w+) \d", d))), None)
    if held == target and place == "desklamp":
        return "use desklamp", first("use desklamp .*", "go to desk .*")
    if held == target and verb and not any(d.startswith(f"{verb} {target} ") for d in did):
        return f"{verb} {target}", first(f"{verb} {target} .*", f"go to {machine} .*")
    if held == target:
        return f"deliver {target}", first(f"move {target} .* to {place} .*", f"go to {place} .*")
    if held:
        return f"drop {held}", first(f"move {held} .*")

    # 2. Empty-handed: take what is in sight, look into what is shut, or go where the last two turns were not.
    taking = [c for c in can if c.startswith(f"take {target} ") and f" from {place} " not in c]
    if taking:
        return f"take {target}", taking[0]
    shut = next((c for c in can if c.startswith("open ")), None)
    if shut and did and did[-1] == shut.replace("open", "go to"):
        return "open it", shut
    been = {" ".join(d.split()[-2:]) for d in did} | {f"{place} 1"}      # a command ends with the place it is done at
    ahead = [c for c in can if c.startswith("go to ") and c[len("go to "):] not in been]
    hint = re.search(rf"needs {target} .*look in (\w+) first", skill or "")
    advised = [c for c in ahead if hint and c.startswith(f"go to {hint[1]} ")]
    return f"find {target}", rng.choice(advised or ahead or can)


# ---- 2. Lessons: pairs of a user turn and the assistant's answer -------------------------------------------


def whereabouts(scene: envs.Scene) -> str:
    """The name of the receptacle class in which the (first) target lies."""
    place = next(place for _, cls, place in scene.objects if cls == scene.target)
    return dict(scene.receptacles)[place].lower()


def play(game, skill: str | None, rng: random.Random, slip: float):
    """One episode of the teacher. Returns its lessons, its trajectory and whether it won."""
    state, history, lessons = game.start, [], []
    while not state.done:
        prompt = envs.render_prompt(game.task.goal, state, history, skill=skill, style="compact")
        thought, action = demonstrate(game.task.goal, state, history, skill, rng)
        lessons.append((prompt, f"<think>{thought}</think><action>{action}</action>", thought))
        if rng.random() < slip:                       # what is done may differ from what is taught
            action = rng.choice(visible(state))
        history.append(envs.Turn(state.observation, action))
        state = game.step(state, action)
    return lessons, history, state.success


def collect(households: int, games: int, seed: int, max_steps: int) -> list[tuple[str, str]]:
    """Play in `households` homes, `games` games each: plain, with a true skill, with a misleading one."""
    rng = random.Random(seed)
    lessons, outcomes = [], defaultdict(list)
    for h in tqdm(range(households), desc="playing"):
        home = 1_000_000 + h                                          # siri.py's households are its seeds, far below
        env = envs.AlfWorld.household(home, max_steps=max_steps, share=1.0)
        tasks = env.tasks("train")
        for i in range(games):
            task = tasks[i]
            with env.open(task) as game:
                target, place = task.data.target.lower(), whereabouts(task.data)
                rooms = sorted({a.split()[2] for a in game.start.admissible if a.startswith("go to ")})
                for label, advice in (("plain", None), ("plain", None), ("true skill", place),
                                      ("random skill", rng.choice(rooms))):
                    text = skill_text(target, advice) if advice else None
                    part, history, won = play(game, text, rng, slip=0.05)
                    outcomes[label].append(won)
                    outcomes[f"{label}, {task.kind}"].append(won)
                    # A search step is easy and frequent, a failed search teaches little: keep a part of them.
                    keep = [(p, r) for p, r, thought in part
                            if not thought.startswith("find") or advice or won or rng.random() < 0.3]
                    lessons += keep
                    found = next((m for t in history if (m := re.match(rf"take {target} \d+ from (\w+) ", t.action))), None)
                    if won and found:
                        steps = [(t.action, "") for t in history]          # the compact form shows actions only
                        lessons.append((skills.mining_prompt(task.goal, steps, "compact"),
                                        f"<skill>{skill_text(target, found[1])}</skill>"))
    for label, won in sorted(outcomes.items()):
        print(f"teacher, {label}: success {sum(won) / len(won):.2f} of {len(won)}")
    rng.shuffle(lessons)
    return lessons


# ---- 3. Tokenizer ------------------------------------------------------------------------------------------


def build_tokenizer(texts) -> PreTrainedTokenizerFast:
    """One token for each word that occurs, in alphabetical order; lower case; tags and control tokens are one token."""
    words = sorted({w for t in texts for w in re.findall(WORD, t.lower())} | {str(n) for n in range(100)}
                   | {"user", "assistant", "system"})
    names = CONTROL + TAGS + [w for w in words if w not in CONTROL + TAGS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]+|->|[^\s\w]"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
                                        additional_special_tokens=["<|im_start|>"])
    tokenizer.add_tokens(TAGS)
    tokenizer.chat_template = CHAT
    assert len(tokenizer) == len(names)
    return tokenizer


# ---- 4. Imitation ------------------------------------------------------------------------------------------


def encode(tokenizer, lessons, max_len: int) -> list[tuple[list[int], int]]:
    """Token ids of each lesson, and where its answer begins."""
    out = []
    for prompt, answer in lessons:
        head = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                             tokenize=True, return_dict=False)
        ids = head + tokenizer(answer + "<|im_end|>").input_ids
        if len(ids) <= max_len:
            out.append((ids, len(head)))
    return out


def batches(rows, tokens: int, rng: random.Random):
    """Endless batches of rows of like length, about `tokens` tokens each."""
    while True:
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]) + rng.random() * 16))
        cut, cuts = [], []
        for i in order:
            if cut and (len(cut) + 1) * len(rows[i][0]) > tokens:
                cuts.append(cut)
                cut = []
            cut.append(i)
        rng.shuffle(cuts)
        yield from cuts


def train(model, tokenizer, rows, steps: int, lr: float, tokens: int, prompt_loss: float, seed: int) -> None:
    """Cross-entropy of the answers, plus a little of the prompts: reading what is there is what makes copying emerge."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream = batches(rows, tokens, random.Random(seed))
    bar = tqdm(range(steps), desc="imitating")
    for step in bar:
        for g in optimizer.param_groups:
            g["lr"] = lr * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        part = [rows[i] for i in next(stream)]
        width = max(len(ids) for ids, _ in part)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([r + [pad] * (width - len(r)) for r, _ in part])                      # (B, T)
        at = torch.arange(width)[None]                                                            # (1, T)
        begin = torch.tensor([b for _, b in part])[:, None]                                       # (B, 1)
        end = torch.tensor([len(r) for r, _ in part])[:, None]                                    # (B, 1)
        logits = model(input_ids=ids, attention_mask=(at < end).long()).logits[:, :-1]            # (B, T-1, V)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        answer = ((at >= begin) & (at < end))[:, 1:]
        prompt = (at < begin)[:, 1:]
        answer_loss, prompt_part = loss[answer].mean(), loss[prompt].mean()
        (answer_loss + prompt_loss * prompt_part).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            bar.set_postfix(answer=f"{answer_loss.item():.3f}", prompt=f"{prompt_part.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "tiny")
    parser.add_argument("--households", type=int, default=300)
    parser.add_argument("--games", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompt-loss", type=float, default=0.2)
    parser.add_argument("--max-steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lessons", type=Path, help="read the lessons from this JSON file, or write them there")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)                # sums in one order: the same weights on the same processor and versions
    if args.lessons and args.lessons.exists():
        lessons = json.loads(args.lessons.read_text())
    else:
        lessons = collect(args.households, args.games, args.seed, args.max_steps)
        if args.lessons:
            args.lessons.write_text(json.dumps(lessons))
    tokenizer = build_tokenizer(t for lesson in lessons for t in lesson)
    rows = encode(tokenizer, lessons, 400)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    print(f"{len(lessons)} lessons, {len(rows)} kept, mean {sum(len(r) for r, _ in rows) / len(rows):.0f} tokens, "
          f"vocabulary {len(tokenizer)}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    started = time.perf_counter()
    train(model, tokenizer, rows, args.steps, args.lr, args.tokens, args.prompt_loss, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    model.save_pretrained(args.out)
    print(f"saved to {args.out} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
