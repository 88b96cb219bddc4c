"""The text worlds: equal seeds, equal worlds; every answer follows from what is told."""

from __future__ import annotations

import itertools
import re

import pytest

from flashrt.worlds import building, mixed, moves, robot, story, updates
from flashrt.worlds.building import FAILURES, STUCK, UNKNOWN, Building, call_text, parse_call
from flashrt.worlds.document import HELD_OUT, Document, Message, Thing
from flashrt.worlds.inventory import Inventory
from flashrt.worlds.moves import GRID, Moves, moved
from flashrt.worlds.names import DIRECTIONS, HEROES, NUMBERS, PLACES
from flashrt.worlds.robot import ARRIVED, Robot
from flashrt.worlds.updates import Updates

SEEDS = [*range(20), *range(HELD_OUT, HELD_OUT + 20)]


def every_kind(seed: int) -> list[Document]:
    return [
        Inventory(seed, 10, 3).document(5),
        updates.document(seed, 20, 3),
        moves.document(seed, 30, 3),
        Building(seed).document(4),
        robot.document(seed, 12),
        story.document(seed, 6),
        mixed.document(seed, 5, 3, 8, 2),
    ]


def told(document: Document, role: str) -> str:
    return " ".join(m.content for m in document.messages if m.role == role)


@pytest.mark.parametrize("seed", [0, 7, HELD_OUT])
def test_equal_seeds_give_equal_worlds_and_others_do_not(seed: int) -> None:
    assert every_kind(seed) == every_kind(seed)
    for one, other in zip(every_kind(seed), every_kind(seed + 1), strict=True):
        assert one != other


@pytest.mark.parametrize("seed", SEEDS)
def test_turns_alternate_and_end_with_the_assistant(seed: int) -> None:
    for document in every_kind(seed):
        roles = [m.role for m in document.messages]
        assert roles[-1] in ("assistant", "tool")
        if roles[0] == "system":
            roles = roles[1:]
        for before, after in itertools.pairwise(roles):
            assert (after == "assistant") != (before == "assistant")


@pytest.mark.parametrize("seed", SEEDS)
def test_an_inventory_answers_with_its_own_facts(seed: int) -> None:
    world = Inventory(seed, 45, 10)
    assert len(set(world.things)) == 45
    for thing in world.things:
        assert world.prompt().count(world.answer(thing)) == 1
        assert str(thing) in world.question(thing)


def test_an_inventory_holds_as_many_things_as_there_are_names() -> None:
    assert len(set(Inventory(0, 384).things)) == 384
    with pytest.raises(ValueError, match="Sample larger"):
        Inventory(0, 385)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_update_of_a_thing_is_the_answer(seed: int) -> None:
    world = Updates(seed, 5)
    text = world.move(30) + " " + world.move()
    found = re.findall(r"the (\w+ \w+) goes to the (\w+) \.", text)
    assert len(found) == 31
    for thing in world.places:
        last = [place for name, place in found if name == str(thing)][-1]
        assert world.answer(thing) == f"the {thing} is in the {last} ."
    assert world.any_thing() in world.places


@pytest.mark.parametrize("seed", SEEDS)
def test_a_walk_stays_on_the_grid_and_ends_where_it_says(seed: int) -> None:
    world = Moves(seed)
    words = world.walk(50).split()
    at = world.positions[0]
    assert f"column {NUMBERS[at[0]]} row {NUMBERS[at[1]]}" in world.start()
    for i, word in enumerate(words):
        step = DIRECTIONS[word]
        at = (at[0] + step[0], at[1] + step[1])
        assert world.positions[i + 1] == at
        assert all(0 <= x < GRID for x in at)
    assert world.position == at
    assert world.answer() == f"you are in column {NUMBERS[at[0]]} row {NUMBERS[at[1]]} ."


def test_the_edge_of_the_grid() -> None:
    assert moved((0, 0), "west") is None
    assert moved((GRID - 1, 0), "east") is None
    assert moved((0, GRID - 1), "north") is None
    assert moved((0, 0), "north") == (0, 1)


def test_positions_of_a_document_are_those_of_its_moves() -> None:
    document = moves.document(3, 40, 4)
    said = [w for w in told(document, "user").split() if w in DIRECTIONS]
    assert len(document.positions) == 1 + len(said) == 41
    assert told(document, "user").count(moves.QUESTION) == 4


@pytest.mark.parametrize("seed", SEEDS)
def test_right_turns_reach_the_goal_of_a_building(seed: int) -> None:
    world = Building(seed)
    for thing in world.things:
        turns, is_lost = world.right_turns(thing), world.is_lost(thing)
        results = [world.call(turn) for turn in turns if parse_call(turn)]
        assert world.is_brought(thing) != is_lost
        if is_lost:
            assert turns[-1] == f"the {thing} is lost ."
            assert all(result in FAILURES or str(thing) not in result for result in results)
        else:
            assert turns[-1] == f"the {thing} was in the {world.taken[thing]} ."
            assert results[-1] == building.TAKEN


def test_calls_of_all_kinds_fail_and_are_retried_somewhere() -> None:
    results = [
        m.content for seed in SEEDS for m in Building(seed).document(8).messages if m.role == "tool"
    ]
    assert {building.NOTHING, building.STUCK, building.TAKEN} <= set(results)


def test_a_stuck_thing_comes_loose_at_the_second_call() -> None:
    for seed in SEEDS:
        world = Building(seed)
        for thing in world.things:
            takes = [turn for turn in world.right_turns(thing) if "take" in turn]
            if len(takes) == 2:
                world.call(call_text("look", world.hidden[thing]))
                assert world.call(takes[0]) == STUCK
                assert world.call(takes[1]) == building.TAKEN
                return
    raise AssertionError("no stuck thing in any building")


@pytest.mark.parametrize(
    "text",
    ["", "hello", call_text("look", "moon"), call_text("look"), call_text("jump"), "<tool_call>"],
)
def test_a_call_that_is_none_says_so(text: str) -> None:
    assert Building(0).call(text) == UNKNOWN


def test_taking_from_elsewhere_is_refused() -> None:
    world = Building(0)
    thing = next(iter(world.hidden))
    assert world.call(call_text("take", *thing)) == building.ABSENT
    assert world.call(call_text("take", "no", "thing")) == building.ABSENT
    assert thing in world.hidden


@pytest.mark.parametrize("seed", SEEDS)
def test_the_trained_policy_reaches_its_goal(seed: int) -> None:
    world = Robot(seed, slip=0.2)
    assert f"the robot is in {world.observation()}" in world.prompt()
    for _ in range(200):
        if world.is_there:
            break
        before = world.distance
        observation = world.call(world.right_turn())
        assert observation == world.observation()
        assert abs(world.distance - before) <= 1
    assert world.right_turn() == ARRIVED


def test_a_robot_without_slip_needs_its_distance() -> None:
    for seed in SEEDS:
        world = Robot(seed, slip=0.0)
        for _ in range(world.distance):
            world.call(world.right_turn())
        assert world.is_there


def test_a_robot_refuses_other_calls_and_stays() -> None:
    world = Robot(1)
    before = world.position
    assert world.call("<tool_call> go up</tool_call>") == "you can not do that ."
    assert world.position == before


def test_a_story_keeps_its_hero_and_what_was_lost() -> None:
    for seed in SEEDS:
        asked, tale = story.document(seed, 6).messages
        hero = next(h for h in HEROES if h in asked.content.split())
        lost = re.search(r"had lost the (\w+ \w+) \.", tale.content)
        assert lost is not None
        assert f"then the {hero} found the {lost[1]} and came back home ." in tale.content
        assert tale.content.count(" .") == 6


def test_mixed_sessions_use_the_last_word_about_a_thing() -> None:
    for seed in range(200):
        document = mixed.document(seed, 5, 3, 12)
        places: dict[str, str] = dict(
            re.findall(r"the (\w+ \w+) is in the (\w+) \.", document.messages[0].content)
        )
        for message in document.messages[1:]:
            if message.role == "user":
                places.update(re.findall(r"the (\w+ \w+) goes to the (\w+) \.", message.content))
            found = re.fullmatch(r"the (\w+ \w+) is in the (\w+) \.", message.content)
            if found and message.role == "assistant":
                assert places[found[1]] == found[2]


def test_messages_are_ready_for_a_chat_template() -> None:
    assert Message("user", "hi").as_dict() == {"role": "user", "content": "hi"}
    assert str(Thing("red", "key")) == "red key"
    assert len(set(PLACES)) == 32
