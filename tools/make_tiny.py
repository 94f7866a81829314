"""Makes assets/tiny/ and assets/tiny-webshop/: the small policies that `python siri.py` starts from on a laptop.

    python tools/make_tiny.py                       about 20 minutes on one core
    python tools/make_tiny.py --env webshop         the same; begins with the weights in assets/tiny

A Qwen2 network of about a million parameters learns, by imitation, to read the compact prompt, to act in it, to follow a
skill and to write one. Its teachers are players with common sense, no memory and no luck, in *other* households and
shops than the ones that siri.py plays in: the policy learns how to search, never where things are or who makes them.
That is what reinforcement learning and skills have to find out afterwards.

The committed assets/tiny-webshop was made in three goes while its lessons were still being written, each with the weights
of the one before (`--start`): 2,200 steps from assets/tiny, in shops of eight brands out of 24, when the compact page did
not yet star what the task names; 900 with stars; and 1,500 in the present shops, but of `loyalty` 0.9 (`--steps 1500
--lr 1.5e-3 --prompt-loss 0.1 --threads 2 --households 200 --games 6`).
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
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs
import skills

CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CONTROL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<action>", "</action>", "<skill>", "</skill>"]
WORD = r"<\|?/?\w+\|?>|[a-z]+|[0-9]+|->|[^\s\w]"


# ---- 1. The teacher in a household -------------------------------------------------------------------------
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
    """Sub-goal and action from the commands `can` and the last two actions `did`. A goal of a form that GOALS lacks
    raises StopIteration."""
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
    """One episode of the teacher. Returns its lessons, its trajectory and whether it won. `slip` is the chance that a
    random visible command is played instead."""
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
    return finish(lessons, outcomes, rng)


def finish(lessons: list[tuple[str, str]], outcomes: dict[str, list[bool]], rng: random.Random) -> list[tuple[str, str]]:
    """Print the teacher's success for each kind of episode; returns the lessons, shuffled."""
    for label, won in sorted(outcomes.items()):
        print(f"teacher, {label}: success {sum(won) / len(won):.2f} of {len(won)}")
    rng.shuffle(lessons)
    return lessons


# ---- 3. The teacher in a shop, and its lessons -------------------------------------------------------------
WISH = re.compile(r"find me (?P<quality>\w+) (?P<article>\w+) with color: (?P<color>\w+), and size: (?P<size>\w+), "
                  r"and price lower than (?P<price>\d+)\.00 dollars")


def shop_skill(quality: str, brand: str) -> str:
    """A skill as the teacher in a shop understands it."""
    return f"when the task needs {quality} -> look at {brand} first"


def brand_of(asin: str) -> str:
    """A product's number in a generated catalogue begins with its brand."""
    return re.match(r"[a-z]+", asin.lower())[0]


def shop(goal: str, state: envs.State, history: list[envs.Turn], skill: str | None, rng: random.Random) -> tuple[str, str]:
    """The next (thought, action), from what the compact prompt shows: page, last two turns, skill."""
    wish = WISH.fullmatch(goal)
    did, saw = [turn.action for turn in history[-2:]], [turn.observation for turn in history[-2:]]
    parts = state.observation.partition(f"{goal} [SEP] ")[2].split(" [SEP] ")
    can = [action[len("click["):-1] for action in state.admissible if action.startswith("click[")]

    if "search" in can:
        return f"find {wish['article']}", f"search[{wish['article']}]"
    if "next >" in can:                                                   # choose among the results
        priced = [(asin.lower(), float(tag[1:])) for asin, tag in zip(parts, parts[2:])
                  if asin.lower() in can and tag[0] == "$"]
        fit = [asin for asin, price in priced if price <= float(wish["price"])]
        been = {brand_of(page.split(" [SEP] ")[-7]) for page in saw if page.endswith("Buy Now")}
        new = [asin for asin in fit if brand_of(asin) not in been]
        hint = re.search(rf"needs {wish['quality']} .*look at (\w+) first", skill or "")
        advised = [asin for asin in new if hint and brand_of(asin) == hint[1]]
        if not (advised or new or fit):
            return "look elsewhere", "click[back to search]"
        pick = rng.choice(advised or new or fit)
        return f"try {brand_of(pick)}", f"click[{pick}]"
    if "buy now" in can:                                                  # a product's page: options, features, buy
        if did and did[-1] == f"click[{wish['color']}]":
            return f"size {wish['size']}", f"click[{wish['size']}]"
        if did and did[-1] == f"click[{wish['size']}]":
            return "buy it", "click[buy now]"
        if not did or did[-1] != "click[< prev]":                         # the page is new
            there = [(wish[option], wish[option] in can) for option in ("color", "size")]
            checks = there[:1 + there[0][1]]                              # the second only if the first is there
            thought = " ".join(verdict(word, ok) for word, ok in checks)
            return thought, "click[features]" if all(ok for _, ok in there) else "click[< prev]"
        found = wish["quality"] in saw[-1].partition(goal)[2].lower().split()
        return verdict(wish["quality"], found), f"click[{wish['color']}]" if found else "click[< prev]"
    return verdict(wish["quality"], wish["quality"] in " ".join(parts).lower().split()), "click[< prev]"


def verdict(word: str, there: bool) -> str:
    """To name a word and then say whether it is on the page is easier for a small network than to say it at once."""
    return f"{word} ? {'yes' if there else 'no'}"


def collect_shop(shops: int, goals: int, seed: int) -> list[tuple[str, str]]:
    """Buy in `shops` shops, `goals` goals each: plain, with a true skill, with a misleading one."""
    rng = random.Random(seed)
    lessons, outcomes = [], defaultdict(list)
    for h in tqdm(range(shops), desc="shopping"):
        env = envs.make("webshop", compact=True, max_steps=15, seed=1_000_000 + h)
        for task in rng.sample(env.tasks("train"), goals):
            quality = task.data.attributes[0]
            brands = sorted({brand_of(asin) for asin in env.shop.asins})
            for label, advice in (("plain", None), ("plain", None), ("true skill", brand_of(task.data.product.asin)),
                                  ("random skill", rng.choice(brands))):
                skill, game, history, part = advice and shop_skill(quality, advice), env.open(task), [], []
                state = game.start
                while not state.done:
                    prompt = envs.render_prompt(task.goal, state, history, skill=skill, style="compact", world="webshop")
                    thought, action = shop(task.goal, state, history, skill, rng)
                    part.append((prompt, f"<think>{thought}</think><action>{action}</action>", thought))
                    if rng.random() < 0.05:
                        action = rng.choice([a for a in state.admissible
                                             if a.startswith("click[") and a != "click[buy now]"])
                    history.append(envs.Turn(state.observation, action))
                    state = game.step(state, action)
                outcomes[label].append(state.success)
                lessons += [(p, r) for p, r, thought in part                     # which one to try first can't be taught
                            if not thought.startswith("try") or advice or state.success or rng.random() < 0.3]
                if state.success:
                    bought = state.engine.asin
                    lessons.append((skills.mining_prompt(task.goal, [(t.action, "") for t in history], "compact"),
                                    f"<skill>{shop_skill(quality, brand_of(bought))}</skill>"))
    return finish(lessons, outcomes, rng)


# ---- 4. Tokenizer ------------------------------------------------------------------------------------------


def build_tokenizer(texts, brackets: bool = False) -> PreTrainedTokenizerFast:
    """One token for each word that occurs, in alphabetical order; lower case; tags and control tokens are one token.
    `brackets`: decoded text has no blanks around them, nor before a number that a bracket follows: `click[acme12]`."""
    words = sorted({w for t in texts for w in re.findall(WORD, t.lower())} | {str(n) for n in range(100)}
                   | {"user", "assistant", "system"})
    names = CONTROL + TAGS + [w for w in words if w not in CONTROL + TAGS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]+|->|[^\s\w]"), "removed", invert=True)
    if brackets:
        core.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(),
                                          decoders.Replace(" [ ", "["), decoders.Replace(" ]", "]"),
                                          decoders.Replace(Regex(r"(?<=[a-z]) (?=[0-9]+\])"), "")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
                                        additional_special_tokens=["<|im_start|>"])
    tokenizer.add_tokens(TAGS)
    tokenizer.chat_template = CHAT
    assert len(tokenizer) == len(names)
    return tokenizer


# ---- 5. Imitation ------------------------------------------------------------------------------------------


def encode(tokenizer, lessons, max_len: int) -> list[tuple[list[int], int]]:
    """Token ids of each lesson, and where its answer begins; lessons of more than `max_len` tokens are left out."""
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


def train(model, tokenizer, rows, steps: int, lr: float, tokens: int, prompt_loss: float, seed: int, judging: float) -> None:
    """Cross-entropy of the answers, plus a little of the prompts: reading what is there is what makes copying emerge.
    A verdict's yes or no counts `judging` times: it is one token of an answer and the hardest to learn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream = batches(rows, tokens, random.Random(seed))
    verdicts = torch.tensor([tokenizer.get_vocab().get(word, -1) for word in ("yes", "no")])
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
        judged = torch.isin(ids[:, 1:], verdicts) & answer
        answer_loss, prompt_part = loss[answer].mean(), loss[prompt].mean()
        answer_loss = answer_loss + (judging - 1) * loss[judged].sum() / answer.sum()
        (answer_loss + prompt_loss * prompt_part).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            bar.set_postfix(answer=f"{answer_loss.item():.3f}", prompt=f"{prompt_part.item():.3f}",
                            verdicts=f"{loss[judged].mean().item():.3f}")


def begin_with(model, tokenizer, folder: Path) -> None:
    """Take over the weights of another tiny policy, and the embeddings of the words that both know."""
    other, words = Qwen2ForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    state, mine = other.state_dict(), model.get_input_embeddings().weight.data
    theirs = state.pop("model.embed_tokens.weight")
    state.pop("lm_head.weight", None)                                # the same matrix
    model.load_state_dict(state, strict=False)
    mine.normal_(0, theirs.std().item())
    for word, i in tokenizer.get_vocab().items():
        if word in words:
            mine[i] = theirs[words[word]]


def main() -> None:
    """The command line: collect lessons, make the tokenizer, imitate, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", choices=("alfworld", "webshop"), default="alfworld")
    parser.add_argument("--out", type=Path, help="default assets/tiny or assets/tiny-webshop")
    parser.add_argument("--start", type=Path, help="begin with the weights of this tiny policy; webshop: assets/tiny")
    parser.add_argument("--households", type=int, default=300, help="or shops")
    parser.add_argument("--games", type=int, default=5, help="or goals, in each of them")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompt-loss", type=float, default=0.2)
    parser.add_argument("--max-steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judging", type=float, default=5.0, help="weight of a verdict's yes or no")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lessons", type=Path, help="read the lessons from this JSON file, or write them there")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)     # sums in one order: the same weights on the same processor and versions
    if args.lessons and args.lessons.exists():
        lessons = json.loads(args.lessons.read_text())
    else:
        lessons = (collect(args.households, args.games, args.seed, args.max_steps) if args.env == "alfworld"
                   else collect_shop(args.households, args.games, args.seed))
        if args.lessons:
            args.lessons.write_text(json.dumps(lessons))
    tokenizer = build_tokenizer((t for lesson in lessons for t in lesson), brackets=args.env == "webshop")
    rows = encode(tokenizer, lessons, 400)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    if args.start or args.env == "webshop":             # what reading a household has taught serves in a shop, too
        begin_with(model, tokenizer, args.start or ROOT / "assets" / "tiny")
    print(f"{len(lessons)} lessons, {len(rows)} kept, mean {sum(len(r) for r, _ in rows) / len(rows):.0f} tokens, "
          f"vocabulary {len(tokenizer)}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    started = time.perf_counter()
    train(model, tokenizer, rows, args.steps, args.lr, args.tokens, args.prompt_loss, args.seed, args.judging)
    args.out = args.out or ROOT / "assets" / ("tiny" if args.env == "alfworld" else "tiny-webshop")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    model.save_pretrained(args.out)
    print(f"saved to {args.out} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
