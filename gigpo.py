"""Group-in-group advantages and the policy loss: phase 0 of SIRI (arXiv 2606.02355), after GiGPO (arXiv 2505.10978).

Holds G1-G8. Rollouts of one task are compared twice: whole trajectories with each other (G1-G2), and steps taken from
the same environment state with each other (G3-G5); the sum (G6) weights a clipped policy loss (G7) with a KL term (G8).

What differs from the papers, and why:
- A group of one, or a spread below `EPS_STD`, has advantage zero. The GiGPO release (verl-agent) divides by std + 1e-6,
  which turns float noise into advantage, and gives a lone score of G2 back unchanged.
- The penalty for an invalid action is added after normalising, so that it is worth `invalid_penalty` in every group.
  `penalty_inside=True` is the release's form: one bad step among N in a lost group then gets about -sqrt(N).
- Statistics are over trajectories, as in the paper; `baseline="steps"` is the release's default, over step rows.
- Losses are per token. The caller sums them over the micro-batches of an optimizer step and divides by ONE token count,
  that of the whole step: the gradient then doesn't depend on how the step was split.

Axes: B rows (one step of one rollout each), T tokens of a response, N tokens of several responses laid end to end,
G rollouts of a group, S_i steps of rollout i, V vocabulary, H hidden width.

>>> rewards = [[0, 0, 10], [0, 0]]  # two rollouts of one task; the first one succeeds
>>> keys = [["hall", "desk", "shelf"], ["hall", "hall"]]
>>> [a.round(2).tolist() for a in group_advantages(rewards, keys, valid=[[True] * 3, [True, False]])]
[[1.86, 0.71, 0.71], [-1.28, -1.48]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

EPS_STD = 1e-4  # reward units: a standard deviation below this counts as zero, and so does the advantage


# ---- 1. Episode-level advantage (G1-G2) ------------------------------------------------------------------------------

def episode_returns(rewards: Sequence[Sequence[float]]) -> np.ndarray:
    """G1: `R_i = sum_t r_{i,t}`, undiscounted. `rewards` holds S_i step rewards per rollout; (G,), in their units."""
    return np.array([sum(row) for row in rewards], dtype=float)  # (G,)


def normalise(scores: np.ndarray, norm: str) -> np.ndarray:
    """`(x - mean) / F` over all of `scores`, any shape; `F` is the unbiased std (`norm="std"`) or 1 (`norm="mean"`).

    G2 and G5 share it. The result is in standard deviations, or with `F = 1` in the units of `scores`. One score alone,
    or a spread below `EPS_STD`, gives zeros. Another `norm` raises ValueError.
    """
    if norm not in ("std", "mean"):
        raise ValueError(f"norm must be 'std' or 'mean', got {norm!r}")
    scores = np.asarray(scores, dtype=float)
    if scores.size < 2 or (std := scores.std(ddof=1)) < EPS_STD:
        return np.zeros_like(scores)
    return (scores - scores.mean()) / (std if norm == "std" else 1.0)


def episode_advantages(
    returns: np.ndarray, lengths: Sequence[int], *, norm: str = "std", baseline: str = "trajectory"
) -> np.ndarray:
    """G2: `A^E_i = (R_i - mean_j R_j) / F`; `returns` (G,) and `lengths` S_i (G,) give (G,).

    `baseline="trajectory"` (paper) counts each trajectory once in mean and F; `"steps"` (release) counts trajectory i
    S_i times, so a long failure weighs more than a short success. Another `baseline` or `norm`, or lengths that are not
    one S_i >= 1 for each return, raise ValueError.
    """
    if baseline not in ("trajectory", "steps"):
        raise ValueError(f"baseline must be 'trajectory' or 'steps', got {baseline!r}")
    if len(returns) != len(lengths) or min(lengths, default=1) < 1:
        raise ValueError(f"lengths must give one step count >= 1 for each of {len(returns)} rollouts, got {lengths}")
    if baseline == "trajectory":
        return normalise(returns, norm)  # (G,)
    first = np.cumsum(lengths) - lengths  # (G,) row of each rollout's first step
    return normalise(np.repeat(returns, lengths), norm)[first]  # (G,)


# ---- 2. Step-level advantage (G3-G5) ---------------------------------------------------------------------------------

def anchor_groups(keys: Sequence[Sequence[str]], *, similarity: float | None = None) -> list[np.ndarray]:
    """G3: label the steps of a group by environment state, across rollouts and time; one (S_i,) int array per rollout.

    Equal keys share a label. With `similarity` in (0, 1) (an option of the release), a state joins the first cluster
    whose representative, its first member, has a difflib ratio >= `similarity`; the order of rollouts then matters.
    Unlike the release, `autojunk` is off: in a text of 200 characters or more it ignores the frequent ones, nearly
    all of them, and the ratio of two near copies can be 0. Outside (0, 1) raises ValueError.
    """
    if similarity is not None and not 0 < similarity < 1:
        raise ValueError(f"similarity must be None or lie in (0, 1), got {similarity!r}")
    label: dict[str, int] = {}
    representatives: list[str] = []
    for key in (key for row in keys for key in row):
        if key in label:
            continue
        known = enumerate(representatives) if similarity else ()
        label[key] = next((c for c, text in known if _alike(key, text, similarity or 1)), len(representatives))
        if label[key] == len(representatives):
            representatives.append(key)
    return [np.array([label[key] for key in row], dtype=int) for row in keys]


def _alike(a: str, b: str, threshold: float) -> bool:
    """Whether the difflib ratio of two texts reaches `threshold`; its two cheap upper bounds are asked first."""
    match = SequenceMatcher(None, a, b, autojunk=False)
    return all(ratio() >= threshold for ratio in (match.real_quick_ratio, match.quick_ratio, match.ratio))


def step_returns(rewards: Sequence[Sequence[float]], gamma: float) -> list[np.ndarray]:
    """G4: `D_{i,t} = sum_{k>=t} gamma^{k-t} r_{i,k}`; one (S_i,) array per rollout, in units of reward; `gamma` is per
    environment step."""
    returns = [np.array(row, dtype=float) for row in rewards]
    for d in returns:
        for t in reversed(range(len(d) - 1)):
            d[t] += gamma * d[t + 1]
    return returns


def step_advantages(
    returns: Sequence[np.ndarray], groups: Sequence[np.ndarray], *, norm: str = "std"
) -> list[np.ndarray]:
    """G5: `A^S_{i,t} = (D_{i,t} - mean of its step group) / F_step`, each step group normalised by itself.

    `returns` (G4) and `groups` (G3) hold one (S_i,) array per rollout; so does the result. A step group of one gets 0.
    Another `norm`, or no rollout at all, raises ValueError.
    """
    flat, label = np.concatenate(returns), np.concatenate(groups)  # (sum S_i,)
    advantage = np.empty_like(flat)  # (sum S_i,)
    for group in np.unique(label):
        advantage[label == group] = normalise(flat[label == group], norm)
    return np.split(advantage, np.cumsum([len(d) for d in returns])[:-1])


# ---- 3. Advantage of a group (G6) ------------------------------------------------------------------------------------

def group_advantages(
    rewards: Sequence[Sequence[float]],
    keys: Sequence[Sequence[str]],
    valid: Sequence[Sequence[bool]],
    *,
    gamma: float = 0.95,
    omega: float = 1.0,
    norm: str = "std",
    baseline: str = "trajectory",
    invalid_penalty: float = 0.2,
    penalty_inside: bool = False,
    similarity: float | None = None,
) -> list[np.ndarray]:
    """G6: `A_{i,t} = A^E_i + omega A^S_{i,t} - c [step t invalid]` for one group, G1-G5 included; (S_i,) per rollout.

    `rewards`, `keys` (state texts) and `valid` hold S_i entries per rollout; `c = invalid_penalty`, in advantage units. With
    `penalty_inside` (release) c is in reward units: it is taken off the invalid step's own scores, `R_i - c` in G2 and
    `D_{i,t} - c` in G5, and nothing is added outside. The steps of a trajectory then differ in their episode score, so this
    needs `baseline="steps"`. Another baseline with it, lengths that differ, and what G2, G3 and G5 refuse raise ValueError.
    """
    lengths = [len(row) for row in rewards]
    if not lengths == [len(row) for row in keys] == [len(row) for row in valid]:
        raise ValueError("rewards, keys and valid must have the same number of rollouts, and of steps in each")
    if penalty_inside and baseline != "steps":
        raise ValueError(f"penalty_inside=True needs baseline='steps', got {baseline!r}")
    charge = [invalid_penalty * ~np.asarray(row, dtype=bool) for row in valid]  # (S_i,) each
    total = episode_returns(rewards)  # (G,)
    returns = step_returns(rewards, gamma)  # (S_i,) each
    episode = list(episode_advantages(total, lengths, norm=norm, baseline=baseline))  # (G,)
    if penalty_inside:
        scores = np.repeat(total, lengths) - np.concatenate(charge)  # (sum S_i,)
        episode = np.split(normalise(scores, norm), np.cumsum(lengths)[:-1])  # (S_i,) each
        returns = [d - c for d, c in zip(returns, charge)]  # (S_i,) each
        charge = [np.zeros(n) for n in lengths]  # (S_i,) each
    step = step_advantages(returns, anchor_groups(keys, similarity=similarity), norm=norm)  # (S_i,) each
    return [e + omega * s - c for e, s, c in zip(episode, step, charge)]


# ---- 4. Log-probabilities in bounded memory --------------------------------------------------------------------------

def token_logprobs(
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
    budget_bytes: int = 256 * 2**20,
) -> tuple[Tensor, Tensor]:
    """`log softmax(lm_head(hidden) / temperature)[targets]` and the entropy of that softmax, in nats; fp32, (N,) each.

    `hidden` (N, H) are the states that predict `targets` (N,). Tokens go through `lm_head` in chunks whose fp32 logits
    fit `budget_bytes` (a chunk holds three or four such arrays at once). No logits outlive their chunk. The gradient
    is exact: a token's log-probability depends on its own state only, so its slope (H,) is taken along with it and does
    the backward pass, at the cost of the textbook form. Only for a head that is itself trained, the logits are computed
    again in backward. The entropy has no gradient; it is for logging. `vocab` is the number of real ids: the logits of
    padding rows after them are cut off, so that training sees the distribution that was sampled from.
    G7, G8 and S9 take their log-probabilities from here. A budget below one token's logits raises ValueError.
    """
    probe = lm_head(hidden[:1].detach())  # (1, V), padding included
    width = probe.shape[-1]
    if budget_bytes < 4 * width:
        raise ValueError(f"budget_bytes must hold one token's fp32 logits, {4 * width} bytes; got {budget_bytes}")

    def score(raw: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = raw[:, :vocab].float()  # (n, V)
        full = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)  # (n, V)
        with torch.no_grad():
            p = full.exp()  # (n, V)
            entropy = -torch.einsum("nv,nv->n", p, full)  # (n,), without an array of products
        return full.gather(-1, y[:, None]).squeeze(-1), entropy, p

    def score_with_slope(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = h.detach().requires_grad_()
        raw = lm_head(h)  # (n, V)
        logp, entropy, p = score(raw.detach(), y)
        p[torch.arange(len(y), device=y.device), y] -= 1.0  # -temperature * d logp / d logits = p - one-hot
        if p.shape[-1] < width:
            p = torch.nn.functional.pad(p, (0, width - p.shape[-1]))
        slope, = torch.autograd.grad(raw, h, p.to(raw.dtype))
        return logp, entropy, slope.float() / -temperature  # (n, H)

    n = budget_bytes // (4 * width)
    chunks = list(zip(hidden.split(n), targets.split(n)))
    if probe.requires_grad or not (torch.is_grad_enabled() and hidden.requires_grad):
        again = [checkpoint(lambda h, y: score(lm_head(h), y)[:2], *chunk, use_reentrant=False) for chunk in chunks]
        logp, entropy = (torch.cat(parts) for parts in zip(*again))  # (N,), (N,)
        return logp, entropy
    logp, entropy, slope = (torch.cat(parts) for parts in zip(*[score_with_slope(*chunk) for chunk in chunks]))
    return logp + ((hidden - hidden.detach()) * slope).sum(-1), entropy  # adds 0, whose gradient is the slope


# ---- 5. Policy loss, one value per token (G7-G8) ---------------------------------------------------------------------

def clipped_surrogate(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, *, clip: float = 0.2, dual_clip: float | None = None
) -> Tensor:
    """G7: `-min(rho A, clip(rho, 1 - eps, 1 + eps) A)` with `rho = exp(logp - logp_old)`; all (N,), `eps = clip`.

    Log-probabilities are in nats. `dual_clip` c > 1 (the release: 3) bounds the loss by `-c A` where A < 0, so that a
    token which became far more likely since it was sampled can't dominate a step; c <= 1 raises ValueError.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be None or above 1, got {dual_clip!r}")
    rho = (logp - logp_old).exp()  # (N,)
    loss = -torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)  # (N,)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)  # (N,)
    return loss


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """G8: `exp(d) - d - 1` with `d = logp_ref - logp`, all (N,): never negative; its mean over samples of the policy is
    KL(policy || reference) in nats."""
    d = logp_ref - logp  # (N,)
    return torch.expm1(d) - d  # (N,)
