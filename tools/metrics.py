"""What a run shows of itself: intervals, a row of metrics.csv, an entry of results.json, a sample, the lines on the screen.

Made of what `siri.py` yields, and used by the program, the report, the benchmark and the notebooks alike. Every rate comes with
its n and an interval or standard error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

import envs
import siri
from policy import peak_gib
from siri import PHASES, Config
from skills import Skill, SkillBank
from tools.terminal import fitted


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; nan for none."""
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% Wilson interval of a success rate; (0, 1) for n = 0.

    >>> [round(x, 3) for x in wilson(5, 10)]
    [0.237, 0.763]
    """
    if n == 0:
        return 0.0, 1.0
    p, d = successes / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return centre - half, centre + half


def mean_se(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error (unbiased deviation / sqrt n); nan for none, and the error nan for one."""
    values = list(values)
    return mean(values), float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def group_stats(groups: Sequence[siri.Group], scored: bool) -> dict[str, Any]:
    """Success, length and validity of an iteration's rollouts, and their scores where the environment gives any. Rates
    of no rollouts are nan; lengths are in actions."""
    episodes = [e for group in groups for e in group]
    plain, guided = [[e for e in episodes if (e.skill is None) == without] for without in (True, False)]
    steps = [s for e in episodes for s in e.steps]
    scores = {f"score_{name}{tail}": value for name, part in (("plain", plain), ("skill", guided))
              for tail, value in zip(("", "_se"), mean_se(e.score for e in part))} if scored else {}
    return dict(groups=len(groups), success_plain=mean(e.success for e in plain), n_plain=len(plain),
                success_skill=mean(e.success for e in guided), n_skill=len(guided), **scores,
                mean_steps=len(steps) / max(len(episodes), 1), invalid_rate=mean(not s.valid for s in steps),
                zero_signal_groups=sum(all(s.advantage == 0 for e in g for s in e.steps) for g in groups))


def detour(groups: Iterable[siri.Group]) -> float:
    """Of the steps of won guided rollouts, the share beyond the shortest win of their group: steps that nobody needed, and that
    are distilled with the others. nan without such wins."""
    own, needed = 0, 0
    for group in groups:
        wins = [len(e.steps) for e in group if e.success and e.skill]
        own += sum(wins)
        needed += len(wins) * min((len(e.steps) for e in group if e.success), default=0)
    return 1 - needed / own if own else math.nan


def metrics_row(learner: siri.Learner, it: siri.Iteration) -> dict[str, Any]:
    """An iteration as a row of metrics.csv; docs/glossary.md has the meaning of each column."""
    p, bank, stats = learner.progress, learner.bank, it.stats
    sampled = sum(len(s.response) for group in it.groups for e in group for s in e.steps)
    return dict(
        iteration=it.number, phase=it.phase, seconds=p.seconds, env_steps=p.env_steps, failed_groups=len(it.failures),
        **group_stats(it.groups, learner.env.scored), detour=detour(it.groups), solved_tasks=len(p.solved), mined=len(it.mined),
        rejected=sum(bank.rejected.values()), **{f"skills_{state}": n for state, n in bank.counts().items()},
        **stats, rollout_s=it.rollout_s, update_s=it.update_s, rollout_tokens_per_s=sampled / it.rollout_s,
        update_tokens_per_s=stats["row_tokens"] / it.update_s, peak_gib=peak_gib())


def token_weights(learner: siri.Learner, e: siri.Episode, effect: float | None) -> list[list[float]]:
    """What internalization would make of an episode: gate times weight of each response token (S7, S8), for each step."""
    if effect is None or e.skill is None:
        return [[0.0] * len(s.response) for s in e.steps]
    steps = siri.guided_steps([e], effect, learner.policy, siri.advantage_unit(learner.cfg, learner.env))
    return [[row.weight * is_open for is_open in row.gate] for row in siri.internalization_rows(steps, learner.bank, learner.cfg)]


def sample(learner: siri.Learner, it: siri.Iteration) -> tuple[str, dict[str, Any]]:
    """A plain and a guided episode of one group, of one with both outcomes if there is any: what was seen, thought, done, and
    what it was worth. As text to read, and as data with every token and its weight."""
    group, effect = max(zip(it.groups, it.effects), key=lambda pair: len({e.success for e in pair[0]}))
    lines, episodes = [], []
    for e in {e.skill is None: e for e in group}.values():
        lines.append(f"# iteration {it.number}, {PHASES[it.phase]}, {e.task.id}\n# {e.task.goal}\n"
                     f"# skill: {e.skill.text if e.skill else 'none'}\n# {'success' if e.success else 'failure'}\n")
        lines += [f"[{t}] {s.observation}\n  {s.text}\n  reward {s.reward:g}  advantage {s.advantage:+.2f}"
                  f"{'' if s.valid else '  INVALID'}\n" for t, s in enumerate(e.steps)]
        weights = token_weights(learner, e, effect)
        episodes.append(dict(skill=e.skill.text if e.skill else None, success=e.success, steps=[dict(
            observation=s.observation, text=s.text, pieces=[learner.policy.decode([t]) for t in s.response], weights=w,
            reward=s.reward, advantage=s.advantage, valid=s.valid) for s, w in zip(e.steps, weights)]))
    return "\n".join(lines), dict(iteration=it.number, phase=it.phase, task=group[0].task.id, goal=group[0].task.goal,
                                  episodes=episodes)


# What decides an evaluation beside the adapter and the panel.
EVALUATED = ("model", "four_bit", "seed", "compact", "max_steps", "prompt_style", "history", "max_prompt", "max_response",
             "alfworld_data", "webshop_data", "webshop_size", "webshop_goals", "webshop_split", "webshop_tagger", "observation",
             "env_hash")


def summarise(env: envs.Environment, cfg: Config, played: siri.Evaluation) -> dict[str, Any]:
    """An evaluation as an entry of results.json: rates with n and their 95% Wilson interval, overall and by task type."""
    def rates(part: list[siri.Episode]) -> dict[str, Any]:
        wins, n = sum(e.success for e in part), len(part)
        steps = [s for e in part for s in e.steps]
        score = dict(zip(("score", "score_se"), mean_se(e.score for e in part))) if env.scored else {}
        return dict(n=n, successes=wins, success=wins / n, interval=wilson(wins, n), **score,
                    mean_steps=len(steps) / n, invalid_rate=mean(not s.valid for s in steps))

    kinds: dict[str, list[siri.Episode]] = defaultdict(list)
    for e in played.episodes:
        kinds[e.task.kind].append(e)
    n, split = len(played.episodes) + len(played.failures), played.episodes[0].task.split
    return dict(label=played.label, notice=env.notice, versions={p: version(p) for p in ("torch", "transformers", "peft")},
                panel=f"{env.name} {split}, {n} games", skills=played.with_skills, temperature=cfg.eval_temperature,
                settings={name: getattr(cfg, name) for name in EVALUATED},
                seconds=played.seconds, failures=len(played.failures), **rates(played.episodes),
                kinds={k: rates(v) for k, v in sorted(kinds.items())}, outcomes={e.task.id: e.success for e in played.episodes})


def warnings_of(row: dict[str, Any], cfg: Config) -> list[str]:
    """What keeps a run from learning, by an iteration's metrics, and the likely mend."""
    signs = (
        (row["skipped_steps"], f"{row['skipped_steps']} updates skipped, as their gradient was not finite; if it goes on, "
         "lower --lr"),
        (row["groups"] and row["zero_signal_groups"] == row["groups"], "no group had a signal, as all of its rollouts did equally "
         "well; easier tasks or a larger --group-size help"),
        (row["kl"] > cfg.kl_warn, f"KL {row['kl']:.2f} is above {cfg.kl_warn}, the policy is far from its reference; raise "
         "--kl-beta or lower --lr"),
        (row["rows"] and row["entropy"] < cfg.entropy_warn, f"entropy {row['entropy']:.4f} is below {cfg.entropy_warn}, the policy "
         "hardly explores; lower --lr or raise --temperature"))
    return [text for sign, text in signs if sign]


def with_error(name: str, value: float, error: float, digits: int = 2) -> str:
    """A mean with its standard error, as far as there are any."""
    return "" if math.isnan(value) else f"{name} {value:.{digits}f}" + ("" if math.isnan(error) else f"±{error:.{digits}f}")


def dense_line(r: dict[str, Any], eta: str = "") -> str:
    """An iteration on one line: success ± standard error and n, kl and H in nats per token, seconds of rollout + update; as much of
    it as fits. All of it is in metrics.csv."""
    def half(name: str) -> str:
        p, n = r[f"success_{name}"], r[f"n_{name}"]
        return f"{with_error(name, p, math.sqrt(p * (1 - p) / n))} n {n}" if n else f"{name} -"

    def score(name: str) -> str:
        return with_error("score", r.get(f"score_{name}", math.nan), r.get(f"score_{name}_se", math.nan))

    phase, pairs = r["phase"], r["phase"] > 0
    return fitted([
        (0, f"{r['iteration']:4d} {PHASES[phase]}"), (0, f"{half('plain'):<20}"), (3, score("plain")),
        (0, f"{half('skill'):<20}" * pairs), (4, score("skill")),
        (4 if phase == 1 else 6, f"skills {r['skills_candidate']}c {r['skills_active']}a {r['skills_retired']}r" * pairs),
        (3, f"lam {r['lam']:.2f}" * (phase == 2)), (9, f"gated {r['internal_rows']}" * (phase == 2)),
        (8 if pairs else 3, f"solved {r['solved_tasks']:<4}"), (9, f"steps {r['mean_steps']:.1f}"),
        (7, "" if math.isnan(r["invalid_rate"]) else f"invalid {r['invalid_rate']:.2f}"), (5, f"kl {r['kl']:.3f}"),
        (8, f"H {r['entropy']:.2f}"), (2, f"{r['rollout_s']:.0f}+{r['update_s']:.0f}s"), (1, f"eta {eta}" if eta else "")])


def result_line(r: dict[str, Any], width: int = 19, indent: int = 0) -> str:
    """An evaluation on one line: success with its 95% Wilson interval, score ± standard error if there is one, n,
    actions per episode, share of invalid steps; as much of it as fits after the indent. `width` is the label's."""
    lo, hi = (max(0.0, bound) for bound in r["interval"])           # rounding may have left -1e-17
    return " " * indent + fitted([
        (0, f"{r['label']:<{width}} success {r['success']:.3f} [{lo:.3f}, {hi:.3f}]"),
        (2, with_error("score", r.get("score", math.nan), r.get("score_se", math.nan), 3)), (1, f"n {r['n']}"),
        (3, f"steps {r['mean_steps']:.1f}"),
        (4, "" if math.isnan(r["invalid_rate"]) else f"invalid {r['invalid_rate']:.2f}")], indent)


def utility(skill: Skill, bank: SkillBank) -> str:
    """What a skill is worth: S5 with its standard error, which one pairing does not have, and the number of pairings."""
    error = bank.stderr(skill)
    return f"utility {bank.utility(skill):.2f}{'' if error is None else f'±{error:.2f}'}, n {skill.n}"


def lost_games(played: siri.Evaluation) -> list[str]:
    """A line for each game that was not played to its end."""
    return [f"a game is lost, and left out: {cause}" for cause in played.failures] + [
        f"a game ended early, and counts as not solved: {e.overlong}" for e in played.episodes if e.overlong]


def kind_lines(result: dict[str, Any]) -> list[str]:
    """One line per task type."""
    width = max(map(len, result["kinds"]), default=0)
    return [result_line(dict(r, label=kind), width, indent=2) for kind, r in result["kinds"].items()]


def results_block(folder: Any, results: Sequence[dict[str, Any]]) -> str:
    """What a run reached: one line per evaluation of the whole panel, and the last one per task type."""
    results = [r for r in results if r["label"] != siri.CURVE] or results
    return "\n".join([f"results of {folder}", f"{results[-1]['panel']}; success with 95% Wilson interval",
                      *(result_line(r, indent=2) for r in results), "per task type, " + results[-1]["label"],
                      *kind_lines(results[-1])])
