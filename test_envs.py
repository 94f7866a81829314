"""Worlds: ALFWorld's engine beside stock TextWorld, generated games, and WebShop beside its rules.

With $SIRI_ALFWORLD_SAMPLE or $ALFWORLD_DATA set to a folder that holds json_2.1.1, official games are played too.
"""

import copy
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import envs
from conftest import (
    GIFT,
    GOLD,
    HERE,
    HUMAN,
    HUMAN_SHOP,
    INSTRUCTIONS,
    ITEMS,
    LAMP,
    RUG,
    SHIRT,
    SHOP,
    TRAY,
    article,
    bare,
    data_of,
    generated_shop,
    goal_of,
    make_folder,
    play,
    shop_of,
    slow,
    small_game,
    some,
    visit,
    walk,
    wish,
    write_shop,
)
from tools import make_tiny
from tools.oracle import oracle_walkthrough
from tools.settings import PRESETS

# ---- 1. what the policy reads and writes -----------------------------------------------------------------------------

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

# ---- 2. the engine beside stock TextWorld ----------------------------------------------------------------------------


REAL = next((f for f in map(os.environ.get, ("SIRI_ALFWORLD_SAMPLE", "ALFWORLD_DATA"))
             if f and (Path(f) / "json_2.1.1" / "train").is_dir()), None)
official = pytest.mark.skipif(
    REAL is None, reason="official games: set SIRI_ALFWORLD_SAMPLE or ALFWORLD_DATA to the folder of json_2.1.1")
KINDS = sorted(envs.KIND_COUNTS)


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
            for commands in (data_of(task)["walkthrough"], oracle_walkthrough(data_of(task))):
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

# ---- 3. one game, many rollouts --------------------------------------------------------------------------------------


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


def test_translations_are_forgotten_after_256_others(monkeypatch):
    """A full game's is near a megabyte."""
    done, nothing = [], SimpleNamespace(init=[], objects=[], types=[], actions=[])
    monkeypatch.setattr(envs._textworld().fd, "pddl2sas", lambda domain, problem: (done.append(problem), (nothing, ""))[1])
    envs._translate.cache_clear()
    for i in (*range(257), 1, 0):
        envs._translate("domain", str(i))
    assert done == [*map(str, range(257)), "0"]                             # only the first was forgotten
    envs._translate.cache_clear()


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
        envs._translate.cache_clear()
        if i == 20:
            before = int(statm.read_text().split()[1])
    assert (int(statm.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") < 30e6

# ---- 4. folders and files --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("spelling", ["{0}", "{0}/json_2.1.1", "~", "~/json_2.1.1"])
def test_the_variable_is_read_as_the_flag_is(tmp_path, monkeypatch, spelling):
    place = spelling.format(make_folder(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    given = envs.make("alfworld", data=place).notice
    monkeypatch.setenv("ALFWORLD_DATA", place)
    assert envs.make("alfworld").notice == given and "official games" in given


@pytest.mark.parametrize("place", ["{0}", "{0}/nowhere", "~/nothing"])
def test_a_variable_that_holds_no_games_is_an_error_and_no_reason_to_generate_some(tmp_path, monkeypatch, place):
    monkeypatch.setenv("ALFWORLD_DATA", place.format(tmp_path))
    with pytest.raises(ValueError, match=r"\$ALFWORLD_DATA: .*alfworld-download.*unset it"):
        envs.make("alfworld")
    assert "GENERATED" in envs.make("alfworld", compact=True).notice


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_no_home_is_needed_and_none_is_made(tmp_path, home):
    """alfworld makes a folder in the home, or one called `~`, when it is imported."""
    clean = {k: v for k, v in os.environ.items() if k not in ("ALFWORLD_DATA", "HOME")} | ({"HOME": home} if home else {})
    code = (f"import os, sys; sys.path.insert(0, {str(HERE)!r}); import envs; before = dict(os.environ)\n"
            "print(envs.make('alfworld', compact=True).notice); assert dict(os.environ) == before")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert "GENERATED" in done.stdout and list(tmp_path.iterdir()) == [], done.stderr


@pytest.mark.parametrize("change", [
    lambda data: data["pddl_domain"].replace("(:action GotoLocation", "(:action Explode :parameters (" + " ".join(
        f"?{c} - object" for c in "abcdefgh") + ") :precondition (and) :effect (checked ?a))\n(:action GotoLocation", 1),
    lambda data: data["pddl_domain"].replace("(:action GotoLocation", "(:action Explode :parameters (" + " ".join(
        f"?{c} - receptacle" for c in "abcdefgh") + ") :precondition (and) :effect (opened ?a))\n(:action GotoLocation", 1)])
def test_a_game_whose_grounding_explodes_is_named_in_bounded_time(tmp_path, monkeypatch, change):
    make_folder(tmp_path, lambda text: json.dumps(json.loads(text) | {"pddl_domain": change(json.loads(text))}))
    monkeypatch.setattr(envs, "TRANSLATION_S", 1.0)
    world = envs.make("alfworld", data=str(tmp_path))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"train/\S+ is not a sound ALFWorld game .*takes longer than 1 s"):
        world.open(world.tasks("train")[0])
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("spoil", [os.mkfifo, lambda path: path.mkdir(), lambda path: path.write_bytes(bytes(11_000_000))])
def test_what_is_no_file_or_far_too_large_is_not_read(tmp_path, spoil):
    """A pipe would be waited for, for ever."""
    make_folder(tmp_path)
    game = next(tmp_path.glob("json_2.1.1/train/**/game.tw-pddl"))
    game.unlink()
    spoil(game)
    with pytest.raises(ValueError, match="game.tw-pddl is no file, or has more than 10 MB; get it again"):
        envs.make("alfworld", data=str(tmp_path))
    if game.is_file():
        return
    shutil.move(game, tmp_path / "items_shuffle_1000.json")
    with pytest.raises(ValueError, match="items_shuffle_1000.json: cannot be read as JSON"):
        envs.make("webshop", data=str(tmp_path))


@pytest.mark.parametrize("groups, values", [(12, 10), (2, 400), (60, 2)])
def test_a_product_with_endless_combinations_of_options_is_named(groups, values):
    options = {f"part {g}": [f"v{v}" for v in range(values)] for g in range(groups)}
    items = [article("lamp", "Lamp", "$9", options, [], "a lamp of parts")]
    with pytest.raises(ValueError, match=rf"product {LAMP} has [\d,]+ combinations of options.*take it out"):
        envs.Shop(items, {LAMP: INSTRUCTIONS[LAMP]})


@pytest.mark.parametrize("play, says", [
    (lambda: envs.make("alfworld").notice, ""),
    (lambda: envs.make("alfworld", data="~/games"), "~/games/json_2.1.1 is not a folder"),
    (lambda: envs.make("alfworld", data="~nobody-here/games"), "~nobody-here/games/json_2.1.1 is not a folder"),
    (lambda: envs.make("webshop", data="~/shop"), "~/shop/items_shuffle_1000.json: cannot be read")])
def test_nobody_needs_a_home(monkeypatch, play, says):
    """As in a container whose user has no entry in the list of users."""
    for name in ("HOME", "ALFWORLD_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    with pytest.raises(ValueError, match=re.escape(says)) if says else nullcontext():
        assert "GENERATED" in play()


def test_open_games_take_little_of_the_folder_for_temporary_files(monkeypatch):
    """64 at a time, each with a copy of Fast Downward's library: the copies are of one without symbols for debuggers. Where
    that can't be had, the message on a full folder says what a copy takes and what would help."""
    fd = envs._textworld().fd
    size = Path(fd.interface.DOWNWARD_LIB_PATH).stat().st_size
    assert 64 * size < 200e6 or not shutil.which("strip")
    with monkeypatch.context() as patch, tempfile.NamedTemporaryFile() as whole:
        Path(whole.name).write_bytes(bytes(33_000_000))
        patch.setattr(fd.interface, "DOWNWARD_LIB_PATH", whole.name)
        patch.setattr(fd, "load_lib", lambda: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(envs.MachineFault, match=r"33.0 MB there \(1.3 with `strip` of binutils\).*TMPDIR"):
            envs.AlfEngine()

# ---- 5. generated games ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", envs.SPLIT_COUNTS)
@pytest.mark.parametrize("world, n", [("plans", 6), ("home", 16)])
def test_every_generated_game_is_won_by_its_walkthrough_and_not_before(request, world, n, split):
    world = request.getfixturevalue(world)
    for i in range(n):
        task = world.tasks(split)[i]
        with world.open(task) as game:
            state = game.start
            assert not state.success and game.task.goal == task.goal and not state.observation.startswith(envs.BANNER)
            for command in oracle_walkthrough(envs.pddl_game(task.data)):
                assert command in state.admissible and not state.done and state.reward == 0
                state = game.step(state, command)
            assert state.success and state.done and state.reward == 10.0


def test_a_game_depends_on_its_arguments_only():
    def draw(i, **kwargs):
        task = envs.generate_task(i, **{"split": "train", **kwargs})
        return dataclasses.replace(task, data=envs.pddl_game(task.data))

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
            scene, steps = task.data, len(oracle_walkthrough(envs.pddl_game(task.data)))
            standing = [cls for _, cls in scene.receptacles]
            assert 6 <= len(standing) <= 9 and len(set(standing)) == len(standing)
            assert home.habit[scene.target] in standing and scene.destination not in envs.wheel().openable
            count = Counter(cls for _, cls, _ in scene.objects)
            assert count.pop(scene.target) == 1 + ("two" in task.kind) and set(count.values()) <= {1}
            assert task.kind != "look_at_obj_in_light" or "Desk" in standing
            assert steps <= (10 if "two" in task.kind else 7 if task.kind in envs.PROCESSES else 5)


def test_a_true_skill_helps_the_tiny_policys_teacher_and_a_false_one_does_not():
    won, rng = {"plain": [], "true": [], "false": []}, random.Random(0)
    for seed in range(6):
        world = envs.AlfWorld.household(seed, max_steps=PRESETS["tiny"]["alfworld"]["max_steps"])
        for i in range(15):
            task = world.tasks("train")[i]
            usual, target = world.tasks("train").household.habit[task.data.target].lower(), task.data.target.lower()
            others = [c.lower() for _, c in task.data.receptacles if c.lower() != usual and c != task.data.destination]
            with world.open(task) as game:
                for name, place in (("plain", None), ("true", usual), ("false", rng.choice(others))):
                    skill = place and make_tiny.skill_text(target, place)
                    won[name].append(make_tiny.play(game, skill, rng, slip=0.05)[-1])
    rate = {name: np.mean(outcomes) for name, outcomes in won.items()}
    assert rate["plain"] < 0.7 and rate["true"] > rate["plain"] + 0.15 and rate["false"] < rate["plain"] + 0.1, rate

# ---- 6. WebShop's search engine --------------------------------------------------------------------------------------


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


def test_symbols_are_words_whatever_the_release_of_regex():
    """Lucene's Unicode knows these as pictures; newer ones don't."""
    words, others = "\u2605\u266c\u261b\u261a\u266b\u265a\u2661\u261e\u2765\u2767", "\u273f\u27a4\u25cf\u2606\u2014\uff1a"
    for text in (" ".join(words + others), words + others, f"red {words[0]}lamp{others}"):
        assert [c for c in text if c in words] == [t for t in envs.search_terms(text) if t not in ("red", "lamp")]


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

# ---- 7. WebShop, a shop of six products ------------------------------------------------------------------------------


def page_parts(state):
    return state.observation.split(" [SEP] ")


RED = goal_of(LAMP, "red", "small")
TO_LAMP = ("search[shade]", f"click[{LAMP}]")                  # only the lamp has the word "shade"

# ---- 8. WebShop, files -----------------------------------------------------------------------------------------------


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

# ---- 9. WebShop, goals and splits ------------------------------------------------------------------------------------


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

# ---- 10. WebShop, pages ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("query, clicked", [
    ('{}<b>&amp;"red"', ["red"]), ('"Red" lamp', ["red"]), ('"dark blue" lamp', []), ("red lamp", []), ('"large""red"', ["large", "red"])])
def test_mode_text_rich_marks_an_option_that_stands_in_quotes_in_the_query(query, clicked):
    """The original looks for it in quotes in the page's address, in which blanks of the query are plus signs."""
    rich = visit(RED, observation="text_rich")
    product = SHOP.products[LAMP]
    page = rich._state(envs.Page("item", query.lower(), asin=LAMP))
    assert [line[17:-1] for line in page.observation.split("\n") if line.startswith("You have clicked ")] == clicked
    assert all((f"[clicked button] {value} [" in page.observation) == (value in clicked)
               for values in product.options.values() for value in values)


def test_mode_text_rich_keeps_the_blanks_of_the_page_after_a_purchase():
    page = walk(visit(RED, observation="text_rich"), *TO_LAMP, "click[buy now]").observation
    assert "\nYour code: \nNone\n (Paste it in your MTurk interface.)\n" in page
    assert "\nGoal \nNone\nReward\n" in page and "\nReward Details \nNone\n" in page


def test_mode_text_rich_marks_buttons_opened_products_and_chosen_options():
    rich = visit(RED, observation="text_rich")
    assert rich.start.observation == f"WebShop\nInstruction: \n{RED.text}\n[button] Search [button_]\n"
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

# ---- 11. WebShop, actions --------------------------------------------------------------------------------------------


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

# ---- 12. WebShop, score ----------------------------------------------------------------------------------------------


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

# ---- 13. WebShop, any sequence of actions ----------------------------------------------------------------------------


NASTY = ["search[]", "click[]", "click[a[b]]", "search[a\nb]", "search[<b>]", "<b>", "search[<r>]", "search[desk]",
         "[]", "\n", "", "search[ ]", "search[" + "x" * 10_000 + "]", "search[" + "lamp " * 2000 + "]", "x" * 10_000,
         "click[buy now]", "search[ünïcødé 灯 🛋]", "search[\0]", "search[red and not (small or \"large\") ~*?:^]",
         "click[< prev]", "click[İ]", "search[%s {0} {goal}]", "<|im_end|>", "search[red natural small round shirt]"]


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

# ---- 14. WebShop, the made-up catalogue ------------------------------------------------------------------------------


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

# ---- 15. WebShop, prompts --------------------------------------------------------------------------------------------


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
