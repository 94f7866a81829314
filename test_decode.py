"""Sampling: the draw, and the decoder, whose answers are those of `generate` however its batches are cut and refilled."""

import dataclasses
import math
import random
from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

import decode
import policy as rooms
import siri
from conftest import awake, config, gradient, slow, some_rows, stranger_config, write_model
from decode import draw, uniforms
from policy import Policy
from tools.settings import make_environment

# ---- 1. the draw -----------------------------------------------------------------------------------------------------


def test_numbers_belong_to_their_stream_and_place():
    a, b, c = uniforms([5, 6, 2**63 - 1], 40)
    assert torch.equal(uniforms([6, 5], 40), torch.stack([b, a])) and torch.equal(uniforms([6], 7)[0], b[:7])
    assert len({*a.tolist(), *b.tolist(), *c.tolist()}) == 120 and 0 <= min(a) and max(a) < 1


def test_what_is_drawn_has_the_models_distribution():
    """Chi-square of 40,000 draws, one for each number of a stream, against softmax."""
    logits, n, temperature = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2, 40_000, 0.7
    drawn = Counter(draw(logits.expand(n, -1), uniforms([1], n)[0], temperature, 48)[0].tolist())
    expected = n * torch.softmax(logits[:48].double() / temperature, 0).numpy()
    common = expected >= 5
    seen, expected = (np.append(x[common], x[~common].sum()) for x in (np.array([drawn[i] for i in range(48)]), expected))
    df = len(seen) - 1
    assert max(drawn) < 48 and ((seen - expected) ** 2 / expected).sum() < df + 4 * math.sqrt(2 * df)


def test_an_id_of_probability_0_is_never_drawn_and_a_rare_one_is():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    edges = torch.tensor([0.0, 0.25, np.nextafter(0.5, 0), 0.5, np.nextafter(1, 0)], dtype=torch.float64)
    assert draw(logits.expand(5, -1), edges, 1.0, 5)[0].tolist() == [1, 1, 1, 3, 3]
    # A hundred thousand ids of 1e-9 each, behind one that has nearly all: in float32 their sum would not move.
    rare = torch.full((1, 100_001), math.log(1e-9))
    rare[0, 0] = 0.0
    assert draw(rare.expand(2, -1), torch.tensor([0.99985, 0.99995], dtype=torch.float64), 1.0, 100_001)[0][0] == 0
    late, logp = draw(rare.expand(2, -1), torch.tensor([0.99992, 0.99998], dtype=torch.float64), 1.0, 100_001)
    assert 0 < late[0] < late[1] < 100_001 and logp.tolist() == pytest.approx([math.log(1e-9 / 1.0001)] * 2, abs=1e-4)


def test_temperature_0_is_the_likeliest_within_the_vocabulary():
    assert draw(torch.tensor([[1.0, 3.0, 2.0, 9.0]]), torch.zeros(1, dtype=torch.float64), 0.0, 3)[0].tolist() == [1]


# ---- 2. the decoder against `generate` -------------------------------------------------------------------------------

def ragged(policy, n, longest=60):
    """Prompts of very unequal length."""
    rng = random.Random(0)
    return [policy.encode("look " * rng.randrange(longest)) for _ in range(n)]


@contextmanager
def in_double(policy):
    """Two ids can be as likely to the last digit of a float, and a batch moves that digit."""
    policy.model.double()
    yield
    policy.model.float()


def talks(policy, prompts, lock_step, temperature=1.0, turns=2, max_new=12, gen_tokens=0):
    """All answers of rows that are asked on, each time with what they said; a third of them once only."""
    heard = {i: [] for i in range(len(prompts))}

    def follow(i, ids):
        heard[i].append(ids)
        return None if len(heard[i]) == (turns if i % 3 else 1) else (prompts[i][:-4] + ids + prompts[i][-4:], 1000 * i + len(heard[i]))

    before, policy.lock_step, budget, policy.gen_tokens = policy.lock_step, lock_step, policy.gen_tokens, gen_tokens or policy.gen_tokens
    try:
        policy.converse(enumerate((prompt, 1000 * i) for i, prompt in enumerate(prompts)), follow, temperature, max_new, len(prompts))
    finally:
        policy.lock_step, policy.gen_tokens = before, budget
    return heard


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["policy", "stranger"])
def test_a_hundred_ragged_rows_are_answered_as_generate_would(request, name, temperature):
    """Over two turns, with rows that end early and slots that are filled again."""
    policy = request.getfixturevalue(name)
    prompts = ragged(policy, 100)
    assert not policy.lock_step
    with in_double(policy):
        fast = talks(policy, prompts, "", temperature, gen_tokens=20 * (policy.cfg.max_prompt + 12))     # 20 rows at a time
        assert fast == talks(policy, prompts, "a test", temperature)
    assert len({len(ids) for said in fast.values() for ids in said}) > (name == "policy" and temperature > 0) and len(fast) == 100


@pytest.mark.parametrize("architecture, changes", [
    ("Llama", dict(tie_word_embeddings=True)), ("GPTNeoX", {}), ("OPT", dict(ffn_dim=64, word_embed_proj_dim=32)),
    ("GPT2", dict(n_embd=32, n_layer=2, n_head=4)), ("Granite", dict(logits_scaling=4.0)), *(
        pytest.param(name, changes, marks=slow) for name, changes in (
            ("Llama", {}), ("Qwen3", {}), ("Cohere", dict(logit_scale=0.5)), ("Phi3", dict(pad_token_id=0)),
            ("Qwen3Moe", dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))))])
def test_other_architectures_are_answered_alike(tmp_path, architecture, changes):
    write_model(tmp_path, architecture, **changes)
    policy = awake(Policy(stranger_config(tmp_path)))
    assert policy.lock_step == ""
    prompts = ragged(policy, 12)
    with in_double(policy) if "Moe" not in architecture else nullcontext():             # its experts' kernels know no doubles
        for temperature in (0.0, 1.0):
            assert talks(policy, prompts, "", temperature, gen_tokens=5 * 2100) == talks(policy, prompts, "a test", temperature)


@pytest.mark.parametrize("architecture, changes", [
    ("Mistral", dict(sliding_window=16)), ("Gemma2", dict(sliding_window=16, head_dim=8, query_pre_attn_scalar=8)), ("Bloom", {})])
def test_what_the_decoder_cannot_serve_is_answered_by_generate(tmp_path, architecture, changes, capsys):
    """One line says why, and the answers are the model's."""
    write_model(tmp_path, architecture, **changes)
    policy = awake(Policy(stranger_config(tmp_path)))
    assert policy.lock_step and capsys.readouterr().out.count(f"than the decoder: {policy.lock_step}\n") == 1
    prompts = ragged(policy, 5)
    assert policy.generate(prompts, 0.0, 6) == [policy.generate([prompt], 0.0, 6)[0] for prompt in prompts]


def test_a_decoder_that_errs_is_found_out(stranger_folder, monkeypatch):
    """One place off in the mask, or positions that start at 1: the model is then answered by `generate`."""
    real = decode.Decoder.admit

    def shifted(self, first, prompts):
        logits = real(self, first, prompts)
        self.at += 1
        return logits

    monkeypatch.setattr(decode.Decoder, "admit", shifted)
    assert "other tokens" in Policy(stranger_config(stranger_folder)).lock_step
    monkeypatch.setattr(decode.Decoder, "admit", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in Policy(stranger_config(stranger_folder)).lock_step


@pytest.mark.parametrize("lock_step", ["", "a test"])
def test_a_response_ends_with_the_token_that_completes_an_end_tag(stranger, monkeypatch, lock_step):
    """The tags are several tokens here, and the prompt has them too. Each row's numbers draw what is on its script."""
    texts = ["<think>so</think><action>look</action> and on and on", "</skill>", "a > b", "</action <|im_end|> c"]
    scripts = [stranger.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    prompts = [stranger.encode("say <action>this</action>" * (n + 1)) for n in range(len(texts))]
    told = {number: token for row, script in enumerate(scripts)
            for number, token in zip(uniforms([row], 50)[0].tolist(), script + [7] * 50)}
    for room in (decode, rooms):
        monkeypatch.setattr(room, "draw", lambda logits, uniform, *_: (torch.tensor([told[u] for u in uniform.tolist()]), torch.zeros(len(uniform))))
    monkeypatch.setattr(stranger, "lock_step", lock_step)
    said = stranger.generate(prompts, 1.0, 50)
    assert [stranger.tokenizer.decode(ids) for ids in said[:2]] == ["<think>so</think><action>look</action>", "</skill>"]
    assert said[2] == (scripts[2] + [7] * 50)[:50] and said[3] == scripts[3][:scripts[3].index(2) + 1]


def test_4bit_weights_are_kept_unpacked_while_decoding_where_that_pays_and_fits(tmp_path, monkeypatch):
    """With the same products; afterwards they are 4-bit layers again."""
    from bitsandbytes.nn import Linear4bit
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)    # with it weights are packed another way
    write_model(tmp_path, "Llama", hidden_size=64, intermediate_size=128)
    policy = awake(Policy(dataclasses.replace(stranger_config(tmp_path), four_bit=True)))
    layers = [module for module in policy.model.modules() if isinstance(module, Linear4bit)]
    asked, kept, answer = [layer(torch.eye(layer.in_features)) for layer in layers], [], decode.Decoder.answer

    def answered(*args):
        """What is kept while answers are decoded, and that it is the same product."""
        kept[:] = [(m.in_features, m.out_features) for m in layers if "forward" in vars(m)]
        for layer, before in zip(layers, asked):
            assert (layer(torch.eye(layer.in_features)) - before).norm() < 0.01 * before.norm()
        return answer(*args)

    monkeypatch.setattr(decode.Decoder, "answer", answered)
    monkeypatch.setattr(rooms, "best_time", lambda work: 1.0 + isinstance(work.func, Linear4bit))
    for room, n in ((1e9, 14), (3 * 2 * 64 * 64, 4), (0.0, 0)):
        monkeypatch.setattr(policy, "room_beside", lambda tokens: room)
        policy.generate(ragged(policy, 6), 0.0, 8)
        assert len(kept) == n
    policy.pays = {shape: shape[1:] == (128, 64) for shape in policy.pays}
    monkeypatch.setattr(policy, "room_beside", lambda tokens: 1e9)
    policy.generate(ragged(policy, 6), 0.0, 8)
    assert kept == [(128, 64)] * 2 and not any("forward" in vars(m) for m in layers)


# ---- 3. what a batch must not change ---------------------------------------------------------------------------------

@pytest.mark.parametrize("lock_step", ["", "a test"])
def test_an_answer_is_the_same_in_batches_of_1_7_and_64_in_any_order(stranger, monkeypatch, lock_step):
    monkeypatch.setattr(stranger, "lock_step", lock_step)
    asks = [*enumerate(ragged(stranger, 64, 30))]
    whole = None
    for size in (64, 7, 1):
        random.Random(size).shuffle(asks)
        said = {}
        with in_double(stranger):
            for at in range(0, 64, size):
                dice, prompts = zip(*asks[at:at + size])
                said |= dict(zip(dice, stranger.generate(prompts, 1.0, 8, dice)))
        whole = whole or said
        assert said == whole
    assert len({tuple(ids) for ids in whole.values()}) > 50


def test_episodes_are_the_same_whatever_the_batch(policy):
    """Each token belongs to (dice, task, rollout, step, position): alone, among others, in another order, in small batches."""
    env = make_environment(policy.cfg)
    tasks = [env.tasks("train")[i] for i in (0, 1, 0)]

    def played(tasks, **more):
        return [[[s.response for s in e.steps] for e in group] for group in siri.rollout(
            policy, env, [(task, [None] * 3) for task in tasks], 1.0, **more)]

    a, b, again = played(tasks, dice=5)
    assert played(tasks[:1], dice=5) == [a] and played(tasks[1::-1], dice=5) == [b, a]
    assert a != again and played(tasks, dice=6)[0] != a                     # a task's second group is other rollouts of it
    policy.gen_tokens, budget = 1700, policy.gen_tokens
    try:
        assert played(tasks, dice=5) == [a, b, again]
    finally:
        policy.gen_tokens = budget


def test_a_generation_leaves_gradients_as_they_were_to_the_bit(policy):
    rows = some_rows(policy)
    before = gradient(policy, rows)
    policy.generate([row.prompt for row in rows], 1.0, 4)
    assert torch.equal(before, gradient(policy, rows))


def test_an_update_is_seen_by_the_next_rollout(policy):
    prompts = ragged(policy, 8)
    before = policy.generate(prompts, 0.0, 8)
    changed = [(p, p.clone()) for name, p in policy.model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for p, _ in changed:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
        after = policy.generate(prompts, 0.0, 8)
        assert after == [ids for ids, in talks(policy, prompts, "a test", 0.0, turns=1, max_new=8).values()]
        for p, old in changed:
            p.copy_(old)
    assert after != before and policy.generate(prompts, 0.0, 8) == before


def test_the_batch_stays_full_until_the_prompts_run_dry():
    """32 episodes of the tiny preset: live rows are at least four fifths of the rows that are computed."""
    policy = Policy(config(preset="tiny"))
    env = make_environment(policy.cfg)
    policy.work.clear()
    siri.rollout(policy, env, [(env.tasks("train")[i], [None] * 8) for i in range(4)], 1.0)
    assert policy.work["live"] > 0.8 * policy.work["rows"] and policy.work["live"] > 10 * policy.work["steps"]
