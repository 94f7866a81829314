"""S1-S6: what a skill may say, how one is found, what it is worth, and the bank's verdicts."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skills
from conftest import bank_with, new_bank
from skills import Skill, SkillBank, SkillRejected

# ---- 1. mining (S1) --------------------------------------------------------------------------------------------------


def record_all(bank, skill, deltas):
    return [bank.record(skill, delta, iteration) for iteration, delta in enumerate(deltas)]


STEPS = [("go to fridge 1", "The fridge 1 is closed."), ("open fridge 1", "You see a apple 2. " + "x" * 900)]


def test_full_mining_prompt_shows_task_actions_and_clipped_observations():
    prompt = skills.mining_prompt("put a cool apple in sinkbasin.", STEPS, max_words=17)
    assert "put a cool apple in sinkbasin." in prompt and "at most 17 words" in prompt
    assert "> go to fridge\nThe fridge is closed.\n> open fridge\nYou see a apple. ...\n" in prompt


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
    ("needs apple 2 -> take 1 apple２ from countertop #3", "needs apple", "take apple from countertop"),
    ("under $1,050.00 -> go 12.5% lower", "under", "go lower"),
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
    ("<skill>needs apple -> click b00x2</skill>", "instance_specific"),
    ("<skill>needs apple -> take the 1st apple</skill>", "instance_specific"),
    ("<skill>needs apple -> take apple²</skill>", "instance_specific"),
    ("<skill>when 2 -> do 3</skill>", "empty"),
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

# ---- 2. retrieval (S3) -----------------------------------------------------------------------------------------------


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
    assert bank.retrieve("heat some egg") is None and new_bank().retrieve("apple") is None


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

# ---- 3. effect and utility (S4, S5) ----------------------------------------------------------------------------------


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

# ---- 4. the bank (S2, S6) --------------------------------------------------------------------------------------------


def test_promotion_waits_for_n_eval_and_the_threshold():
    bank = bank_with("apple", kappa=0.0, n_eval=3, tau_up=0.25)
    assert record_all(bank, bank.skills[0], [0.25, 0.25, 0.25, 0.5]) == ["candidate"] * 3 + ["active"]


def test_a_moving_average_forgets_by_hand():
    """S5 with b = .2: 0 -> .2 -> .16 -> .328."""
    skill = Skill(0, "a", "b", 0, "t", effects=[[0, 1.0], [1, 0.0], [2, 1.0]])
    assert skill.utility(5.0, ema=0.2) == pytest.approx(0.328) and skill.utility(5.0) == pytest.approx(3 / 8 * 2 / 3)
    weights = np.array([0.2 * 0.64, 0.2 * 0.8, 0.2])
    assert skill.stderr(5.0, ema=0.2) == pytest.approx(np.std([1, 0, 1], ddof=1) * np.linalg.norm(weights))
    bank = bank_with("apple", ema=0.2, n_eval=1, tau_up=0.17, m_retire=1)
    bank.record(bank.skills[0], 1.0, 0)
    assert bank.skills[0].state == "active" and bank.utility(bank.skills[0]) == pytest.approx(0.2)
    assert SkillBank.from_json(bank.to_json()) == bank and bank.to_json()["skills"][0]["utility"] == pytest.approx(0.2)
    older = bank.to_json()
    del older["ema"]                                            # a bank of before: the mean
    assert SkillBank.from_json(older).utility(bank.skills[0]) == pytest.approx(1 / 6)


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
    with pytest.raises(ValueError, match=rf"bank\.skills\[1\]\.{field}.* is "):
        SkillBank.from_json(data)
    del data["skills"][1][field]
    with pytest.raises(ValueError, match=rf"bank\.skills\[1\]: {field} is missing"):
        SkillBank.from_json(data)


@pytest.mark.parametrize("change, culprit", [
    ({"kappa": -1}, "bank.kappa"), ({"tau_up": math.nan}, "bank.tau_up"), ({"tau_down": 0.5}, "bank.tau_down"),
    ({"n_eval": 0}, "bank.n_eval"), ({"top_k": 2.5}, "bank.top_k"), ({"temperature": 1}, "temperature is unknown"),
    ({"rejected": {"boring": 1}}, "bank.rejected"), ({"skills": {}}, "bank.skills"), ({"skills": [3]}, r"skills\[0\] is 3")])
def test_from_json_names_the_malformed_bank_field(change, culprit):
    with pytest.raises(ValueError, match=culprit):
        SkillBank.from_json({**new_bank().to_json(), **change})
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
