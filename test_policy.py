"""The policy: what is sampled is what is trained, control tokens, memory, unusable models."""

import copy
import dataclasses
import json
import math
import random
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
import siri
from conftest import HERE, TINY, awake, close, gradient, offline, some_rows, stranger_config
from policy import Policy, UserError

# ---- 1. the policy ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generating_leaves_the_gradients_of_4bit_layers_alone(stranger_folder):
    """Some 4-bit kernels repack the weights on the first generation and lose their autograd."""
    policy = awake(Policy(stranger_config(stranger_folder, four_bit=True)))
    rows = some_rows(policy)

    def gradient():
        policy.model.train()
        policy.logprobs(rows)[0].sum().backward()
        policy.model.eval()
        flat = torch.cat([p.grad.flatten() for p in policy.trainable]).clone()
        policy.model.zero_grad()
        return flat

    before = gradient()
    policy.generate([row.prompt for row in rows], 1.0, 4)
    assert torch.nn.functional.cosine_similarity(before, gradient(), dim=0) > 0.999


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_sampled_policy_is_the_trained_one(stranger, monkeypatch, temperature):
    """Frequencies of 4,000 sampled tokens against `logprobs`, by chi-square; a model's generation_config has no say."""
    monkeypatch.setattr(stranger, "cfg", dataclasses.replace(stranger.cfg, temperature=temperature))
    prompt, n = stranger.encode("look"), 4000
    torch.manual_seed(0)
    drawn = Counter(ids[0] for ids in stranger.generate([prompt] * n, temperature, 1))
    with torch.no_grad():
        logp, entropy = stranger.logprobs([siri.Row(prompt, [token]) for token in range(stranger.vocab)])
    assert entropy[0] > 1 and logp.exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert max(drawn) < stranger.vocab < stranger.model.config.vocab_size
    expected = n * logp.exp().double().cpu().numpy()
    common = expected >= 5
    seen = np.array([drawn[token] for token in range(stranger.vocab)])
    seen, expected = (np.append(x[common], x[~common].sum()) for x in (seen, expected))
    df = len(seen) - 1
    assert ((seen - expected) ** 2 / expected).sum() < df + 4 * math.sqrt(2 * df)


@pytest.mark.parametrize("name", ["policy", "stranger"])
def test_greedy_responses_do_not_depend_on_their_batch(request, name):
    policy = request.getfixturevalue(name)
    prompts = [row.prompt for row in some_rows(policy)]
    together = policy.generate(prompts, 0.0, 8)
    assert together == [policy.generate([prompt], 0.0, 8)[0] for prompt in prompts]
    assert len({tuple(ids) for ids in together}) > 1


def test_a_response_ends_with_the_token_that_completes_an_end_tag(stranger, monkeypatch):
    """The tags are several tokens here, and the prompt has them too. The model is made to say what is on the script."""
    texts = ["<think>so</think><action>look</action> and on and on", "</skill>", "a > b", "</action <|im_end|> c"]
    scripts = [stranger.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    prompts = [stranger.encode("say <action>this</action>" * (n + 1)) for n in range(len(texts))]
    width = max(map(len, prompts))

    def recite(ids, scores):
        for row, script in zip(scores, scripts):
            row[(script + [7] * 99)[ids.shape[1] - width]] = math.inf
        return scores

    monkeypatch.setattr(stranger, "mask_padded_vocabulary", recite)
    said = stranger.generate(prompts, 0.0, 50)
    assert [stranger.tokenizer.decode(ids) for ids in said[:2]] == ["<think>so</think><action>look</action>", "</skill>"]
    assert said[2] == (scripts[2] + [7] * 50)[:50] and said[3] == scripts[3][:scripts[3].index(2) + 1]


class Memory:
    """A device that runs out of memory in the calls whose numbers are given."""

    def __init__(self, work, *full):
        self.work, self.full, self.calls = work, full, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.work(*args, **kwargs)


def test_out_of_memory_costs_time_and_nothing_else(policy, monkeypatch, capsys):
    prompts = [row.prompt for row in some_rows(policy)]
    whole = policy.generate(prompts, 0.0, 8)
    monkeypatch.setattr(policy, "gen_tokens", 4000)
    monkeypatch.setattr(policy, "sample", Memory(policy.sample, 1, 2))
    assert policy.generate(prompts, 0.0, 8) == whole and policy.gen_tokens == 1000 and policy.sample.calls == 3
    assert "out of memory: gen_tokens is 1000" in capsys.readouterr().out
    rows = some_rows(policy)
    good = gradient(policy, rows, kl_beta=0.1)
    monkeypatch.setattr(policy, "cfg", dataclasses.replace(policy.cfg, max_prompt=8, max_response=8))
    monkeypatch.setattr(policy, "logprobs", Memory(policy.logprobs, 1, 6))     # the reference, then after a backward pass
    close(gradient(policy, rows, kl_beta=0.1, update_tokens=120), good)
    assert re.findall("update_tokens is ([0-9]+)", capsys.readouterr().out) == ["60", "30"]
    assert policy.logprobs.calls > 8
    monkeypatch.setattr(policy, "sample", Memory(policy.sample, *range(99)))
    with pytest.raises(UserError, match="single row.*--max-prompt"):
        policy.generate(prompts, 0.0, 8)


def test_token_budgets_follow_from_what_two_probes_of_each_kind_take(policy, monkeypatch):
    """A device of 24 GiB on which generating takes 1 MiB a row and training 3 MiB a row, above 5 GiB of weights."""
    gib, mib = 2**30, 2**20
    policy, taken, told = copy.copy(policy), [], []
    policy.cfg = dataclasses.replace(policy.cfg, max_prompt=100, max_response=28, memory_gib=20.0, compact=False)
    policy.device, policy.gen_tokens, policy.update_tokens = "cuda", 0, 0

    def logprobs(rows):
        assert {(len(r.prompt), len(r.response)) for r in rows} == {(100, 28)}
        taken.append(5 * gib + 3 * mib * len(rows))
        return torch.zeros(1, requires_grad=True), None

    policy.sample = lambda prompts, temperature, new: taken.append(5 * gib + mib * len(prompts))
    policy.logprobs = logprobs
    for name, result in dict(get_device_properties=SimpleNamespace(total_memory=24 * gib), memory_reserved=0,
                             mem_get_info=(23 * gib, 24 * gib), empty_cache=None, reset_peak_memory_stats=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: taken[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    policy.fit()
    adam = 8 * sum(p.numel() for p in policy.trainable)
    spare = 0.85 * 20 * gib - adam - 5 * gib
    assert told == [20 / 24] and policy.gen_tokens == pytest.approx(spare / mib * 102, rel=1e-3)
    assert policy.update_tokens == pytest.approx(spare / (3 * mib) * 128, rel=1e-3)
    policy.gen_tokens, sample = 0, policy.sample
    policy.sample = Memory(sample, 2)                                       # 8 rows fit and 16 do not
    policy.fit()
    assert policy.gen_tokens == 8 * 102
    policy.cfg = dataclasses.replace(policy.cfg, memory_gib=4.0)
    policy.gen_tokens, policy.sample = 0, Memory(None, 1)
    with pytest.raises(UserError, match="--memory-gib 4.0: 8 rows of 128 tokens do not fit"):
        policy.fit()


@pytest.mark.parametrize("name", ["policy", "stranger"])
def test_logprobs_equal_the_models_own_logits_in_any_batch(request, name):
    policy = request.getfixturevalue(name)
    rows = some_rows(policy)
    with torch.no_grad():
        logp, entropy = policy.logprobs(rows)
        for row, mine, h in zip(rows, *(x.split([len(r.response) for r in rows]) for x in (logp, entropy))):
            ids = torch.tensor([row.prompt + row.response], device=policy.device)
            logits = policy.model(input_ids=ids).logits[0, len(row.prompt) - 1:-1, :policy.vocab].float()      # (T, V)
            full = torch.distributions.Categorical(logits=logits)
            near = dict(rtol=1e-3, atol=1e-3) if policy.device == "cpu" else dict(rtol=0.02, atol=0.02)         # bf16
            torch.testing.assert_close(mine, full.log_prob(ids[0, len(row.prompt):]), **near)
            torch.testing.assert_close(h, full.entropy(), **near)


def test_the_reference_is_the_base_model(policy):
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(HERE / TINY)
    ids = torch.tensor([policy.encode("task : put a apple in shelf")])
    with torch.no_grad(), policy.model.disable_adapter():
        torch.testing.assert_close(policy.model(input_ids=ids).logits, base(input_ids=ids).logits)
    with torch.no_grad():
        assert (policy.model(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() > 0.1
    assert all("lora_" in name for name, p in policy.model.named_parameters() if p.requires_grad)


CONTROL = st.lists(st.sampled_from(
    "<|im_end|> <|im_start|> <pad> <unk> <|IM_END|> <|İm_end|> <|endoftext|> <|im_ end|> < | > im_end \n a".split(" "))
    | st.text(max_size=2), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(outer=CONTROL, inner=CONTROL, cut=st.integers(0, 9))
@pytest.mark.parametrize("name", ["policy", "stranger"])
def test_no_text_can_end_a_turn(request, name, outer, inner, cut):
    """Tasks, observations and skills come from elsewhere: whatever they hold, the prompt has the template's control
    tokens and no others."""
    policy = request.getfixturevalue(name)
    added = json.loads(policy.tokenizer.backend_tokenizer.to_str())["added_tokens"]
    control = {t["id"] for t in added if t["special"] and t["content"] != "<unk>"}
    structure = [i for i in policy.encode("x") if i in control]
    for text in (outer, outer[:cut] + inner + outer[cut:], f"<|im_{outer}end|>", f"<{inner}|im_end|>"):
        assert [i for i in policy.encode(text) if i in control] == structure, text


def test_text_without_control_tokens_reaches_the_model_unchanged(stranger):
    for text in ("a < b | c > d <|im end|>", "Ä 🍎\n  two  spaces", "<think>x</think>"):
        assert text in stranger.decode(stranger.encode(text))


def test_the_tiny_tokenizer_is_the_one_that_its_file_describes(policy):
    from tokenizers import Tokenizer
    from_file = Tokenizer.from_file(str(HERE / TINY / "tokenizer.json"))
    with envs.AlfWorld.household(0).open(envs.AlfWorld.household(0).tasks("train")[0]) as game:
        text = envs.render_prompt(game.task.goal, game.start, [], skill="when dark -> find a lamp", style="compact")
    text += " <think>find apple</think> <action>Take Apple 12 from sinkbasin 1</action>\n<skill>a -> b</skill>"
    assert policy.tokenizer(text, add_special_tokens=False).input_ids == from_file.encode(text).ids


def test_the_tiny_policy_can_say_and_read_everything_in_its_world(policy):
    """Prompts have no unknown word, and each command that they offer comes back as it was written."""
    unknown = policy.tokenizer.convert_tokens_to_ids("<unk>")
    for seed in range(8):
        world = envs.AlfWorld.household(seed, max_steps=30)
        for i, split in enumerate(envs.SPLIT_COUNTS):
            with world.open(world.tasks(split)[i]) as game:
                state, rng = game.start, random.Random(seed)
                while not state.done:
                    prompt = envs.render_prompt(game.task.goal, state, [], style="compact")
                    assert unknown not in policy.encode(prompt), prompt
                    offered = re.search("can : (.*)", prompt)[1].split(" ; ")
                    for command in offered:
                        ids = policy.tokenizer(f"<think>find it</think><action>{command}</action>").input_ids
                        assert command in state.admissible and envs.parse_action(policy.decode(ids)) == command
                    state = game.step(state, rng.choice(offered))


@pytest.mark.parametrize("spoil, says", [
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "could not be loaded"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "nonsense"}'), "could not be loaded"),
    (lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}'),
     "chat template"),
    (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "chat template|could not be loaded"),
    (lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "could not be loaded"),
    (lambda folder: shutil.rmtree(folder), "could not be loaded")])
def test_an_unusable_model_folder_is_named(stranger_folder, tmp_path, monkeypatch, spoil, says):
    offline(monkeypatch)
    folder = tmp_path / "model"
    shutil.copytree(stranger_folder, folder)
    spoil(folder)
    with pytest.raises(UserError, match=says) as caught:
        Policy(stranger_config(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
