"""Advantage-weighted internalization: phase 2 of SIRI (arXiv 2606.02355), which moves a skill from prompt to weights.

Holds S7-S10. Action tokens sampled with a useful skill in the prompt are made likelier under the plain prompt of the
same step, in proportion to their advantage; then the skill can go.

What differs from the paper, and why: the gate can also ask that the pair of half-groups itself gained from the skill
(`require_pair_gain`), as a utility averages over tasks where the skill did harm; and it can take the whole response
(`tokens="response"`), because a thought that already names the action leaves nothing to learn from action tokens.

Axes: B rows (one step of one rollout each), T response tokens.

>>> mask = torch.tensor([action_mask(["<act", "ion>", "go", " east", "</action>"])])
>>> gate = action_gate(mask, torch.tensor([True]), utility=torch.tensor([0.2]), delta=torch.tensor([0.5]))
>>> internalization_loss(torch.full((1, 5), -2.0), advantage_weights(torch.tensor([[1.5]]), a_max=2.0), gate)
(tensor(3.), tensor(2))
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

# ---- 1. Which tokens (S7) --------------------------------------------------------------------------------------------

def action_mask(pieces: Sequence[str]) -> list[bool]:
    """S7: whether each sampled token has a character of the action: the text inside the first `<action>...</action>`.

    `pieces` are the T decoded response tokens in order, and their concatenation is the response. The tags are not part
    of the action, but a token that straddles a tag and the action counts. Without a complete pair no token counts.
    """
    found = re.search(r"<action>(.*?)</action>", "".join(pieces), re.DOTALL)
    start, end = found.span(1) if found else (0, 0)
    mask, at = [], 0
    for piece in pieces:
        mask.append(max(at, start) < min(at + len(piece), end))
        at += len(piece)
    return mask


def action_gate(
    is_action: Tensor,
    used_skill: Tensor,
    utility: Tensor,
    delta: Tensor,
    *,
    response_mask: Tensor | None = None,
    tokens: str = "action",
    require_pair_gain: bool = True,
    gated: bool = True,
) -> Tensor:
    """S7: `gate = [used a skill] [U_s > 0] [Delta_g > 0] [action token]`, (B, T) bool.

    `is_action` (B, T) bool from `action_mask`; per row (B,): `used_skill` bool, `utility` U_s and `delta` Delta_g, both
    differences of success rates, which have to be above 0 (`tau_up` is about promotion). `tokens="response"` takes
    `response_mask` (B, T) bool, all sampled tokens, in place of `is_action`; `require_pair_gain=False` drops the condition on
    Delta_g; `gated=False` (ablation `no_gate`) drops both conditions on the skill. Another `tokens`, or "response" without its
    mask, raises ValueError.
    """
    if tokens not in ("action", "response"):
        raise ValueError(f"tokens must be 'action' or 'response', got {tokens!r}")
    if tokens == "response" and response_mask is None:
        raise ValueError("tokens='response' needs response_mask, got None")
    row = used_skill  # (B,)
    if gated:
        row = row & (utility > 0)  # (B,)
        if require_pair_gain:
            row = row & (delta > 0)  # (B,)
    return row[:, None] & (is_action if tokens == "action" else response_mask)  # (B, T)


# ---- 2. How strongly (S8, S10) ---------------------------------------------------------------------------------------

def advantage_weights(advantage: Tensor, a_max: float, *, uniform: bool = False) -> Tensor:
    """S8: `w = clip(A, 0, A_max) / A_max`, in [0, 1], with the shape of `advantage` (G6); `a_max` is in its units.

    `uniform=True` (ablation `no_advantage`) gives 1 everywhere. `a_max <= 0` raises ValueError.
    """
    if a_max <= 0:
        raise ValueError(f"a_max must be positive, got {a_max!r}")
    return torch.ones_like(advantage) if uniform else advantage.clamp(0, a_max) / a_max


def with_mean_one(weight: Tensor, gate: Tensor) -> Tensor:
    """Weights (B,) over their mean over the gated tokens (B, T) bool: which steps count is kept, how large a step is becomes that
    of weights of 1 [O]. As they are where that mean is 0.

    >>> with_mean_one(torch.tensor([0.5, 0.0]), torch.tensor([[True, False], [True, True]]))
    tensor([3., 0.])
    """
    tokens = gate.sum(dim=1)  # (B,)
    mean = (weight * tokens).sum() / tokens.sum().clamp(min=1)
    return weight / mean if mean > 0 else weight


def lambda_schedule(k: int, lambda_max: float, k_warm: int) -> float:
    """S10: `lambda(k) = lambda_max min(1, k / K_warm)`, the coefficient of S9 in the phase's k-th iteration.

    Zero at k = 0 unless `k_warm`, in iterations, is 0: no warm-up. A negative `k` or `k_warm` raises ValueError.
    """
    if k < 0 or k_warm < 0:
        raise ValueError(f"k and k_warm must not be negative, got k={k}, k_warm={k_warm}")
    return lambda_max * min(1.0, k / k_warm) if k_warm else lambda_max


# ---- 3. The loss (S9) ------------------------------------------------------------------------------------------------

def internalization_loss(logp_plain: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """S9: the two halves of `L_int = - sum w log p(token | plain prompt) / sum gate`, as scalars (sum, count).

    `logp_plain`, `weight` and `gate` (bool) are (B, T), or flat, or broadcast to that; log-probabilities in nats. Sum
    both over the micro-batches of an optimizer step and divide once, so that the gradient doesn't depend on the split.
    The count can be 0. Shapes that don't broadcast raise RuntimeError.
    """
    logp_plain, weight, gate = torch.broadcast_tensors(logp_plain, weight, gate)  # (B, T)
    return -(weight[gate] * logp_plain[gate]).sum(), gate.sum()
