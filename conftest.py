"""What several test files share: small configurations, a tiny policy and a stranger's, and two whole runs."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import envs
import siri
from policy import Policy
from run import main
from skills import SkillBank
from tools.files import latest_checkpoint
from tools.oracle import oracle_walkthrough
from tools.settings import PRESETS, make_environment, resolve

HERE = Path(__file__).resolve().parent
TINY = PRESETS["tiny"]["alfworld"]["model"]                                   # the policy that comes with the program
torch.set_num_threads(1)                                                # as in the runs from the command line below
slow = pytest.mark.skipif(not os.environ.get("SIRI_SLOW"), reason="slow: set SIRI_SLOW=1 to run it")
some = lambda n: n if os.environ.get("SIRI_SLOW") else n // 5          # examples of the longest property tests


BANK = dict(kappa=5.0, tau_up=0.1, tau_down=0.0, n_eval=10, m_retire=5, top_k=4, ucb_c=0.3, min_similarity=0.05, max_size=64)


def new_bank(**constants):
    """An empty bank. A run's constants are in `siri.Config`; these are a test's own."""
    return SkillBank(**{**BANK, **constants})


def bank_with(*conditions, **constants):
    bank = new_bank(**constants)
    for index, condition in enumerate(conditions):
        bank.add(condition, f"plan {index}", born=0, source="game")
    return bank


@pytest.fixture(scope="module")
def plans():
    """Generated games on official floor plans."""
    return envs.AlfWorld.generated(0)


@pytest.fixture(scope="module")
def home():
    """Small generated games in one household."""
    return envs.AlfWorld.household(3, max_steps=40)


def data_of(task):
    """The game as the dictionary that TextWorld loads, its winning commands included."""
    data = envs.pddl_game(task.data) if isinstance(task.data, envs.Scene) else json.loads(task.data.read_text())
    return {**data, "walkthrough": data.get("walkthrough") or oracle_walkthrough(data)}


def small_game(world, kind=None, split="train"):
    tasks = [task for task in map(world.tasks(split).__getitem__, range(80)) if kind in (None, task.kind)]
    return min(tasks, key=lambda task: len(task.data.objects) + len(task.data.receptacles))


def play(game, seed, length=30):
    """All states of a random rollout."""
    rng, states = random.Random(seed), [game.start]
    while not states[-1].done and len(states) <= length:
        states.append(game.step(states[-1], rng.choice(states[-1].admissible)))
    return states


def make_folder(root, spoil=lambda text: text):
    """A data folder in the official layout with one generated game a split; `spoil` changes the file of train."""
    for split in envs.SPLIT_COUNTS:
        task = envs.generate_task(0, split=split, household=envs.Household(0))
        path = root / "json_2.1.1" / split / task.id.split("/")[-1] / "trial_1" / "game.tw-pddl"
        path.parent.mkdir(parents=True)
        text = json.dumps(data_of(task))
        path.write_text(spoil(text) if split == "train" else text)
    return root


PLACES = {"lamp": "Home › Lighting › Desk Lamps", "rug": "Home › Rugs", "gift": "Gifts", "gold": "Metals",
          "shirt": "Clothing › Shirts", "tray": "Office › Trays"}


def article(name, title, pricing, options, bullets, description):
    return {"asin": f"B{name.upper():0>9}", "name": title, "category": "home", "query": f" {name.upper()} ",
            "product_category": PLACES[name], "pricing": pricing, "full_description": description, "images": ["a.jpg"],
            "small_description": bullets, "customization_options": options and {
                k: v and [{"value": x, "url": "/x"} for x in v] for k, v in options.items()}}


def wish(text, *attributes, own=None):
    return {"attributes": own or list(attributes), "instruction": text, "instruction_attributes": list(attributes)}


ITEMS = [
    article("lamp", "Red Desk Lamp with Shade", "$12.99",
         {"Color": ["Red", " Dark Blue ", "Black/White"], "Finish": None, "Size": ["small", "large"]},
         ["Bright LED", "", "Easy to wipe"], "A warm light."),
    article("rug", "Woven Area Rug", "$41.80$43.99", {"Shape": ["Rectangular", "Round"]}, "Very soft", "For floors."),
    article("gift", "Surprise", "", None, [], ""),
    article("gold", "Gold Bar", "$1,200.00", None, ["Heavy"], "Shines."),
    article("shirt", "Linen Shirt", "$20.00", {"Color": ["natural", "red"], "Material": ["natural", "wool"]},
         ["Dries fast", "soft touch"], "Worn daily."),
    article("tray", "Blue Desk Tray", "$30.00", {}, ["A bright tray"], "Holds paper."),       # no entry in INSTRUCTIONS
]
LAMP, RUG, GIFT, GOLD, SHIRT, TRAY = (i["asin"] for i in ITEMS)
INSTRUCTIONS = {
    LAMP: wish("find me a lamp", "easy clean", "bright", own=["easy clean", "energy saving"]),
    RUG: wish("find me a rug", "soft"), GIFT: wish("find me a gift", "nice"), GOLD: wish("find me gold", "heavy"),
    SHIRT: wish("find me a shirt", "light"),
}
HUMAN = {asin: [dict(zip(("instruction", "instruction_attributes", "instruction_options"), e)) for e in entries]
         for asin, entries in {LAMP: [("..i need a lamp.", ["bright"], ["red", "small"]), ("whatever", [], [])],
                               RUG: [("a rug", ["soft"], ["rectangular"])], GOLD: [("gold.", ["heavy"], [])]}.items()}


def shop_of(items=ITEMS, instructions=INSTRUCTIONS, human=None):
    return envs.Shop(items, instructions, human, tagger="stop-list")


SHOP, HUMAN_SHOP = shop_of(), shop_of(human=HUMAN)


@lru_cache
def generated_shop(seed=0):
    return envs.Shop.generated(seed, 450, tagger="stop-list")


def goal_of(asin, *values, shop=SHOP):
    """The goal of a product whose options have these values."""
    return next(g for g in shop.goals if g.product.asin == asin and
                (not values or tuple(o[1] if isinstance(o, tuple) else o for o in g.options) == values))


def visit(goal, shop=SHOP, observation="text", max_steps=15):
    env = SimpleNamespace(shop=shop, max_steps=max_steps, observation=observation)
    return envs.ShopGame(env, envs.Task("train/0", "home", goal.text, "train", goal))


def walk(game, *actions, state=None):
    state = state or game.start
    for action in actions:
        state = game.step(state, action)
    return state


def write_shop(folder):
    for name, content in (("items_shuffle", ITEMS), ("items_ins_v2", INSTRUCTIONS), ("items_human_ins", HUMAN)):
        for tail in ("", "_1000") if name != "items_human_ins" else ("",):
            (folder / f"{name}{tail}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def bare(rich):
    """The texts of a `text_rich` page without their marks."""
    lines = [line.strip() for line in rich.split("\n") if line.strip() and not line.startswith("You have clicked ")]
    return [re.sub(r"^\[(?:clicked )?button\] (.*) \[(?:clicked )?button_\]$", r"\1", line) for line in lines]


def config(**overrides):
    return resolve({"preset": "smoke", **overrides})[0]


def awake(policy):
    """A fresh adapter changes nothing, because its second matrix is zero; give that values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return policy


@pytest.fixture(scope="module")
def policy():
    return awake(Policy(config()))


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_tokenizer(folder, template=CHATML, special=(), added=(), normalizer=None, **settings):
    """A byte-level BPE tokenizer of 400 ids or so, as others publish them, with more special and other added tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(envs.PROMPTS.values(), trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]))
    bpe.add_tokens(list(added))
    if normalizer:
        bpe.normalizer = normalizer
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "chat_template": template} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return bpe.get_vocab_size()


def write_model(folder, architecture="Qwen2", template=CHATML, seed=0, tokenizer=None, **changes):
    """A random model of an architecture of transformers, 32 wide, and its tokenizer; returns the model."""
    import transformers
    write_tokenizer(folder, template, **tokenizer or {})
    torch.manual_seed(seed)
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3, bos_token_id=0, eos_token_id=2,
                 pad_token_id=0)
    kind = getattr(transformers, f"{architecture}ForCausalLM", None) or getattr(transformers, f"{architecture}LMHeadModel")
    model = kind(getattr(transformers, f"{architecture}Config")(**sizes | changes))
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def stranger_folder(tmp_path_factory):
    """A model as others publish them: byte-level BPE, ChatML, untied head. Its vocabulary is padded with rows that
    shout, and its generation_config asks for another distribution than the model's."""
    from transformers import GenerationConfig
    folder = tmp_path_factory.mktemp("stranger")
    model = write_model(folder, tie_word_embeddings=False)
    model.lm_head.weight.data[write_tokenizer(folder):] *= 100
    model.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 0], do_sample=True, top_k=5, top_p=0.5, temperature=0.3, repetition_penalty=3.0,
                     min_new_tokens=3, suppress_tokens=list(range(50, 200))).save_pretrained(folder)
    return folder


def stranger_config(folder, **overrides):
    return resolve({"preset": "paper", "four_bit": False, "model": str(folder), "lora_r": 4, "gen_tokens": 10**6,
                         "max_response": 8, "max_steps": 2, **overrides})[0]


@pytest.fixture(scope="module")
def stranger(stranger_folder):
    return awake(Policy(stranger_config(stranger_folder)))


def offline(monkeypatch):
    """No attempt to reach the model hub, as with HF_HUB_OFFLINE=1 in the environment."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def some_rows(policy):
    """Prompts and responses of very unequal length."""
    torch.manual_seed(0)
    return [siri.Row(policy.encode("look " * n), torch.randint(4, policy.vocab, (m,)).tolist(), a)
            for n, m, a in ((1, 4, 1.0), (40, 4, -0.5), (3, 9, 2.0), (20, 1, 0.3), (7, 4, -1.0))]


def learner_of(policy, **parts):
    """A learner of which a test needs some parts only."""
    return siri.Learner(**{**dict(cfg=policy.cfg, env=None, policy=policy, optimizer=None, bank=new_bank(n_eval=1),
                                  progress=siri.Progress()), **parts})


def gradient(policy, rl, internal=(), lam=1.0, update_tokens=10**6, **changes):
    """What one update takes off the parameters with plain gradient descent at rate 1; the policy is left as it was."""
    cfg = dataclasses.replace(policy.cfg, **{**dict(minibatch=99, grad_clip=1e9, distill_epochs=1, distill_rows=99,
                                                    kl_beta=0.0), **changes})
    before, policy.update_tokens, budget = [p.detach().clone() for p in policy.trainable], update_tokens, policy.update_tokens
    siri.update(policy, torch.optim.SGD(policy.trainable, lr=1.0), list(rl), list(internal), lam, cfg,
                np.random.default_rng(0))
    policy.update_tokens = budget
    after = [p.detach().clone() for p in policy.trainable]
    with torch.no_grad():
        for p, old in zip(policy.trainable, before):
            p.copy_(old)
    return torch.cat([(a - b).flatten() for a, b in zip(before, after)])


def close(a, b):
    """Equal up to float noise, relative to the largest entry."""
    assert b.abs().max() > 1e-4
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


TIMES = {"seconds", "rollout_s", "update_s", "rollout_tokens_per_s", "update_tokens_per_s", "peak_gib"}
SMALL = "--preset smoke --name x"
SMOKE = (SMALL + " --warmup-max 1 --mining-max 2 --distill-max 3 --groups 6 --group-size 2 --max-steps 14"
         " --active-req 9 --save-every 4 --panel 4 --distill-epochs 2").split()


def start(cwd, *args):
    with (cwd / "out.txt").open("w") as out, (cwd / "err.txt").open("w") as err:
        return subprocess.Popen([sys.executable, str(HERE / "siri.py"), *args], cwd=cwd, stdout=out, stderr=err,
                                env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"})


def metrics(cwd):
    path = cwd / "runs/x/metrics.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def two_runs(through, broken):
    """Two small runs from the command line: one goes through; one is killed in its sixth and last iteration, when its
    last checkpoint is from after the fourth, and resumed."""
    whole = start(through, *SMOKE)
    assert whole.wait() == 0, (through / "err.txt").read_text()
    killed = start(broken, *SMOKE)
    while len(metrics(broken)) < 5 and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (broken / "err.txt").read_text()
    assert latest_checkpoint(broken / "runs/x").name == "00004-2"
    resumed = start(broken, "--resume", "runs/x")
    assert resumed.wait() == 0, (broken / "err.txt").read_text()
    return through, broken


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return two_runs(*map(tmp_path_factory.mktemp, ("through", "broken")))


@pytest.hookimpl(wrapper=True)              # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """The tests of these two runs go to one process, which makes them once."""
    for item in items:
        if "runs" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("runs"))
    return (yield)


def pytest_xdist_auto_num_workers(config):
    """The whole suite runs on all cores, up to four; a part of it here, which begins sooner."""
    whole = config.args == config.getini("testpaths") and not config.option.keyword
    return min(os.cpu_count(), 4) if whole else 0


def spoil(path, how):
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "cut" else b'{"a": 1}')


def call(*args):
    """One call of the program: its exit code, output and errors."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(list(map(str, args)))
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module")
def world():
    cfg = config()
    policy = Policy(cfg)
    policy.model.double()               # two commands can be as likely to the last digit of a float, and padding moves it
    return make_environment(cfg), policy
