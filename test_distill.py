"""S7-S10: the gate, its weights, the internalization loss and its schedule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distill

# ---- 1. internalization (S7-S10) -------------------------------------------------------------------------------------


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
    cases = [(s, u, d) for s in (True, False) for u in (0.1, 1e-3, 0.0, -0.1) for d in (0.5, 1e-3, 0.0, -0.5)]
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
