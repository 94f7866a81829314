"""Tests of SIRI, in the order of the modules: gigpo, distill, skills, envs, siri, and what the documentation promises.

    python -m pytest -q test_siri.py                  on a CPU, offline, in a few minutes
    SIRI_SLOW=1 python -m pytest -q test_siri.py      also speed, memory, and more games beside stock TextWorld

With $SIRI_ALFWORLD_SAMPLE or $ALFWORLD_DATA set to a folder that holds json_2.1.1, official games are played too.
"""

import ast
import contextlib
import copy
import csv
import dataclasses
import doctest
import gc
import html
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import distill
import envs
import gigpo
import siri
import skills
from notebooks import bench, figures, report
from notebooks import play as terminal
from skills import Skill, SkillBank, SkillRejected

HERE = Path(__file__).resolve().parent
TINY = siri.PRESETS["tiny"]["model"]                                   # the policy that comes with the program
torch.set_num_threads(1)                                                # as in the runs from the command line below
slow = pytest.mark.skipif(not os.environ.get("SIRI_SLOW"), reason="slow: set SIRI_SLOW=1 to run it")
some = lambda n: n if os.environ.get("SIRI_SLOW") else n // 5          # examples of the longest property tests


# ---- 1. gigpo: advantages (G1-G6) ------------------------------------------------------------------------------------

REWARDS = st.lists(st.lists(st.integers(-3, 10), min_size=1, max_size=5), min_size=1, max_size=6)


def steps_like(rewards, fill):
    return [[fill] * len(row) for row in rewards]


def state_keys(rewards):
    """A few states that recur within and across rollouts."""
    return [[f"room {(3 * i + t * t) % 4}" for t in range(len(row))] for i, row in enumerate(rewards)]


def test_g1_episode_return_is_the_undiscounted_sum():
    assert gigpo.episode_returns([[0, 1, 10], [2.5]]).tolist() == [11.0, 2.5]


# Returns 10, 0, 0, 2. Over trajectories: mean 3, squared deviations 49 + 9 + 9 + 1 = 68, unbiased variance 68 / 3.
# Over step rows with lengths 2, 1, 4, 1: mean 22 / 8 = 2.75, sum of squares 204 - 8 * 2.75^2 = 143.5, variance 20.5.
@pytest.mark.parametrize(
    "baseline, mean, variance, norm",
    [
        ("trajectory", 3.0, 68 / 3, "std"),
        ("trajectory", 3.0, 1.0, "mean"),
        ("steps", 2.75, 20.5, "std"),
        ("steps", 2.75, 1.0, "mean"),
    ],
)
def test_g2_matches_hand_computed_values(baseline, mean, variance, norm):
    returns = np.array([10.0, 0.0, 0.0, 2.0])
    got = gigpo.episode_advantages(returns, [2, 1, 4, 1], norm=norm, baseline=baseline)
    assert got == pytest.approx((returns - mean) / math.sqrt(variance))


def test_g2_baselines_agree_when_lengths_do_except_for_the_unbiased_std():
    returns, lengths = np.array([10.0, 0.0, 0.0, 2.0]), [3, 3, 3, 3]
    trajectory, steps = (
        {norm: gigpo.episode_advantages(returns, lengths, norm=norm, baseline=b) for norm in ("mean", "std")}
        for b in ("trajectory", "steps")
    )
    assert trajectory["mean"] == pytest.approx(steps["mean"])
    # 3 * 68 / (12 - 1) against 68 / 3
    assert steps["std"] / trajectory["std"] == pytest.approx(math.sqrt((68 / 3) / (3 * 68 / 11)))


@pytest.mark.parametrize("norm", ["std", "mean"])
@pytest.mark.parametrize("baseline", ["trajectory", "steps"])
def test_g2_a_group_of_one_and_float_noise_get_exactly_zero(norm, baseline):
    for returns in ([7.0], [0.1 + 0.2, 0.3, 0.3], [1.0, 1.0 + 1e-5, 1.0]):
        got = gigpo.episode_advantages(np.array(returns), [3] * len(returns), norm=norm, baseline=baseline)
        assert got.tolist() == [0.0] * len(returns)


def test_g2_a_spread_just_above_the_threshold_counts_in_full():
    assert np.abs(gigpo.normalise(np.array([0.0, 2e-4]), "std")) == pytest.approx([math.sqrt(0.5)] * 2)


@pytest.mark.parametrize(
    "call, field",
    [
        (lambda: gigpo.normalise(np.zeros(2), "max"), "norm"),
        (lambda: gigpo.episode_advantages(np.zeros(2), [1, 1], baseline="rows"), "baseline"),
        (lambda: gigpo.episode_advantages(np.zeros(2), [1, 0]), "lengths"),
        (lambda: gigpo.episode_advantages(np.zeros(2), [1]), "lengths"),
        (lambda: gigpo.anchor_groups([["a"]], similarity=1.0), "similarity"),
        (lambda: gigpo.group_advantages([[0, 0]], [["a"]], [[True]]), "same number"),
        (lambda: gigpo.group_advantages([[0]], [["a"]], [[True]], penalty_inside=True), "baseline='steps'"),
        (lambda: gigpo.clipped_surrogate(*torch.zeros(3, 1), dual_clip=1.0), "dual_clip"),
        (lambda: gigpo.token_logprobs(torch.zeros(1, 2), torch.nn.Linear(2, 5), torch.zeros(1).long(), budget_bytes=19),
         "budget_bytes"),
        (lambda: distill.advantage_weights(torch.zeros(1), 0.0), "a_max"),
        (lambda: distill.lambda_schedule(-1, 1.0, 5), "k=-1"),
        (lambda: distill.lambda_schedule(1, 1.0, -5), "k_warm=-5"),
    ],
)
def test_wrong_arguments_name_the_field(call, field):
    with pytest.raises(ValueError, match=field):
        call()


def test_g3_equal_states_share_a_label_across_rollouts_and_time():
    a, b = gigpo.anchor_groups([["hall", "desk", "hall"], ["shelf", "hall"]])
    assert a[0] == a[2] == b[1]
    assert len({int(a[0]), int(a[1]), int(b[0])}) == 3


def test_g3_similarity_joins_near_copies_of_the_first_member_only():
    # 10 characters: one substitution gives ratio .9, two give .8; a chain of near copies doesn't drift away.
    keys = [["aaaaaaaaaa", "aaaaaaaaab"], ["aaaaaaaabb", "zzzzzzzzzz"]]
    labels = [row.tolist() for row in gigpo.anchor_groups(keys, similarity=0.9)]
    assert labels == [[0, 0], [1, 2]]
    assert len(set(np.concatenate(gigpo.anchor_groups(keys)))) == 4


def test_g3_similarity_sees_through_one_inserted_word_in_a_long_text():
    # With difflib's autojunk the ratio of these two is 0, since every character of them is frequent.
    text = "you see a cabinet, a desk and a drawer. " * 8
    a, b = gigpo.anchor_groups([[text], ["Now " + text]], similarity=0.95)
    assert a[0] == b[0]


def test_g4_discounts_towards_the_start_of_unequal_rollouts():
    long, short = gigpo.step_returns([[1, 0, 8], [4]], gamma=0.5)
    assert long.tolist() == [1 + 0.25 * 8, 0.5 * 8, 8.0]
    assert short.tolist() == [4.0]


def test_g5_normalises_each_step_group_by_itself():
    returns = [np.array([6.0, 5.0, 0.0]), np.array([0.0, 9.0])]
    groups = [np.array([0, 1, 0]), np.array([0, 2])]  # state 0: 6, 0, 0; states 1 and 2: alone
    first, second = gigpo.step_advantages(returns, groups, norm="mean")
    assert first.tolist() == [4.0, 0.0, -2.0] and second.tolist() == [-2.0, 0.0]
    first, second = gigpo.step_advantages(returns, groups, norm="std")
    assert first == pytest.approx([4 / math.sqrt(12), 0, -2 / math.sqrt(12)])  # variance (16 + 4 + 4) / 2


def test_g6_adds_the_episode_and_step_terms_and_the_penalty():
    rewards, keys = [[0, 10], [0]], [["hall", "desk"], ["hall"]]
    got = gigpo.group_advantages(
        rewards, keys, [[True, True], [False]], gamma=0.5, omega=2.0, norm="mean", invalid_penalty=0.25
    )
    # A^E = +-5; state "hall" holds D = 5 and 0, so A^S = +-2.5; "desk" is alone.
    assert [a.tolist() for a in got] == [[5 + 2 * 2.5, 5.0], [-5 - 2 * 2.5 - 0.25]]


def test_g6_penalty_inside_blows_up_in_a_lost_group_and_outside_does_not():
    rewards = [[0.0] * 10] * 8  # N = 80 steps, all lost
    keys = [[f"state {i} {t}" for t in range(10)] for i in range(8)]  # no state seen twice: only A^E remains
    valid = np.ones((8, 10), dtype=bool)
    valid[2, 3] = False
    outside, inside = (
        np.array(gigpo.group_advantages(rewards, keys, valid, baseline="steps", penalty_inside=form))
        for form in (False, True)
    )
    assert outside[2, 3] == -0.1 and np.count_nonzero(outside) == 1
    # One score -c among N: mean -c / N, unbiased std c / sqrt(N), hence -(N - 1) / sqrt(N) whatever c is.
    assert inside[2, 3] == pytest.approx(-79 / math.sqrt(80))
    assert inside[0, 0] == pytest.approx(1 / math.sqrt(80))


def test_g6_penalty_inside_charges_only_the_invalid_step():
    inside = gigpo.group_advantages(
        [[0, 10], [0, 0]], [["hall", "desk"], ["hall", "desk"]], [[True, False], [True, True]],
        gamma=0.5, norm="mean", baseline="steps", invalid_penalty=1.0, penalty_inside=True,
    )
    # Rows score 10, 10 - 1, 0, 0: mean 4.75. "desk" holds D = 10 - 1 and 0; "hall" 5 and 0, as the charge stays put.
    assert inside[0] == pytest.approx([10 - 4.75 + 2.5, 9 - 4.75 + 4.5])
    assert inside[1] == pytest.approx([-4.75 - 2.5, -4.75 - 4.5])


@settings(max_examples=40, deadline=None)
@given(REWARDS, st.randoms(use_true_random=False), st.sampled_from(["std", "mean"]), st.booleans())
def test_advantages_follow_a_permutation_of_the_rollouts(rewards, random, norm, inside):
    keys, valid = state_keys(rewards), [[r % 2 == 0 for r in row] for row in rewards]
    order = random.sample(range(len(rewards)), len(rewards))

    def advantages(rows):
        picked = ([x[i] for i in rows] for x in (rewards, keys, valid))
        return gigpo.group_advantages(*picked, norm=norm, baseline="steps", penalty_inside=inside)

    plain = advantages(range(len(rewards)))
    for i, permuted in zip(order, advantages(order)):
        assert permuted == pytest.approx(plain[i], abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(REWARDS, st.floats(-50, 50), st.floats(0.5, 20), st.sampled_from(["trajectory", "steps"]))
def test_g2_ignores_shift_and_scale_of_the_returns_and_centres_them(rewards, shift, scale, baseline):
    returns, lengths = gigpo.episode_returns(rewards), [len(row) for row in rewards]
    mean, std = (gigpo.episode_advantages(returns, lengths, norm=n, baseline=baseline) for n in ("mean", "std"))
    weight = np.ones(len(lengths)) if baseline == "trajectory" else np.array(lengths)
    assert weight @ mean == pytest.approx(0, abs=1e-9) and weight @ std == pytest.approx(0, abs=1e-9)
    moved = gigpo.episode_advantages(scale * returns + shift, lengths, norm="std", baseline=baseline)
    assert moved == pytest.approx(std, abs=1e-9)
    moved = gigpo.episode_advantages(returns + shift, lengths, norm="mean", baseline=baseline)
    assert moved == pytest.approx(mean, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(REWARDS)
def test_g5_centres_every_step_group(rewards):
    groups = gigpo.anchor_groups(state_keys(rewards))
    label = np.concatenate(groups)
    flat = np.concatenate(gigpo.step_advantages(gigpo.step_returns(rewards, 0.95), groups, norm="mean"))
    for group in set(label):
        assert flat[label == group].sum() == pytest.approx(0, abs=1e-9)


# ---- 2. gigpo: log-probabilities and losses (G7-G8) ------------------------------------------------------------------


def logits_problem(n=13, width=6, vocab=11):
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocab)
    return torch.randn(n, width, requires_grad=True), head, torch.randint(vocab - 2, (n,)), torch.randn(n)


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 13, 1000])
@pytest.mark.parametrize("vocab", [None, 9])
def test_token_logprobs_equal_the_full_softmax_in_value_entropy_and_gradient(rows_per_chunk, vocab):
    hidden, head, targets, direction = logits_problem()
    seen = []

    def spy(h):
        seen.append(4 * head(h).numel())
        return head(h)

    budget = rows_per_chunk * 4 * 11
    logp, entropy = gigpo.token_logprobs(hidden, spy, targets, temperature=0.7, vocab=vocab, budget_bytes=budget)
    got = torch.autograd.grad((logp * direction).sum(), [hidden, *head.parameters()])
    assert max(seen) <= budget and not entropy.requires_grad

    logits = head(hidden) / 0.7
    if vocab is not None:
        logits = logits.masked_fill(torch.arange(11) >= vocab, -torch.inf)
    full = torch.distributions.Categorical(logits=logits)
    expected = torch.autograd.grad((full.log_prob(targets) * direction).sum(), [hidden, *head.parameters()])
    torch.testing.assert_close(logp, full.log_prob(targets))
    torch.testing.assert_close(entropy, full.entropy())
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_token_logprobs_without_grad_keep_no_graph_and_allow_no_tokens():
    hidden, head, targets, _ = logits_problem()
    with torch.no_grad():
        logp, _ = gigpo.token_logprobs(hidden, head, targets, budget_bytes=100)
    assert not logp.requires_grad and logp.shape == (13,)
    logp, entropy = gigpo.token_logprobs(hidden[:0], head, targets[:0])
    assert logp.shape == entropy.shape == (0,)


def test_token_logprobs_are_fp32_for_a_half_precision_head():
    hidden, head, targets, _ = logits_problem()
    logp, _ = gigpo.token_logprobs(hidden.bfloat16(), head.bfloat16(), targets)
    assert logp.dtype == torch.float32


# The whole sign table of G7 at eps = .2: where min() picks the clipped branch the gradient is zero, elsewhere it is
# d(-rho A) / d logp = -rho A. A positive advantage stops paying above 1.2, a negative one below .8, and only there.
@pytest.mark.parametrize(
    "rho, advantage, dual_clip, loss, gradient",
    [
        (0.5, 2.0, None, -1.0, -1.0),
        (1.1, 2.0, None, -2.2, -2.2),
        (1.5, 2.0, None, -2.4, 0.0),
        (0.5, -2.0, None, 1.6, 0.0),
        (0.9, -2.0, None, 1.8, 1.8),
        (1.5, -2.0, None, 3.0, 3.0),
        (5.0, -2.0, None, 10.0, 10.0),
        (5.0, -2.0, 3.0, 6.0, 0.0),
        (1.5, -2.0, 3.0, 3.0, 3.0),
        (0.5, -2.0, 3.0, 1.6, 0.0),
        (5.0, 2.0, 3.0, -2.4, 0.0),
    ],
)
def test_g7_sign_table(rho, advantage, dual_clip, loss, gradient):
    logp = torch.tensor([-1.0 + math.log(rho)], dtype=torch.double, requires_grad=True)
    old, a = torch.full((1,), -1.0, dtype=torch.double), torch.tensor([advantage], dtype=torch.double)
    got = gigpo.clipped_surrogate(logp, old, a, dual_clip=dual_clip)
    got.sum().backward()
    assert got.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(gradient)


def test_g7_is_the_policy_gradient_on_policy():
    logp = torch.tensor([-3.0, -0.1, -1.0], requires_grad=True)
    advantage = torch.tensor([1.5, -0.5, 0.0])
    gigpo.clipped_surrogate(logp, logp.detach(), advantage, dual_clip=3.0).sum().backward()
    torch.testing.assert_close(logp.grad, -advantage)


def test_g8_value_gradient_and_sign_follow_the_definition():
    reference = torch.linspace(-6, 0, 25, dtype=torch.double)
    logp = torch.linspace(0, -5, 25, dtype=torch.double).requires_grad_()
    d = reference - logp
    got, defined = gigpo.kl_k3(logp, reference), d.exp() - d - 1
    torch.testing.assert_close(got, defined)
    ours, theirs = (torch.autograd.grad(x.sum(), logp, retain_graph=True)[0] for x in (got, defined))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, 1 - d.exp())  # pulls logp towards the reference from either side
    assert (got >= 0).all() and gigpo.kl_k3(reference, reference).abs().max() == 0


def test_g8_expectation_under_the_policy_is_the_kl_divergence():
    torch.manual_seed(1)
    logp, reference = torch.randn(2, 7, dtype=torch.double).log_softmax(-1)
    expectation = (logp.exp() * gigpo.kl_k3(logp, reference)).sum()
    torch.testing.assert_close(expectation, (logp.exp() * (logp - reference)).sum())


@pytest.mark.parametrize("split", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_the_gradient_of_a_step_does_not_depend_on_its_micro_batches(split):
    torch.manual_seed(2)
    body, head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)
    parameters = [*body.parameters(), *head.parameters()]
    rows = [torch.randint(9, (n,)) for n in (2, 9, 3, 5, 1)]  # responses of very unequal length
    gate = [row % 2 == 0 for row in rows]
    advantage = [1.0, -0.5, 2.0, 0.3, -1.0]
    with torch.no_grad():
        reference = [gigpo.token_logprobs(body(row), head, row.flip(0))[0] - 0.1 for row in rows]
    tokens, gated = sum(len(row) for row in rows), sum(int(g.sum()) for g in gate)

    def gradient(split):
        total = [torch.zeros_like(p) for p in parameters]
        for part in torch.arange(5).split(split):
            ids, old, inside = (torch.cat([x[i] for i in part]) for x in (rows, reference, gate))
            targets = torch.cat([rows[i].flip(0) for i in part])
            a = torch.cat([torch.full((len(rows[i]),), advantage[i]) for i in part])
            logp, _ = gigpo.token_logprobs(body(ids), head, targets, budget_bytes=4 * 9 * 4)
            policy = (gigpo.clipped_surrogate(logp, old, a) + 0.01 * gigpo.kl_k3(logp, old)).sum()
            distilled, _ = distill.internalization_loss(logp, distill.advantage_weights(a, 2.0), inside)
            loss = policy / tokens + 0.5 * distilled / gated
            total = [t + g for t, g in zip(total, torch.autograd.grad(loss, parameters))]
        return total

    for got, whole in zip(gradient(split), gradient([5])):
        assert whole.abs().max() > 1e-3
        torch.testing.assert_close(got, whole)


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 1000])
@pytest.mark.parametrize("vocab", [None, 9])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_of_a_frozen_head_equal_the_full_softmax_and_keep_no_logits(rows_per_chunk, vocab, temperature):
    """What training uses: the head isn't trained, so the gradient is taken in the forward pass."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11).requires_grad_(False)
    hidden, targets, direction = torch.randn(13, 6, requires_grad=True), torch.randint(9, (13,)), torch.randn(13)
    kept, called = [], []

    def spy(h):
        called.append(len(h))
        return head(h)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        logp, entropy = gigpo.token_logprobs(hidden, spy, targets, temperature=temperature, vocab=vocab,
                                             budget_bytes=rows_per_chunk * 4 * 11)
        forward = len(called)
        got, = torch.autograd.grad((logp * direction).sum(), hidden)
    assert len(called) == forward and max(called) <= rows_per_chunk         # backward doesn't compute logits again
    assert not entropy.requires_grad and logp.requires_grad

    logits = head(hidden) / temperature
    if vocab is not None:
        logits = logits.masked_fill(torch.arange(11) >= vocab, -torch.inf)
    full = torch.distributions.Categorical(logits=logits)
    expected, = torch.autograd.grad((full.log_prob(targets) * direction).sum(), hidden)
    torch.testing.assert_close(logp, full.log_prob(targets))
    torch.testing.assert_close(entropy, full.entropy())
    torch.testing.assert_close(got, expected)

    logp, entropy = gigpo.token_logprobs(hidden[:0], head, targets[:0])
    assert logp.shape == entropy.shape == (0,)


# ---- 3. distill: internalization (S7-S10) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces, inside",
    [
        (["<think>", "x", "</think>", "<action>", "go", " east", "</action>"], "go| east"),  # tags are single tokens
        (["<", "act", "ion", ">", "go", " east", "</", "action", ">", "<eos>"], "go| east"),  # tags are split
        (["<action", ">go", " east<", "/action>"], ">go| east<"),  # tokens straddle the borders
        (["<action>go</action>"], "<action>go</action>"),  # one token holds it all
        (["<action>", "a", "</action>", "<action>", "b", "</action>"], "a"),  # only the first pair
        (["</action>", "<action>", "a", "\n", "", "b", "</action>"], "a|\n|b"),  # stray end tag, empty piece, newline
        (["<action>", "go", " east"], None),  # never closed
        (["go", "</action>"], None),  # never opened
        (["<action>", "</action>"], None),  # nothing inside
        ([], None),
    ],
)
def test_action_mask_marks_exactly_the_tokens_of_the_action(pieces, inside):
    mask = distill.action_mask(pieces)
    assert len(mask) == len(pieces)
    assert "|".join(p for p, m in zip(pieces, mask) if m) == (inside or "")


@settings(max_examples=30, deadline=None)
@given(st.text("<action>/ go", max_size=12), st.text("go 1/", min_size=1, max_size=8), st.data())
def test_action_mask_agrees_with_characters_however_the_text_is_cut(before, action, data):
    text = f"{before}<action>{action}</action> end"
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    by_character = distill.action_mask(list(text))
    expected, at = [], 0
    for piece in pieces:
        expected.append(any(by_character[at : at + len(piece)]))
        at += len(piece)
    assert distill.action_mask(pieces) == expected
    start = text.index("<action>") + len("<action>")
    assert "".join(c for c, m in zip(text, by_character) if m) == text[start : text.index("</action>", start)]


@pytest.mark.parametrize("require_pair_gain, gated", [(True, True), (False, True), (True, False), (False, False)])
def test_s7_truth_table(require_pair_gain, gated):
    cases = [(s, u, d) for s in (True, False) for u in (0.1, 0.0, -0.1) for d in (0.5, 0.0, -0.5)]
    skill, utility, delta = (torch.tensor(x) for x in zip(*cases))
    is_action = torch.tensor([[False, True, True, False]]).expand(len(cases), -1)
    gate = distill.action_gate(is_action, skill, utility, delta, require_pair_gain=require_pair_gain, gated=gated)
    for (s, u, d), row in zip(cases, gate.tolist()):
        opened = s and (not gated or (u > 0 and (not require_pair_gain or d > 0)))
        assert row == ([False, True, True, False] if opened else [False] * 4)


def test_s7_response_tokens_replace_action_tokens_and_need_their_mask():
    is_action = torch.tensor([[False, True, False], [False, True, False]])
    response = torch.tensor([[True, True, False], [True, True, True]])
    row = torch.tensor([True, False]), torch.tensor([0.2, 0.2]), torch.tensor([0.5, 0.5])
    gate = distill.action_gate(is_action, *row, response_mask=response, tokens="response")
    assert gate.tolist() == [[True, True, False], [False, False, False]]
    with pytest.raises(ValueError, match="response_mask"):
        distill.action_gate(is_action, *row, tokens="response")
    with pytest.raises(ValueError, match="tokens"):
        distill.action_gate(is_action, *row, tokens="thought")


def test_s8_weights_clip_to_the_unit_interval():
    advantage = torch.tensor([-1.0, 0.0, 0.5, 2.0, 7.0])
    assert distill.advantage_weights(advantage, 2.0).tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert distill.advantage_weights(advantage, 2.0, uniform=True).tolist() == [1.0] * 5


def test_s9_matches_its_closed_form_and_only_gated_tokens_get_a_gradient():
    logits = torch.randn(2, 3, 5, dtype=torch.double, generator=torch.Generator().manual_seed(3)).requires_grad_()
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    weight = torch.tensor([[0.25], [1.0]], dtype=torch.double)  # (B, 1): one advantage per step
    gate = torch.tensor([[True, False, True], [False, True, False]])
    logp = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    total, count = distill.internalization_loss(logp, weight, gate)
    assert count == 3
    assert total.item() == pytest.approx(-(0.25 * (logp[0, 0] + logp[0, 2]) + logp[1, 1]).item())
    (gradient,) = torch.autograd.grad(total / count, logits)
    # Weighted maximum likelihood: w * (softmax - one-hot) / sum gate on gated tokens, exactly zero elsewhere.
    onehot = torch.nn.functional.one_hot(targets, 5)
    expected = (weight * gate)[..., None] * (logits.softmax(-1) - onehot) / 3
    torch.testing.assert_close(gradient, expected.detach())
    assert (gradient[~gate] == 0).all()


def test_s9_ignores_impossible_tokens_outside_the_gate_and_allows_an_empty_gate():
    logp = torch.tensor([-torch.inf, -1.0], requires_grad=True)
    total, count = distill.internalization_loss(logp, torch.zeros(2), torch.tensor([False, True]))
    assert total == 0 and count == 1
    total, count = distill.internalization_loss(logp, torch.ones(2), torch.zeros(2, dtype=torch.bool))
    assert total == 0 and count == 0 and total.requires_grad


def test_s10_rises_linearly_and_stays():
    assert [distill.lambda_schedule(k, 0.4, 4) for k in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert distill.lambda_schedule(0, 0.4, 0) == 0.4


# ---- 4. skills: mining (S1) ------------------------------------------------------------------------------------------

def bank_with(*conditions, **constants):
    bank = SkillBank(**constants)
    for index, condition in enumerate(conditions):
        bank.add(condition, f"plan {index}", born=0, source="game")
    return bank


def record_all(bank, skill, deltas):
    return [bank.record(skill, delta, iteration) for iteration, delta in enumerate(deltas)]


STEPS = [("go to fridge 1", "The fridge 1 is closed."), ("open fridge 1", "You see a apple 2. " + "x" * 900)]


def test_full_mining_prompt_shows_task_actions_and_clipped_observations():
    prompt = skills.mining_prompt("put a cool apple in sinkbasin.", STEPS, max_words=17)
    assert "put a cool apple in sinkbasin." in prompt and "At most 17 words" in prompt
    assert "> go to fridge 1\nThe fridge 1 is closed.\n> open fridge 1\nYou see a apple 2. ...\n" in prompt


def test_compact_mining_prompt_is_exactly_task_and_actions():
    assert (skills.mining_prompt("cool apple", STEPS, "compact")
            == "task: cool apple\nactions: go to fridge 1 ; open fridge 1\nwrite a skill")


@pytest.mark.parametrize("steps, style, culprit", [([], "full", "steps"), (STEPS, "brief", "style is 'brief'")])
def test_mining_prompt_refuses(steps, style, culprit):
    with pytest.raises(ValueError, match=culprit):
        skills.mining_prompt("goal", steps, style)


@pytest.mark.parametrize("body, condition, strategy", [
    ("when it is hot -> open a window", "it is hot", "open a window"),
    ("  WHEN it\n is\thot --> Do open a window ", "it is hot", "open a window"),
    ("it is hot -> do not open it", "it is hot", "do not open it"),
    ("whenever hot->dough rises", "whenever hot", "dough rises"),
])
def test_parse_skill_accepts(body, condition, strategy):
    response = f"<think>when a -> b, price < 3</think> <SKILL>{body}</Skill> done"
    assert skills.parse_skill(response) == (condition, strategy)


@pytest.mark.parametrize("response, reason", [
    ("", "unparsable"),
    ("when it is hot -> open a window", "unparsable"),
    ("<skill>when it is hot -> open a window", "unparsable"),
    ("<skill>a -> b</skill><skill>c -> d</skill>", "unparsable"),
    ("<skill>when it is hot, open a window</skill>", "unparsable"),
    ("<skill>hot -> open -> close</skill>", "unparsable"),
    ("<skill>when -> do</skill>", "empty"),
    ("<skill>when it is hot -> ...</skill>", "empty"),
    ("<skill>when CONDITION -> STRATEGY</skill>", "empty"),
    ("<skill>needs apple -> take apple 2</skill>", "instance_specific"),
    ("<skill>needs apple -> take apple２</skill>", "instance_specific"),
    ("<skill>hot -> open<|im_end|></skill>", "control_token"),
    ("<skill>hot -> <action>open</action></skill>", "control_token"),
    ("<skill><skill>hot -> open</skill>", "control_token"),
    ("<skill>hot -> open\u202eit</skill>", "control_token"),
    ("<skill>hot -> open\x07</skill>", "control_token"),
    ("<skill>a " + "b " * 20 + "-> " + "c " * 20 + "</skill>", "too_long"),
    ("<skill>a -> " + "b" * 400 + "</skill>", "too_long"),
])
def test_parse_skill_rejects(response, reason):
    with pytest.raises(SkillRejected) as caught:
        skills.parse_skill(response)
    assert caught.value.reason == reason


def test_forty_words_are_accepted():
    assert skills.parse_skill("<skill>" + "a " * 20 + "-> " + "b " * 20 + "</skill>")


def test_the_prompts_own_form_and_example_are_not_skills():
    prompt = skills.mining_prompt("goal", STEPS)
    shown = [line for line in prompt.splitlines() if line.startswith("<skill>")]
    assert len(shown) == 2
    for line in shown:
        with pytest.raises(SkillRejected, match="empty"):
            skills.parse_skill(line)


PIECES = st.sampled_from(
    "<skill> </skill> when do not -> --> <- <| |> <think> 2 ２ ² apple Fridge ß \n \t \0 \u200b - ' .".split(" "))
NOISE = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map(" ".join), st.lists(PIECES).map("".join))


@settings(max_examples=300, deadline=None)
@given(NOISE | st.tuples(NOISE, NOISE).map(lambda halves: "<skill>%s->%s</skill>" % halves))
def test_parse_skill_on_any_text(response):
    try:
        condition, strategy = skills.parse_skill(response, max_words=12)
    except SkillRejected as rejection:
        assert rejection.reason in skills.REASONS
        return
    both = f"{condition} {strategy}"
    assert not any(c in "<>\n\r" or c.isdigit() or not c.isprintable() for c in both)
    assert len(both.split()) <= 12
    text = Skill(0, condition, strategy, 0, "game").text
    assert skills.parse_skill(f"<skill>{text}</skill>", max_words=12) == (condition, strategy)


# ---- 5. skills: retrieval (S3) ---------------------------------------------------------------------------------------

def test_matching_is_by_words_not_substrings():
    assert skills.tfidf_cosine("Take that hat in spring", ["ring", "that", "hats", "HAT!"]).astype(bool).tolist() == [
        False, False, False, True]
    assert bank_with("ring").retrieve("examine spring") is None


def test_stop_words_and_numbers_do_not_match():
    assert skills.tfidf_cosine("put 2 apple in the fridge", ["when the task is in 2", "", "...", "drawer 2"]).sum() == 0


def test_tfidf_by_hand():
    # D = 2, df(apple) = 1, df(fridge) = 2, df(pen) = 0: idf = 1 + ln(3/2), 1, 1 + ln 3
    apple, fridge, pen = 1 + math.log(1.5), 1.0, 1 + math.log(3)
    query = math.sqrt((2 * apple) ** 2 + fridge ** 2 + pen ** 2)
    expected = [(2 * apple * apple + fridge) / (query * math.hypot(apple, fridge)), fridge / query]
    np.testing.assert_allclose(skills.tfidf_cosine("apple apple fridge pen", ["fridge apple", "fridge"]), expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("abc ", max_size=20), min_size=1, max_size=5))
def test_cosine_lies_in_0_1_and_is_1_for_itself(documents):
    cosine = skills.tfidf_cosine(documents[0], documents)
    assert cosine.shape == (len(documents),) and (cosine >= 0).all() and (cosine <= 1).all()
    assert cosine[0] == pytest.approx(1.0 if skills.words(documents[0]) else 0.0)


def test_retrieve_takes_the_matching_skill_or_none():
    bank = bank_with("the task needs apple", "you examine things with a desklamp", "machine wash women's jumpsuits")
    shop = "find me slim fit, machine wash women's jumpsuits, in color red, price lower than 50.00 dollars"
    assert bank.retrieve("put a clean apple in fridge.").id == 0
    assert bank.retrieve("examine the pen with the desklamp.").id == 1
    assert bank.retrieve(shop).id == 2
    assert bank.retrieve("heat some egg") is None and SkillBank().retrieve("apple") is None


def test_confidence_bound_tries_the_untried_then_weighs_it_by_hand():
    bank = bank_with("apple", "apple")
    known, rival = bank.skills
    assert bank.retrieve("apple") is known                      # both untried and equal: the older
    record_all(bank, known, [0.25] * 12)
    assert bank.retrieve("apple") is rival
    record_all(bank, rival, [-0.25] * 8)
    # N = 20.  known: .25 * 12/17 + c sqrt(ln 21 / 13);  rival: -.25 * 8/13 + c sqrt(ln 21 / 9);  equal at c = 3.381
    for bank.ucb_c, chosen in ((0.0, known), (3.37, known), (3.39, rival)):
        assert bank.retrieve("apple") is chosen


def test_only_the_top_k_by_similarity_compete():
    bank = bank_with("apple", "apple fridge", top_k=1)
    record_all(bank, bank.skills[1], [-1.0] * 3)
    assert bank.retrieve("apple fridge").id == 1    # the untried one matches less and is not among the top 1
    bank.top_k = 2
    assert bank.retrieve("apple fridge").id == 0


def test_evaluation_uses_active_skills_by_similarity_then_utility():
    bank = bank_with("apple", "apple", "apple fridge", "apple fridge")
    for skill, delta in zip(bank.skills[:3], (0.25, 0.5, 0.25)):
        record_all(bank, skill, [delta] * 20)
    assert [skill.id for skill in bank.active] == [0, 1, 2]
    assert bank.retrieve("apple fridge", explore=False).id == 2     # 3 is as similar but a candidate
    assert bank.retrieve("apple", explore=False).id == 1            # 0 is as similar but less useful
    assert bank.retrieve("fridge", explore=True).id == 3            # untried


def test_shuffle_draws_live_skills_uniformly_whatever_the_task():
    bank = bank_with("apple", "pen", "egg", n_eval=1, m_retire=1)
    bank.record(bank.skills[1], -1.0, 0)
    rng = np.random.default_rng(0)
    drawn = [bank.retrieve("lamp", shuffle=rng).id for _ in range(400)]
    assert set(drawn) == {0, 2} and abs(drawn.count(0) - 200) < 40   # four standard deviations
    assert bank.retrieve("lamp", shuffle=rng, explore=False) is None


# ---- 6. skills: effect and utility (S4, S5) --------------------------------------------------------------------------

def test_paired_effect():
    assert skills.paired_effect([1, 1, 1, 0], [1, 0, 0, 0]) == 0.5
    assert skills.paired_effect([0, 0], [True]) == -1.0


@pytest.mark.parametrize("skill, plain, culprit", [
    ([], [1], "skill_outcomes is empty"), ([1], [], "plain_outcomes is empty"), ([1], [10, 0], "plain_outcomes is"),
    ([math.nan], [0], "skill_outcomes is")])
def test_paired_effect_refuses(skill, plain, culprit):
    with pytest.raises(ValueError, match=culprit):
        skills.paired_effect(skill, plain)


def test_utility_and_stderr_by_hand():
    skill = Skill(0, "a", "b", 0, "game")
    assert (skill.mean, skill.utility(0.0), skill.utility(5.0), skill.stderr(5.0)) == (0, 0, 0, None)
    skill.effects = [[1, 0.5]]
    assert skill.utility(4.0) == pytest.approx(0.1) and skill.stderr(4.0) is None
    skill.effects = [[1, 0.5], [1, 0.0], [2, 0.25], [4, 0.25]]       # mean .25, unbiased variance .125 / 3
    assert skill.mean == 0.25 and skill.utility(0.0) == 0.25
    assert skill.utility(4.0) == pytest.approx(4 / 8 * 0.25)
    assert skill.stderr(4.0) == pytest.approx(4 / 8 * math.sqrt(0.125 / 3) / 2)


# ---- 7. skills: the bank (S2, S6) ------------------------------------------------------------------------------------

def test_promotion_waits_for_n_eval_and_the_threshold():
    bank = bank_with("apple", kappa=0.0, n_eval=3, tau_up=0.25)
    assert record_all(bank, bank.skills[0], [0.25, 0.25, 0.25, 0.5]) == ["candidate"] * 3 + ["active"]


def test_low_streak_resets_and_only_m_retire_in_a_row_retire():
    bank = bank_with("apple", kappa=0.0, n_eval=2, m_retire=2, tau_up=0.9)
    skill = bank.skills[0]
    streaks = []
    for iteration, delta in enumerate([-1.0, 0.5, 0.75, -0.5, -0.5]):    # means -1, -.25, .083, -.0625, -.15
        bank.record(skill, delta, iteration)
        streaks.append(skill.low_streak)
    assert streaks == [0, 1, 0, 1, 2] and skill.state == "retired"


def test_promoted_then_retired_for_good():
    bank = bank_with("apple", kappa=0.0, n_eval=1, m_retire=2)
    states = record_all(bank, bank.skills[0], [0.5, -0.25, -0.25, -0.5, -0.5, 1.0, 1.0, 1.0])
    # means .5, .125, 0, -.125, -.2: active between the thresholds; later effects are kept but change nothing
    assert states == ["active"] * 4 + ["retired"] * 4
    assert bank.skills[0].n == 8 and bank.skills[0].mean > 0 and bank.retrieve("apple") is None


def test_duplicates_and_a_full_bank_are_rejected_and_counted_by_the_caller():
    bank = bank_with("apple", "pen", n_eval=1, m_retire=1, max_size=2)
    bank.record(bank.skills[0], -1.0, 0)                                  # retired: frees a place, still blocks
    for condition, reason in [("APPLE", "duplicate"), ("egg", None), ("cup", "bank_full"), ("Egg", "duplicate")]:
        if reason is None:
            assert bank.add(condition, "plan 0", born=5, source="game").id == 2
            continue
        with pytest.raises(SkillRejected, match=reason):
            bank.add(condition, "plan 0", born=5, source="game")
        bank.reject(reason)
    assert bank.rejected == {"duplicate": 2, "bank_full": 1}
    assert bank.counts() == {"candidate": 2, "active": 0, "retired": 1}
    with pytest.raises(ValueError, match="'boring'"):
        bank.reject("boring")


def test_record_refuses_another_scale_and_a_stranger():
    bank = bank_with("apple")
    for delta in (10.0, math.nan):
        with pytest.raises(ValueError, match="skill 0: effect"):
            bank.record(bank.skills[0], delta, 0)
    with pytest.raises(ValueError, match="not an object of this bank"):
        bank.record(SkillBank.from_json(bank.to_json()).skills[0], 0.5, 0)
    assert bank.skills[0].effects == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(-1, 1)), max_size=60), st.floats(0, 20))
def test_json_round_trip_after_any_history(history, kappa):
    bank = bank_with("apple", "pen", "é \"quoted\"", kappa=kappa, n_eval=2, m_retire=2)
    bank.reject("empty")
    for iteration, (index, delta) in enumerate(history):
        bank.record(bank.skills[index], delta, iteration)
    text = json.dumps(bank.to_json(), allow_nan=False)
    again = SkillBank.from_json(json.loads(text))
    assert again == bank and json.dumps(again.to_json()) == text


def test_to_dict_shows_what_a_reader_needs():
    bank = bank_with("apple", kappa=1.0)
    record_all(bank, bank.skills[0], [0.0, 0.5])
    assert bank.to_json()["skills"] == [{
        "id": 0, "condition": "apple", "strategy": "plan 0", "state": "candidate", "born": 0, "source": "game",
        "n": 2, "utility": pytest.approx(1 / 6), "stderr": pytest.approx(2 / 3 * 0.25),
        "effects": [[0, 0.0], [1, 0.5]], "low_streak": 0}]


@pytest.mark.parametrize("field, value", [
    ("id", -1), ("id", 0), ("condition", " "), ("strategy", None), ("born", 1.5), ("source", 7), ("state", "dead"),
    ("low_streak", True), ("effects", {}), ("effects", [[0, 2.0]]), ("effects", [[0, math.nan]]), ("effects", [[0]])])
def test_from_json_names_the_malformed_skill_and_field(field, value):
    data = bank_with("apple", "pen").to_json()
    data["skills"][1][field] = value
    with pytest.raises(ValueError, match=f"skill {data['skills'][1]['id']}: field '{field}'"):
        SkillBank.from_json(data)
    del data["skills"][1][field]
    with pytest.raises(ValueError, match=f"field '{field}' is missing"):
        SkillBank.from_json(data)


@pytest.mark.parametrize("change, culprit", [
    ({"kappa": -1}, "'kappa'"), ({"tau_up": math.nan}, "'tau_up'"), ({"tau_down": 0.5}, "'tau_down'"),
    ({"n_eval": 0}, "'n_eval'"), ({"top_k": 2.5}, "'top_k'"), ({"temperature": 1}, "temperature"),
    ({"rejected": {"boring": 1}}, "'rejected'"), ({"skills": {}}, "'skills'"), ({"skills": [3]}, "skill: .* 3")])
def test_from_json_names_the_malformed_bank_field(change, culprit):
    with pytest.raises(ValueError, match=culprit):
        SkillBank.from_json({**SkillBank().to_json(), **change})
    with pytest.raises(ValueError, match="bank"):
        SkillBank.from_json([])


@pytest.mark.parametrize("seed", range(8))
def test_forty_pairings_sort_good_from_bad(seed):
    # Each skill shifts a plain success rate of .5 by its true effect; 4 + 4 rollouts a pairing. The utility's standard
    # error is about 40/45 * .32 / sqrt(40) = .045, so +-.3 lies 3 or more errors from both thresholds.
    rng = np.random.default_rng(seed)
    bank = bank_with("good", "void", "harmful")
    good, void, harmful = bank.skills
    for iteration in range(40):
        for skill, effect in ((good, 0.3), (void, 0.0), (harmful, -0.3)):
            delta = skills.paired_effect(rng.random(4) < 0.5 + effect, rng.random(4) < 0.5)
            bank.record(skill, delta, iteration)
    assert (good.state, harmful.state) == ("active", "retired")
    assert harmful.utility(bank.kappa) < void.utility(bank.kappa) < good.utility(bank.kappa)


# ---- 8. envs: what the policy reads and writes -----------------------------------------------------------------------

THOUGHT = "<think>an apple</think>"


@pytest.mark.parametrize("response, action", [
    (THOUGHT + "<action>go to desk 1</action>", "go to desk 1"),
    (THOUGHT + "<action> Go  TO\n\tdesk 1 </action> done", "go to desk 1"),                 # case and white space
    (THOUGHT + "<action>look</action><action>inventory</action>", "look"),                  # the first of several
    (THOUGHT + "<action><action>look</action>", "<action>look"),
    (THOUGHT + "<action>nimm Äpfel 🍎</action>", "nimm äpfel 🍎"),
    (THOUGHT + f"<action>{'a' * 10_000}</action>", "a" * 10_000),
    ("<action>look</action>", None),                                                        # no thought
    ("<think>an apple<action>look</action>", None),
    ("an apple</think><action>look</action>", None),
    (THOUGHT + "look", None), (THOUGHT + "<action>look", None), (THOUGHT + "look</action>", None),
    (THOUGHT + "</action>look<action>", None), (THOUGHT + "<action> \n </action>", None), ("", None)])
def test_parse_action(response, action):
    assert envs.parse_action(response) == action


TAGS = st.sampled_from("<think> </think> <action> </action> <|im_end|> look \n \0 İ 🍎".split(" "))


@given(st.text() | st.lists(TAGS | st.text(max_size=3)).map("".join))
def test_parse_action_gives_a_clean_line_or_nothing_for_any_text(response):
    action = envs.parse_action(response)
    assert action is None or (action and action == " ".join(action.split()) and action == action.lower())


def test_full_prompt_shows_the_last_turns_the_skill_and_every_action_but_help():
    state = envs.State("You arrive at desk 3.", ("go to desk 1", "help", "look"), "", steps=3)
    turns = [envs.Turn(f"You see {i}.", f"go to desk {i}") for i in range(3)]
    prompt = envs.render_prompt("find {braces}", state, turns, skill="when dark -> use a lamp", window=2)
    assert "find {braces}" in prompt and "when dark -> use a lamp" in prompt and "Step 4." in prompt
    assert "['go to desk 1', 'look']" in prompt and "last 2 of 3 steps" in prompt
    assert "[Observation 2: You see 1. Action 2: go to desk 1]" in prompt and "You see 0." not in prompt
    plain = envs.render_prompt("find {braces}", state, turns, window=0)
    assert "You see" not in plain and "dvice" not in plain


# ---- 9. envs: the engine beside stock TextWorld ----------------------------------------------------------------------

REAL = next((f for f in map(os.environ.get, ("SIRI_ALFWORLD_SAMPLE", "ALFWORLD_DATA"))
             if f and (Path(f) / "json_2.1.1" / "train").is_dir()), None)
official = pytest.mark.skipif(
    REAL is None, reason="official games: set SIRI_ALFWORLD_SAMPLE or ALFWORLD_DATA to the folder of json_2.1.1")
KINDS = sorted(envs.KIND_COUNTS)


@pytest.fixture(scope="module")
def plans():
    """Generated games on official floor plans."""
    return envs.AlfWorld.generated(0)


@pytest.fixture(scope="module")
def home():
    """Small generated games in one household."""
    return envs.AlfWorld.household(3, max_steps=40)


@pytest.fixture(scope="module")
def real():
    return envs.AlfWorld.official(REAL)


@pytest.fixture(scope="module")
def stock():
    """ALFWorld's own stack: TextWorld's PddlEnv under the naming wrapper. One for all tests, because closing several
    Fast Downward handles can crash Python at exit."""
    import textworld
    from alfworld.agents.utils.misc import Demangler
    from textworld.envs.pddl import PddlEnv

    class AlfredDemangler(textworld.core.Wrapper):      # that of alfred_tw_env, whose import needs much more
        def load(self, *args, **kwargs):
            super().load(*args, **kwargs)
            demangler = Demangler(game_infos=self._entity_infos, shuffle=False)
            for info in self._entity_infos.values():
                info.name = demangler.demangle_alfred_name(info.id)

    return AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))


def data_of(task):
    """The game as the dictionary that TextWorld loads, its winning commands included."""
    data = envs.pddl_game(task.data) if isinstance(task.data, envs.Scene) else json.loads(task.data.read_text())
    return {**data, "walkthrough": data.get("walkthrough") or envs.oracle_walkthrough(data)}


def small_game(world, kind=None, split="train"):
    tasks = [task for task in map(world.tasks(split).__getitem__, range(80)) if kind in (None, task.kind)]
    return min(tasks, key=lambda task: len(task.data.objects) + len(task.data.receptacles))


ODD = ["", "   ", "look ", "\tinventory\n", "LOOK", "go to nowhere 1", "take apfel 1 from kühlschrank 1", "look; look",
       "{r}", "#look.feedback#", "put mug 1 in/on desk 1", "go to  desk 1", "🍎", "'", "help"]


def compare(stock, engine, commands):
    """Play both; `commands(admissible)` yields the next command."""
    state, node, text = stock.reset(), engine.root, engine.intro
    assert (text, list(node.admissible)) == (state.feedback, state["admissible_commands"])
    for command in commands(lambda: node.admissible):
        state, score, done = stock.step(command)
        node, text = engine.step(node, command)
        assert text == state.feedback, command
        assert list(node.admissible) == state["admissible_commands"], command
        assert (node.won, node.won) == (bool(score), bool(done)) == (state["won"],) * 2, command
    return node.won


def random_walk(seed, length):
    def commands(admissible):
        rng = random.Random(seed)
        for _ in range(length):         # half of the commands are not movements, or a walk would only move
            here = [c for c in admissible() if not c.startswith("go to")]
            yield rng.choice(ODD) if rng.random() < 0.15 else rng.choice(here if rng.random() < 0.5 else admissible())
    return commands


def check_against_stock(stock, world, task, length):
    """On the winning commands with every odd one between and after them, and on a random walk."""
    data = data_of(task)
    with world.open(task) as game:
        stock.load(data)
        win = data["walkthrough"]
        assert compare(stock, game.engine, lambda _: [*win[:2], *ODD, *win[2:], "look", "inventory", "", "nonsense"])
        compare(stock, game.engine, random_walk(task.id, length))


def test_engine_equals_textworld_in_a_household(stock, home):
    """Feedback, admissible commands, score and done are the same to the byte: also for empty, odd and unicode commands,
    and after the win."""
    check_against_stock(stock, home, small_game(home, "pick_heat_then_place_in_recep"), length=25)


def test_engine_equals_textworld_on_a_floor_plan(stock, plans):
    check_against_stock(stock, plans, small_game(plans, "pick_two_obj_and_place"), length=25)


@slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", range(3))
def test_engine_equals_textworld_on_every_kind_of_generated_game(stock, plans, kind, index):
    tasks = [task for task in map(plans.tasks("valid_seen").__getitem__, range(140)) if task.kind == kind]
    check_against_stock(stock, plans, tasks[index], length=60)


@official
@pytest.mark.parametrize("index", range(18))
def test_engine_equals_textworld_on_official_games(stock, real, index):
    tasks = [task for split in real.splits for task in real.tasks(split)[:6]]
    check_against_stock(stock, real, tasks[index], length=30)


@official
def test_official_games_are_won_by_their_walkthroughs_and_by_the_oracle(real):
    for task in [task for split in real.splits for task in real.tasks(split)[:6]]:
        with real.open(task) as game:
            assert game.task.goal in game.start.observation
            for commands in (data_of(task)["walkthrough"], envs.oracle_walkthrough(data_of(task))):
                state = game.start
                for command in commands:
                    assert not state.done and state.valid
                    state = game.step(state, command)
                assert state.success


@slow
def test_speed_over_textworld(stock, plans):
    """At least 30 times as fast per step and per reset, measured in turns on the same walk."""
    took = Counter()

    def timed(what, call, *args):
        begin = time.perf_counter()
        result = call(*args)
        took[what] += time.perf_counter() - begin
        return result

    for task in map(plans.tasks("valid_seen").__getitem__, range(4)):
        stock.load(data_of(task))
        plans.open(task).close()
        timed("stock reset", stock.reset)
        game, rng = timed("reset", plans.open, task), random.Random(task.id)
        state = game.start
        for _ in range(40):
            command = rng.choice(state.admissible)
            timed("stock step", stock.step, command)
            state = timed("step", game.step, state, command)
        game.close()
    assert took["stock reset"] > 30 * took["reset"] and took["stock step"] > 30 * took["step"], took


# ---- 10. envs: one game, many rollouts -------------------------------------------------------------------------------

def play(game, seed, length=30):
    """All states of a random rollout."""
    rng, states = random.Random(seed), [game.start]
    while not states[-1].done and len(states) <= length:
        states.append(game.step(states[-1], rng.choice(states[-1].admissible)))
    return states


def test_interleaved_rollouts_equal_separate_ones(plans, home):
    """Rollouts that share a game, advanced in a random order, see what each would see in a game of its own."""
    for world in (plans, home):
        task, alone = world.tasks("train")[1], []
        for seed in range(4):
            with world.open(task) as game:
                alone.append(play(game, seed))
        with world.open(task) as game:
            rngs, shared = [random.Random(seed) for seed in range(4)], [[game.start] for _ in range(4)]
            order = random.Random(9)
            while live := [i for i in range(4) if len(shared[i]) < len(alone[i])]:
                i = order.choice(live)
                shared[i].append(game.step(shared[i][-1], rngs[i].choice(shared[i][-1].admissible)))
        assert shared == alone and len({states[-1].anchor for states in shared}) > 1


def test_any_old_state_goes_on_as_in_an_engine_that_never_saw_the_rest(home):
    task = home.tasks("train")[2]
    with home.open(task) as game, home.open(task) as fresh:
        states = play(game, seed=1)
        for k in (0, 7, 19):
            for command in states[k].admissible[::3]:
                replayed, rng = fresh.start, random.Random(1)
                for _ in range(k):
                    replayed = fresh.step(replayed, rng.choice(replayed.admissible))
                assert game.step(states[k], command) == fresh.step(replayed, command)


@pytest.mark.parametrize("template, asked", [
    ("look", ()), ("take {o} from {r}", ()), ("go to {#where#}", None), ("#go# there", None),
    ("go to {#where# | opened(r:receptacle)}", None),
    ("go to [{r.name | receptacleatlocation(r:receptacle, lend:location)}]", ("receptacleatlocation",))])
def test_what_a_command_depends_on(template, asked):
    assert envs._asked(template) == asked


def test_commands_are_the_same_when_each_is_written_anew(plans, home, monkeypatch):
    for world in (plans, home):
        task = world.tasks("train")[3]
        with world.open(task) as game:
            remembered = [play(game, seed) for seed in range(3)]
            assert game.engine.written
        with monkeypatch.context() as patch, world.open(task) as game:
            patch.setattr(envs, "_asked", lambda template: None)
            assert [play(game, seed) for seed in range(3)] == remembered
            assert len(game.engine.nodes) > 20


def test_step_limit_invalid_actions_and_the_end(home):
    short = envs.AlfWorld.household(3, max_steps=3)
    with short.open(short.tasks("train")[0]) as game:
        state = game.step(game.start, "fly to the moon")
        assert (state.valid, state.observation, state.done) == (False, "Nothing happens.", False)
        assert state.admissible == game.start.admissible and state.anchor != game.start.anchor
        state = game.step(game.step(state, " look "), "inventory")
        assert (state.valid, state.done, state.success, state.reward, state.steps) == (True, True, False, 0.0, 3)
        with pytest.raises(ValueError, match="the episode ended after 3 steps"):
            game.step(state, "look")


@pytest.fixture
def translator(monkeypatch):
    """A translator of the test's own. Translating in this process is an error until the test allows it."""
    own, here = envs.Translator(), envs._translate
    monkeypatch.setattr(envs, "translator", own)
    monkeypatch.setattr(envs, "_translate", lambda *game: pytest.fail("translated in the first process"))
    own.allow = lambda: monkeypatch.setattr(envs, "_translate", here)
    yield own
    if own.process:
        own.process.kill()


def test_games_that_were_announced_are_translated_by_the_second_process_as_by_the_first(home, plans, translator):
    worlds = {}
    for world in (home, plans):
        tasks = [world.tasks("valid_seen")[i] for i in range(3)]
        world.prepare([*tasks, *tasks[:1]])
        for task in reversed(tasks):
            with world.open(task) as game:
                worlds[task.id] = game.engine.world
    assert translator.announced == {} == translator.waiting
    translator.known.clear()
    translator.allow()
    for world in (home, plans):
        for i in range(3):
            with world.open(world.tasks("valid_seen")[i]) as game:
                assert json.loads(json.dumps(game.engine.world)) == list(worlds.pop(game.task.id))


def test_games_that_nobody_has_opened_yet_are_translated_all_the_same(plans, translator):
    """More text than a pipe holds: the second process must not have to wait for its answers to be read."""
    tasks = [plans.tasks("valid_unseen")[i] for i in range(4)]
    plans.prepare(tasks)
    futures = list(translator.announced.values())
    worlds = [future.result(timeout=120) for future in futures]
    assert sum(len(json.dumps(world)) for world in worlds) > 3 * 2**16
    for task in tasks:
        plans.open(task).close()


def test_a_second_process_that_is_killed_is_done_without_and_then_replaced(home, translator):
    task = home.tasks("valid_seen").__getitem__

    def kill():
        translator.process.kill()
        translator.process.wait()

    home.prepare([task(0), task(1)])
    kill()
    translator.allow()
    for i in (0, 1):
        home.open(task(i)).close()
    assert len(translator.known) == 2 and translator.announced == {}
    home.prepare([task(2)])                                                 # it finds out, and gives up
    assert translator.process is None
    home.prepare([task(3)])
    home.open(task(3)).close()
    assert translator.process.poll() is None and len(translator.known) == 3


def test_an_interrupt_while_a_game_is_announced_loses_nothing(home, translator, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    task = home.tasks("valid_seen").__getitem__
    home.prepare([task(0)])
    with monkeypatch.context() as patch:
        patch.setattr(envs, "print", lambda *_, **__: 1 / 0, raising=False)
        home.prepare([task(1)])                                             # suppressed there: opening it says what is wrong
        patch.setattr(envs, "print", interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            home.prepare([task(1)])
    assert translator.process is None and translator.announced == {}
    home.prepare([task(1)])
    home.open(task(1)).close()
    translator.allow()
    home.open(task(0)).close()
    assert len(translator.known) == 2 and translator.process.poll() is None


def test_a_broken_game_that_is_announced_is_reported_when_it_is_opened(home, translator, tmp_path):
    sound = home.tasks("valid_seen")[0]
    broken = [dataclasses.replace(sound, id=f"broken {i}", data=tmp_path / f"{i}") for i in range(4)]
    game = envs.pddl_game(sound.data)
    for task, text in zip(broken[1:], ("[]", json.dumps(game | {"pddl_domain": [1]}), json.dumps(game | {"pddl_problem": "("}))):
        task.data.write_text(text)
    home.prepare([*broken, sound])
    home.open(sound).close()                                                # the second process lives on
    translator.allow()
    for task in broken:
        with pytest.raises(ValueError, match=f"{task.id} is not a sound ALFWorld game"):
            home.open(task)


def test_translations_are_forgotten_after_256_others(translator, monkeypatch):
    monkeypatch.setattr(envs, "_translate", lambda *game: envs._World("", {}, {}, {}, {}))
    for i in range(300):
        translator.world("domain", str(i))
    assert list(translator.known) == [("domain", str(i)) for i in range(44, 300)]


def test_the_second_process_ends_with_the_first(tmp_path):
    script = ("import envs, time; world = envs.make('alfworld', compact=True)\n"
              "world.prepare([world.tasks('train')[i] for i in range(3)])\n"
              "print(envs.translator.process.pid, flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", script], cwd=HERE, stdout=subprocess.PIPE, text=True) as first:
        second = int(first.stdout.readline())
        first.kill()
    for _ in range(600):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(second)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):                              # ended, if nobody has asked how
            return
        time.sleep(0.1)
    pytest.fail(f"the second process lives on ({state})")


@slow
def test_memory_stays_flat_over_200_games(plans):
    """200 games of a group of four: the resident set grows by less than 30 MB after the first 20. The last translations
    that are kept (256 games, about half a megabyte each) are not counted: they are dropped after each game here."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads /proc")
    for i in range(220):
        with plans.open(plans.tasks("train")[i]) as game:
            for seed in range(4):
                play(game, seed)
        envs.translator.known.clear()
        if i == 20:
            before = int(statm.read_text().split()[1])
    assert (int(statm.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") < 30e6


# ---- 11. envs: folders and files -------------------------------------------------------------------------------------

def make_folder(root, spoil=lambda text: text):
    """A data folder in the official layout with one generated game a split; `spoil` changes the file of train."""
    for split in envs.SPLIT_COUNTS:
        task = envs.generate_task(0, split=split, household=envs.Household(0))
        path = root / "json_2.1.1" / split / task.id.split("/")[-1] / "trial_1" / "game.tw-pddl"
        path.parent.mkdir(parents=True)
        text = json.dumps(data_of(task))
        path.write_text(spoil(text) if split == "train" else text)
    return root


def test_a_folder_in_the_official_layout_is_played(tmp_path):
    world = envs.make("alfworld", data=str(make_folder(tmp_path)))
    assert "official games" in world.notice and "train 1" in world.notice
    with world.open(world.tasks("train")[0]) as game:
        state = game.start
        for command in data_of(game.task)["walkthrough"]:
            state = game.step(state, command)
        assert state.success and game.task.goal == envs.generate_task(
            0, split="train", household=envs.Household(0)).goal
        assert game.task.kind in KINDS and game.task.split == "train"


def test_the_official_loaders_filters(tmp_path):
    for split in envs.SPLIT_COUNTS:
        for name, solvable in (("pick-A-1", True), ("pick-B-1", False), ("pick-AppleSliced-2", True),
                               ("pick_movable-C-3", True), ("cool-A-2", True)):
            path = tmp_path / "json_2.1.1" / split / name / "trial" / "game.tw-pddl"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"grammar": '"Your task is to: find it."', "solvable": solvable}))
    world = envs.AlfWorld.official(tmp_path)
    assert [(t.id, t.kind, t.goal) for t in world.tasks("train")] == [
        ("train/cool-A-2/trial", "cool", "find it"), ("train/pick-A-1/trial", "pick", "find it")]
    assert envs.AlfWorld.official(tmp_path / "json_2.1.1").tasks("train") == world.tasks("train")
    shutil.rmtree(tmp_path / "json_2.1.1" / "valid_seen")
    with pytest.raises(ValueError, match="no ALFWorld games in .*valid_seen"):
        envs.AlfWorld.official(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[:5000], lambda text: text.replace('"solvable"', '"soluble"'),
    lambda text: text.replace("Your task is to: ", "")])
def test_a_file_that_is_no_game_is_named_before_any_play(tmp_path, damage):
    with pytest.raises(ValueError, match=r"train/\S*/trial_1/game.tw-pddl is not an ALFWorld game.*alfworld-download"):
        envs.AlfWorld.official(make_folder(tmp_path, damage))


@pytest.mark.parametrize("damage, says", [
    (lambda text: "{" + text, "JSONDecodeError"),
    (lambda text: text.replace('"pddl_domain"', '"domain"'), "KeyError: 'pddl_domain'"),
    (lambda text: text.replace('"pddl_domain": "', '"pddl_domain": "", "old": "'), "StopIteration"),
    (lambda text: text.replace("(:goal", "(:goal ("), "ParseError"),
    (lambda text: text.replace("agent1 - agent", ""), "KeyError"),
    (lambda text: text.replace('"grammar": "', '"grammar": "nonsense '), "FailedToken")])
def test_a_broken_game_is_named_with_the_mend_and_spoils_no_other(tmp_path, damage, says):
    world = envs.AlfWorld.official(make_folder(tmp_path, damage))
    (broken,), (sound,) = world.tasks("train"), world.tasks("valid_seen")
    free = len(world.engines)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{says}.*alfworld-download") as caught:
            world.open(broken)
        assert broken.id in str(caught.value) and "\n" not in str(caught.value)
        with world.open(sound) as game:
            assert game.step(game.start, "look").valid and len(world.engines) == max(free - 1, 0)


@pytest.mark.parametrize("expression", [
    "__import__('os').system('touch pwned')", "r.__class__", "(lambda: 1)()", "r.name if r else r", "r.name.upper()",
    "open('pwned', 'w')", "r.name * 9"])
def test_a_game_file_cannot_run_code(tmp_path, monkeypatch, expression):
    monkeypatch.chdir(tmp_path)

    def spoil(text):
        assert "{r.name}" in text
        return text.replace("{r.name}", "{%s}" % expression)

    world = envs.AlfWorld.official(make_folder(tmp_path, spoil))
    with pytest.raises(ValueError, match="may only use names, their attributes, text"):
        with world.open(world.tasks("train")[0]) as game:
            play(game, seed=0)
    assert not (tmp_path / "pwned").exists()


def test_the_variable_that_importing_alfworld_sets_is_no_data(tmp_path):
    code = ("import os, alfworld.info, envs; assert os.environ['ALFWORLD_DATA']; "
            "print(envs.make('alfworld').notice)")
    clean = {k: v for k, v in os.environ.items() if k != "ALFWORLD_DATA"} | {"HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=clean, capture_output=True, text=True)
    assert "GENERATED" in out.stdout and "not ALFWorld benchmark scores" in out.stdout, out.stderr


# ---- 12. envs: generated games ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", envs.SPLIT_COUNTS)
@pytest.mark.parametrize("world, n", [("plans", 6), ("home", 16)])
def test_every_generated_game_is_won_by_its_walkthrough_and_not_before(request, world, n, split):
    world = request.getfixturevalue(world)
    for i in range(n):
        task = world.tasks(split)[i]
        with world.open(task) as game:
            state = game.start
            assert not state.success and game.task.goal == task.goal and not state.observation.startswith(envs.BANNER)
            for command in envs.oracle_walkthrough(envs.pddl_game(task.data)):
                assert command in state.admissible and not state.done and state.reward == 0
                state = game.step(state, command)
            assert state.success and state.done and state.reward == 10.0


def test_a_game_depends_on_its_arguments_only():
    def draw(i, **kwargs):
        return envs.generate_game(i, **{"split": "train", **kwargs})

    home = envs.Household(1)
    for i in range(20):
        random.seed(i)
        assert draw(i) == draw(i) and draw(i).data == draw(i).data
        assert draw(i, household=home).data == draw(i, household=envs.Household(1)).data
        others = [draw(i + 1), draw(i, split="valid_seen"), draw(i, seed=1), draw(i, household=home)]
        assert all(draw(i).data["pddl_problem"] != other.data["pddl_problem"] for other in others)
    assert draw(0).id == "plans-0/train/0000/pick_heat_then_place_in_recep-Egg-None-GarbageCan-28"    # on any machine


@pytest.mark.parametrize("household", [None, 0])
def test_splits_are_disjoint_and_unseen_is_unseen(household):
    home = None if household is None else envs.Household(household)
    ids, rooms, pairs = {}, {}, {}
    for split in envs.SPLIT_COUNTS:
        tasks = list(envs.GeneratedTasks(split, 0, home))
        ids[split] = {t.id for t in tasks}
        rooms[split] = {t.id.rpartition("-")[2] for t in tasks}
        pairs[split] = {(t.data.target, t.data.destination) for t in tasks}
        assert len(ids[split]) == envs.SPLIT_COUNTS[split]
        assert {t.kind for t in tasks} == set(KINDS)
    assert not ids["train"] & ids["valid_seen"]
    if home is None:
        assert rooms["valid_unseen"] <= {str(n) for n in envs.UNSEEN_PLANS}
        assert not rooms["valid_unseen"] & (rooms["train"] | rooms["valid_seen"])
    else:
        assert not pairs["valid_unseen"] & (pairs["train"] | pairs["valid_seen"])


def test_objects_lie_where_alfred_allows_and_the_task_is_not_done_yet():
    for i in range(300):
        scene = envs.generate_task(i, split="train").data
        place = dict(scene.receptacles)
        for _, cls, inside in scene.objects:
            assert cls == "DeskLamp" or cls in envs.wheel().holds[place[inside]]
            assert (cls, place[inside]) != (scene.target, scene.destination)


def test_habits_hold_nine_times_in_ten_and_differ_between_households():
    home, usual = envs.Household(5), []
    for i in range(1000):
        scene = envs.generate_task(i, split="train", household=home).data
        place = dict(scene.receptacles)
        usual += [place[inside] == home.habit[cls] for _, cls, inside in scene.objects if cls == scene.target]
    assert abs(sum(usual) / len(usual) - 0.9) < 4 * (0.09 / len(usual)) ** 0.5
    # Knowing one household says nothing about another: they agree as often as uniform draws from 8 or 10 places do.
    homes = [envs.Household(seed).habit for seed in range(80)]
    agree = [a[o] == b[o] for a, b in zip(homes[::2], homes[1::2]) for o in a]
    assert len(homes[0]) == 24 and abs(sum(agree) / len(agree) - (1 / 8 + 1 / 10) / 2) < 0.04


def test_household_games_are_compact():
    for seed in range(3):
        home = envs.Household(seed)
        for i in range(200):
            task = envs.generate_task(i, split="train", household=home)
            scene, steps = task.data, len(envs.oracle_walkthrough(envs.pddl_game(task.data)))
            standing = [cls for _, cls in scene.receptacles]
            assert 6 <= len(standing) <= 9 and len(set(standing)) == len(standing)
            assert home.habit[scene.target] in standing and scene.destination not in envs.wheel().openable
            count = Counter(cls for _, cls, _ in scene.objects)
            assert count.pop(scene.target) == 1 + ("two" in task.kind) and set(count.values()) <= {1}
            assert task.kind != "look_at_obj_in_light" or "Desk" in standing
            assert steps <= (10 if "two" in task.kind else 7 if task.kind in envs.PROCESSES else 5)


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_true_skill_helps_the_tiny_policys_teacher_and_a_false_one_does_not():
    teacher = load_script(HERE / "notebooks" / "make_tiny.py")
    won, rng = {"plain": [], "true": [], "false": []}, random.Random(0)
    for seed in range(6):
        world = envs.AlfWorld.household(seed, max_steps=siri.PRESETS["tiny"]["max_steps"])
        for i in range(15):
            task = world.tasks("train")[i]
            usual, target = world.tasks("train").household.habit[task.data.target].lower(), task.data.target.lower()
            others = [c.lower() for _, c in task.data.receptacles if c.lower() != usual and c != task.data.destination]
            with world.open(task) as game:
                for name, place in (("plain", None), ("true", usual), ("false", rng.choice(others))):
                    skill = place and teacher.skill_text(target, place)
                    won[name].append(teacher.play(game, skill, rng, slip=0.05)[-1])
    rate = {name: np.mean(outcomes) for name, outcomes in won.items()}
    assert rate["plain"] < 0.7 and rate["true"] > rate["plain"] + 0.15 and rate["false"] < rate["plain"] + 0.1, rate


# ---- 13. envs: WebShop's search engine -------------------------------------------------------------------------------
# Against numbers derived by hand, Lucene's published formulas redone slowly, and a table of analyses.

ANY_TEXT = st.text(st.one_of(st.sampled_from("aZs9_.,:;'’ -\n\"#éא日ひア한ส\u0301\u200d\ufe0f\u20e3😀👍🏽🇫"), st.characters()))
fast_search = settings(max_examples=60, deadline=None, database=None)

def long_to_int4(i):
    bits = i.bit_length()
    if bits < 4:
        return i
    shift = bits - 4
    return ((i >> shift) & 0x07) | ((shift + 1) << 3)


def int4_to_long(i):
    bits, shift = i & 0x07, (i >> 3) - 1
    return bits if shift == -1 else (bits | 0x08) << shift


FREE = 255 - long_to_int4(2**31 - 1)


def through_one_byte(length):
    byte = length if length < FREE else FREE + long_to_int4(length - FREE)
    assert 0 <= byte <= 255
    return byte if byte < FREE else FREE + int4_to_long(byte - FREE)


def reference_scores(texts, query):
    f = np.float32
    documents = [Counter(envs.search_terms(text)) for text in texts]
    lengths = [sum(document.values()) for document in documents]
    filled = sum(length > 0 for length in lengths)
    scores = []
    for document, length in zip(documents, lengths, strict=True):
        total = 0.0
        for term, count in Counter(envs.search_terms(query)).items():
            if term in document:
                df = sum(term in other for other in documents)
                mean = f(sum(lengths) / filled)
                norm = f(f(0.4) * f(through_one_byte(length))) / mean
                inverse = f(1) / f(f(0.9) * f(f(f(1) - f(0.4)) + norm))
                weight = f(count) * f(math.log(1 + (filled - df + 0.5) / (df + 0.5)))
                total += float(weight - f(weight / f(f(1) + f(f(document[term]) * inverse))))
        scores.append(f(total))
    return scores


def reference_search(names, texts, query, k):
    scores = reference_scores(texts, query)
    return sorted((i for i in range(len(names)) if scores[i] > 0), key=lambda i: (-scores[i], names[i]))[:k]


def test_scores_by_hand():
    """Lengths 3, 1, 1 and an empty text, which does not count: N = 3, mean length 5/3.

    Length norms: k1 (1 - b + b length / mean) = .9 (.6 + .4 * 9/5) = 1.188 and .9 (.6 + .4 * 3/5) = .756.
    cat: df 1, idf ln(1 + 2.5/1.5) = ln(8/3) = .980829; in document 0 twice: .980829 * 2 / (2 + 1.188) = .615326.
    dog: df 2, idf ln(1 + 1.5/2.5) = ln(1.6) = .470004; .470004 / 2.188 = .214810 and .470004 / 1.756 = .267656.
    """
    found = envs.SearchIndex(["a", "b", "c", "d"], ["cat cat dog", "dog", "bird", ""])
    assert found._scores("cat") == pytest.approx([0.615326, 0, 0, 0], abs=1e-6)
    assert found._scores("dogs") == pytest.approx([0.214810, 0.267656, 0, 0], abs=1e-6)
    assert found._scores("dog cat dog") == pytest.approx([0.615326 + 2 * 0.214810, 2 * 0.267656, 0, 0], abs=2e-6)
    assert (found.search("dog"), found.search("dog cat"), found.search("dog", k=1)) == ([1, 0], [0, 1], [1])
    assert (found.search("dog", k=0), found.search("fish"), found._scores("dog").dtype) == ([], [], np.float32)


def test_one_byte_lengths():
    """24 + m keeps the 4 highest bits of m: m = 16, 17 -> 16; 31 -> 30; 32..35 -> 32; 226 = 0b11100010 -> 224."""
    known = {0: 0, 23: 23, 24: 24, 39: 39, 40: 40, 41: 40, 55: 54, 56: 56, 59: 56, 60: 60, 250: 248}
    assert envs.lucene_lengths(np.array(list(known))).tolist() == list(known.values())
    lengths = [*range(3000), *(2**p + d for p in range(12, 31) for d in (-1, 0, 1, 23, 24, 25)), 2**31 - 1]
    assert envs.lucene_lengths(np.array(lengths)).tolist() == [through_one_byte(length) for length in lengths]


SEARCH_WORDS = [*"alpha beta gamma delta epsilon zeta running runs café 3.5 the".split(), "x's"]


@fast_search
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_ranking_is_the_reference(seed, k):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(SEARCH_WORDS, range(12, 0, -1), k=rng.choice([0, 3, 5, 60, 150]))) for _ in range(12)]
    names = rng.sample([f"d{i}" for i in range(40)], 12)
    query = " ".join(rng.choices([*SEARCH_WORDS, "absent"], k=4))
    found = envs.SearchIndex(names, iter(texts))
    assert found._scores(query).tolist() == [float(score) for score in reference_scores(texts, query)]
    assert found.search(query, k) == reference_search(names, texts, query, k)


def test_ties_go_by_name():
    names = ["d9", "d10", "e", "D", "é"]  # as strings: D < d10 < d9 < e < é
    found = envs.SearchIndex(names, ["same words"] * 5)
    assert found.search("words") == [3, 1, 0, 2, 4]
    assert found.search("words", k=2) == [3, 1]  # the cut runs through a tie


def test_lengths_that_share_a_byte_tie():
    """41 and 40 terms are one byte to Lucene, so the name decides although the shorter document is denser."""
    found = envs.SearchIndex(["a", "b"], ["cat " + "z " * 40, "cat " + "z " * 39])
    assert found.search("cat") == [0, 1]


ANALYSES = {
    "The cats' tails, and not the dog's": ["cat", "tail", "dog"],
    "DOG’S dog＇s dogs": ["dog", "dog", "dog"],
    "don't can't": ["don't", "can't"],
    "3.5 1,000 1;2 1:2 1. .5": ["3.5", "1,000", "1;2", "1", "2", "1", "5"],
    "a.b a:b a,b b;c": ["a.b", "a:b", "b", "b", "c"],  # the lone a is a stop word
    "t-shirt e-mail x/y": ["t", "shirt", "e", "mail", "x", "y"],
    "foo_bar _x_ __ 'quoted'": ["foo_bar", "_x_", "quot"],
    "a1.b2 3_5 3_.5": ["a1", "b2", "3_5", "3_", "5"],
    "possibly": ["possibl"],  # -bli -> -ble, then the final e goes
    "technology": ["technolog"],  # -logi -> -log after a stem with a vowel-consonant
    "geology": ["geologi"],  # geo has none
    "running flies skies agreed hopping": ["run", "fli", "ski", "agre", "hop"],
    "is as us by": ["us"],  # two letters: never stemmed
    "to be or not to be": [],
    "café's naïve": ["café", "naïv"],
    "d'été l'objectif 'été": ["d'été", "l'objectif", "été"],
    "日本語 ひら カタカナ 한국어": ["日", "本", "語", "ひ", "ら", "カタカナ", "한국어"],
    "สวัสดี": ["สวัสดี"],
    "e\u0301te\u0301": ["e\u0301te\u0301"],  # marks stay in the word
    'צה"ל א\' "': ['צה"ל', "א'"],
    "😀 👍🏽👩\u200d💻 🇫🇷🇩🇪 #\ufe0f\u20e3 → ©": ["😀", "👍🏽", "👩\u200d💻", "🇫🇷", "🇩🇪", "#\ufe0f\u20e3", "©"],
    "ΟΔΟΣ İX": ["οδοσ", "ix"],  # Java lowers one character at a time
    "b" * 300: ["b" * 255, "b" * 45],
    "é" * 255 + "." + "é": ["é" * 255, "é"],
    "_" * 300 + "b": ["_" * 254 + "b"],
}


@pytest.mark.parametrize("text", ANALYSES, ids=range(len(ANALYSES)))
def test_analyses(text):
    assert envs.search_terms(text) == ANALYSES[text]


def test_stop_words():
    """Lucene's 33; their like are terms."""
    stop = "a an and are as at be but by for if in into is it no not of on or such that the their then there these they"
    assert envs.search_terms(f"{stop} this to was will with from has were he") == ["from", "ha", "were", "he"]
    assert len(envs.STOP_WORDS) == 33


@settings(fast_search, max_examples=400)
@given(st.text(st.one_of(st.sampled_from("aZ9_.,:;'"), st.characters(max_codepoint=127))))
def test_both_patterns_agree_on_ascii(text):
    assert envs.ASCII_TOKEN.findall(text) == envs.TOKEN.findall(text)


@settings(fast_search, max_examples=200)
@given(ANY_TEXT)
def test_no_token_holds_a_space(text):
    assert envs._lucene_tokens(text) == envs.TOKEN.findall(text)


@settings(fast_search, max_examples=200)
@given(st.lists(st.sampled_from([*"abcdefghiklmnorstuvwxyz1", *"ation bli logi ness ful ize".split()]), min_size=3))
def test_the_stemmer_keeps_words_with_other_endings(parts):
    word = "".join(parts)
    assert word.endswith(envs.STEMMED) or envs._stem()(word) == word


@fast_search
@given(st.lists(ANY_TEXT, max_size=4), ANY_TEXT)
def test_any_text_is_indexed_and_searched(texts, query):
    found = envs.SearchIndex([str(i) for i in range(len(texts))], texts)
    for text in texts:
        assert set(found.search(text)) == {i for i, t in enumerate(texts) if set(envs.search_terms(t)) & set(envs.search_terms(text))}
    found.search(query)


@pytest.mark.parametrize("query", ["", " ", "the of", "?!", "\ud800", "x" * 10_000, "a b " * 2_500, "_" * 10_000])
def test_queries_without_an_answer(query):
    assert envs.SearchIndex([], []).search(query) == []
    assert envs.SearchIndex(["a", "b"], ["", "the"]).search(query) == []
    assert envs.SearchIndex(["a"], ["words"]).search(query) == []


def test_each_name_has_a_text():
    with pytest.raises(ValueError, match="2 names for 1 texts"):
        envs.SearchIndex(["a", "b"], ["x"])


# ---- 14. envs: WebShop, a shop of six products -----------------------------------------------------------------------
# What is expected is worked out by hand from the rules of WebShop (Yao et al. 2022).

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


def page_parts(state):
    return state.observation.split(" [SEP] ")


RED = goal_of(LAMP, "red", "small")
TO_LAMP = ("search[shade]", f"click[{LAMP}]")                  # only the lamp has the word "shade"


# ---- 15. envs: WebShop, files ----------------------------------------------------------------------------------------


def test_the_files_are_read_as_the_original_reads_them():
    tags = [p.price_tag for p in SHOP.products.values()]
    assert tags == ["$12.99", "$41.8 to $43.99", "$100.0", "$1200.0", "$20.0", "$30.0"]
    lamp, rug, gift, _, _, tray = SHOP.products.values()
    assert (lamp.price, gift.price) == (12.99, 100.0) and 41.8 <= rug.price <= 43.99
    assert lamp.options == {"color": ("red", "dark blue", "black | white"), "size": ("small", "large")}  # null: none
    assert lamp.query == "lamp" and lamp.crumbs == {"Home", "Lighting", "Desk Lamps"}
    assert rug.bullets == ("Very soft",) and tray.attributes == ("DUMMY_ATTR",) and gift.options == tray.options == {}


@pytest.mark.parametrize("odd", [
    ITEMS[0] | {"asin": "nan"}, ITEMS[0] | {"asin": "B" + LAMP}, ITEMS[0] | {"name": "2nd"}, {"asin": "nan"},
    {"asin": "B" + LAMP}, ITEMS[0] | {"pricing": "abc"}])       # the last three are malformed
def test_long_and_nan_asins_and_later_duplicates_are_skipped_whatever_they_hold(odd):
    assert shop_of([*ITEMS, odd]).products == SHOP.products


def write_shop(folder):
    for name, content in (("items_shuffle", ITEMS), ("items_ins_v2", INSTRUCTIONS), ("items_human_ins", HUMAN)):
        for tail in ("", "_1000") if name != "items_human_ins" else ("",):
            (folder / f"{name}{tail}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("size, goals, shop", [("small", "synthetic", SHOP), ("full", "human", HUMAN_SHOP)])
def test_a_shop_from_files_is_the_shop_from_their_contents(tmp_path, size, goals, shop):
    loaded = envs.Shop.load(write_shop(tmp_path), size=size, goals=goals, tagger="stop-list")
    assert loaded.goals == shop.goals and loaded.products == shop.products


@pytest.mark.parametrize("content", [None, "[{", "\0", "3"])
@pytest.mark.parametrize("name, other", [
    ("items_shuffle_1000.json", "{}"), ("items_ins_v2_1000.json", "[]"), ("items_human_ins.json", "[]")])
def test_a_missing_or_broken_file_is_named(tmp_path, name, other, content):
    file = write_shop(tmp_path) / name
    for text in (content, other):
        file.write_text(text) if text else file.unlink()
        with pytest.raises(ValueError, match=re.escape(name)):
            envs.Shop.load(tmp_path, goals="human", tagger="stop-list")


@pytest.mark.parametrize("field, change", [
    *(("name", c) for c in ("-", 5, None)), *(("pricing", c) for c in ("abc", "$1.2.3", "$", 5)),
    ("customization_options", ["red"]), ("customization_options", {"Color": ["red"]}),
    ("customization_options", {"Color": [{"text": "red"}]}), ("customization_options", {"Color": 3}),
    ("small_description", [1]), ("small_description", 7), ("query", 1), ("product_category", None), ("asin", "-"),
    ("small_description", "-"), ("customization_options", "-")])
def test_a_malformed_field_is_named_with_its_product(field, change):
    bad = {k: v for k, v in ITEMS[1].items() if k != field} | ({} if change == "-" else {field: change})
    with pytest.raises(ValueError) as error:
        shop_of([ITEMS[0], bad])
    assert field in str(error.value) and ("product 1" if field == "asin" else RUG) in str(error.value)


@pytest.mark.parametrize("value", [[], None, "-"])
def test_an_instruction_without_attributes_or_options_is_named(value):
    part = {} if value == "-" else {"instruction_attributes": value}
    with pytest.raises(ValueError, match=f"items_ins_v2.*{RUG}.*instruction_attributes"):
        shop_of(instructions={RUG: {"attributes": ["soft"], "instruction": "find me a rug", **part}})
    entry = HUMAN[RUG][0] | {"instruction_options": None}       # null, then not there; an empty list is well-formed
    for bad in () if value == [] else (entry, ) if value is None else ({k: entry[k] for k in list(entry)[:2]},):
        with pytest.raises(ValueError, match=f"items_human_ins.*{RUG}.*instruction_options"):
            shop_of(human={RUG: [bad]})


def test_an_empty_catalogue_too_few_goals_and_a_foreign_task_are_refused():
    for items in ([], [ITEMS[0] | {"asin": "nan"}]):
        with pytest.raises(ValueError, match="empty"):
            shop_of(items)
    for split in ("original", "release"):                      # the six products have 14 goals
        with pytest.raises(ValueError, match=f"14 goals.*{split}"):
            envs.WebShop(SHOP, "six products", split=split)
    env, other = envs.WebShop(generated_shop(), "made up"), envs.WebShop(generated_shop(1), "other")
    assert env.open(env.tasks("test")[3]).task is env.tasks("test")[3]
    with pytest.raises(ValueError, match=re.escape(other.tasks("test")[0].id)):
        env.open(other.tasks("test")[0])


# ---- 16. envs: WebShop, goals and splits -----------------------------------------------------------------------------


def test_a_synthetic_goal_is_made_for_each_combination_of_option_values():
    """Lamp 3 * 2, rug 2, gift 1 (the empty combination), gold 1, shirt 2 * 2; the tray has no instruction."""
    assert Counter(g.product.asin for g in SHOP.goals) == {LAMP: 6, RUG: 2, GIFT: 1, GOLD: 1, SHIRT: 4}
    assert {g.options for g in SHOP.goals if g.product.asin == LAMP} == {
        (("color", c), ("size", s)) for c in ("red", "dark blue", "black | white") for s in ("small", "large")}
    swapped = copy.deepcopy(ITEMS[:1])                          # names are sorted, whatever their order in the file
    swapped[0]["customization_options"] = dict(reversed(swapped[0]["customization_options"].items()))
    assert {g.options for g in shop_of(swapped).goals} == {g.options for g in SHOP.goals if g.product.asin == LAMP}


def test_a_goal_says_instruction_options_and_price_limit():
    """$12.99: the next steps are 20, 30, 40, 50, of which the larger of two is never 20. $1200 is above all steps."""
    limit = f", and price lower than {RED.price_upper:.0f}.00 dollars"
    assert RED.price_upper in (30, 40, 50) and RED.attributes == ("easy clean", "bright")
    assert RED.text == "find me a lamp with color: red, and size: small" + limit
    gift, gold = goal_of(GIFT), goal_of(GOLD)
    assert gift.text == f"find me a gift, and price lower than {gift.price_upper:.0f}.00 dollars"
    assert (gold.text, gold.price_upper) == ("find me gold", 1e6)
    lamp, rug, gold = (goal_of(a, shop=HUMAN_SHOP) for a in (LAMP, RUG, GOLD))      # of a person: without outer dots
    assert len(HUMAN_SHOP.goals) == 3 and rug.options == ("rectangular",)  # the one without attributes is skipped
    assert lamp.text == f"i need a lamp, and price lower than {lamp.price_upper:.2f} dollars"
    assert (gold.text, gold.options, gold.price_upper) == ("gold", (), 1e6)


def one_price(pricing, asins):
    items = [ITEMS[3] | {"asin": a, "pricing": pricing} for a in asins]
    return shop_of(items, dict.fromkeys(asins, INSTRUCTIONS[GOLD])).goals


def test_the_price_limit_is_the_larger_of_two_draws_from_the_next_four_steps():
    """$20 is not below $20: steps 30, 40, 50, 60. Of the 6 pairs 1 has the maximum 40, 2 have 50 and 3 have 60: of 600
    goals 100, 200 and 300, with standard deviations of sqrt(600 p (1 - p)) = 9, 12 and 12; the band is 4 of them."""
    asins = [f"P{i}" for i in range(600)]
    goals = one_price("$20.00", asins)
    counts = Counter(g.price_upper for g in goals)
    assert set(counts) == {40, 50, 60} and {g.price_upper for g in one_price("$19.99", asins[:60])} == {30, 40, 50}
    assert all(abs(counts[limit] - n) < 50 for limit, n in ((40, 100), (50, 200), (60, 300)))
    random.Random(233).shuffle(asins)
    assert [g.product.asin for g in goals] == asins              # the order is seed 233's


def test_two_shops_from_the_same_data_have_the_same_goals_whatever_the_global_seed():
    random.seed(1)
    first = shop_of(), shop_of(human=HUMAN)
    random.seed(2)
    for shop, other, kept in zip(first, (shop_of(), shop_of(human=HUMAN)), (SHOP, HUMAN_SHOP)):
        assert shop.goals == other.goals == kept.goals and shop.products == kept.products     # prices from ranges too


@pytest.mark.parametrize("split, edges", [
    ("original", {"test": (0, 500), "validation": (500, 1500), "train": (1500, None)}),
    ("release", {"test": (0, 500), "validation": (0, 500), "train": (500, None)})])
def test_train_shares_no_goal_with_test_and_validation(split, edges):
    env = envs.WebShop(generated_shop(), "made up", split=split)
    goals = env.shop.goals
    tasks = {name: env.tasks(name) for name in edges}
    for name, (first, last) in edges.items():
        assert [id(t.data) for t in tasks[name]] == [id(g) for g in goals[first:last]]
        assert all(t.goal == t.data.text and t.split == name for t in tasks[name])
    identities = (lambda t: t.id, lambda t: (t.data.text, t.data.product.asin), lambda t: id(t.data))
    for identity, other in itertools.product(identities, ("test", "validation")):
        train = {identity(t) for t in tasks["train"]}
        assert len(train) == len(tasks["train"]) == len(goals) - edges["train"][0]      # none twice within train either
        assert train.isdisjoint(identity(t) for t in tasks[other])
    assert len({t.id for ts in tasks.values() for t in ts}) == sum(map(len, tasks.values()))


# ---- 17. envs: WebShop, pages ----------------------------------------------------------------------------------------


def test_every_page_in_mode_text():
    play_red, head = visit(RED), f"Instruction: [SEP] {RED.text} [SEP] Back to Search [SEP] "
    assert play_red.start.observation == f"WebShop [SEP] Instruction: [SEP] {RED.text} [SEP] Search"
    results = walk(play_red, "search[Shade]")
    assert results.observation == head + f"Page 1 (Total results: 1) [SEP] Next > [SEP] {LAMP} [SEP] " \
        "Red Desk Lamp with Shade [SEP] $12.99"
    assert walk(play_red, "click[next >]", state=results).observation == \
        head + "Page 2 (Total results: 1) [SEP] < Prev [SEP] Next >"
    lamp = walk(play_red, f"click[{LAMP.lower()}]", state=results)
    assert lamp.observation == head + " [SEP] ".join([
        "< Prev", "color", "red", "dark blue", "black | white", "size", "small", "large", "Red Desk Lamp with Shade",
        "Price: $12.99", "Rating: N.A.", "Description", "Features", "Reviews", "Buy Now"])
    for name, text in (("description", " [SEP] A warm light."), ("reviews", ""),
                       ("features", " [SEP] Bright LED [SEP]  [SEP] Easy to wipe")):            # the empty bullet stays
        assert walk(play_red, f"click[{name}]", state=lamp).observation == head + "< Prev" + text
    gift = walk(play_red, "search[surprise]", f"click[{GIFT}]", "click[description]")
    assert gift.observation == head + "< Prev"  # the empty description goes


def test_the_last_page_tells_product_options_and_score():
    done = walk(visit(RED), *TO_LAMP, "click[red]", "click[small]", "click[buy now]")
    assert done.observation == " [SEP] ".join([
        "Thank you for shopping with us!", "Your code:", "None", "(Paste it in your MTurk interface.)", "Purchased",
        "asin", LAMP, "options", '{"color": "red", "size": "small"}', "attrs", "None", "category", "None", "query",
        "None", "product category", "None", "Target", "asin", "options", "attrs", "price upper", "instuction text",
        "category", "product category", "query", "Goal", "None", "Reward", "Your score (min 0.0, max 1.0)", "1.0",
        "Reward Details", "None"])
    assert done.done and done.success and (done.score, done.reward, done.steps) == (1.0, 10.0, 5)


def test_a_training_goal_that_reads_as_one_held_out_is_left_out():
    """Two spellings of two colours: each goal is there four times, and the shuffle spreads them over the splits."""
    values = [{"value": v} for v in ("Black/White", "black | white", "Red ", "red")]
    sizes = [{"value": str(n)} for n in range(5)]
    items = [ITEMS[0] | dict(asin=f"P{i}", customization_options={"Color": values, "Size": sizes}) for i in range(200)]
    entry = dict(attributes=["soft"], instruction_attributes=["soft"])
    shop = shop_of(items, {item["asin"]: entry | dict(instruction=f"find me {item['asin']}") for item in items})
    env = envs.WebShop(shop, "repeated")
    read = {name: {t.goal for t in env.tasks(name)} for name in ("train", "validation", "test")}
    assert read["train"] and not read["train"] & (read["test"] | read["validation"])
    assert [t.data for t in env.tasks("test")] == list(shop.goals[:500])
    assert f"train {len(env.tasks('train'))}, " in env.notice
    assert f"({4000 - 1500 - len(env.tasks('train'))} more read as one held out)" in env.notice
    alike = shop_of(items, {item["asin"]: entry | dict(instruction="find me a lamp") for item in items})
    with pytest.raises(ValueError, match="4000 goals, 2500 of them left out.*train"):
        envs.WebShop(alike, "all alike")


def test_the_order_of_two_clicks_does_not_make_another_anchor():
    market = visit(RED)
    one, two = (walk(market, *TO_LAMP, *order) for order in (("click[large]", "click[red]"), ("click[red]", "click[large]")))
    assert one.anchor == two.anchor != walk(market, *TO_LAMP, "click[small]", "click[red]").anchor


@pytest.mark.parametrize("name", ["split", "observation", "size", "goals"])
def test_an_unknown_setting_of_a_shop_is_named(name, tmp_path):
    data = write_shop(tmp_path) if name in ("size", "goals") else ""
    with pytest.raises(ValueError, match="'nonsense'.*unknown"):
        envs.make("webshop", data=str(data), compact=not data, **{name: "nonsense"})


def test_a_spacy_model_that_tags_no_nouns_is_refused(tmp_path):
    spacy = pytest.importorskip("spacy")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ValueError, match="blank.*tags nouns"):
        envs.Shop(ITEMS, INSTRUCTIONS, tagger=str(tmp_path / "blank"))


def test_mode_text_rich_keeps_the_blank_before_a_feature():
    lines = walk(visit(RED, observation="text_rich"), *TO_LAMP, "click[features]").observation.split("\n")
    assert [line for line in lines if line.startswith(" ")] == [f" {b}" for b in SHOP.products[LAMP].bullets]


def test_mode_text_rich_marks_buttons_opened_products_and_chosen_options():
    rich = visit(RED, observation="text_rich")
    assert rich.start.observation == f"WebShop\nInstruction:\n{RED.text}\n[button] Search [button_]\n"
    head = f"Instruction:\n{RED.text}\n[button] Back to Search [button_]\n"
    page = head + "Page 1 (Total results: 1)\n[button] Next > [button_]\n\n"
    tail = "\nRed Desk Lamp with Shade\n$12.99\n"
    assert walk(rich, "search[shade]").observation == page + f"[button] {LAMP} [button_]" + tail
    # Chosen first or last: "large" stands below "dark blue" on the page, so its line is written later, above the other.
    for order in (("click[large]", "click[dark blue]"), ("click[dark blue]", "click[large]")):
        chosen = walk(rich, *TO_LAMP, *order)
        assert chosen.observation == "You have clicked large.\nYou have clicked dark blue.\n" + head + (
            "[button] < Prev [button_]\ncolor\n  [button] red [button_]\n"
            "  [clicked button] dark blue [clicked button_]\n  [button] black | white [button_]\n"
            "size\n  [button] small [button_]\n  [clicked button] large [clicked button_]\n"
            "Red Desk Lamp with Shade\nPrice: $12.99\nRating: N.A.\n[button] Description [button_]\n"
            "[button] Features [button_]\n[button] Reviews [button_]\n[button] Buy Now [button_]\n")
    back = walk(rich, "click[< prev]", state=chosen)
    assert back.observation == page + f"[clicked button] {LAMP} [clicked button_]" + tail
    assert walk(rich, "search[shade]", state=back).observation == back.observation           # still the same visit
    anew = walk(rich, "click[back to search]", "search[shade]", state=back)
    assert anew.observation == page + f"[button] {LAMP} [button_]" + tail


def test_a_results_page_shows_ten_products_and_a_search_finds_at_most_fifty():
    """Six articles with ten products each match, and the best 50 are shown on pages of 10."""
    shop = generated_shop()
    market = visit(shop.goals[0], shop)
    state, seen = walk(market, "search[lamp chair desk kettle mug sofa]"), []
    for number in range(1, 7):
        assert f"Page {number} (Total results: 50)" in page_parts(state) and ("< Prev" in page_parts(state)) == (number > 1)
        seen.append([p for p in page_parts(state) if p in shop.products])
        state = walk(market, "click[next >]", state=state)
    assert [len(s) for s in seen] == [10] * 5 + [0] and len(set(sum(seen, []))) == 50


def test_a_word_that_one_product_has_finds_this_product_alone():
    found = {"shade": LAMP, "WOVEN": RUG, "surprise": GIFT, "shines": GOLD, "wool": SHIRT, "tray": TRAY, "floors": RUG}
    for word, asin in found.items():                # in title, description, first bullet or option
        assert [p for p in page_parts(walk(visit(RED), f"search[{word}]")) if p in SHOP.products] == [asin]
    both = [p for p in page_parts(walk(visit(RED), "search[desk shade]")) if p in SHOP.products]
    assert both == [LAMP, TRAY]                     # one has both words, the other, no rarer in it, one of them
    assert page_parts(walk(visit(RED), "search[zzz]"))[3] == "Page 1 (Total results: 0)"


# ---- 18. envs: WebShop, actions --------------------------------------------------------------------------------------


def test_admissible_actions_are_buttons_products_and_options_in_this_order():
    lamp, up = visit(RED), ("click[back to search]", "click[< prev]")
    assert lamp.start.admissible == ("search[<your query>]", "click[search]")
    assert walk(lamp, "click[search]") == dataclasses.replace(lamp.start, steps=1)       # valid, and nothing happens
    assert walk(lamp, "search[shade]").admissible == (up[0], "click[next >]", f"click[{LAMP.lower()}]")
    assert walk(lamp, *TO_LAMP).admissible == (*up, *(f"click[{t}]" for t in (
        "description", "features", "reviews", "buy now", "red", "dark blue", "black | white", "small", "large")))
    assert walk(lamp, *TO_LAMP, "click[reviews]").admissible == up
    shirt = walk(lamp, "search[linen]", f"click[{SHIRT}]")
    assert shirt.admissible[6:] == ("click[natural]", "click[red]", "click[wool]")           # without repeats


@pytest.mark.parametrize("action", [
    "buy now", "", "click[]", "search[]", "click[large", "open[red]", "click[search]", "search[a\nb]", "click[a[b]]",
    "search[shade[lamp]]", f"click[{TRAY}]", "click[<your query>]", " click[large]", "Click[large]"])
def test_anything_else_is_invalid_and_changes_nothing(action):
    lamp = visit(RED)
    before = walk(lamp, *TO_LAMP, "click[red]")
    after = walk(lamp, action, state=before)
    assert not after.valid and after == dataclasses.replace(before, steps=4, valid=False) and after.engine == before.engine


def test_a_search_works_from_any_page_and_clears_page_number_and_options():
    lamp = visit(RED)
    fresh = walk(lamp, "search[tray]")
    for way in ((), ("search[desk]", "click[next >]"), (*TO_LAMP, "click[red]"),
                (*TO_LAMP, "click[RED]", "click[features]")):
        state = walk(lamp, *way, "search[TRAY] please")         # in any case, and matched at the start
        assert state.valid and state.observation == fresh.observation and state.engine.chosen == ()
    done = walk(lamp, *TO_LAMP, "click[red]", "search[shade]", f"click[{LAMP}]", "click[buy now]")
    assert page_parts(done)[8] == "{}"


def test_prev_goes_one_page_up():
    """From a sub-page to the item, with its options; from the item to its page of the results, without them."""
    shop = generated_shop()
    market = visit(shop.goals[0], shop, "text_rich", max_steps=99)
    third = walk(market, "search[lamp chair desk kettle]", "click[next >]", "click[next >]")
    asin = next(a for a in third.admissible if a[6:-1].upper() in shop.products)
    item = walk(market, asin, state=third)
    chosen = walk(market, item.admissible[6], item.admissible[-1], state=item)
    assert chosen.observation.count("[clicked button]") == chosen.observation.count("You have clicked ") == 2
    for page in ("description", "features", "reviews"):
        assert walk(market, f"click[{page}]", "click[< prev]", state=chosen).observation == chosen.observation
    up = walk(market, "click[< prev]", state=chosen)
    assert "Page 3 " in up.observation and up.engine.chosen == ()
    assert "You have" not in walk(market, asin, state=up).observation
    both = walk(market, up.admissible[4], "click[< prev]", state=up)         # each product that was opened is marked
    assert both.observation.count("[clicked button]") == 2
    second = walk(market, "click[< prev]", state=up)
    assert "Page 2 " in second.observation and "Page 1 " in walk(market, "click[< prev]", state=second).observation
    assert walk(market, "click[back to search]", state=chosen).observation == market.start.observation
    assert walk(market, "click[back to search]", state=chosen).engine == market.start.engine


def test_a_second_value_of_a_group_replaces_the_first_and_a_shared_value_belongs_to_the_last_group():
    def bought(asin, word, *values):
        clicks = [f"click[{what}]" for what in (asin, *values, "buy now")]
        return json.loads(page_parts(walk(visit(RED), f"search[{word}]", *clicks))[8])
    assert bought(LAMP, "shade", "red", "small", "dark blue") == {"color": "dark blue", "size": "small"}
    assert bought(SHIRT, "linen", "natural") == {"material": "natural"}
    assert bought(SHIRT, "linen", "red", "natural", "wool") == {"color": "red", "material": "wool"}


def test_the_episode_ends_at_max_steps_without_a_score():
    short = visit(RED, max_steps=4)
    state = walk(short, *TO_LAMP, "click[red]", "nonsense")
    assert state.done and not state.success and (state.score, state.reward, state.steps) == (0.0, 0.0, 4)
    state = walk(visit(RED, max_steps=5), *TO_LAMP, "click[red]", "click[small]", "click[buy now]")
    assert state.done and state.score == 1.0                    # the last step may still be the purchase


# ---- 19. envs: WebShop, score ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal, asin, word, chosen, score", [
    (RED, LAMP, "shade", ["red", "small"], 1.0),                # 2 attributes + 2 options + price, of 2 + 2 + 1
    (RED, LAMP, "shade", ["red"], 4 / 5), (RED, LAMP, "shade", [], 3 / 5), (RED, LAMP, "shade", ["dark blue"], 3 / 5),
    # Tray: "bright" in its bullet, 30 is never above the limit; of the nouns red, desk, lamp, shade it has 1 / 4 > .2
    (RED, TRAY, "tray", [], 2 / 5), (RED, RUG, "rug", ["round"], 0.0),  # and the rug shares no noun
    (goal_of(LAMP, "dark blue", "large"), LAMP, "shade", ["dark blue", "large"], 1.0),  # "blue" is in the pair's words
    (goal_of(LAMP, "black | white", "large"), LAMP, "shade", ["black | white", "large"], 1.0),
    (goal_of(RUG, "round"), RUG, "rug", ["round"], 1.0),
    (goal_of(RUG, "rectangular"), RUG, "rug", ["rectangular"], 2 / 3),  # chosen: "tan"; asked: the pair
    (goal_of(RUG, "rectangular", shop=HUMAN_SHOP), RUG, "rug", ["rectangular"], 1.0),  # both are "tan"
    (goal_of(SHIRT, "natural", "natural"), SHIRT, "linen", ["natural"], 1.0),  # one value hits both options
    (goal_of(SHIRT, "natural", "wool"), SHIRT, "linen", ["natural", "wool"], 3 / 4),  # both are materials: wool only
    (goal_of(GOLD), GOLD, "gold", [], 1.0)])
def test_the_score_of_a_purchase(goal, asin, word, chosen, score):
    state = walk(visit(goal), f"search[{word}]", f"click[{asin}]", *(f"click[{v}]" for v in chosen), "click[buy now]")
    assert state.done and state.score == pytest.approx(score)
    assert (state.reward, state.success) == ((10.0, True) if score == 1 else (0.0, False))
    assert page_parts(state)[-3] == str(state.score)


def score_of(goal_changes=(), chosen=(), **product_changes):
    """The score of a changed lamp for a changed goal for the lamp."""
    product = dataclasses.replace(SHOP.products[LAMP], **product_changes)
    return envs.purchase_score(product, list(chosen), dataclasses.replace(RED, **dict(goal_changes)), "stop-list")


@pytest.mark.parametrize("attribute, own, hit", [
    ("energy-saving", "energy saving", True), ("easy to clean", "easy clean", True),  # all words shared: 100
    ("desk lamp", "", True), ("wipe", "", True), ("warm light", "", True), ("cheap", "", False),  # on the page
    ("led  easy", "", True), ("led easy", "", False),  # bullets are joined by a blank, so around the empty one are two
    # No word in common: 2 * common letters / all letters: 12 / 14 = 86, 10 / 12 = 83, 34 / 40 = 85 is not above 85
    ("stripes", "striped", True), ("matter", "matted", False), ("a" * 17 + "xyz", "a" * 17 + "bcd", False)])
def test_an_attribute_counts_if_known_or_written_on_the_page(attribute, own, hit):
    assert bool(score_of({"attributes": (attribute,)}, attributes=(own,)).attributes) is hit
    assert not own or bool(score_of({"options": (attribute,)}, [own]).options) is hit  # options compare in the same way


@pytest.mark.parametrize("asked, chosen, hit", [
    ("dark", "dark navy", True), ("navy", "dark navy", False), ("royal blue", "sky blue", True),
    ("tan", "titanium", True), (("color", "navy"), "navy", True), (("color", "navy"), "dark navy", False),
    (("color", "dark navy"), "dark", True),
    (("color", "dark navy"), "navy", True), (("size", "small"), "smaller", False)])
def test_an_option_is_compared_by_its_first_colour_in_the_alphabet(asked, chosen, hit):
    """"dark" < "navy". A pair has the colour that equals a member, ("color", "navy") navy; else its words count."""
    assert bool(score_of({"options": (asked,)}, [chosen]).options) is hit


def test_closed_class_words_are_no_nouns_and_the_price_counts_up_to_the_limit():
    assert envs.title_nouns("The Lamp for My Desk, with a lamp", "stop-list") == ("lamp", "desk", "lamp")
    assert score_of({"price_upper": 12.99}).price and not score_of({"price_upper": 12.98}).price
    assert score_of({"price_upper": 12.98}, ["red", "small"]).total == pytest.approx(4 / 5)


@pytest.mark.parametrize("bought, asked, same_query, crumbs, kind", [
    ("tray", "lamp shade", True, 3, 0.0),                       # no noun in common, whatever else
    ("lamp", "lamp m b c d e f g h j k", True, 3, 0.1),                 # 1 of 11
    ("lamp", "lamp m b c d e f g h j", False, 1, 0.5),          # 1 of 10 is not below .1, and not above .2
    ("lamp", "lamp m b c d", False, 1, 0.5),                    # 1 of 5 is not above .2
    ("lamp", "lamp m b c", False, 0, 1.0),                      # 1 of 4 is
    ("lamp", "lamp m b c d", False, 2, 1.0), ("lamp", "lamp m b c d", True, 0, 1.0),
    ("lamp", "lamp lamp lamp lamp lamp desk", False, 1, 0.5),   # 1 of 6: repeats count below the line
    ("lamp lamp desk", "lamp desk m b c d e f g h", False, 0, 0.5),                         # 2 of 10: but not above it
    ("lamp", "with the", False, 1, 0.5), ("lamp", "12 of", True, 0, 1.0)])                  # no nouns: .2
def test_the_type_of_a_purchase(bought, asked, same_query, crumbs, kind):
    wanted = dataclasses.replace(SHOP.products[LAMP], name=asked.title())
    mine = frozenset(["Home", "Lighting", "Desk Lamps"][:crumbs] + ["Other"])
    query = "lamp" if same_query else "other"
    got = score_of({"product": wanted}, ["red", "small"], name=bought.upper(), crumbs=mine, query=query)
    assert got.type == kind and got.total == pytest.approx(kind)            # all else is met: "bright" is in a bullet


WORDS = st.sampled_from(["red", "small", "dark blue", "tan", "", "???", "ü", "easy clean", "rectangular", "x" * 300])


@settings(deadline=None, max_examples=100)
@given(st.lists(WORDS, max_size=4), st.lists(WORDS | st.tuples(WORDS, WORDS), max_size=4), st.lists(WORDS),
       WORDS, WORDS)
def test_a_score_lies_between_0_and_1_and_one_more_choice_never_lowers_it(attributes, options, chosen, more, name):
    goal = {"attributes": tuple(attributes), "options": tuple(options)}
    fewer, all_ = score_of(goal, chosen, name=name), score_of(goal, [*chosen, more], name=name)
    assert 0 <= fewer.total <= all_.total <= 1


# ---- 20. envs: WebShop, any sequence of actions ----------------------------------------------------------------------


NASTY = ["search[]", "click[]", "click[a[b]]", "search[a\nb]", "search[<b>]", "<b>", "search[<r>]", "search[desk]",
         "[]", "\n", "", "search[ ]", "search[" + "x" * 10_000 + "]", "search[" + "lamp " * 2000 + "]", "x" * 10_000,
         "click[buy now]", "search[ünïcødé 灯 🛋]", "search[\0]", "search[red and not (small or \"large\") ~*?:^]",
         "click[< prev]", "click[İ]", "search[%s {0} {goal}]", "<|im_end|>", "search[red natural small round shirt]"]


def bare(rich):
    """The texts of a `text_rich` page without their marks."""
    lines = [line.strip() for line in rich.split("\n") if line.strip() and not line.startswith("You have clicked ")]
    return [re.sub(r"^\[(?:clicked )?button\] (.*) \[(?:clicked )?button_\]$", r"\1", line) for line in lines]


@settings(deadline=None, max_examples=120)
@given(st.sampled_from([*SHOP.goals[:5], *HUMAN_SHOP.goals, *generated_shop().goals[:3]]),
       st.lists(st.integers(0, 40) | st.sampled_from(NASTY), max_size=20))
@example(RED, ["search[shade]", 2, 6, 9, 5])
@example(RED, ["click[buy now]", "search[desk]", "click[buy now]", 2, 3, "click[buy now]", 1, "click[buy now]"])
def test_no_sequence_of_actions_leaves_the_rules(goal, moves):
    shop = next(s for s in (SHOP, HUMAN_SHOP, generated_shop()) if goal in s.goals)
    plain, rich = visit(goal, shop), visit(goal, shop, "text_rich")
    state, twin, history = plain.start, rich.start, []
    for move in moves:
        action = state.admissible[move % len(state.admissible)] if isinstance(move, int) else move
        before = copy.deepcopy(state)
        after, twin = plain.step(state, action), rich.step(twin, action)
        assert plain.step(state, action) == after and state == before and state.engine == before.engine     # immutable
        assert after.valid or not isinstance(move, int) and after.admissible == state.admissible
        assert after.valid or after.observation == state.observation
        buys = action == "click[buy now]" and "Buy Now" in page_parts(state)
        assert action != "click[buy now]" or after.valid == buys
        assert after.done == (buys or after.steps == 15) and after.steps == state.steps + 1
        assert 0 <= after.score <= buys and after.success == (after.score == 1)
        assert after.engine.kind not in ("search", "results") or after.engine.chosen == ()
        assert bare(twin.observation) == [p for p in page_parts(after) if p] != [] and twin.observation.endswith("\n")
        assert dataclasses.replace(twin, observation="", anchor="") == dataclasses.replace(after, observation="", anchor="")
        history.append(envs.Turn(state.observation, action))
        for style, shown in itertools.product(("full", "compact"), (after, twin)):
            assert goal.text in envs.render_prompt(goal.text, shown, history, style=style, world="webshop")
        state = after
        if state.done:
            break


# ---- 21. envs: WebShop, the made-up catalogue ------------------------------------------------------------------------


def test_a_made_up_catalogue_follows_from_its_seed():
    first = envs.generate_catalogue(5, 60)
    assert first == envs.generate_catalogue(5, 60) and len(first[0]) == 60
    assert first[0] != envs.generate_catalogue(6, 60)[0]
    assert len(generated_shop().products) == 450 and generated_shop.__wrapped__().goals == generated_shop().goals


@pytest.mark.parametrize("seed", [0, 1])
def test_every_goal_of_a_made_up_catalogue_can_be_met(seed):
    for goal in generated_shop(seed).goals:
        assert envs.purchase_score(goal.product, [v for _, v in goal.options], goal, "stop-list").total == 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_four_brands_of_a_made_up_catalogue_make_three_special_things_each(seed):
    made = defaultdict(Counter)
    for item in envs.generate_catalogue(seed, 450)[0]:
        for quality in item["small_description"][1:]:
            made[quality][item["asin"].rstrip("0123456789")] += 1
    usual = {quality: count.most_common(1)[0] for quality, count in made.items()}
    assert len(usual) == 12 and sorted(Counter(brand for brand, _ in usual.values()).values()) == [3] * 4
    share = sum(n for _, n in usual.values()) / sum(count.total() for count in made.values())
    assert 0.92 < share < 0.99                                              # a loyalty of 0.95, and chance for the rest


def test_every_small_catalogue_has_goals_for_all_splits():
    for seed in range(0, 100, 100 // some(25)):
        assert len(envs.make("webshop", compact=True, seed=seed).tasks("train")) >= 200


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("words", [lambda task: task.data.product.query, lambda task: task.goal], ids=["article", "task"])
def test_to_buy_the_first_hit_earns_a_little_over_half_and_never_succeeds(seed, words):
    env, ends = envs.WebShop(generated_shop(seed), "made up"), []
    for task in env.tasks("train"):
        shopper = env.open(task)
        state = walk(shopper, f"search[{words(task)}]")
        state = walk(shopper, state.admissible[2], state=state)         # after Back to Search and Next >
        for _, value in task.data.options:
            if f"click[{value}]" in state.admissible:
                state = walk(shopper, f"click[{value}]", state=state)
        ends.append(walk(shopper, "click[buy now]", state=state))
    assert 0.5 <= sum(e.score for e in ends) / len(ends) <= 0.62 and not any(e.success for e in ends)


MEASURE = """
import json, random, sys, time
import envs
n, rng = int(sys.argv[1]), random.Random(0)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
words = ["".join(rng.choices("abcdefghilmnoprstu", k=rng.randint(3, 9))) for _ in range(60_000)]
weights = [1 / (i + 10) for i in range(len(words))]
items, instructions = envs.generate_catalogue(0, n)
for item in items:                                  # as long as real descriptions
    item["full_description"] += " " + " ".join(rng.choices(words, weights, k=200))
data = json.dumps([items, instructions])
del items, instructions, item
before, started = resident(), time.perf_counter()
shop = envs.Shop(*json.loads(data), tagger="stop-list")
load, grown = time.perf_counter() - started, resident() - before
env = envs.WebShop(shop, "measured", split="release")     # 300 products have too few goals for the other
queries = [" ".join([task.data.product.query, task.data.attributes[0], *rng.choices(words[:2000], k=3)])
           for task in rng.sample(env.tasks("train"), 200)]
started = time.perf_counter()
for query in queries:
    shop.search(query)
search = (time.perf_counter() - started) / len(queries)
steps, started = 0, time.perf_counter()
for task in rng.sample(env.tasks("train"), 200):
    game = env.open(task)
    state = game.step(game.start, f"search[{task.data.product.query} {rng.choice(words)}]")
    while not state.done:
        state = game.step(state, rng.choice(state.admissible))
        steps += 1
rate = steps / (time.perf_counter() - started)
print(json.dumps(dict(products=len(shop.products), load_s=load, mib=grown, search_ms=1000 * search, steps_per_s=rate)))
"""


@slow
@pytest.mark.parametrize("products", [300, 1000, 50_000])
def test_speed_and_memory_of_a_shop(products):
    """On one core: 2,000 steps/s, searches included; 50,000 products load in 30 s and 1 GB, and a search takes 10 ms."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(products)], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    print(got)
    assert got["steps_per_s"] > 2000 and got["load_s"] < 30 and got["mib"] < 950 and got["search_ms"] < 10


# ---- 22. envs: WebShop, prompts --------------------------------------------------------------------------------------


def test_the_full_prompt_quotes_the_page_after_the_task_and_lists_the_actions():
    page = "'Back to Search' [SEP] 'Page 1 (Total results: 1)' [SEP] 'Next >' [SEP] " \
        f"'{LAMP}' [SEP] 'Red Desk Lamp with Shade' [SEP] '$12.99'"
    lamp = visit(RED)
    state = walk(lamp, "search[shade]")
    prompt = envs.render_prompt(RED.text, state, [envs.Turn(lamp.start.observation, "search[shade]")], world="webshop")
    assert page in prompt and prompt.count(RED.text) == 1 and "Instruction:" not in prompt
    assert "'Search'" in prompt and f"'click[back to search]', 'click[next >]', 'click[{LAMP.lower()}]'" in prompt
    rich = walk(visit(RED, observation="text_rich"), "search[shade]")
    prompt = envs.render_prompt(RED.text, rich, [], world="webshop")
    assert prompt.count(RED.text) == 1 and rich.observation.partition(f"{RED.text}\n")[2] in prompt


@pytest.mark.parametrize("style", ["full", "compact"])
def test_a_prompt_keeps_the_last_turns_only(style):
    lamp, actions = visit(RED), ("search[floors]", "search[desk]", "search[zzz]", *TO_LAMP)
    state, history = lamp.start, []
    for action in actions:
        history.append(envs.Turn(state.observation, action))
        state = lamp.step(state, action)
    for window in (0, 1, 2, 4):
        prompt = envs.render_prompt(RED.text, state, history, style=style, window=window, world="webshop")
        past = prompt.partition("You can take")[0]              # the actions that follow in "full" are no history
        shown = [a for a in actions if a in past]
        assert shown == list(actions[len(actions) - window:])


def test_the_compact_prompt_marks_what_can_be_clicked_with_brackets():
    """And, by a star, the parts that the task names: its red and its small."""
    results = f"[Back to Search] Page 1 (Total results: 1) ; [Next >] [{LAMP}] Red Desk Lamp with Shade ; $12.99 ;"
    lamp = "[Back to Search] [< Prev] color ; [* red] [dark blue] [black | white] size ; [* small] [large] Red Desk Lamp " \
        "with Shade ; Price: $12.99 ; Rating: N.A. ; [Description] [Features] [Reviews] [Buy Now]"
    for way, page in (((), "[Search]"), (TO_LAMP[:1], results), (TO_LAMP, lamp)):
        prompt = envs.render_prompt(RED.text, walk(visit(RED), *way), [], style="compact", world="webshop")
        assert page in prompt and prompt.count(RED.text) == 1


@pytest.mark.parametrize("style", ["full", "compact"])
@pytest.mark.parametrize("mode", ["text", "text_rich"])
def test_markup_in_texts_does_not_break_a_prompt(style, mode):
    title, text = "{goal} {0} }{ %s <|im_start|> [SEP] </s> zebra", "buy {skill} [SEP] <|im_end|> {"
    shop = shop_of([article("tray", title, "$5.00", {"{Color}": ["{x} [SEP] y", "<b>"]}, ["{", "[SEP]"], "{history}")],
                {TRAY: wish(text, "{")})
    task = shop.goals[0]
    stall = visit(task, shop, mode)
    to_item = ("search[zebra]", f"click[{TRAY}]")
    for way in ((), to_item[:1], to_item, *((*to_item, f"click[{t}]") for t in ("<b>", "features", "buy now"))):
        state = walk(stall, *way)
        assert state.valid
        turn = envs.Turn(state.observation, "{action}")
        prompt = envs.render_prompt(task.text, state, [turn], style=style, world="webshop")
        assert task.text in prompt and "{action}" in prompt and (style == "compact" or prompt.count(task.text) == 1)
        if way == to_item and (style, mode) != ("compact", "text_rich"):
            assert all(piece in prompt for piece in ("{goal} {0} }{ %s <|im_start|>", "</s> zebra", "{color}"))


@pytest.mark.parametrize("style", ["full", "compact"])
@pytest.mark.parametrize("words", [" buy gold", "  buy gold", "buy gold "])
def test_blanks_around_a_task_do_not_cost_the_page(style, words):
    """Pages strip the task, and without a price limit ($1200) nothing follows the instruction."""
    shop = shop_of(human={GOLD: [{"instruction": words, "instruction_attributes": ["heavy"], "instruction_options": []}]})
    task = shop.goals[0]
    state = walk(visit(task, shop), "search[gold]")
    prompt = envs.render_prompt(task.text, state, [], style=style, world="webshop")
    assert GOLD in prompt and prompt.count(words.strip()) == 1 and "Instruction:" not in prompt


# ---- 23. siri: the policy --------------------------------------------------------------------------------------------

def config(**overrides):
    return siri.resolve({"preset": "smoke", **overrides})[0]


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
    return awake(siri.Policy(config()))


@pytest.fixture(scope="module")
def stranger_folder(tmp_path_factory):
    """A model as others publish them: byte-level BPE, ChatML, untied head. Its vocabulary is padded with rows that
    shout, and its generation_config asks for another distribution than the model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    folder = tmp_path_factory.mktemp("stranger")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(envs.PROMPTS.values(), trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    bpe.save(str(folder / "tokenizer.json"))
    template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "chat_template": template}))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.3, max_position_embeddings=4096))
    model.lm_head.weight.data[bpe.get_vocab_size():] *= 100
    model.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 0], do_sample=True, top_k=5, top_p=0.5, temperature=0.3, repetition_penalty=3.0,
                     min_new_tokens=3, suppress_tokens=list(range(50, 200))).save_pretrained(folder)
    return folder


def stranger_config(folder, **overrides):
    return siri.resolve({"preset": "paper", "four_bit": False, "model": str(folder), "lora_r": 4, "gen_tokens": 10**6,
                         "max_response": 8, "max_steps": 2, **overrides})[0]


@pytest.fixture(scope="module")
def stranger(stranger_folder):
    return awake(siri.Policy(stranger_config(stranger_folder)))


def offline(monkeypatch):
    """No attempt to reach the model hub, as with HF_HUB_OFFLINE=1 in the environment."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def some_rows(policy):
    """Prompts and responses of very unequal length."""
    torch.manual_seed(0)
    return [siri.Row(policy.encode("look " * n), torch.randint(4, policy.vocab, (m,)).tolist(), a)
            for n, m, a in ((1, 4, 1.0), (40, 4, -0.5), (3, 9, 2.0), (20, 1, 0.3), (7, 4, -1.0))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generating_leaves_the_gradients_of_4bit_layers_alone(stranger_folder):
    """Some 4-bit kernels repack the weights on the first generation and lose their autograd."""
    policy = awake(siri.Policy(stranger_config(stranger_folder, four_bit=True)))
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
    expected = n * logp.exp().double().numpy()
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
    with pytest.raises(siri.UserError, match="single row.*--max-prompt"):
        policy.generate(prompts, 0.0, 8)


def test_token_budgets_follow_from_what_two_probes_of_each_kind_take(policy, monkeypatch):
    """A device of 24 GiB on which generating takes 1 MiB a row and training 3 MiB a row, above 5 GiB of weights."""
    gib, mib = 2**30, 2**20
    policy, taken, told = copy.copy(policy), [], []
    policy.cfg = dataclasses.replace(policy.cfg, max_prompt=100, max_response=28, memory_gib=20.0)
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
    with pytest.raises(siri.UserError, match="--memory-gib 4.0: 8 rows of 128 tokens do not fit"):
        policy.fit()


@pytest.mark.parametrize("name", ["policy", "stranger"])
def test_logprobs_equal_the_models_own_logits_in_any_batch(request, name):
    policy = request.getfixturevalue(name)
    rows = some_rows(policy)
    with torch.no_grad():
        logp, entropy = policy.logprobs(rows)
        for row, mine, h in zip(rows, *(x.split([len(r.response) for r in rows]) for x in (logp, entropy))):
            logits = policy.model(input_ids=torch.tensor([row.prompt + row.response])).logits[0]    # (T, V)
            logits = logits[len(row.prompt) - 1:-1, :policy.vocab].float()
            full = torch.distributions.Categorical(logits=logits)
            torch.testing.assert_close(mine, full.log_prob(torch.tensor(row.response)), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(h, full.entropy(), rtol=1e-3, atol=1e-3)


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
        assert stranger.neutralise(text) == text and text in stranger.decode(stranger.encode(text))


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
    with pytest.raises(siri.UserError, match=says) as caught:
        siri.Policy(stranger_config(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# ---- 24. siri: rollouts ----------------------------------------------------------------------------------------------

@pytest.fixture()
def small():
    """The world of the smoke preset."""
    return siri.make_environment(config())


def teach(policy, monkeypatch, say):
    """Replace sampling: `say(k)` gives the texts of the k responses that are asked for."""
    ids = lambda text: policy.tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(policy, "generate", lambda prompts, *_: [ids(text) for text in say(len(prompts))])


def winner_and_mumbler(policy, monkeypatch, env, task, skill=None):
    """A group of two: the first plays the oracle's commands, the second never says anything parsable."""
    commands = envs.oracle_walkthrough(envs.pddl_game(task.data))
    script = iter(f"<think>find it</think><action>{command}</action>" for command in commands)
    teach(policy, monkeypatch, lambda k: [next(script), "look"] if k == 2 else ["look"])
    return siri.rollout(policy, env, [(task, [skill, None])], 1.0)[0], commands


def bare_run(policy, **state):
    """A Run without folder and environment."""
    run = object.__new__(siri.Run)
    run.cfg, run.policy, run.progress, run.bank = policy.cfg, policy, siri.Progress(), SkillBank(n_eval=1)
    vars(run).update(state)
    return run


def test_rollout_records_what_was_seen_said_and_won(policy, monkeypatch, small):
    task = small.tasks("train")[0]
    (winner, mumbler), commands = winner_and_mumbler(policy, monkeypatch, small, task)
    assert winner.success and [s.action for s in winner.steps] == commands and all(s.valid for s in winner.steps)
    assert [s.reward for s in winner.steps] == [0.0] * (len(commands) - 1) + [10.0]
    assert not mumbler.success and len(mumbler.steps) == small.max_steps
    assert all(s.action == "" and not s.valid and s.reward == 0 for s in mumbler.steps)
    assert mumbler.steps[1].observation == "Nothing happens."
    with small.open(task) as game:
        state, turns = game.start, []
        for step in winner.steps:
            assert step.observation == state.observation and step.anchor == state.anchor
            prompt = envs.render_prompt(task.goal, state, turns, style="compact", window=policy.cfg.history)
            assert step.prompt == policy.encode(prompt)
            turns.append(envs.Turn(state.observation, step.action))
            state = game.step(state, step.action)


def test_g6_of_a_winner_and_a_mumbler_by_hand(policy, monkeypatch, small):
    group, commands = winner_and_mumbler(policy, monkeypatch, small, small.tasks("train")[0])
    bare_run(policy).score(group)
    winner, mumbler = ([s.advantage for s in e.steps] for e in group)
    # Two returns, 10 and 0: A^E = +-sqrt(1/2). They share the first state only, where the discounted returns differ.
    one = math.sqrt(0.5)
    charge = policy.cfg.invalid_penalty
    assert winner == pytest.approx([2 * one] + [one] * (len(commands) - 1)) and charge > 0
    assert mumbler == pytest.approx([-2 * one - charge] + [-one - charge] * (small.max_steps - 1))


def test_a_group_starts_in_one_state_and_the_skill_is_only_in_its_half(policy, small):
    skill = SkillBank().add("the task needs apple", "look in fridge first", born=0, source="game")
    tasks = [small.tasks("train")[i] for i in range(3)]
    torch.manual_seed(0)
    for group in siri.rollout(policy, small, [(task, [skill, skill, None, None]) for task in tasks], 1.0):
        first = [e.steps[0] for e in group]
        assert len({(s.observation, s.anchor) for s in first}) == 1
        assert first[0].prompt == first[1].prompt != first[2].prompt == first[3].prompt == first[0].plain
        assert "look in fridge" in policy.decode(first[0].prompt) and "look in" not in policy.decode(first[2].prompt)
        assert all((s.plain is None) == (e.skill is None) for e in group for s in e.steps)


def test_a_model_that_never_saw_this_task_plays_invalid_actions(stranger, plans):
    """The code path of the paper preset, with a small local model of the same kind, on a full-size game."""
    env = envs.AlfWorld.generated(0, max_steps=2)
    torch.manual_seed(0)
    group, = siri.rollout(stranger, env, [(small_game(plans), [None] * 4)], 1.0)
    assert [len(e.steps) for e in group] == [2] * 4
    assert all(not s.valid and s.action == "" and 1 <= len(s.response) <= 8 for e in group for s in e.steps)
    assert "You are acting in a household" in stranger.decode(group[0].steps[0].prompt)


class Faulty:
    """A world in which some games break: when opened (`at` is 0) or in their step number `at`."""

    def __init__(self, world, breaks, at):
        self.world, self.breaks, self.at = world, breaks, at

    def __getattr__(self, name):
        return getattr(self.world, name)

    def open(self, task):
        if self.breaks(task) and not self.at:
            raise OSError("disk on fire")
        game = self.world.open(task)
        play_on = game.step

        def step(state, action):
            if self.breaks(task) and state.steps + 1 == self.at:
                raise OSError("disk on fire")
            return play_on(state, action)

        game.step = step
        return game


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_environment_that_raises_loses_its_own_group_only(policy, small, at):
    tasks = [small.tasks("train")[i] for i in range(3)]
    failures, env = [], Faulty(small, lambda task: task.id == tasks[1].id, at)
    torch.manual_seed(0)
    groups = siri.rollout(policy, env, [(task, [None] * 2) for task in tasks], 1.0, failures)
    assert [len(group) for group in groups] == [2, 0, 2]
    assert all(e.success or len(e.steps) == small.max_steps for e in groups[0] + groups[2])
    assert failures == [f"{tasks[1].id}: OSError: disk on fire"]


def test_a_state_with_more_actions_than_a_prompt_can_list_loses_its_own_group_only(policy, small):
    """As a product with thousands of options would be. Where it is the first state, the settings are at fault."""
    many = tuple(f"go to shelf {n}" for n in range(999))

    class Wide(Faulty):
        def open(self, task):
            game = self.world.open(task)
            play_on = game.step
            game.step = lambda state, action: dataclasses.replace(
                play_on(state, action), **dict(admissible=many) if self.breaks(task) else {})
            if self.at == 0:
                game.start = dataclasses.replace(game.start, admissible=many)
            return game

    tasks, failures = [small.tasks("train")[i] for i in range(3)], []
    world = Wide(small, lambda task: task.id == tasks[1].id, 1)
    torch.manual_seed(0)
    groups = siri.rollout(policy, world, [(task, [None] * 2) for task in tasks], 1.0, failures)
    assert [len(group) for group in groups] == [2, 0, 2] and len(failures) == 1
    assert failures[0].startswith(f"{tasks[1].id}: UserError: --max-prompt {policy.cfg.max_prompt}: too short")
    with pytest.raises(siri.UserError, match="--max-prompt.*too short"):
        siri.rollout(policy, Wide(small, lambda task: True, 0), [(tasks[0], [None] * 2)], 1.0, failures)


def test_an_evaluation_that_lost_every_game_is_no_result(policy, small):
    world, panel = Faulty(small, lambda task: True, 1), [small.tasks("train")[i] for i in range(2)]
    with pytest.raises(siri.UserError, match="every game.*disk on fire"):
        siri.evaluate(policy, world, panel, policy.cfg, "x")


def test_more_than_a_twentieth_of_broken_groups_stops_the_run_with_the_cause(tmp_path, monkeypatch, capsys, small):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(siri, "make_environment", lambda cfg: Faulty(small, lambda task: task.split == "train", 1))
    assert siri.main(f"{SMALL} --panel 1 --warmup-max 9".split()) == 2
    out, err = capsys.readouterr()
    assert "a group is lost: " in out and "disk on fire" in out
    assert re.fullmatch(r"siri: .*limit 5%.*disk on fire.*--resume runs/x", err.splitlines()[-1])


@pytest.mark.parametrize("name", ["policy", "stranger"])
def test_a_prompt_that_is_too_long_loses_history_then_observation_never_the_skill(request, monkeypatch, name):
    policy = request.getfixturevalue(name)
    task = envs.Task("x", "k", "put a apple in shelf", "train")
    state = envs.State("You arrive at desk 1. " + "On the desk 1, you see a mug 1. " * 9, ("look", "go to desk 1"), "")
    turns = [envs.Turn(f"You arrive at shelf {i}.", f"go to shelf {i}") for i in range(4)]
    prompts = [policy.encode(envs.render_prompt(task.goal, state, turns, skill="look in fridge first",
                                                style=policy.cfg.prompt_style, window=w)) for w in range(3)]
    limits = [(len(p), p) for p in prompts] + [(len(prompts[2]) - 1, prompts[1]), (len(prompts[1]) - 1, prompts[0])]
    for limit, expected in limits:
        monkeypatch.setattr(policy, "cfg", dataclasses.replace(policy.cfg, max_prompt=limit))
        assert siri.fit_prompt(policy, task, state, turns, "look in fridge first") == expected
    monkeypatch.setattr(policy, "cfg", dataclasses.replace(policy.cfg, max_prompt=len(prompts[0]) - 60))
    ids = siri.fit_prompt(policy, task, state, turns, "look in fridge first")
    assert len(ids) <= len(prompts[0]) - 60 and ids[:2] == prompts[0][:2] and ids[-3:] == prompts[0][-3:]
    assert "look in fridge first" in policy.decode(ids) and "put a apple in shelf" in policy.decode(ids)


@pytest.mark.parametrize("observation", ["text", "text_rich"])
def test_any_chat_model_can_shop_with_the_full_prompt(stranger_folder, observation):
    """The paper preset's path: 1,000 products, quoted pages, prompts that fit, a skill in the prompt of its half only."""
    cfg = stranger_config(stranger_folder, env="webshop", observation=observation, max_prompt=900, webshop_tagger="stop-list")
    env, policy = siri.make_environment(cfg), siri.Policy(cfg)
    task = env.tasks("train")[0]
    group, = siri.rollout(policy, env, [(task, [Skill(0, "it rains", "look at acme first", 0, ""), None])], 1.0)
    assert len(env.shop.products) == 1000 and [len(e.steps) for e in group] == [2, 2]
    for episode in group:
        for step in episode.steps:
            text = policy.tokenizer.decode(step.prompt)
            assert len(step.prompt) <= 900 and task.goal in text and ("look at acme first" in text) == bool(episode.skill)
            assert "search[<your query>]" in text and (step.plain is None) == (episode.skill is None)
        assert (episode.success, episode.score) == (False, 0.0)


# ---- 25. siri: updates, mining and gating ----------------------------------------------------------------------------

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


def gated_rows(policy):
    return [siri.Row(r.prompt, r.response, gate=[k % 2 == 0 for k in range(len(r.response))], weight=w)
            for r, w in zip(some_rows(policy), (0.5, 0.0, 1.0, 0.25, 0.75))]


def close(a, b):
    """Equal up to float noise, relative to the largest entry."""
    assert b.abs().max() > 1e-4
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_an_update_does_not_depend_on_its_micro_batches(policy):
    rl, internal = some_rows(policy), gated_rows(policy)
    whole = gradient(policy, rl, internal, kl_beta=0.1)
    for update_tokens in (1, 100):
        close(gradient(policy, rl, internal, kl_beta=0.1, update_tokens=update_tokens), whole)


def test_an_update_that_is_not_finite_changes_nothing_and_the_third_in_a_row_stops(policy, monkeypatch):
    cfg = dataclasses.replace(policy.cfg, minibatch=99, kl_beta=0.0)
    sgd, real = torch.optim.SGD(policy.trainable, lr=1.0), policy.logprobs
    update = lambda bad: siri.update(policy, sgd, some_rows(policy), [], 0.0, cfg, np.random.default_rng(0), bad)
    before = [p.detach().clone() for p in policy.trainable]
    for poison in (math.nan, math.inf):
        monkeypatch.setattr(policy, "logprobs", lambda rows: [x * poison for x in real(rows)])
        stats = update(1)
        assert (stats["skipped_steps"], stats["bad_steps"]) == (1, 2)
        assert all(torch.equal(p, old) for p, old in zip(policy.trainable, before))
        with pytest.raises(siri.UserError, match="three updates in a row .* not finite.*--lr"):
            update(2)
        assert all(torch.equal(p, old) and p.grad is None for p, old in zip(policy.trainable, before))
    monkeypatch.setattr(policy, "logprobs", real)
    stats = update(2)
    assert (stats["skipped_steps"], stats["bad_steps"]) == (0, 0)               # a good one ends the row
    assert not all(torch.equal(p, old) for p, old in zip(policy.trainable, before))
    with torch.no_grad():
        for p, old in zip(policy.trainable, before):
            p.copy_(old)


@pytest.mark.parametrize("change, says", [
    ({}, None), (dict(skipped_steps=2), "2 updates skipped"), (dict(zero_signal_groups=4), "no group had a signal"),
    (dict(kl=1.2), "KL 1.20 is above 1.0.*--kl-beta"), (dict(entropy=0.001), "entropy 0.0010 is below 0.01.*--lr"),
    (dict(entropy=0.0, rows=0), None)])
def test_what_keeps_a_run_from_learning_is_said(change, says):
    row = dict(skipped_steps=0, groups=4, zero_signal_groups=3, kl=0.1, entropy=0.2, rows=9) | change
    found = siri.warnings_of(row, siri.Config())
    assert found == [] if says is None else len(found) == 1 and re.match(says, found[0])


def test_an_update_is_the_gradient_of_the_loss_over_all_sampled_tokens(policy):
    """S10 written out for all rows at once: on-policy G7, beta G8, lambda S9, each with one denominator."""
    rl, internal = some_rows(policy), gated_rows(policy)
    logp, _ = policy.logprobs(rl)
    with torch.no_grad(), policy.model.disable_adapter():
        reference, _ = policy.logprobs(rl)
    advantage = torch.cat([torch.full((len(r.response),), r.advantage) for r in rl])
    plain, _ = policy.logprobs(internal)
    weight = torch.cat([torch.full((len(r.response),), r.weight) for r in internal])
    gate = torch.tensor([g for r in internal for g in r.gate])
    d = reference - logp
    loss = (-(advantage * logp) + 0.1 * (d.exp() - d - 1)).sum() / len(logp)
    loss = loss - 0.3 * (weight * plain)[gate].sum() / gate.sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.trainable)])
    close(gradient(policy, rl, internal, lam=0.3, kl_beta=0.1), expected)


def test_rows_without_advantage_or_weight_still_count_in_the_denominators(policy):
    row = some_rows(policy)[0]
    silent = dataclasses.replace(row, advantage=0.0)
    close(2 * gradient(policy, [row, silent]), gradient(policy, [row]))
    row = dataclasses.replace(row, gate=[True] * 3 + [False], weight=0.5)
    silent = dataclasses.replace(row, weight=0.0)
    close(2 * gradient(policy, [], [row, silent]), gradient(policy, [], [row]))


def test_the_clip_bounds_how_far_later_steps_of_an_iteration_go(policy):
    """Four copies of a one-token row, an optimizer step each: once the ratio is past 1 + eps, nothing moves."""
    row = dataclasses.replace(some_rows(policy)[3], advantage=0.1)
    free = gradient(policy, [row] * 4, minibatch=1, clip=1e9)
    clipped = gradient(policy, [row] * 4, minibatch=1, clip=1e-3)
    close(clipped, gradient(policy, [row], minibatch=1))
    assert free.norm() > 1.5 * clipped.norm()


def test_the_shortest_plain_win_of_a_task_is_kept_with_what_followed_each_action(policy, monkeypatch, small):
    task, run = small.tasks("train")[0], bare_run(policy)
    (winner, mumbler), commands = winner_and_mumbler(policy, monkeypatch, small, task)
    slower = dataclasses.replace(winner, steps=winner.steps * 2)
    guided = dataclasses.replace(winner, skill="advice", steps=winner.steps[:1])
    run.remember([[slower, winner, mumbler], [guided]])
    assert run.progress.solved == [task.id] and run.progress.recent == [pytest.approx(2 / 3)]
    with small.open(task) as game:
        states = [game.start]
        for command in commands:
            states.append(game.step(states[-1], command))
    (win,) = run.progress.wins
    assert (win["task"], win["goal"]) == (task.id, task.goal)
    assert [tuple(step) for step in win["steps"]] == [(c, s.observation) for c, s in zip(commands, states[1:])]
    run.remember([])
    assert run.progress.recent == [pytest.approx(2 / 3)]                    # no number is made of no episodes
    run.cfg = dataclasses.replace(run.cfg, variant="gigpo")
    run.remember([[winner]])
    assert len(run.progress.wins) == 1


def test_mining_reads_wins_adds_skills_and_counts_what_it_rejects(policy, monkeypatch):
    said = ["<skill>when the task needs apple -> look in fridge first</skill>", "look in fridge",
            "<skill>When the task needs apple -> look in fridge first</skill>"]
    asked = []
    teach(policy, monkeypatch, lambda k: said[:k])
    monkeypatch.setattr(policy, "encode", lambda text: asked.append(text) or [0])
    run = bare_run(policy)
    run.progress.iteration = 7
    run.progress.wins = [dict(task=f"game {i}", goal="put a apple in shelf", steps=[["go to fridge 1", "You see."]])
                         for i in range(3)]
    assert run.mine() == 1 and run.progress.wins == [] and run.mine() == 0
    assert all("apple in shelf" in text and "go to fridge 1" in text for text in asked) and len(asked) == 3
    skill, = run.bank.skills
    assert (skill.source, skill.born, skill.state) == ("game 0", 7, "candidate")
    assert run.bank.rejected == {"unparsable": 1, "duplicate": 1}


def test_a_won_pair_is_measured_and_gated_on_its_action_tokens(policy, monkeypatch, small):
    run = bare_run(policy, bank=bank_with("the task needs apple", n_eval=1, kappa=1.0, tau_up=0.1))
    skill = run.bank.skills[0]
    group, commands = winner_and_mumbler(policy, monkeypatch, small, small.tasks("train")[0], skill)
    run.score(group)
    effect = run.measure(group)
    assert effect == 1.0 and skill.effects == [[0, 1.0]] and skill.state == "active"
    gate = lambda effect: run.gate(run.guided(group, effect))
    is_open = lambda rows: any(any(row.gate) for row in rows)
    rows = gate(effect)
    assert [r.prompt for r in rows] == [s.plain for s in group[0].steps] and len(rows) == len(commands)
    for row, step, command in zip(rows, group[0].steps, commands):
        assert policy.decode([t for t, g in zip(row.response, row.gate) if g]) == command
        assert row.response == step.response and row.weight == pytest.approx(min(step.advantage / 2, 1))
    assert not is_open(gate(0.0))                                           # the pair gained nothing
    kept = run.guided(group, 1.0)
    skill.effects = [[0, -1.0]]
    assert not is_open(run.gate(kept))                                      # the skill has turned out to be of no use
    run.cfg = dataclasses.replace(run.cfg, variant="no_gate")
    assert [r.gate for r in gate(0.0)] == [r.gate for r in rows]
    run.cfg = dataclasses.replace(run.cfg, variant="no_advantage")
    skill.effects = [[0, 1.0]]
    assert not is_open(gate(0.0)) and {r.weight for r in gate(1.0)} == {1.0}
    assert run.measure([e for e in group if e.skill is None]) is None


@pytest.mark.parametrize("variant", ["siri", "random_skill"])
def test_groups_get_the_skill_that_matches_their_task_or_any_for_the_ablation(policy, monkeypatch, variant):
    bank, plans = bank_with("the task needs apple"), []
    bank.add("the task needs mug", "look", 0, "t")
    tasks = [envs.Task(f"game {i}", "kind", f"put a {'apple' if i % 2 else 'mug'} in shelf", "train") for i in range(16)]
    monkeypatch.setattr(siri, "rollout", lambda policy, env, plan, *_: plans.append(plan) or [])
    run = bare_run(policy, bank=bank, env=SimpleNamespace(prepare=len), train_tasks=tasks,
                   cfg=dataclasses.replace(policy.cfg, variant=variant, groups=16, group_size=4))
    for phase in (0, 1):
        run.progress.phase = phase
        run.play()
    assert all(given == [None] * 4 for _, given in plans[0])
    assert all(a is b is not None and c is d is None for _, (a, b, c, d) in plans[1])
    matched = [given[0].condition.split()[-1] in task.goal for task, given in plans[1]]
    assert all(matched) if variant == "siri" else 0 < sum(matched) < 16


@pytest.mark.parametrize("variant, phase, age, solved, recent, active, ends", [
    ("siri", 0, 3, 40, [0.2, 0.3, 0.4], 0, True), ("siri", 0, 3, 39, [0.2, 0.3, 0.4], 0, False),
    ("siri", 0, 3, 40, [0.2, 0.3, 0.3], 0, False), ("siri", 0, 2, 40, [0.9, 0.9], 0, False),
    ("siri", 0, 9, 0, [0.0] * 3, 0, True), ("gigpo", 0, 9, 99, [1.0] * 3, 5, False), ("gigpo", 0, 24, 0, [], 0, True),
    ("siri", 1, 1, 99, [1.0] * 3, 3, False), ("siri", 1, 1, 0, [], 4, True), ("no_warmup", 1, 9, 0, [], 3, False),
    ("no_warmup", 1, 16, 0, [], 3, True), ("siri", 2, 7, 99, [1.0] * 3, 5, False), ("siri", 2, 8, 0, [], 0, True)])
def test_phases_end_by_success_by_active_skills_or_by_budget(policy, variant, phase, age, solved, recent, active, ends):
    cfg = dataclasses.replace(policy.cfg, variant=variant, n_req=40, floor=0.3, active_req=4, warmup_max=9,
                              mining_max=7, distill_max=8)
    run = bare_run(policy, cfg=cfg, bank=bank_with(*["apple"] * active, tau_up=-0.5, n_eval=1, tau_down=-1))
    for skill in run.bank.skills:
        run.bank.record(skill, 0.0, 0)
    run.progress = siri.Progress(iteration=50 + age, phase=phase, phase_start=50, solved=list(map(str, range(solved))),
                                 recent=recent)
    assert bool(run.phase_done()) == ends
    assert run.last_phase() == (variant == "gigpo" or phase == 2)
    run.cfg = dataclasses.replace(cfg, env_steps=1000)
    run.progress.env_steps = 1000
    assert "1000 environment steps" in run.phase_done() and run.last_phase()


def test_every_pass_over_the_training_tasks_is_a_new_permutation(policy):
    told = []
    run = bare_run(policy, train_tasks=list("abcdefghij"), cfg=dataclasses.replace(policy.cfg, groups=4),
                   env=SimpleNamespace(prepare=told.append))
    drawn = sum((run.next_tasks() for _ in range(5)), [])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == run.train_tasks and drawn[:10] != drawn[10:]
    assert sum(told[:4], []) == drawn[4:]                                   # the environment knows what comes next
    again = bare_run(policy, train_tasks=run.train_tasks, cfg=run.cfg, env=run.env)
    again.progress.cursor = 8                                               # a resumed run draws what comes next
    assert again.next_tasks() == drawn[8:12]


@pytest.mark.parametrize("wins, n", [(0, 8), (8, 8), (3, 120), (60, 120)])
def test_wilson_interval_solves_its_defining_equation(wins, n):
    # Its ends are the rates p0 from which the observed rate is 1.96 standard errors *of p0* away.
    for p0 in siri.wilson(wins, n):
        assert abs(wins / n - p0) == pytest.approx(1.96 * math.sqrt(abs(p0 * (1 - p0)) / n), abs=1e-6)


# ---- 26. siri: whole runs --------------------------------------------------------------------------------------------

TIMES = {"seconds", "rollout_s", "update_s", "rollout_tokens_per_s", "update_tokens_per_s", "peak_gib"}
SMALL = "--preset smoke --name x"
SMOKE = (SMALL + " --warmup-max 1 --mining-max 2 --distill-max 3 --groups 6 --group-size 2 --max-steps 14"
         " --active-req 9 --save-every 4 --panel 4 --distill-epochs 2").split()


def start(cwd, *args):
    with (cwd / "out.txt").open("w") as out, (cwd / "err.txt").open("w") as err:
        return subprocess.Popen([sys.executable, str(HERE / "siri.py"), *args], cwd=cwd, stdout=out, stderr=err,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


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
    assert siri.latest_checkpoint(broken / "runs/x").name == "00004-2"
    resumed = start(broken, "--resume", "runs/x")
    assert resumed.wait() == 0, (broken / "err.txt").read_text()
    return through, broken


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """`two_runs`, on the other core while the tests before them run: they take a minute and a half."""
    with ThreadPoolExecutor(1) as other_core:
        yield (any("runs" in item.fixturenames for item in request.session.items)
               and other_core.submit(two_runs, *map(tmp_path_factory.mktemp, ("through", "broken"))))


@pytest.fixture(scope="session")
def runs(begun):
    return begun.result()


def test_a_run_goes_through_all_phases_and_says_so(runs):
    out = (runs[0] / "out.txt").read_text()
    first, second = out.splitlines()[:2]
    assert "GENERATED" in first and "not ALFWorld benchmark scores" in first
    assert "preset smoke (chosen by --preset)" in second and TINY in second
    rows = metrics(runs[0])
    assert [row["phase"] for row in rows] == list("011222") and [row["iteration"] for row in rows] == list("012345")
    assert all(int(row["n_plain"]) + int(row["n_skill"]) == 12 for row in rows) and rows[0]["n_skill"] == "0"
    assert sum(int(row["n_skill"]) for row in rows) > 0                                 # some skill was mined and tried
    assert [int(row["env_steps"]) for row in rows] == sorted(int(row["env_steps"]) for row in rows)
    assert len(re.findall(r"plain \d\.\d\d±\d\.\d\d \(n \d+\)", out)) == 6              # a dense line an iteration
    for phase in siri.PHASES:
        assert f"{phase} ends after" in out


LABELS = ["base", "after warm-up", "phase 1 plain", "phase 1 with skills", "final"]


def test_a_run_ends_with_a_block_of_results(runs):
    results = json.loads((runs[0] / "runs/x/results.json").read_text())
    assert [r["label"] for r in results] == LABELS and [r["skills"] for r in results] == [False] * 3 + [True, False]
    assert len({r["panel"] for r in results}) == 1 and len({tuple(r["outcomes"]) for r in results}) == 1
    block = (runs[0] / "out.txt").read_text().partition("results of runs/x")[2]
    for r in results:
        assert r["n"] == 4 == sum(kind["n"] for kind in r["kinds"].values())
        assert r["successes"] == sum(r["outcomes"].values()) == 4 * r["success"]
        assert r["interval"] == list(siri.wilson(r["successes"], 4))
        lo, hi = r["interval"]
        assert re.search(rf"{r['label']} +success {r['success']:.3f} \[{lo:.3f}, {hi:.3f}\]  n 4 ", block)


def test_a_run_folder_holds_what_the_readme_promises(runs):
    folder = runs[0] / "runs/x"
    saved = json.loads((folder / "config.json").read_text())
    assert saved == dataclasses.asdict(siri.resolve(siri.parse_arguments(SMOKE)[1])[0])
    bank, rows = SkillBank.from_json(json.loads((folder / "skills.json").read_text())), metrics(runs[0])
    assert bank.counts() == {state: int(rows[-1][f"skills_{state}"]) for state in skills.STATES}
    assert sum(skill.n for skill in bank.skills) == sum(int(row["n_skill"]) for row in rows)    # groups of 1 + 1
    assert sum(int(row["mined"]) for row in rows) == len(bank.skills) > 0
    last = siri.latest_checkpoint(folder)
    assert {p.name for p in last.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "progress.json",
                                                "optimizer.safetensors", "skills.json"}
    assert not list(last.glob("model*.safetensors")) and len(list(last.parent.iterdir())) == 2
    sample = (folder / "samples/0000.txt").read_text()
    assert "<think>" in sample and "reward" in sample and "advantage" in sample


def same_run(through, broken):
    """Equal to the byte: weights, optimizer, bank, progress, results and metrics, all but times."""
    last = siri.latest_checkpoint(through).relative_to(through)
    for name in (last / "adapter_model.safetensors", last / "optimizer.safetensors", last / "skills.json", "skills.json"):
        assert (through / name).read_bytes() == (broken / name).read_bytes(), name
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in metrics(folder.parent.parent)]
            for folder in (through, broken)]
    assert len(rows[0]) > 0 and rows[0] == rows[1]
    progress, results = ([json.loads((folder / name).read_text()) for folder in (through, broken)]
                         for name in (last / "progress.json", "results.json"))
    for a, b in (progress, *zip(*results)):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert len(results[0]) == len(results[1])


def test_a_killed_run_resumes_to_the_same_bytes(runs):
    assert len(metrics(runs[0])) == 6                                           # 4 + 2 iterations
    same_run(*(cwd / "runs/x" for cwd in runs))


@slow
def test_a_run_that_ended_with_mining_goes_on_when_granted_more_under_any_variant(runs, tmp_path):
    """The first two phases don't depend on the variants of the third, so one run of them serves all."""
    cwd = tmp_path / "siri"
    cwd.mkdir()
    assert start(cwd, *SMOKE, "--distill-max", "0").wait() == 0, (cwd / "err.txt").read_text()
    assert len(metrics(cwd)) == 3 and len(json.loads((cwd / "runs/x/results.json").read_text())) == 5
    other = shutil.copytree(cwd, tmp_path / "no_gate")
    for process, at in [(start(at, "--resume", "runs/x", "--distill-max", "3", "--variant", at.name), at) for at in (cwd, other)]:
        assert process.wait() == 0, (at / "err.txt").read_text()
    adapter, optimizer, rows = (
        [f(at) for at in (runs[0], cwd, other)] for f in (
            lambda at: (siri.latest_checkpoint(at / "runs/x") / "adapter_model.safetensors").read_bytes(),
            lambda at: (siri.latest_checkpoint(at / "runs/x") / "optimizer.safetensors").read_bytes(),
            lambda at: [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(at)]))
    assert adapter[0] == adapter[1] and optimizer[0] == optimizer[1] and rows[0] == rows[1]
    assert rows[2][:3] == rows[0][:3] and int(rows[2][3]["internal_rows"]) > int(rows[0][3]["internal_rows"])
    assert adapter[2] != adapter[0]


def test_evaluating_a_run_repeats_its_last_result(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs[0])
    monkeypatch.setattr(siri, "add_result", lambda folder, result: added.append(result))
    added = []
    assert siri.main(["--eval", "runs/x"]) == 0 and siri.main(["--eval", "runs/x", "--with-skills"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ALFWorld: small GENERATED games") and len(re.findall(r"success .* n \d", out)) > 4
    final = json.loads(Path("runs/x/results.json").read_text())[-1]
    plain, skilled = added
    assert plain["outcomes"] == final["outcomes"] and plain["mean_steps"] == final["mean_steps"]
    assert (plain["skills"], skilled["skills"]) == (False, True)
    assert skilled["panel"] == plain["panel"] == final["panel"]


def test_resuming_a_finished_run_shows_its_results_and_changes_nothing(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs[0])
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert siri.main(["--resume", "runs/x"]) == 0 and "results of runs/x" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("variant, phases, labels", [
    ("gigpo", "000", ["base", "final"]), ("no_warmup", "112", ["base", *LABELS[2:]])])
def test_variants_leave_phases_out_and_have_the_same_budget(tmp_path, monkeypatch, variant, phases, labels):
    monkeypatch.chdir(tmp_path)
    assert siri.main(f"{SMALL} --variant {variant} --warmup-max 1 --mining-max 1 --distill-max 1 --panel 2 --groups 1 "
                     "--active-req 9".split()) == 0
    assert [row["phase"] for row in metrics(tmp_path)] == list(phases)
    assert [r["label"] for r in json.loads(Path("runs/x/results.json").read_text())] == labels


def test_a_run_on_webshop_reports_scores_and_says_what_it_shops_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert siri.main(f"{SMALL} --env webshop --warmup-max 1 --mining-max 2 --distill-max 1 --panel 2 --groups 5 "
                     "--group-size 2".split()) == 0
    out = capsys.readouterr().out
    assert "GENERATED catalogue 0" in out.splitlines()[0] and "not WebShop benchmark scores" in out.splitlines()[0]
    tagger = json.loads(Path("runs/x/config.json").read_text())["webshop_tagger"]
    assert tagger == envs.find_tagger() and ("a stop-list" if tagger == "stop-list" else tagger) in out.splitlines()[0]
    results = json.loads(Path("runs/x/results.json").read_text())
    assert [r["label"] for r in results] == LABELS and all(r["panel"] == "webshop test, 2 games" for r in results)
    assert all(r["success"] <= r["score"] <= 1 for r in results)
    assert re.search(rf"final +success .* score {results[-1]['score']:.3f}±{results[-1]['score_se']:.3f}  n 2", out)
    assert max(s["mean_steps"] for s in results) <= 15
    rows = metrics(tmp_path)
    assert sum(int(row["n_skill"]) for row in rows) > 0 and int(rows[-1]["internal_rows"]) > 0    # skills are tried, and distilled
    for row in rows:
        assert float(row["success_plain"]) <= float(row["score_plain"]) <= 1
        assert f"plain {float(row['success_plain']):.2f}" in out and f"score {float(row['score_plain']):.2f}±" in out


def test_webshop_has_the_settings_of_the_release():
    """15 steps, prompts of 4,096 tokens, advantages not divided by a deviation; a flag still has the last word."""
    cfg, _ = siri.resolve(dict(env="webshop", preset="paper", four_bit=False))
    assert (cfg.max_steps, cfg.max_prompt, cfg.norm, cfg.split) == (15, 4096, "mean", "test")
    assert siri.resolve(dict(env="webshop", preset="paper", four_bit=False, norm="std"))[0].norm == "std"
    assert siri.resolve(dict(env="webshop", preset="tiny"))[0].model != siri.resolve(dict(preset="tiny"))[0].model


def test_a_budget_of_environment_steps_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert siri.main(f"{SMALL} --env-steps 1 --panel 2 --groups 1".split()) == 0
    assert len(metrics(tmp_path)) == 1 and "the budget of 1 environment steps is spent" in capsys.readouterr().out
    assert [r["label"] for r in json.loads(Path("runs/x/results.json").read_text())] == ["base", "final"]


# ---- 27. siri: bad input ---------------------------------------------------------------------------------------------

def refusal(capsys, *args):
    """Run the program; its whole standard error must be one line of complaint."""
    capsys.readouterr()
    assert siri.main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("siri: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("args, says", [
    ("--grup-size 4", "--grup-size: unknown flag; did you mean --group-size?"), ("--xyzzy", "--xyzzy: unknown flag"),
    ("--groups four", "--groups.*'four'"), ("--lr", "--lr"), ("--lr 1e-3x", "--lr.*'1e-3x'"), ("train", "train"),
    ("--preset nonsense", "--preset nonsense: .*paper.*tiny.*smoke"), ("--variant grpo", "--variant grpo: .*no_warmup"),
    ("--env webshop9", "--env webshop9: .*alfworld.*webshop"), ("--split test", "--split test: .*valid_unseen"),
    ("--env webshop --split valid_seen", "--split valid_seen: .*validation"), ("--webshop-goals all", "--webshop-goals all"),
    (SMALL + " --env webshop --webshop-data .", "--webshop-data.*--preset paper"),
    (SMALL + " --env webshop --observation text_rich", "--observation text_rich: .*--prompt-style full"),
    (SMALL + " --env webshop --webshop-tagger xx_model", "xx_model.*not an installed.*stop-list"),
    (SMALL + " --env webshop --webshop-tagger json", "json.*not an installed.*stop-list"),       # a module, but no model
    (SMALL + " --env webshop --webshop-goals human", "--webshop-goals human: .*without --webshop-data"),
    (SMALL + " --webshop-split release", "--webshop-split release: .*without --env webshop"),
    (SMALL + " --env webshop --alfworld-data .", "--alfworld-data .: .*without --env alfworld"),
    (SMALL + " --env webshop --no-compact --prompt-style full --webshop-data ~nosuchuser/x", "~nosuchuser/x/items.*read"),
    (SMALL + " --env webshop --no-compact --webshop-data nowhere", "nowhere/items_shuffle_1000.json: cannot be read"),
    (SMALL + " --group-size 3", "--group-size 3: .*use 4"), (SMALL + " --group-size 0", "--group-size 0"),
    (SMALL + " --group-size 1 --variant gigpo", "--group-size 1: .*at least 2"),
    (SMALL + " --lr nan", "--lr nan"), (SMALL + " --lr inf", "--lr inf"), (SMALL + " --lr -1", "--lr -1"),
    (SMALL + " --temperature 0", "--temperature 0"), (SMALL + " --max-steps 0", "--max-steps 0"),
    (SMALL + " --seed -1", "--seed -1"), (SMALL + " --penalty-inside", "--penalty-inside: .*--baseline steps"),
    (SMALL + " --dual-clip 0.5", "--dual-clip 0.5"), (SMALL + " --tau-down 1 --tau-up 0", "--tau-down 1.0"),
    (SMALL + " --gamma 1.5", "--gamma 1.5"), (SMALL + " --alfworld-data .", "--alfworld-data.*--preset paper"),
    (SMALL + " --model nowhere/nothing", "--model nowhere/nothing"), ("--with-skills", "--with-skills: .*--eval"),
    ("--eval a --resume b", "--resume and --eval"), ("--play --bench", "--play and --bench"), ("--report ''", "config.json"), ("--report a --seed 5", "--seed: --report takes no settings"), ("--eval nowhere", "nowhere: holds no checkpoint"),
    ("--resume nowhere", "nowhere: holds no checkpoint"),
    pytest.param("--preset paper", "4-bit .*--no-4bit.*--preset tiny", marks=no_cuda),
    pytest.param(SMALL + " --4bit", "4-bit .*--no-4bit", marks=no_cuda)])
def test_bad_flags_get_one_line_that_names_the_culprit(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch)
    assert re.search(says, refusal(capsys, *args.split()))
    assert re.search(says, refusal(capsys, *args.split()))            # nothing was left that is in the way


def test_a_run_keeps_its_split(tmp_path):
    """Goals 500-1499 are held out by one split and trained on by the other."""
    saved = siri.resolve(dict(env="webshop", preset="smoke", webshop_split="release"))[0]
    siri.write_json(tmp_path / "config.json", dataclasses.asdict(saved))
    assert siri.load_config(tmp_path, dict(webshop_split="release", split="validation")) == dataclasses.replace(
        saved, split="validation")
    for change in (dict(webshop_split="original"), dict(webshop_size="full"), dict(webshop_goals="human")):
        (name, value), = change.items()
        with pytest.raises(siri.UserError, match=f"--{siri.flag(name)} {value}: .*trained with.*leave it out"):
            siri.load_config(tmp_path, change)


def test_what_a_run_was_saved_with_is_no_reason_to_refuse_it(tmp_path):
    """Settings without effect are refused where they are given."""
    saved = dataclasses.replace(siri.resolve(dict(env="webshop", preset="smoke"))[0], webshop_size="full")
    siri.write_json(tmp_path / "config.json", dataclasses.asdict(saved))
    assert siri.load_config(tmp_path, {}) == saved


def test_a_refusal_on_the_command_line_has_no_traceback_and_exit_code_2(tmp_path):
    process = start(tmp_path, "--grup-size", "4")
    assert process.wait() == 2 and (tmp_path / "out.txt").read_text() == ""
    assert (tmp_path / "err.txt").read_text() == "siri: --grup-size: unknown flag; did you mean --group-size?\n"


def test_before_installation_the_program_says_what_is_missing(tmp_path):
    """Without any package (-S) and any compiler (an empty PATH)."""
    def bare(*args):
        return subprocess.run([sys.executable, "-S", str(HERE / "siri.py"), *args], cwd=tmp_path, env={"PATH": ""},
                              capture_output=True, text=True)
    check, train = bare("--check"), bare("--env", "alfworld")
    assert check.returncode == 2 and "C++ compiler" in check.stderr and "build-essential" in check.stderr
    assert all(line.startswith("siri: ") for line in check.stderr.splitlines())
    assert train.returncode != 0
    assert re.fullmatch("siri: .* is missing: run `pip install -r requirements.txt`\n", train.stderr)


@pytest.mark.parametrize("make, says", [
    (lambda root: None, "json_2.1.1 is not a folder"),
    (lambda root: (root / "json_2.1.1").mkdir(parents=True), "no ALFWorld games in .*train"),
    (lambda root: make_folder(root, lambda text: text[:9000]), r"train/\S*/game.tw-pddl is not an ALFWorld game")])
def test_bad_data_folders_are_named(tmp_path, monkeypatch, capsys, stranger_folder, make, says):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data")
    err = refusal(capsys, "--preset", "paper", "--no-4bit", "--model", str(stranger_folder), "--alfworld-data",
                  str(tmp_path / "data"), "--name", "x")
    assert re.search(says, err) and "alfworld-download" in err


@pytest.fixture()
def copied_run(runs, tmp_path, monkeypatch):
    shutil.copytree(runs[0] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Path("runs/x")


def test_the_name_of_a_run_is_used_once(copied_run, capsys):
    err = refusal(capsys, *SMOKE)
    assert "runs/x already holds a run" in err and "--resume runs/x" in err and "--name" in err


FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "progress.json", "skills.json",
         "manifest.json"]


def spoil(path, how):
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "cut" else b'{"a": 1}')


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["cut", "missing", "other"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied_run, capsys, file, how):
    newest, older = siri.checkpoints(copied_run)
    spoil(newest / file, how)
    assert siri.latest_checkpoint(copied_run) == older
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"siri: {newest} cannot be used" in err and (file in err or how == "other")
    spoil(older / file, how)
    for action in ("--resume", "--eval"):
        assert siri.main([action, str(copied_run)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"siri: {copied_run}: holds no sound checkpoint")


def test_every_cut_and_every_flipped_bit_of_a_checkpoint_is_noticed(copied_run):
    """Each length of a small file, 40 of a large one; 200 bits at random places."""
    rng, checkpoint = random.Random(0), siri.latest_checkpoint(copied_run)
    whole = {file: (checkpoint / file).read_bytes() for file in FILES}
    assert siri.damage(checkpoint) == ""
    for file, data in whole.items():
        for length in range(len(data)) if len(data) < 3000 else rng.sample(range(len(data)), 40):
            (checkpoint / file).write_bytes(data[:length])
            assert siri.damage(checkpoint), (file, length)
        (checkpoint / file).write_bytes(data)
    for _ in range(200):
        file = rng.choice(FILES)
        data, at = bytearray(whole[file]), rng.randrange(len(whole[file]))
        data[at] ^= 1 << rng.randrange(8)
        (checkpoint / file).write_bytes(data)
        harmless = file == "manifest.json" and json.loads(whole[file]) == loads_or_none(data)      # white space
        assert bool(siri.damage(checkpoint)) != harmless, (file, at)
        (checkpoint / file).write_bytes(whole[file])


def loads_or_none(data):
    try:
        return json.loads(bytes(data))
    except ValueError:
        return None


@slow
def test_fifty_kills_at_random_moments_change_nothing(runs, tmp_path):
    """kill -9 anywhere in a life of the process: start, rollout, update, evaluation, writing. Then it may finish."""
    rng, kills, started = random.Random(0), 0, time.monotonic()
    assert start(tmp_path, *SMOKE).wait() == 0
    took = time.monotonic() - started
    while kills < 50:
        cwd = Path(tempfile.mkdtemp(dir=tmp_path))
        while True:
            process = start(cwd, *(["--resume", "runs/x"] if siri.checkpoints(cwd / "runs/x") else SMOKE))
            try:
                process.wait(rng.uniform(0, 0.6 * took))
                assert process.returncode == 0, (cwd / "err.txt").read_text()
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        same_run(runs[0] / "runs/x", cwd / "runs/x")


@slow
def test_three_hundred_iterations_with_faults_end_whole_and_in_flat_memory(tmp_path, monkeypatch, capsys):
    """Games that raise, gradients that are not finite, a full device, signals, torn files: all are survived, and no row is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(siri, "SIGNALS", (signal.SIGUSR1, signal.SIGTERM))
    rng, seen, memory = random.Random(0), Counter(), {}
    open_game, clip, iterate = envs.AlfWorld.open, torch.nn.utils.clip_grad_norm_, siri.Run.iterate
    sample = siri.Policy.sample

    def faulty_open(env, task):
        if rng.random() < 0.01:
            seen["game"] += 1
            raise RuntimeError("the game is broken")
        return open_game(env, task)

    def faulty_clip(*args):
        norm, bad = clip(*args), rng.random() < 0.05
        seen["gradient"] += bad
        return norm * math.nan if bad else norm

    def faulty_sample(policy, *args):
        if rng.random() < 0.01:
            seen["memory"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(policy, *args)

    def faulty_iterate(run):
        row = iterate(run)
        memory[run.progress.iteration] = int(Path("/proc/self/statm").read_text().split()[1])
        if rng.random() < 0.05:
            seen["signal"] += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(envs.AlfWorld, "open", faulty_open)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", faulty_clip)
    monkeypatch.setattr(siri.Policy, "sample", faulty_sample)
    monkeypatch.setattr(siri.Run, "iterate", faulty_iterate)
    code = siri.main(f"{SMALL} --variant gigpo --groups 2 --group-size 2 --max-steps 4 --panel 2 --warmup-max 296".split())
    while code == 130:
        newest = siri.checkpoints(Path("runs/x"))[0]
        if rng.random() < 0.3:
            seen["torn file"] += 1
            spoil(newest / rng.choice(FILES), rng.choice(["cut", "missing", "other"]))
        gc.collect()                            # the run that ended goes with its process, in life
        code = siri.main(["--resume", "runs/x"])
    assert code == 0, capsys.readouterr().err
    assert [int(row["iteration"]) for row in metrics(tmp_path)] == list(range(300))
    assert all(seen[fault] >= 3 for fault in ("game", "gradient", "memory", "signal", "torn file")), seen
    floor = lambda last: min(memory[k] for k in range(last - 9, last + 1))      # a leak raises the floor, one update does not
    assert floor(300) < 1.05 * floor(20), (floor(20), floor(300))


@pytest.mark.parametrize("file", ["config.json"])
@pytest.mark.parametrize("how", ["cut", "missing", "other"])
def test_a_damaged_config_is_named(copied_run, capsys, file, how):
    spoil(copied_run / file, how)
    for action in ("--resume", "--eval"):
        assert siri.main([action, str(copied_run)]) == 2
        assert str(copied_run) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("line", ["", "1", "6,2,0.5", "6" + ",1" * 40 + "\n"])
def test_torn_and_later_rows_of_the_metrics_are_cut_off_on_resuming(copied_run, line, monkeypatch):
    """The last checkpoint is from after iteration 5. What a killed write left behind it goes, and no row is lost."""
    metrics_file = copied_run / "metrics.csv"
    before = metrics_file.read_bytes()
    metrics_file.write_bytes(before + line.encode())
    assert siri.main(["--resume", str(copied_run)]) == 0
    assert metrics_file.read_bytes() == before


def test_what_the_adapter_is_made_with_cannot_be_changed_later(copied_run, capsys):
    for name in ("--lora-r", "--lora-alpha"):
        assert f"{name} 4" in refusal(capsys, "--resume", str(copied_run), name, "4")


def test_the_moments_of_another_optimizer_begin_anew(copied_run, capsys):
    """bitsandbytes keeps other tensors than torch, and --4bit chooses between them."""
    checkpoint = siri.latest_checkpoint(copied_run)
    run = siri.Run(siri.load_config(copied_run, {}), copied_run, "again", checkpoint)
    assert run.optimizer.state and "begin anew" not in capsys.readouterr().out
    run.cfg = dataclasses.replace(run.cfg, four_bit=True)
    siri.load_checkpoint(run, checkpoint)
    assert not run.optimizer.state and "begin anew" in capsys.readouterr().out


def test_one_process_at_a_time_uses_a_run_folder(copied_run, capsys):
    held = siri.lock(copied_run)
    for action in ("--resume", "--eval"):
        assert "runs/x is in use by another process" in refusal(capsys, action, str(copied_run))
    held.close()
    assert siri.main(["--resume", str(copied_run)]) == 0


def test_a_run_s_name_stays_in_the_folder_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("../x", "/x", "a/b", ".", "..", "-x"):
        assert f"--name {name}" in refusal(capsys, "--preset", "smoke", f"--name={name}")
    assert list(tmp_path.iterdir()) == []


def wait_for(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.02)


def test_a_signal_lets_the_iteration_end_and_a_second_one_does_not(tmp_path):
    """SIGTERM: the run ends after an iteration, saved. SIGINT twice: it ends at once, and what was saved is sound."""
    args = f"{SMALL} --groups 2 --group-size 2 --warmup-max 50 --n-req 999 --panel 1".split()
    process = start(tmp_path, *args)
    wait_for(lambda: len(metrics(tmp_path)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: "siri: stopped" in (tmp_path / "err.txt").read_text(), process)
    process.send_signal(signal.SIGTERM)                     # while the interpreter ends: nothing is left to stop
    assert process.wait() == 130
    done = len(metrics(tmp_path))
    last = (tmp_path / "err.txt").read_text().splitlines()[-1]
    assert last == f"siri: stopped before iteration {done}; go on with: python siri.py --resume runs/x"
    assert siri.latest_checkpoint(tmp_path / "runs/x").name == f"{done:05d}-0" and 2 <= done < 50
    process = start(tmp_path, "--resume", "runs/x", "--groups", "16")      # both signals must find one iteration running
    wait_for(lambda: siri.checkpoints(tmp_path / "runs/x")[0].name > f"{done:05d}-0", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping after this iteration" in (tmp_path / "err.txt").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert re.search("siri: stopped at once.*--resume runs/x", (tmp_path / "err.txt").read_text().splitlines()[-1])
    assert siri.damage(siri.checkpoints(tmp_path / "runs/x")[0]) == ""


CONFIG_FLAGS = [siri.flag(f.name) for f in dataclasses.fields(siri.Config)]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CONFIG_FLAGS), st.sampled_from(
    ["", "0", "1", "-1", "2", "1e9", "nan", "inf", "x", "true", "tiny", "webshop", "train", "..", "\n", "\0", "9" * 40, "é"])
    | st.text(max_size=5)), max_size=4))
def test_any_flags_are_accepted_or_refused_in_one_line(pairs):
    try:
        cfg, _ = siri.resolve(siri.parse_arguments([f"--{flag}={value}" for flag, value in pairs])[1])
        assert cfg.group_size >= 2 and cfg.max_steps > 0
    except siri.UserError as error:
        assert str(error)


def test_no_room_and_no_permission_are_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
        assert re.search("runs/x: 0.00 GiB free.*make room", refusal(capsys, *SMOKE))
    shutil.rmtree("runs")
    Path("runs").write_text("a file")
    assert re.search("runs/x: cannot be written", refusal(capsys, *SMOKE))


# ---- 28. What no text and no file may do -----------------------------------------------------------------------------
# Texts are made of fragments that mean something to a part of the program, so that they meet in every order.

SHRAPNEL = ["<think>", "</think>", "<action>", "</action>", "<ACTION>", "<skill>", "</skill>", "<|im_end|>", "<|im_start|>",
            "<|endoftext|>", "<pad>", "<|im_", "end|>", "<", "|>", "|", "->", "when ", "do ", "look", "inventory", "search[", "click[",
            "]", "lamp", "next >", "features", "\n", "\t", " ", "\0", "\x1c", "\u2028", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800",
            "\udfff", "\ufffd", "İ", "ß", "Σ", "２", "🍎", "e\u0301", "<b class='x'>", "&lt;action&gt;", "<!--", "{goal}", "{0}",
            "%s", "\\", "\\u003c", "#look#", " [SEP] ", "None", "'", '"']
WORDS = st.sampled_from(SHRAPNEL) | st.text(st.characters(), max_size=4)                # with lone surrogates
SHORT = st.lists(WORDS, max_size=8).map("".join)
LONG = st.lists(WORDS, min_size=1, max_size=4).map(lambda parts: ("".join(parts) * 10_000)[:10_000])
TEXT = st.one_of(*[SHORT] * 15, LONG)


@pytest.fixture(scope="module")
def open_games(home):
    """A household and a shop kept open, and the states of a walk through each."""
    shop = envs.WebShop(generated_shop(), "made up")
    with home.open(home.tasks("train")[0]) as household, shop.open(shop.tasks("test")[0]) as shopping:
        bought = ["search[lamp]", "click[next >]", None, None, "click[features]", "click[< prev]"]
        states = [shopping.start]
        for action in bought:
            states.append(shopping.step(states[-1], action or states[-1].admissible[-1 if len(states) == 3 else 2]))
        yield {"alfworld": (household, play(household, seed=1, length=6)), "webshop": (shopping, states)}


FRAMES = ["{0}{1}", "<think>{0}</think><action>{1}</action>", "<action>{0}</action>{1}",
          "<think>x</think><action>search[{0}]</action>{1}", "<skill>when {0} -> {1}</skill>"]


@settings(max_examples=some(400), deadline=None)                                              # 2,000 responses
@given(TEXT, TEXT, st.lists(st.integers(0, 120), max_size=6), st.integers(0, 6))
def test_no_response_can_hurt_the_game_the_bank_or_the_gate(open_games, first, second, cuts, at):
    """Whatever is said: an action or none, that any game takes and marks if it is not admitted; a skill in bounds or
    SkillRejected; and for every action tokens that the gate can train."""
    for frame in FRAMES:
        response = frame.format(first, second)
        edges = [0, *sorted(cut * len(response) // 120 for cut in cuts), len(response)]
        pieces = [response[i:j] for i, j in zip(edges, edges[1:])]
        action, mask = envs.parse_action(response), distill.action_mask(pieces)
        assert len(mask) == len(pieces)
        if action:
            trained = " ".join("".join(piece for piece, gated in zip(pieces, mask) if gated).split())
            assert action.casefold() in trained.casefold()
        try:
            condition, strategy = skills.parse_skill(response, max_words=20)
            assert len(f"{condition} {strategy}".split()) <= 20 and len(f"{condition} {strategy}") <= 200
        except SkillRejected as rejection:
            assert rejection.reason in skills.REASONS
        for world, (game, states) in open_games.items():
            state, said = states[at], action or ""
            after = game.step(state, said)
            known = said in state.admissible
            search = world == "webshop" and said.startswith("search[")
            click = world == "webshop" and said[:said.rfind("]") + 1] in state.admissible       # what follows is ignored
            assert after.valid or not (known or search and re.fullmatch(r"search\[[^\[\]]+\]", said)), said
            assert known or search or click or not after.valid, said
            assert after.valid or after.admissible == state.admissible and not after.success and after.reward == 0
            assert after.steps == state.steps + 1


SPLIT_UP = ["<|im_<|im_end|>end|>", "<|im_ end|>", "< |im_end|>", "<|im_\u200bend|>", "\uff1c|im_end|\uff1e", "<\uff5cim_end\uff5c>",
            "<|IM_END|>", "<|\u0130m_end|>", "<|im_end|", "|im_end|>", "im_end", "<<||iimm__eenndd||>>", "<pa", "d>", "<unk>",
            "<p<pad>ad>", "\nassistant\n", "<|im_start|>assistant\n", "&#60;|im_end|>", "\\u003c|im_end|>"]
HOSTILE = st.lists(st.sampled_from(SHRAPNEL + SPLIT_UP * 3) | st.text(st.characters(), max_size=3), max_size=8).map("".join)


def prompts_with(text, other, world):
    """Every prompt that the program writes with a text from elsewhere in it, one text in all of its places."""
    skill = Skill(0, other, text, 0, "game").text
    page = f"Instruction: [SEP] {text} [SEP] {other} [SEP] Page 1 [SEP] {text}"
    state = envs.State(page if world == "webshop" else text, (text, f"click[{other.lower()}]", other), "")
    for style in ("full", "compact"):
        yield envs.render_prompt(text, state, [envs.Turn(page, other), envs.Turn(other, text)], skill=skill, style=style,
                                 world=world)
        yield skills.mining_prompt(text, [(other, text), (text, other)], style)


def control_ids(policy):
    """The special tokens of the tokenizer's file; <unk> stands for words, and ends nothing."""
    added = json.loads(policy.tokenizer.backend_tokenizer.to_str())["added_tokens"]
    return {t["id"] for t in added if t["special"] and t["content"] != "<unk>"}


@settings(max_examples=some(250), deadline=None)                                              # 4 prompts and 2 policies: 2,000
@given(HOSTILE, HOSTILE, st.sampled_from(["alfworld", "webshop"]))
@pytest.mark.parametrize("name", ["policy", "stranger"])
def test_no_task_page_command_or_skill_adds_a_control_token(request, name, text, other, world):
    policy = request.getfixturevalue(name)
    control = control_ids(policy)
    for hostile, harmless in zip(prompts_with(text, other, world), prompts_with("apple", "desk", world)):
        ids, same = ([i for i in policy.encode(prompt) if i in control] for prompt in (hostile, harmless))
        assert ids == same and len(ids) > 0, hostile


@settings(max_examples=some(300), deadline=None)
@given(st.lists(st.tuples(HOSTILE, HOSTILE), max_size=6), st.integers(1, 9))
def test_a_bank_of_any_accepted_skills_comes_back_from_its_file(pairs, longest):
    bank = SkillBank()
    for condition, strategy in pairs:
        try:
            skill = bank.add(*skills.parse_skill(f"<skill>when {condition} -> {strategy}</skill>", max_words=longest), 0, condition)
            assert len(f"{skill.condition} {skill.strategy}".split()) <= longest and "\n" not in skill.text
            bank.retrieve(strategy)
        except SkillRejected as rejection:
            bank.reject(rejection.reason)
    assert SkillBank.from_json(json.loads(json.dumps(bank.to_json()))) == bank


# Files. A call of the program is real but for the model: it is loaded once, and what it says is made up.

class Parrot:
    """In the place of `siri.Policy`: one real policy for all calls, which shops by rote and does nothing in a household."""

    def __init__(self, policy):
        self.policy, self.real = policy, siri.Policy

    def __call__(self, cfg, adapter=None):
        self.policy.cfg = cfg
        self.policy.generate = self.speak
        return self.policy

    def speak(self, prompts, *_):
        texts = map(self.policy.tokenizer.decode, prompts)
        return [self.policy.tokenizer(f"<think>x</think><action>{self.choose(text)}</action>",
                                      add_special_tokens=False).input_ids for text in texts]

    def choose(self, text):
        """Search, open the first product, choose its last option, buy."""
        step = int((re.findall(r"Step (\d+)\. You now see the page", text) or ["0"])[-1])
        offered = re.findall(r"'(click\[.*?\])'", text.rpartition("You can take one of these actions")[2])
        return {0: "look", 1: "search[lamp]", 2: (offered * 3 + [""] * 3)[2], 3: (offered or [""])[-1]}.get(step, "click[buy now]")


def call(*args):
    """One call of the program: its exit code, output and errors."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = siri.main(list(map(str, args)))
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


GONE = object()
ATOMS = st.sampled_from([None, True, False, 0, 1, -1, 2, 3, 2.5, -0.5, math.nan, math.inf, 10**20, 10**400, "", "x", "1", "\ud800",
                         "\n", "<|im_end|>", "$", "candidate", "train", "webshop", [], {}, GONE, GONE, GONE])
VALUES = ATOMS | st.lists(ATOMS.filter(lambda x: x is not GONE), max_size=2) | st.just({"a": [1]}) | st.just([[[]]])
SPOTS = st.lists(st.tuples(st.lists(st.integers(0, 99), max_size=5), VALUES), min_size=1, max_size=2)
FILES_LIKE = ["", "{", "null", "3", "[]", "\"x\"", "NaN", "\0", "[" * 100_000, "{\"a\": " * 100_000, "9" * 5000, "\ud800"]


def replaced(data, path, value):
    """A copy of a JSON value whose part at `path` (numbers, modulo what there is) is `value`, or has that added, or is gone."""
    if not path or not isinstance(data, (dict, list)) or not data:
        return {**data, "extra": value} if isinstance(data, dict) and value is not GONE else value
    new = copy.copy(data)
    key = (list(data) if isinstance(data, dict) else range(len(data)))[path[0] % len(data)]
    new[key] = replaced(data[key], path[1:], value)
    if new[key] is GONE:
        del new[key]
    return new


@st.composite
def damaged_json(draw, data):
    """The text of a JSON file that once held `data`: other values at one or two places, or a torn file, or another one."""
    how = draw(st.integers(0, 9))
    if how == 0:
        return draw(st.sampled_from(FILES_LIKE))
    text = json.dumps(data)
    if how == 1:
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.sampled_from(["", "\0", "}", "NaN", ",", "\"", "é", "1e999"])) + text[at + draw(st.integers(0, 9)):]
    for path, value in draw(SPOTS):
        data = replaced(data, path, value)
    return "" if data is GONE else json.dumps(data)


def write_damaged(path, text):
    path.unlink(missing_ok=True)                                # others may share the file by a hard link
    path.write_bytes(text.encode(errors="surrogatepass"))


def fresh(template, folder):
    """A new copy of a run. Files are shared: the program replaces them, and never writes into one but metrics.csv."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, copy_function=os.link)
    for name in ("lock", "metrics.csv", "results.json"):
        (folder / name).unlink()
        shutil.copy(template / name, folder / name)
    return folder


def works_or_says_why(done, *names):
    """The promise of every call: it works, or one line says which file (or setting) is at fault."""
    if done.code != 0:
        assert done.code == 2 and re.fullmatch(r"siri: .*\n", done.err), done.err
        assert any(name in done.err for name in names), done.err
    return done.code == 0


@pytest.fixture(scope="class")                  # made anew for every test: no other may meet the parrot
def parked_run(runs, tmp_path_factory):
    """A run that has one small iteration to go, and the parrot for its policy."""
    root = tmp_path_factory.mktemp("parked")
    shutil.copytree(runs[0] / "runs/x", root / "template")
    config_file, last = root / "template/config.json", siri.latest_checkpoint(root / "template")
    saved = json.loads(config_file.read_text()) | dict(groups=1, group_size=2, max_steps=2, panel=2, distill_max=4,
                                                       invalid_penalty=0.0, save_every=9)
    siri.write_json(config_file, saved)
    siri.write_json(last / "progress.json", json.loads((last / "progress.json").read_text()) | {"finished": False})
    sign(last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siri, "Policy", Parrot(siri.Policy(siri.load_config(root / "template", {}), last)))
        assert works_or_says_why(call("--resume", fresh(root / "template", root / "x")))
        assert works_or_says_why(call("--eval", root / "x", "--with-skills"))
        yield root


def sign(checkpoint):
    """Make the manifest agree with the files as they are."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    siri.write_json(checkpoint / "manifest.json", {name: siri.file_hash(checkpoint / name) for name in manifest})


@settings(max_examples=some(100), deadline=None)
@given(st.data())
def test_any_config_file_works_or_is_named(parked_run, data):
    folder = fresh(parked_run / "template", parked_run / "x")
    saved = json.loads((folder / "config.json").read_text())
    text = data.draw(damaged_json(saved))
    write_damaged(folder / "config.json", text)
    works_or_says_why(call("--eval", folder), "config.json", "siri: --")


@settings(max_examples=some(100), deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name, action, more", [("skills.json", "--eval", ["--with-skills"]), ("progress.json", "--resume", [])])
def test_any_checkpoint_file_works_or_is_named(parked_run, data, name, action, more):
    folder = fresh(parked_run / "template", parked_run / "x")
    last = siri.latest_checkpoint(folder)
    write_damaged(last / name, data.draw(damaged_json(json.loads((last / name).read_text()))))
    sign(last)
    works_or_says_why(call(action, folder, *more), name)


# Data files. The same run plays them: a household's game file, or a shop of seven products.

@st.composite
def damaged_game(draw, data):
    """The text of a game file, torn or with other values, or a word of its PDDL or grammar in the place of another."""
    if draw(st.booleans()):
        return draw(damaged_json(data))
    part = draw(st.sampled_from(["pddl_problem"] * 7 + ["pddl_domain"] * 4 + ["grammar"]))
    tokens = re.findall(r"\w+|\s+|.", data[part])
    for at, other in draw(st.lists(st.tuples(st.integers(0, len(tokens) - 1), st.integers(0, len(tokens) - 1)), min_size=1, max_size=3)):
        tokens[at] = draw(st.sampled_from(["", "(", ")", "\0", "\ud800", "?x", "not"] + [tokens[other]] * 7))
    return json.dumps({**data, part: "".join(tokens)})


@pytest.fixture(scope="module")
def household_folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("data"))
    return folder, next((folder / "json_2.1.1/train").glob("**/game.tw-pddl"))


@settings(max_examples=some(100), deadline=None)
@given(st.data())
def test_any_game_file_works_or_is_named(parked_run, household_folder, data):
    folder, file = household_folder
    sound = json.loads((next((folder / "json_2.1.1/valid_seen").glob("**/game.tw-pddl"))).read_text())
    write_damaged(file, data.draw(damaged_game(sound)))
    done = call("--eval", fresh(parked_run / "template", parked_run / "x"), "--no-compact", "--alfworld-data", folder, "--split", "train")
    works_or_says_why(done, str(file), f"no ALFWorld games in {file.parents[2]}", f"{file.parent.name} is not a sound ALFWorld game")
    lost = [line for line in done.out.splitlines() if "is lost" in line]
    assert all(re.search(r"train/\S+ is not a sound ALFWorld game", line) for line in lost), lost


@settings(max_examples=some(100), deadline=None)
@given(st.data(), st.sampled_from(["items_shuffle_1000", "items_ins_v2_1000", "items_human_ins"]))
def test_any_shop_file_works_or_is_named(parked_shopper, data, name):
    folder = write_shop(parked_shopper)
    sound = json.loads((folder / f"{name}.json").read_text())
    write_damaged(folder / f"{name}.json", data.draw(damaged_json(sound)))
    config = fresh(folder / "template", folder / "x") / "config.json"
    goals = "human" if name == "items_human_ins" else "synthetic"
    siri.write_json(config, json.loads(config.read_text()) | dict(webshop_goals=goals))
    done = call("--eval", folder / "x", "--webshop-data", folder)
    works_or_says_why(done, name.removesuffix("_1000"), "goals are too few")
    assert "is lost" not in done.out, done.out


@pytest.fixture(scope="class")                  # made anew for every test: no other may meet the parrot
def parked_shopper(parked_run, stranger_folder, tmp_path_factory):
    """A run that shops, its policy one that can say anything, and the folder for the shop's files."""
    root = tmp_path_factory.mktemp("shop")
    shutil.copytree(parked_run / "template", root / "template")
    cfg = stranger_config(stranger_folder, env="webshop", webshop_split="release", webshop_tagger="stop-list", max_steps=5,
                          groups=2, max_prompt=9999, variant="gigpo")
    siri.write_json(root / "template/config.json", dataclasses.asdict(cfg))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(envs.SHOP_SPLITS, "release", {"train": (2, None), "validation": (0, 2), "test": (0, 2)})
        patch.setattr(siri, "Policy", Parrot(siri.Policy(cfg)))
        yield root


def test_an_option_with_two_blanks_can_be_chosen_as_an_answer_writes_it():
    """WebShop puts blanks around a slash, so that "a / b" gets two on each side; `parse_action` leaves one."""
    odd = article("lamp", "Lamp", "$5.00", {"Color": ["Black / White", "black | white"], "Size": ["6  wide"]}, [], "Shines.")
    game = visit(goal_of(LAMP, shop=(shop := shop_of([odd]))), shop)
    state = walk(game, "search[lamp]", f"click[{LAMP.lower()}]")
    assert {"click[black  |  white]", "click[black | white]", "click[6  wide]"} <= set(state.admissible)
    for offered, kept in (("click[6  wide]", "6  wide"), ("click[black | white]", "black | white")):
        action = envs.parse_action(f"<think>x</think><action>{offered}</action>")
        state = game.step(state, action)
        assert state.valid and dict(state.engine.chosen)[{"6": "size"}.get(kept[0], "color")] == kept
    assert dict(game.step(state, "click[black  |  white]").engine.chosen)["color"] == "black  |  white"


def test_a_zero_byte_in_a_game_does_not_end_the_process(tmp_path):
    """Fast Downward's C++ half calls exit() on input that it cannot read."""
    world = envs.AlfWorld.official(make_folder(tmp_path, lambda text: text.replace("(:init", "(:init (isClean \\u0000)")))
    with pytest.raises(ValueError, match="zero byte"):
        world.open(world.tasks("train")[0])


# ---- 29. notebooks: the benchmark ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world():
    cfg = config()
    policy = siri.Policy(cfg)
    policy.model.double()               # two commands can be as likely to the last digit of a float, and padding moves it
    return siri.make_environment(cfg), policy


def spoken(groups):
    return [[s.response for s in e.steps] for group in groups for e in group]


def test_the_benchmarks_rollouts_play_the_same_episodes(world):
    """Greedy: a batch that shrinks, one prompt at a time, and a batch of fixed shape."""
    env, policy = world
    tasks = bench.some_tasks(env, 0, 4)[2:]                                 # the second is won before the steps run out
    ours, alone, padded = (bench.play(p, env, tasks, 2, 0.0) for p in (
        policy, bench.one_by_one(policy), bench.max_padded(policy, 4)))
    assert spoken(ours) == spoken(alone) == spoken(padded)
    assert len({len(e.steps) for group in ours for e in group}) > 1         # so the batch did shrink


def test_the_fixed_batch_keeps_its_shape(world, monkeypatch):
    env, policy = world
    shapes, generate = [], policy.model.generate
    monkeypatch.setattr(policy.model, "generate",
                        lambda input_ids, **kw: shapes.append(tuple(input_ids.shape)) or generate(input_ids=input_ids, **kw))
    short, long = policy.encode("look"), policy.encode("look look look")
    out = bench.max_padded(policy, 5).generate([short, long], 0.0, 4)
    assert shapes == [(5, policy.cfg.max_prompt)] and out == policy.generate([short, long], 0.0, 4)


def test_the_textbook_update_has_our_gradient(world):
    env, policy = world
    torch.manual_seed(0)
    rows = bench.rows_of(bench.play(policy, env, bench.some_tasks(env, 1, 1), 4, 1.0), policy.cfg)[:9]
    assert any(r.advantage for r in rows)
    ours, theirs = (bench.one_update(side, policy, rows, policy.cfg)["grad_norm"] for side in ("ours", "textbook"))
    assert ours == pytest.approx(theirs, rel=1e-3) and ours > 0


def test_peak_memory_is_seen_and_is_that_of_the_process_only():
    torch.ones(2**26).sum()                                                 # 256 MiB before it don't count
    with bench.Peak("cpu") as peak:
        torch.ones(2**24).sum()                                             # 64 MiB
    assert 62 <= peak.mib < 100


def test_a_row_compares_medians_and_checks_the_requirement():
    r = bench.row("p", "w", "u", [10.0, 30.0, 20.0], "other", [5.0, 2.0, 4.0], ">= 5")
    assert (r["ours"]["median"], r["ours"]["min"], r["ours"]["max"], r["other"]["median"]) == (20, 10, 30, 4)
    assert r["ratio"] == dict(median=5, min=2, max=15) and r["met"] is True
    assert bench.row("p", "w", "u", [2.0], require="<= 1.9")["met"] is False
    assert "NO" in bench.line(bench.row("p", "w", "u", [2.0], require="<= 1.9"))


def test_sides_take_turns_after_a_warm_up():
    seen = []
    side = lambda name: lambda k: seen.append((name, k)) or dict(x=k)
    assert bench.alternate(2, a=side("a"), b=side("b")) == dict(a=dict(x=[1, 2]), b=dict(x=[1, 2]))
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


@pytest.mark.parametrize("part, rows, work", [("rollouts", 3, ("steps", "tokens")), ("logprobs", 3, ()), ("paper", 24, ()),
                                               pytest.param("caches", 3, (), marks=slow)])
def test_a_benchmark_prints_and_writes_what_it_promises(tmp_path, capsys, part, rows, work):
    path = tmp_path / "bench.json"
    bench.main([part], config(), rounds=1, quick=True, path=path)
    report, text = json.loads(path.read_text()), capsys.readouterr().out
    assert {"versions", "processor", "threads", "device", "date", "commit", "rounds", "seed", "rows"} <= set(report)
    assert {"python", "torch", "transformers", "peft"} <= set(report["versions"]) and report["quick"] is True
    assert len(report["rows"]) == rows
    for r in report["rows"]:
        assert r["part"] == part and r["what"] in text and len(r["ours"]["values"]) == 1
        for side in filter(None, (r["ours"], r["other"])):
            assert 0 < side["min"] <= side["median"] <= side["max"] < math.inf
        if r["other"]:
            assert r["ratio"]["median"] == pytest.approx(r["ours"]["median"] / r["other"]["median"])
        for counted in work if r["other"] else ():
            assert min(r["work"]["ours"][counted] + r["work"]["other"][counted]) > 0
    if part == "logprobs":
        assert report["rows"][-1]["met"] is True                            # the gradients are equal


def test_an_unknown_benchmark_is_named(tmp_path):
    with pytest.raises(siri.UserError, match="--bench rollout: unknown part; choose from rollouts, "):
        bench.main(["rollout"], config(), path=tmp_path / "bench.json")
    assert not list(tmp_path.iterdir())


def test_without_trl_its_benchmark_is_skipped_with_the_mend(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    bench.main(["trl"], config(), rounds=1, quick=True, path=tmp_path / "bench.json")
    row, = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["part"] == "trl" and row["skipped"].endswith(f"pip install {bench.TRL}")
    assert row["skipped"] in capsys.readouterr().out


# ---- 30. notebooks: report and play ----------------------------------------------------------------------------------

HOSTILE = "</style></title><script>alert('x')</script><img src=//e.example onerror=f()>&amp;\"'\x1b[31m\u202e\ud800"


class Outline(HTMLParser):
    """A page as its elements, its text, and what is wrong with its nesting."""
    VOID = {"meta", "br", "path", "circle"}                                # void, or written <path .../> inside SVG

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.texts, self.faults = [], [], [], []
        self.feed(page)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another element")

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def metrics_row(iteration, phase, **values):
    """A row as a run writes it, n rollouts of each kind from phase 1 on."""
    skill = dict(success_skill=0.75, n_skill=32) if phase else dict(success_skill=math.nan, n_skill=0)
    return dict(iteration=iteration, phase=phase, seconds=60.0 * (iteration + 1), env_steps=500 * (iteration + 1),
                success_plain=0.25, n_plain=32, **skill, mean_steps=9.5, invalid_rate=0.125, kl=0.01, entropy=0.2,
                skills_candidate=iteration, skills_active=phase, skills_retired=0, rollout_tokens_per_s=1200.0,
                update_tokens_per_s=9000.0, lam=0.0, internal_rows=0) | values


def evaluation(label, iteration, successes, n, **values):
    part = dict(n=n, successes=successes, success=successes / n, interval=siri.wilson(successes, n), mean_steps=7.5,
                invalid_rate=0.25)
    return dict(label=label, panel=f"alfworld valid_seen, {n} games", skills=False, iteration=iteration, **part,
                kinds={"pick_and_place_simple": part}, outcomes={f"game {k}": k < successes for k in range(n)}) | values


def sampled(policy, text, skill=None, **values):
    ids = policy.tokenizer.encode(text)
    return siri.Step([1], ids, policy.decode(ids), "look", "You see a pen 1.", "", None, "", **values)


@lru_cache(maxsize=1)
def tiny_policy():
    return siri.Policy(siri.resolve({"preset": "tiny"})[0])


@pytest.fixture
def reported(tmp_path):
    """A finished run's folder as the program writes it (by its own functions), without training."""
    folder = tmp_path / "finished"
    folder.mkdir()
    siri.write_json(folder / "config.json", dataclasses.asdict(siri.resolve({"preset": "tiny", "name": "finished"})[0]))
    for iteration in range(6):
        siri.append_metrics(folder, metrics_row(iteration, iteration // 2, success_plain=iteration / 8))
    for label, at, wins, guided in (("base", 0, 21, False), ("phase 1 with skills", 4, 102, True), ("final", 6, 105, False)):
        siri.add_result(folder, evaluation(label, at, wins, 120, skills=guided))
    bank = SkillBank(kappa=1.0, n_eval=2, tau_up=0.05, tau_down=0.0, m_retire=2)
    good, bad, _ = (bank.add(f"the task needs {word}", "look on the desk first", 2, "game 7") for word in ("pen", "cup", "egg"))
    for iteration, delta in ((2, -0.25), (3, 0.5), (4, 0.75)):
        bank.record(good, delta, iteration)
    for iteration in (2, 3, 4):
        bank.record(bad, -0.5, iteration)
    bank.reject("duplicate")
    siri.write_json(folder / "skills.json", bank.to_json())
    policy, task = tiny_policy(), envs.Task("household0-0/train/1", "kind", "put a pen in shelf", "train")
    steps = [sampled(policy, "<think> find pen </think> <action> go to desk 1 </action>", advantage=1.5, reward=10.0),
             sampled(policy, "<think> find pen </think> <action> look </action>", advantage=-0.75, valid=False)]
    guided = [dataclasses.replace(step, plain=[1]) for step in steps]
    group = [siri.Episode(task, good, guided, False), siri.Episode(task, None, steps, True)]
    run = bare_run(policy, folder=folder, bank=bank, progress=siri.Progress(iteration=5, phase=2))
    siri.save_samples(run, [group], [0.5])
    return folder


def written(folder):
    path = report.write(folder)
    assert path == folder / "report.html"
    page = path.read_text(encoding="ascii")
    return page, Outline(page)


def test_the_report_says_what_the_files_say(reported):
    page, outline = written(reported)
    lo, hi = siri.wilson(105, 120)
    assert f"Final success with the plain prompt: 0.875 [{lo:.3f}, {hi:.3f}] (95% Wilson interval, n 120)" in outline.text
    assert outline.text.count(f"0.875 [{lo:.3f}, {hi:.3f}]") == 3          # header, evaluations, task type
    assert "small generated world: its scores are not benchmark scores" in outline.text
    assert "plain: 0 at iteration 0, 0.625 at 5; lowest 0, highest 0.625. skill: 0.75 at iteration 2, 0.75 at 5" in outline.text
    # Bands: skill's at iterations 2-5 is .75 +- sqrt(.75 * .25 / 32) = .0765, between y = 0 at 170 and y = 1 at 34.
    band = re.search(r'class="s1">.*?points="([^"]+)"', page)[1].split()
    heights = [float(p.split(",")[1]) for p in band]
    assert heights == pytest.approx([170 - 136 * 0.82655] * 4 + [170 - 136 * 0.67345] * 4, abs=0.06)
    # The phases begin at iterations 0, 2 and 4.
    marks = re.findall(r'class="mark" d="M([\d.]+)', page[:page.index("</svg>")])
    assert [float(x) for x in marks] == pytest.approx([42 + 308 * (k + 0.5) / 7 for k in (0, 2, 4)], abs=0.06)
    won = re.findall(r'<tr><th scope="row">game \d+</th>.*?</tr>', page)
    assert len(won) == 120 and sum(row.count(">won<") for row in won) == 21 + 102 + 105
    siri.add_result(reported, evaluation("eval", 6, 1, 2, notice="What was played.", versions={"torch": "9.9"}))
    text = written(reported)[1].text
    assert "What was played." in text and "torch 9.9" in text and "eval (alfworld valid_seen, 2 games)" in text


def test_the_report_tells_every_skills_history(reported):
    """Effects -.25, .5, .75 with kappa 1: the second gives U = 2/3 * .125 = .083 > .05, the third 3/4 * 1/3 = .25."""
    page, outline = written(reported)
    assert "active utility +0.25 ± 0.23 s.e., n 3 candidate (2) → active (3)" in outline.text
    assert "retired utility -0.38 ± 0.00 s.e., n 3 candidate (2) → retired (4)" in outline.text
    assert "candidate utility +0.00 no standard error before 2 pairs, n 0 candidate (2)" in outline.text
    assert "Not yet tried in a pair" in outline.text and "Rejected: duplicate 1" in outline.text
    assert "paired effects: -0.25 at iteration 2, 0.75 at 4; lowest -0.25, highest 0.75" in outline.text
    bank = siri.read_json(reported / "skills.json")
    bank["skills"][0]["state"] = "retired"
    siri.write_json(reported / "skills.json", bank)
    assert "The file says retired, but these effects lead to active" in written(reported)[1].text


def test_the_report_shows_advantage_and_weight_of_every_token(reported):
    page, outline = written(reported)
    samples = page[page.index('<section id="samples">'):page.index('<section id="config">')]
    assert re.findall(r'<b style="--w:([\d.]+)">([^<]*)</b>', samples)[1:] == [
        ("0.75", word) for word in ("go", "to", "desk", "1")]              # the first is the legend's
    assert re.findall(r'<span class="(pos|neg)" style="--a:([\d.]+)"><', samples) == [("pos", "1.00"), ("neg", "0.50")] * 2
    assert samples.index("Plain prompt: success, 2 steps") < samples.index("With the skill <q>when the task needs pen")
    assert samples.count("failure, 2 steps") == 1
    assert "advantage +1.50, reward 10; distilled: 4 of 10 tokens, weight 0.75" in outline.text
    assert outline.text.count("advantage -0.75, reward 0, invalid") == 2
    assert "<think> find pen </think> <action> go to desk 1 </action>" in outline.text          # words with their spaces
    assert report.spaces(["<a>", "cl", "ick", "[", "red", "", "]"], "<a> click[red]") == ["", " ", "", "", "", "", ""]
    assert report.spaces(["go", " on", "\ufffd", "\ufffd", " now"], "go on\u00e9 now") == [""] * 5   # a letter of two tokens
    assert report.spaces(["x", "b", "c"], "b x c") == ["", "", ""]         # a piece out of place moves nothing
    (reported / "samples" / "0005.json").unlink()                          # an older run's
    assert "This run has samples without token data" in written(reported)[1].text


def test_a_run_that_goes_on_after_its_end_is_not_finished(reported):
    """Its metrics have a row more than there were when it ended."""
    path = reported / "metrics.csv"
    lines = path.read_bytes().decode().splitlines(keepends=True)
    results = json.loads((reported / "results.json").read_text())
    results[-1]["iteration"] = len(lines) - 1
    siri.write_json(reported / "results.json", results)
    assert "Final success" in written(reported)[1].text
    path.write_bytes("".join([*lines, lines[-1]]).encode())
    text = written(reported)[1].text
    assert "not finished: running, or stopped" in text and "Final success" not in text


def test_a_sample_holds_the_weights_of_the_actions_that_pass_the_gate(reported):
    guided, plain = json.loads((reported / "samples" / "0005.json").read_text())["episodes"]
    weights = lambda episode: [step["weights"] for step in episode["steps"]]
    assert weights(guided) == [[0.0] * 5 + [0.75] * 4 + [0.0], [0.0] * 7]           # 1.5 / a_max, the action: go to desk 1
    assert weights(plain) == [[0.0] * 10, [0.0] * 7]


def test_the_report_is_one_accessible_page(reported):
    page, outline = written(reported)
    assert outline.faults == []
    assert outline.all("html", lang="en") and outline.all("meta", name="viewport")
    assert not {tag for tag, _ in outline.elements} & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert {a["href"][0] for a in outline.all("a")} == {"#"} and "http:" not in page and "https:" not in page
    assert re.findall(r"url\(|@import|src=", page) == []
    ids = [a["id"] for _, a in outline.elements if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in outline.all("a")} <= set(ids)
    figures_ = outline.all("svg", role="img")
    assert len(figures_) == len(outline.all("figure")) > 8
    for svg in figures_:
        assert len(svg["aria-labelledby"].split()) == 2 and set(svg["aria-labelledby"].split()) <= set(ids)
    assert all(a.get("aria-hidden") == "true" for a in outline.all("svg") if "role" not in a)
    assert len(outline.all("table")) == len(outline.all("caption")) == len(outline.all("div", role="region", tabindex="0"))
    assert all(a.get("scope") in ("col", "row") for a in outline.all("th"))
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    assert page == written(reported)[0]                                    # the same files, the same bytes


def test_colours_of_the_report_can_be_read():
    """WCAG contrast of every text colour on every background it stands on, tints at their fullest: 4.5 at least."""
    light, dark = (dict(re.findall(r"--(\w+): ([^;]+);", part)) for part in figures.STYLE.split("@media")[:2])
    rgb = lambda c: [int(x) for x in c.split()] if " " in c else [
        int((c[1:] if len(c) == 7 else "".join(x * 2 for x in c[1:]))[k:k + 2], 16) for k in (0, 2, 4)]
    linear = lambda x: x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
    luminance = lambda c: sum(w * linear(x / 255) for w, x in zip((0.2126, 0.7152, 0.0722), c))
    share = {name: float(a) + float(b) for name, a, b in re.findall(
        r"rgb\(var\(--(\w+)\) / calc\(([.\d]+) \+ ([.\d]+) \* var\(--a\)\)\)", figures.STYLE)}
    assert set(share) == {"blue", "orange"}
    for colours in (light, light | dark):
        for ground in (rgb(colours["bg"]), rgb(colours["card"])):
            tinted = [[a * (1 - share[t]) + b * share[t] for a, b in zip(ground, rgb(colours[t]))] for t in share]
            pairs = [(name, ground) for name in ("fg", "dim", "s0", "s1", "s2", "s3")] + [("fg", g) for g in tinted]
            for name, behind in pairs:
                low, high = sorted((luminance(rgb(colours[name])), luminance(behind)))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, behind)


def test_text_of_a_run_stays_text_in_its_report(reported):
    """Wherever a run has text, hostile text: the page has the same elements, and shows it without its control characters."""
    plain = written(reported)[1]

    def spoil(data):
        if isinstance(data, dict):
            return {(HOSTILE + k if k in ("pick_and_place_simple",) or k.startswith("game ") else k): v if k in
                    ("preset", "variant", "state", "rejected", "label") else spoil(v) for k, v in data.items()}
        if isinstance(data, list):
            return [spoil(v) for v in data]
        return HOSTILE + data if isinstance(data, str) and data else data

    for name in ("config.json", "results.json", "skills.json", "samples/0005.json"):
        siri.write_json(reported / name, spoil(siri.read_json(reported / name)))
    page, outline = written(reported)
    assert [tag for tag, _ in outline.elements] == [tag for tag, _ in plain.elements] and outline.faults == []
    assert {k for _, a in outline.elements for k in a} == {k for _, a in plain.elements for k in a}
    shown = "</style></title><script>alert('x')</script><img src=//e.example onerror=f()>&amp;\"'\ufffd[31m\ufffd\ufffd"
    for text in ("put a pen in shelf", "You see a pen 1.", "the task needs pen", "look on the desk first", "assets/tiny",
                 "finished", "pick_and_place_simple", "game 0", "household0-0/train/1", "alfworld valid_seen, 120 games", "desk"):
        assert shown + text in outline.text, text


@pytest.mark.parametrize("missing, said", [
    (("metrics.csv",), "metrics.csv is missing: this run has not finished an iteration"),
    (("results.json",), "nothing has been evaluated yet"),
    (("skills.json",), "There are no skills to show: skills.json is missing"),
    (("samples/0005.json", "samples/0005.txt"), "This run has no sample episodes yet"),
    (("metrics.csv", "results.json", "skills.json", "samples/0005.json", "samples/0005.txt"), "Iterations none yet"),
])
def test_a_report_of_a_young_run_names_what_is_missing(reported, missing, said):
    for name in missing:
        (reported / name).unlink()
    outline = written(reported)[1]
    assert said in outline.text and outline.faults == []
    assert ("not finished: running, or stopped" in outline.text) == ("results.json" in missing)


def test_a_report_of_warm_up_and_of_values_that_are_not_numbers(reported):
    siri.write_json(reported / "skills.json", SkillBank().to_json())
    (reported / "metrics.csv").unlink()
    for iteration in range(2):
        siri.append_metrics(reported, metrics_row(iteration, 0, kl=math.nan, entropy=math.inf if iteration else 0.5))
    (reported / "results.json").write_text("[]")
    outline = written(reported)[1]
    assert "There are no skills to show: the run is in warm-up" in outline.text
    assert "No finite value in this run" in outline.text                   # KL
    assert "Entropy: 0.5 at iteration 0." in outline.text                  # the infinite one is a gap
    assert "results.json is missing or empty" in outline.text and outline.faults == []
    with (reported / "metrics.csv").open("a") as f:
        f.write("2,0,180.0,15")                                            # a crash in mid-line
    outline = written(reported)[1]
    assert "The last line of metrics.csv is torn" in outline.text and "(iterations: 2)" in outline.text


@pytest.mark.parametrize("name, content, said", [
    ("config.json", None, "cannot be read as JSON"), ("config.json", "[]", "not what siri.py writes"),
    ("config.json", '{"env": "alfworld"}', "not what siri.py writes"),
    ("metrics.csv", "a,b\r\n1,2\r\n", "has no column iteration"), ("metrics.csv", b"\xff\xfe\n", "cannot be read as CSV"),
    ("metrics.csv", "{header}1,two\r\n", "line 2 is not a row"), ("metrics.csv", "{header}\r\n", "line 2 is not a row"),
    ("metrics.csv", "{header}" + ",".join(["7"] * 19) + "\r\n", "impossible phase"),
    ("results.json", "{}", "not what siri.py writes"), ("results.json", "[3]", "not what siri.py writes"),
    ("results.json", '[{"label": "base"}]', "not what siri.py writes"), ("results.json", "[", "cannot be read as JSON"),
    ("results.json", "more successes", "121 successes of 120 games"),
    ("skills.json", "{}", "missing or unknown fields"), ("skills.json", "nonsense", "cannot be read as JSON"),
    ("samples/0005.json", "{}", "not what siri.py writes"), ("samples/0005.json", "a weight less", "tokens without a weight"),
])
def test_a_report_of_foreign_files_is_a_line_that_names_the_file(reported, name, content, said):
    path = reported / name
    if content is None:
        path.unlink()
    elif content == "more successes":
        siri.write_json(path, [r | dict(successes=121) for r in siri.read_json(path)])
    elif content == "a weight less":
        data = siri.read_json(path)
        data["episodes"][0]["steps"][0]["weights"].pop()
        siri.write_json(path, data)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        header = (reported / "metrics.csv").read_bytes().decode().splitlines(keepends=True)[0]
        assert header.count(",") == 18
        path.write_bytes(content.replace("{header}", header).encode())
    with pytest.raises(siri.UserError, match=re.escape(said)) as error:
        report.write(reported)
    assert name in str(error.value) and "\n" not in str(error.value) and not (reported / "report.html").exists()


@slow
def test_the_report_fits_a_phone_and_a_desk(reported, tmp_path):
    """In a browser: no page scrolls sideways with every part unfolded, light or dark, and print unfolds what screens fold."""
    browser = os.environ.get("SIRI_CHROMIUM")
    if not browser:
        pytest.skip("set SIRI_CHROMIUM to a Chromium or Chrome to run it")
    data = siri.read_json(reported / "samples/0005.json")
    data["episodes"][0]["steps"][0]["observation"] = "x" * 3000             # nothing to break at
    siri.write_json(reported / "samples/0005.json", data)
    page = written(reported)[0]
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(page)}"></iframe>' for w in (390, 1280))
    probe = tmp_path / "probe.html"
    probe.write_text(f"""<!DOCTYPE html><body>{frames}<pre></pre><script>onload = () => {{
        document.querySelector("pre").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(f => {{
            const d = f.contentDocument;
            const folded = d.querySelectorAll("details:not([open])").length;
            d.querySelectorAll("details").forEach(x => x.open = true);
            return [f.clientWidth, d.documentElement.scrollWidth, folded, d.querySelectorAll("figure svg").length]; }})); }}
        </script></body>""")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run([*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=60, check=True).stdout
    measured = json.loads(html.unescape(re.search(r"<pre>(\[\[.*?\]\])</pre>", dom)[1]))
    charts = page.count('class="chart"')
    for width, content, folded, drawn in measured:
        assert content <= width and folded >= 4 and drawn >= charts
    assert [m[0] for m in measured] == [390, 1280]
    subprocess.run([*command, f"--print-to-pdf={tmp_path / 'page.pdf'}", (reported / "report.html").as_uri()], timeout=60,
                   capture_output=True, check=True)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


class PlayedShop:
    """Two commands and a search box; leaving wins. Its pages hold terminal codes."""
    name, scored, max_steps, notice = "alfworld", True, 5, "A cupboard.\x1b[2J"

    def tasks(self, split):
        return [envs.Task("t/1", "kind", "leave \x1b]0;title\x07the room", split)]

    def open(self, task):
        state = envs.State("a \x1b[31mroom", ("wait", "leave", "search[<your query>]"), "a")

        def step(before, action):
            won = action == "leave"
            return dataclasses.replace(before, observation=f"after {action}", steps=before.steps + 1, success=won,
                                       score=float(won), done=won or before.steps == 4, valid=action in ("wait", "leave"))
        return SimpleNamespace(task=task, start=state, step=step, close=lambda: None)


def played(monkeypatch, capsys, lines, run=None, env=None):
    monkeypatch.setattr(siri, "make_environment", lambda cfg: env or PlayedShop())
    monkeypatch.setattr(siri, "Policy", lambda cfg, checkpoint: tiny_policy())
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    terminal.main(siri.resolve({"preset": "tiny"})[0], run)
    return capsys.readouterr().out


def test_play_takes_numbers_and_words_and_ends_with_the_result(monkeypatch, capsys):
    out = played(monkeypatch, capsys, "1\n  LEAVE \n2\nfly\n9\n0\n3\nleave\n")
    assert re.findall(r"=== (.*), (\d) steps", out) == [
        ("success, score 1.00", "2"),                                       # wait, then leave in words
        ("success, score 1.00", "1"),                                       # leave by its number
        ("success, score 1.00", "2")]                                       # fly costs a step, 9, 0 and 3 none
    assert out.count("not a command that can be done here") == 1
    assert "there is no command 9: 1 to 3" in out and "there is no command 0: 1 to 3" in out
    assert "search[red shoes]" in out
    assert out.count("=== t/1") == 4                                        # the fourth game meets the end of the input


def test_play_sends_no_codes_to_the_terminal(monkeypatch, capsys):
    out = played(monkeypatch, capsys, "search[\x1b[5m]\nq\n")
    assert "after search" in out and [c for c in out if not c.isprintable() and c != "\n"] == []


def test_play_shows_the_policys_prompt_and_thoughts(monkeypatch, capsys):
    """`?` is the very prompt of `fit_prompt`; `h` asks and plays nothing; `w` plays on with what the policy says."""
    answers = iter(["<think> why not </think> <action> wait </action>",
                    "<think> enough \x1b[0m</think> <action> leave </action>"] * 2)
    policy = tiny_policy()
    monkeypatch.setattr(policy, "generate", lambda prompts, temperature, max_new: [[7]])
    monkeypatch.setattr(policy, "decode", lambda ids: next(answers))
    out = played(monkeypatch, capsys, "?\nh\nh\nw\nq\n")
    world = PlayedShop()
    task = world.tasks("valid_seen")[0]
    game = world.open(task)
    prompt = policy.tokenizer.decode(siri.fit_prompt(policy, task, game.start, [], None))
    assert figures.printable(prompt) in out and "<|im_start|>" in prompt and "the room" in prompt
    assert out.count("the policy: <think> why not </think> <action> wait </action>") == 2
    assert "enough \ufffd[0m</think>" in out and "=== success, score 1.00, 2 steps" in out
    assert out.count("[0 of 5]") == 2 and out.count("[1 of 5]") == 1        # h moved nothing; w went two steps; then a new game
    turns = [envs.Turn(game.start.observation, "wait")]
    later = policy.tokenizer.decode(siri.fit_prompt(policy, task, game.step(game.start, "wait"), turns, None))
    assert figures.printable(later) in played(monkeypatch, capsys, "wait\n?\n")


@pytest.mark.parametrize("env", ["alfworld", "webshop"])
def test_play_plays_both_benchmarks_with_a_real_policy(monkeypatch, capsys, env):
    cfg = siri.resolve({"preset": "tiny", "env": env})[0]
    policy = siri.Policy(cfg)
    monkeypatch.setattr(siri, "Policy", lambda cfg, checkpoint: policy)
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n?\nw\n"))
    terminal.main(cfg, None)
    out = capsys.readouterr().out
    assert re.search(r"=== (success|not solved).*, \d+ steps", out) and "GENERATED" in out
    assert len(re.findall("the policy: <think>", out)) == int(re.search(r", (\d+) steps", out)[1]) - 1 > 0


def test_play_with_a_run_needs_its_checkpoint(tmp_path):
    with pytest.raises(siri.UserError, match="holds no checkpoint"):
        terminal.main(siri.resolve({"preset": "tiny"})[0], tmp_path)


# ---- 31. notebooks: the lessons --------------------------------------------------------------------------------------

LESSONS = sorted(HERE.glob("notebooks/*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in cell.outputs)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_notebook_can_be_read_without_running_it(path):
    import nbformat
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))          # run once, from the top
    assert all(sum(map(bool, cell.source.splitlines())) <= 15 for cell in cells) and path.stat().st_size < 600_000
    outputs = [o for cell in cells for o in cell.outputs]
    assert all(o.output_type != "error" and o.get("name") != "stderr" for o in outputs)
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert any("exact" in cell.metadata.get("tags", []) for cell in cells)


@pytest.mark.skipif(not os.environ.get("SIRI_NOTEBOOKS"), reason="takes minutes: set SIRI_NOTEBOOKS=1 to run it")
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_the_modules_hold_now(path):
    """From top to bottom without an error; cells with the tag `exact` print what is committed, to the letter."""
    import nbclient
    import nbformat
    before = nbformat.read(path, 4)
    after = nbclient.NotebookClient(copy.deepcopy(before), timeout=900, resources={"metadata": {"path": str(HERE)}}).execute()
    for old, new in zip(code_cells(before), code_cells(after)):
        if "exact" in old.metadata.get("tags", []):
            assert text_of(new) == text_of(old), old.source


# ---- 32. What the documentation promises -----------------------------------------------------------------------------

README = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""
COMMANDS = [line.strip() for block in re.findall(r"```bash\n(.*?)```", README.replace("\\\n", " "), re.S)
            for line in re.split(r"\n|&&", block) if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("module", [gigpo, distill, skills, envs, siri, report], ids=lambda module: module.__name__)
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("name", ["gigpo", "distill", "skills"])
def test_the_mathematics_is_pure(name):
    """No imports of the other modules, no files, no printing, no clocks, no hidden random numbers."""
    tree = ast.parse((HERE / f"{name}.py").read_text())
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names} | {node.module.split(".")[0] for node in ast.walk(tree)
                                            if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections", "dataclasses", "difflib", "math", "numpy", "re", "textwrap",
                        "torch", "typing"}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "print", "input", "eval", "exec"}
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))


def test_the_readme_has_the_command_that_trains_and_the_one_that_tests():
    assert any(command.startswith("python siri.py --env alfworld") for command in COMMANDS)
    assert re.search(r"^python -m pytest.*$", README, re.M)                    # the line that .ci/run takes from there


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_are_valid(command):
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"\w+=\S*", word)]
    for word in words[1:]:
        assert not re.fullmatch(r"[\w/]+\.(py|txt|ipynb|md)", word) or (HERE / word).exists(), word
    if words[:2] == ["python", "siri.py"] and "--help" not in words:
        chosen, given = siri.parse_arguments(words[2:])
        if not (chosen.eval or chosen.resume or given.get("preset", "").startswith("paper")):
            siri.resolve(given)


@pytest.mark.parametrize("file", ["bench.json", "bench-cuda.json"])
def test_the_readmes_performance_tables_are_those_of_the_files(file):
    measured = json.loads((HERE / "assets" / file).read_text())
    assert not measured["quick"] and bench.markdown(measured) in (HERE / "README.md").read_text()


def test_readme_names_exist():
    """Files, functions, tests and flags in back-quotes."""
    options = {siri.flag(field.name) for field in dataclasses.fields(siri.Config)} | {
        "help", *(action.replace("_", "-") for action in siri.make_parser()[1])}
    modules = dict(gigpo=gigpo, distill=distill, skills=skills, envs=envs, siri=siri)
    assert "`gigpo." in README and "`test_" in README
    for name in re.findall(r"`([^`\n]+)`", README):
        if match := re.fullmatch(r"(gigpo|distill|skills|envs|siri)\.(\w+)(\.\w+)?(\(.*\))?", name):
            assert match[2] in ("py", "json") or hasattr(modules[match[1]], match[2]), name
        if re.fullmatch(r"test_\w+", name) and name != "test_siri":
            assert name in globals(), name
        if re.fullmatch(r"[\w./-]+\.(py|txt|ipynb)", name):
            assert (HERE / name).exists(), name
        if match := re.fullmatch(r"--(no-)?([a-z0-9-]+)( .*)?", name):
            assert match[2] in options, name
