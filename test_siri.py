"""The method: rollouts, advantages and effects, rows, the loss and the update, phases and variants."""

import dataclasses
import errno
import inspect
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distill
import envs
import gigpo
import siri
import skills
from conftest import (
    SMALL,
    bank_with,
    close,
    config,
    gradient,
    learner_of,
    new_bank,
    small_game,
    some_rows,
    stranger_config,
)
from policy import Policy, UserError
from run import main
from skills import Skill
from tools.metrics import lost_games, summarise, warnings_of, wilson
from tools.oracle import oracle_walkthrough
from tools.settings import make_environment

# ---- 1. rollouts -----------------------------------------------------------------------------------------------------


@pytest.fixture()
def small():
    """The world of the smoke preset."""
    return make_environment(config())


def teach(policy, monkeypatch, say):
    """Replace sampling: `say(k)` gives the texts of the k responses that are asked for."""
    ids = lambda text: policy.tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(policy, "generate", lambda prompts, *_: [ids(text) for text in say(len(prompts))])


def winner_and_mumbler(policy, monkeypatch, env, task, skill=None):
    """A group of two: the first plays the oracle's commands, the second never says anything parsable."""
    commands = oracle_walkthrough(envs.pddl_game(task.data))
    script = iter(f"<think>find it</think><action>{command}</action>" for command in commands)
    teach(policy, monkeypatch, lambda k: [next(script), "look"] if k == 2 else ["look"])
    return siri.rollout(policy, env, [(task, [skill, None])], 1.0)[0], commands


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
    siri.assign_advantages(group, policy.cfg, small)
    winner, mumbler = ([s.advantage for s in e.steps] for e in group)
    # Two returns, 10 and 0: A^E = +-sqrt(1/2). They share the first state only, where the discounted returns differ.
    one = math.sqrt(0.5)
    charge = policy.cfg.invalid_penalty
    assert winner == pytest.approx([2 * one] + [one] * (len(commands) - 1)) and charge > 0
    assert mumbler == pytest.approx([-2 * one - charge] + [-one - charge] * (small.max_steps - 1))


def test_a_group_starts_in_one_state_and_the_skill_is_only_in_its_half(policy, small):
    skill = new_bank().add("the task needs apple", "look in fridge first", born=0, source="game")
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


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), OSError("failed to map segment"), MemoryError()])
def test_a_machine_that_fails_ends_the_run_and_is_never_a_policys_failure(policy, small, monkeypatch, fault):
    """No room for the engine's library or no right to execute it, and no memory for a game; in training as in an evaluation."""
    def fail(*_):
        raise fault

    tasks = [small.tasks("train")[i] for i in range(2)]
    monkeypatch.setattr(envs.AlfWorld, "engines", [])
    monkeypatch.setattr(*(envs.AlfEngine, "load") if isinstance(fault, MemoryError) else (envs._textworld().fd, "load_lib"), fail)
    for play in (lambda: siri.rollout(policy, small, [(task, [None]) for task in tasks], 1.0, []),
                 lambda: siri.evaluate(policy, small, tasks, policy.cfg, "x")):
        with pytest.raises(UserError, match="TMPDIR|out of memory"):
            play()


def test_a_game_that_is_lost_is_left_out_of_an_evaluation(policy, small):
    panel = [small.tasks("train")[i] for i in range(3)]
    played = siri.evaluate(policy, Faulty(small, lambda task: task.id == panel[0].id, 1), panel, policy.cfg, "x")
    result = summarise(small, policy.cfg, played)
    assert result["n"] == 2 == sum(kind["n"] for kind in result["kinds"].values()) and result["failures"] == 1
    assert set(result["outcomes"]) == {task.id for task in panel[1:]} and "3 games" in result["panel"]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, None, "ten"])
def test_a_reward_that_is_no_finite_number_loses_its_own_group_only(policy, small, reward):
    """Else it would go on into advantages, effects and a checkpoint that nobody could read."""
    tasks, failures = [small.tasks("train")[i] for i in range(2)], []

    class Odd(Faulty):
        def open(self, task):
            game = self.world.open(task)
            play_on = game.step
            game.step = lambda state, action: dataclasses.replace(play_on(state, action), **(
                dict(reward=reward) if self.breaks(task) and state.steps == 2 else {}))
            return game

    groups = siri.rollout(policy, Odd(small, lambda task: task.id == tasks[0].id, 0), [(t, [None] * 2) for t in tasks], 1.0, failures)
    assert [len(group) for group in groups] == [0, 2] and len(failures) == 1 and failures[0].startswith(tasks[0].id)


def test_a_state_with_more_actions_than_a_prompt_can_list_ends_its_episode(policy, small):
    """As a product with thousands of options would be. Training loses the group, and an evaluation counts the game as not
    solved: it must not look better for what the policy ran into. Where it is the first state, the settings are at fault."""
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

    tasks = [small.tasks("train")[i] for i in range(3)]
    world = Wide(small, lambda task: task.id == tasks[1].id, 1)
    learner, it = learner_of(policy, env=world), siri.Iteration(0, 0)
    torch.manual_seed(0)
    siri.play(learner, it, [(task, [None] * 2) for task in tasks])
    assert [group[0].task for group in it.groups] == [tasks[0], tasks[2]] and len(it.failures) == 1
    assert re.match(f"--max-prompt {policy.cfg.max_prompt}: too short .*{tasks[1].id}", it.failures[0])

    played = siri.evaluate(policy, world, tasks, policy.cfg, "x")
    result = summarise(world.world, policy.cfg, played)
    assert result["n"] == 3 and result["failures"] == 0 and result["outcomes"][tasks[1].id] is False
    assert [len(e.steps) for e in played.episodes][1] == 1
    line, = lost_games(played)
    assert "counts as not solved" in line and tasks[1].id in line
    with pytest.raises(UserError, match="--max-prompt.*too short"):
        siri.rollout(policy, Wide(small, lambda task: True, 0), [(tasks[0], [None] * 2)], 1.0)


@pytest.mark.parametrize("n, broken, too_many", [(1, 1, True), (3, 2, False), (3, 3, True), (5, 3, True)])
def test_an_evaluation_that_lost_many_games_is_no_result(policy, small, n, broken, too_many):
    panel = [small.tasks("train")[i] for i in range(n)]
    world = Faulty(small, lambda task: task.id in {task.id for task in panel[:broken]}, 1)
    with pytest.raises(UserError, match=f"{broken} of the panel's {n} games.*disk on fire") if too_many else nullcontext():
        assert len(siri.evaluate(policy, world, panel, policy.cfg, "x").failures) == broken


def test_more_than_a_twentieth_of_broken_groups_stops_the_run_with_the_cause(tmp_path, monkeypatch, capsys, small):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run.make_environment", lambda cfg: Faulty(small, lambda task: task.split == "train", 1))
    assert main(f"{SMALL} --panel 1 --warmup-max 9".split()) == 2
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
    skill = SimpleNamespace(text="look in fridge first")
    past = [siri.Step([], [], "", turn.action, turn.observation, "", None) for turn in turns]
    episode = siri.Episode(task, skill, past, state)
    for limit, expected in limits:
        monkeypatch.setattr(policy, "cfg", dataclasses.replace(policy.cfg, max_prompt=limit))
        assert siri.fit_prompt(policy, episode, skill) == expected
    monkeypatch.setattr(policy, "cfg", dataclasses.replace(policy.cfg, max_prompt=len(prompts[0]) - 60))
    ids = siri.fit_prompt(policy, episode, skill)
    assert len(ids) <= len(prompts[0]) - 60 and ids[:2] == prompts[0][:2] and ids[-3:] == prompts[0][-3:]
    assert "look in fridge first" in policy.decode(ids) and "put a apple in shelf" in policy.decode(ids)


@pytest.mark.parametrize("observation", ["text", "text_rich"])
def test_any_chat_model_can_shop_with_the_full_prompt(stranger_folder, observation):
    """The paper preset's path: 1,000 products, quoted pages, prompts that fit, a skill in the prompt of its half only."""
    cfg = stranger_config(stranger_folder, env="webshop", observation=observation, max_prompt=900, webshop_tagger="stop-list")
    env, policy = make_environment(cfg), Policy(cfg)
    task = env.tasks("train")[0]
    group, = siri.rollout(policy, env, [(task, [Skill(0, "it rains", "look at acme first", 0, ""), None])], 1.0)
    assert len(env.shop.products) == 1000 and [len(e.steps) for e in group] == [2, 2]
    for episode in group:
        for step in episode.steps:
            text = policy.tokenizer.decode(step.prompt)
            assert len(step.prompt) <= 900 and task.goal in text and ("look at acme first" in text) == bool(episode.skill)
            assert "search[<your query>]" in text and (step.plain is None) == (episode.skill is None)
        assert (episode.success, episode.score) == (False, 0.0)

# ---- 2. updates, mining and gating -----------------------------------------------------------------------------------


def gated_rows(policy):
    return [siri.Row(r.prompt, r.response, gate=[k % 2 == 0 for k in range(len(r.response))], weight=w)
            for r, w in zip(some_rows(policy), (0.5, 0.0, 1.0, 0.25, 0.75))]


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
        with pytest.raises(UserError, match="3 updates in a row .* not finite.*--lr"):
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
    found = warnings_of(row, siri.Config())
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
    task, learner = small.tasks("train")[0], learner_of(policy)
    (winner, mumbler), commands = winner_and_mumbler(policy, monkeypatch, small, task)
    slower = dataclasses.replace(winner, steps=winner.steps * 2)
    guided = dataclasses.replace(winner, skill="advice", steps=winner.steps[:1])
    siri.note_successes(learner, [[slower, winner, mumbler], [guided]])
    assert learner.progress.solved == [task.id] and learner.progress.recent == [pytest.approx(2 / 3)]
    with small.open(task) as game:
        states = [game.start]
        for command in commands:
            states.append(game.step(states[-1], command))
    (win,) = learner.progress.wins
    assert (win["task"], win["goal"]) == (task.id, task.goal)
    assert [tuple(step) for step in win["steps"]] == [(c, s.observation) for c, s in zip(commands, states[1:])]
    siri.note_successes(learner, [])
    assert learner.progress.recent == [pytest.approx(2 / 3)]                # no number is made of no episodes
    learner.cfg = dataclasses.replace(learner.cfg, variant="gigpo")
    siri.note_successes(learner, [[winner]])
    assert len(learner.progress.wins) == 1


def test_mining_reads_wins_adds_skills_and_counts_what_it_rejects(policy, monkeypatch):
    said = ["<skill>when the task needs apple -> look in fridge first</skill>", "look in fridge",
            "<skill>When the task needs apple -> look in fridge first</skill>"]
    asked = []
    teach(policy, monkeypatch, lambda k: said[:k])
    monkeypatch.setattr(policy, "encode", lambda text: asked.append(text) or [0])
    learner = learner_of(policy)
    learner.progress.iteration = 7
    learner.progress.wins = [dict(task=f"game {i}", goal="put a apple in shelf", steps=[["go to fridge 1", "You see."]])
                             for i in range(3)]
    assert siri.mine(learner) == learner.bank.skills and learner.progress.wins == [] and siri.mine(learner) == []
    assert all("apple in shelf" in text and "go to fridge 1" in text for text in asked) and len(asked) == 3
    skill, = learner.bank.skills
    assert (skill.source, skill.born, skill.state) == ("game 0", 7, "candidate")
    assert learner.bank.rejected == {"unparsable": 1, "duplicate": 1}


def test_a_won_pair_is_measured_and_gated_on_its_action_tokens(policy, monkeypatch, small):
    bank, cfg = bank_with("the task needs apple", n_eval=1, kappa=1.0, tau_up=0.1), policy.cfg
    skill = bank.skills[0]
    group, commands = winner_and_mumbler(policy, monkeypatch, small, small.tasks("train")[0], skill)
    siri.assign_advantages(group, cfg, small)
    alone = [e for e in group if e.skill is None]
    assert siri.record_effects(bank, [group, alone], 0) == [1.0, None]
    assert skill.effects == [[0, 1.0]] and skill.state == "active"

    def gate(effect, **changes):
        steps = siri.guided_steps(group, effect, policy, siri.advantage_unit(cfg, small))
        return siri.internalization_rows(steps, bank, dataclasses.replace(cfg, **changes))

    is_open = lambda rows: any(any(row.gate) for row in rows)
    rows = gate(1.0)
    assert [r.prompt for r in rows] == [s.plain for s in group[0].steps] and len(rows) == len(commands)
    for row, step, command in zip(rows, group[0].steps, commands):
        assert policy.decode([t for t, g in zip(row.response, row.gate) if g]) == command
        assert row.response == step.response and row.weight == pytest.approx(min(step.advantage / 2, 1))
    assert not is_open(gate(0.0))                                           # the pair gained nothing
    skill.effects = [[0, -1.0]]
    assert not is_open(gate(1.0))                                           # the skill has turned out to be of no use
    assert [r.gate for r in gate(0.0, variant="no_gate")] == [r.gate for r in rows]
    skill.effects = [[0, 1.0]]
    assert not is_open(gate(0.0, variant="no_advantage"))
    assert {r.weight for r in gate(1.0, variant="no_advantage")} == {1.0}


def test_without_validation_no_effect_is_recorded_and_the_first_skill_that_fits_is_used_to_the_end(policy, monkeypatch, small):
    """Skills stay candidates of no utility: whatever pairs showed, phases 1 and 2 and the evaluation use them, and all is distilled."""
    task = small.tasks("train")[0]
    thing = re.findall(r"[a-z]+", task.goal)[2 if "put" in task.goal else 3]
    cfg = dataclasses.replace(policy.cfg, variant="no_validation", groups=1, group_size=2)
    bank = bank_with(f"the task needs {thing}", f"the task needs {thing}", n_eval=1)
    group, _ = winner_and_mumbler(policy, monkeypatch, small, task, bank.skills[0])
    learner = learner_of(policy, cfg=cfg, bank=bank, env=SimpleNamespace(tasks=lambda split: [task], success_reward=10))
    monkeypatch.setattr(siri, "rollout", lambda *_: [group])
    it = siri.Iteration(0, 1)
    siri.play(learner, it, [])
    assert it.effects == [1.0] and [s.n for s in bank.skills] == [0, 0] and it.judged == []
    steps = learner.progress.guided[-1]
    assert len(steps) == len(group[0].steps) and any(any(r.gate) for r in siri.internalization_rows(steps, bank, cfg))
    for explore in (True, False):
        (_, dealt), = siri.paired_plan(learner, explore=explore)
        assert dealt == [bank.skills[0], None]
    learner.cfg = dataclasses.replace(cfg, variant="siri")
    siri.play(learner, siri.Iteration(0, 1), [])
    assert bank.skills[0].n == 1


def test_distill_plain_distils_own_plain_wins_and_has_no_skill(policy, monkeypatch, small):
    cfg = dataclasses.replace(policy.cfg, variant="distill_plain", warmup_max=3, mining_max=4, distill_max=2, groups=1, group_size=2)
    group, commands = winner_and_mumbler(policy, monkeypatch, small, small.tasks("train")[0])
    learner = learner_of(policy, cfg=cfg, env=small)
    monkeypatch.setattr(siri, "rollout", lambda *_: [group])
    siri.play(learner, siri.Iteration(0, 0), [])
    steps, = learner.progress.guided
    assert [s.prompt for s in steps] == [s.prompt for s in group[0].steps] and {s.skill for s in steps} == {-1}
    rows = siri.internalization_rows(steps, learner.bank, cfg)
    assert [policy.decode([t for t, g in zip(r.response, r.gate) if g]) for r in rows] == commands
    assert [r.weight for r in rows] == pytest.approx([min(max(s.advantage, 0) / cfg.a_max, 1) for s in group[0].steps])
    assert [siri.phase_limit(cfg, phase) for phase in range(3)] == [7, 0, 2]            # those of mining are warm-up's
    assert all(dealt == [None, None] for _, dealt in siri.plain_plan(learner))


def test_weights_of_mean_one_keep_their_proportions(policy):
    bank, cfg = bank_with("apple", n_eval=1), dataclasses.replace(policy.cfg, a_max=2.0)
    bank.record(bank.skills[0], 1.0, 0)
    steps = [siri.GuidedStep([1], [5] * n, [True] * n, advantage, 0, 1.0) for n, advantage in ((1, 2.0), (3, 0.5), (2, -1.0))]
    weights = lambda **changes: [r.weight for r in siri.internalization_rows(steps, bank, dataclasses.replace(cfg, **changes))]
    assert weights() == [1.0, 0.25, 0.0]
    mean = (1 * 1.0 + 3 * 0.25) / 6                                         # over tokens, those of weight 0 included
    assert weights(weight_mean="one") == pytest.approx([1 / mean, 0.25 / mean, 0.0])
    assert weights(weight_mean="one", variant="no_advantage") == [1.0, 1.0, 1.0]


class Paying:
    """A world that pays another reward for success."""

    def __init__(self, world, reward):
        self.world, self.success_reward = world, reward

    def __getattr__(self, name):
        return getattr(self.world, name)

    def open(self, task):
        game = self.world.open(task)
        play_on = game.step
        game.step = lambda state, action: (lambda after: dataclasses.replace(
            after, reward=self.success_reward * after.success))(play_on(state, action))
        return game


@pytest.mark.parametrize("reward", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("norm", ["std", "mean"])
def test_what_success_pays_changes_neither_the_weights_nor_what_an_invalid_step_costs(policy, monkeypatch, small, norm, reward):
    """S8 and c of G6 by hand, for a winner with a skill and a mumbler: half of the returns are the reward, half are 0."""
    assert small.success_reward == envs.SUCCESS_REWARD == 10
    cfg, world = dataclasses.replace(policy.cfg, norm=norm, invalid_penalty=0.5, a_max=2.0), Paying(small, reward)
    bank = bank_with("the task needs apple", n_eval=1)
    group, _ = winner_and_mumbler(policy, monkeypatch, world, small.tasks("train")[0], bank.skills[0])
    siri.assign_advantages(group, cfg, world)
    effect, = siri.record_effects(bank, [group], 0)
    unit = siri.advantage_unit(cfg, world)
    assert unit == (1.0 if norm == "std" else reward / 2)
    steps = siri.guided_steps(group, effect, policy, unit)
    weights = [row.weight for row in siri.internalization_rows(steps, bank, cfg)]
    # All but the first step, which both share, have the episode's advantage: half the reward, or sqrt(1/2) deviations.
    each = 1.0 if norm == "mean" else math.sqrt(0.5)
    assert weights[1:] == pytest.approx([each / 2] * (len(weights) - 1)) and effect == 1.0
    lost = [s.advantage / unit for s in group[1].steps]
    assert lost[1:] == pytest.approx([-each - 0.5] * (len(lost) - 1))


@pytest.mark.parametrize("variant", ["siri", "random_skill"])
def test_groups_get_the_skill_that_matches_their_task_or_any_for_the_ablation(policy, variant):
    bank = bank_with("the task needs apple")
    bank.add("the task needs mug", "look", 0, "t")
    tasks = [envs.Task(f"game {i}", "kind", f"put a {'apple' if i % 2 else 'mug'} in shelf", "train") for i in range(16)]
    learner = learner_of(policy, bank=bank, env=SimpleNamespace(tasks=lambda split: tasks),
                         cfg=dataclasses.replace(policy.cfg, variant=variant, groups=16, group_size=4))
    assert all(dealt == [None] * 4 for _, dealt in siri.plain_plan(learner))
    plan = siri.paired_plan(learner, explore=True)
    assert all(a is b is not None and c is d is None for _, (a, b, c, d) in plan)
    matched = [dealt[0].condition.split()[-1] in task.goal for task, dealt in plan]
    assert all(matched) if variant == "siri" else 0 < sum(matched) < 16
    assert all(dealt == [None] * 4 for _, dealt in siri.paired_plan(learner, explore=False))    # none is active yet


@pytest.mark.parametrize("variant, phase, age, solved, recent, active, ends", [
    ("siri", 0, 3, 40, [0.2, 0.3, 0.4], 0, True), ("siri", 0, 3, 39, [0.2, 0.3, 0.4], 0, False),
    ("siri", 0, 3, 40, [0.2, 0.3, 0.3], 0, False), ("siri", 0, 2, 40, [0.9, 0.9], 0, False),
    ("siri", 0, 9, 0, [0.0] * 3, 0, True), ("gigpo", 0, 9, 99, [1.0] * 3, 5, False), ("gigpo", 0, 24, 0, [], 0, True),
    ("siri", 1, 1, 99, [1.0] * 3, 3, False), ("siri", 1, 1, 0, [], 4, True), ("no_warmup", 1, 9, 0, [], 3, False),
    ("no_warmup", 1, 16, 0, [], 3, True), ("siri", 2, 7, 99, [1.0] * 3, 5, False), ("siri", 2, 8, 0, [], 0, True)])
def test_phases_end_by_success_by_active_skills_or_by_budget(policy, monkeypatch, variant, phase, age, solved, recent, active,
                                                             ends):
    """A phase that goes on yields an iteration (made up here); one that ends says why."""
    for name, stand_in in dict(mine=[], plain_plan="plain", gated_rows=([], 0.0), learn="goes on").items():
        monkeypatch.setattr(siri, name, lambda *_, result=stand_in: result)
    played = []
    monkeypatch.setattr(siri, "paired_plan", lambda learner, explore: f"paired, {explore}")
    monkeypatch.setattr(siri, "play", lambda learner, it, plan: played.append(plan))
    cfg = dataclasses.replace(policy.cfg, variant=variant, n_req=40, floor=0.3, active_req=4, warmup_max=9,
                              mining_max=7, distill_max=8)
    progress = siri.Progress(iteration=50 + age, phase=phase, phase_start=50, solved=list(map(str, range(solved))), recent=recent)
    learner = learner_of(policy, cfg=cfg, progress=progress,
                         bank=bank_with(*["apple"] * active, tau_up=-0.5, n_eval=1, tau_down=-1))
    for skill in learner.bank.skills:
        learner.bank.record(skill, 0.0, 0)
    begin = lambda: (siri.warm_up, siri.mine_and_validate, siri.internalize)[phase](learner)
    if ends:
        with pytest.raises(StopIteration) as ended:
            next(begin())
        assert ended.value.value
    else:
        assert next(begin()) == "goes on" and played == [["plain", "paired, True", "paired, False"][phase]]
    assert siri.last_phase(learner) == (variant == "gigpo" or phase == 2)
    learner.cfg, progress.env_steps = dataclasses.replace(cfg, env_steps=1000), 1000
    with pytest.raises(StopIteration) as ended:
        next(begin())
    assert "1000 environment steps" in ended.value.value and siri.last_phase(learner)
    learner.cfg, progress.train_tokens = dataclasses.replace(cfg, train_tokens=500), 501
    with pytest.raises(StopIteration) as ended:
        next(begin())
    assert "500 trained tokens" in ended.value.value and siri.last_phase(learner)


def test_every_pass_over_the_training_tasks_is_a_new_permutation(policy):
    letters, cfg = list("abcdefghij"), dataclasses.replace(policy.cfg, groups=4)
    learner = learner_of(policy, cfg=cfg, env=SimpleNamespace(tasks=lambda split: letters))
    drawn = sum((siri.next_tasks(learner) for _ in range(5)), [])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == letters and drawn[:10] != drawn[10:]
    again = learner_of(policy, cfg=cfg, env=learner.env)
    again.progress.cursor = 8                                               # a resumed run draws what comes next
    assert siri.next_tasks(again) == drawn[8:12]


def test_training_is_events_that_need_no_run_folder(tmp_path, monkeypatch, capsys):
    """As in a notebook: all three phases, with nothing printed and nothing written, and the learner whole in between."""
    monkeypatch.chdir(tmp_path)
    cfg = config(groups=1, group_size=2, panel=2, warmup_max=1, mining_max=1, distill_max=1, active_req=9)
    learner = siri.Learner.begin(cfg, make_environment(cfg), Policy(cfg))
    seen = []
    for event in siri.train(learner):
        kind = type(event).__name__
        seen.append(event.label if kind == "Evaluation" else f"phase {event.phase}" if kind == "Iteration" else
                    "ends" if event.reason else "whole")
        if kind == "Iteration":
            assert learner.progress.iteration == event.number + 1 and event.stats["rows"] >= 0
    assert seen == ["base", "whole", "phase 0", "ends", "after warm-up", "whole", "phase 1", "ends", "phase 1 plain",
                    "phase 1 with skills", "whole", "phase 2", "ends", "final", "whole"]
    assert learner.progress.finished and list(siri.train(learner)) == []
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_a_constant_has_one_value():
    """What the pure modules take by default is what a run takes by default; a bank has no values of its own."""
    for function in (gigpo.group_advantages, gigpo.clipped_surrogate, distill.action_gate, skills.parse_skill):
        for name, parameter in inspect.signature(function).parameters.items():
            field = {"tokens": "distill_tokens", "require_pair_gain": "pair_gain", "max_words": "skill_words"}.get(name, name)
            if parameter.default is not parameter.empty and hasattr(siri.Config, field):
                assert parameter.default == getattr(siri.Config, field) or not (parameter.default or getattr(siri.Config, field)), name
    constants = siri.make_bank(siri.Config(bank_size=7)).constants()
    assert constants.pop("max_size") == 7 and constants == {name: getattr(siri.Config, name) for name in constants}
    with pytest.raises(TypeError, match="kappa"):
        skills.SkillBank()


@pytest.mark.parametrize("wins, n", [(0, 8), (8, 8), (3, 120), (60, 120)])
def test_wilson_interval_solves_its_defining_equation(wins, n):
    # Its ends are the rates p0 from which the observed rate is 1.96 standard errors *of p0* away.
    for p0 in wilson(wins, n):
        assert abs(wins / n - p0) == pytest.approx(1.96 * math.sqrt(abs(p0 * (1 - p0)) / n), abs=1e-6)


def test_the_samplers_log_probabilities_are_those_of_the_update_and_may_stand_for_them(policy, small):
    """Nothing but rounding lies between them; with `--old sampler` they save a forward pass and move the gradient as little."""
    tasks = [small.tasks("train")[i] for i in range(3)]
    groups = siri.rollout(policy, small, [(task, [None] * 4) for task in tasks], 1.0)
    rows = siri.rl_rows(groups)
    for k, row in enumerate(rows):
        row.advantage = (-1.0) ** k
    said, _ = policy.logprobs(rows)
    assert (said - torch.tensor([x for row in rows for x in row.sampled])).abs().max() < 1e-4
    cfg, calls, frozen = dataclasses.replace(policy.cfg, minibatch=len(rows) // 3, kl_beta=0.0, old="update"), [], policy.frozen_logprobs

    def moved(**changes):
        before = [p.detach().clone() for p in policy.trainable]
        optimizer = torch.optim.SGD(policy.trainable, lr=0.01)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "frozen_logprobs", lambda rows: calls.append(len(rows)) or frozen(rows))
            stats = siri.update(policy, optimizer, [dataclasses.replace(row) for row in rows], [], 0.0,
                                dataclasses.replace(cfg, **changes), np.random.default_rng(0))
        after = torch.cat([(p.detach() - old).flatten() for p, old in zip(policy.trainable, before)])
        with torch.no_grad():
            for p, old in zip(policy.trainable, before):
                p.copy_(old)
        return after, stats

    (ours, stats), asked = moved(), calls[:]
    calls.clear()
    theirs, _ = moved(old="sampler")
    assert stats["optimizer_steps"] > 2 and 0 < stats["sampler_gap"] < 1e-4
    assert asked == [len(rows) - math.ceil(len(rows) / stats["optimizer_steps"])] and calls == []       # of later steps only
    assert (ours - theirs).norm() < 1e-3 * ours.norm()
