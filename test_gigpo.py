"""G1-G8: advantages, log-probabilities and losses, by hand-computed examples, closed forms and PyTorch twins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distill
import gigpo

# ---- 1. advantages (G1-G6) -------------------------------------------------------------------------------------------

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
    assert outside[2, 3] == -0.2 and np.count_nonzero(outside) == 1
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

# ---- 2. log-probabilities and losses (G7-G8) -------------------------------------------------------------------------


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
