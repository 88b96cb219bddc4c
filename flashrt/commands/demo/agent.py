"""The demo's acts: an agent is told a long prompt, branches, errs, goes back, and is resumed.

IS: what happens and what is measured. IS NOT: how it is shown (report), or the questions after half
a restore (ablation). The truth about answers comes from the simulators in flashrt.worlds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashrt.commands.checkpoints import EngineOptions
from flashrt.commands.demo.ablation import OTHER, Ablation
from flashrt.commands.demo.acts import ANSWER_TOKENS, Acts
from flashrt.commands.demo.findings import AgentFindings, Mishap, Turn
from flashrt.commands.demo.report import draw
from flashrt.commands.demo.starts import measure_starts
from flashrt.core.backend import Progress
from flashrt.session.chat import Chat, ChatPoint
from flashrt.session.engine import SessionEngine
from flashrt.worlds.building import Building, parse_call
from flashrt.worlds.document import HELD_OUT, Thing
from flashrt.worlds.inventory import Inventory
from flashrt.worlds.moves import Moves
from flashrt.worlds.updates import goes_to

MAX_CALLS = 8
FAILURE = "error : the tool did not answer . try again later ."  # nothing like it was trained


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is told and asked; the defaults are for a model that reads fast."""

    facts: int = 150  # of the prompt
    filler: int = 40  # sentences of a tale between them
    hints: int = 14  # where things may be
    questions: int = 10  # of each kind, after whole and half restores
    walk: int = 12  # steps of the branch `walk`
    moves: int = 100  # before a question after half a restore
    updates: int = 60
    lengths: tuple[int, ...] = (512, 2048, 8192)  # prompts of the comparison cold / warm


SMALL = Sizes(20, 4, 4, 2, 6, 20, 12, (256, 1024))
FAST_TOKENS_PER_S = 2000.0  # a model that prefills slower gets SMALL


class AgentDemo(Acts):
    """An engine with three lanes; `chat` is the agent."""

    def __init__(
        self,
        engine: SessionEngine,
        options: EngineOptions,
        sizes: Sizes,
        found: AgentFindings,
        progress: Progress,
    ) -> None:
        super().__init__(engine, options, found, progress)
        self.found, self.sizes = found, sizes
        seed = HELD_OUT + found.seed
        self.inventory = Inventory(seed, sizes.facts, sizes.filler)
        self.building = _apart_from(self.inventory, seed, sizes.hints)
        self.walker = Moves(seed)

    def play(self, out: Path) -> None:
        """All acts, in order."""
        facts = self._prompt()
        ends = [self._recall(), self._walk(facts), self._errand(facts)]
        before = self._mishap(facts)
        thing = self.inventory.things[self.sizes.facts // 2]
        self.resume(ends[0], self.inventory.question(thing))
        tree = [point.capsule for point in (facts, *ends, *before)]
        draw(self.found, self.engine, tree, {"the agent": ends[0].capsule}, out)
        self.ask_the_witness()
        self._ablation(facts)
        for point in (*ends, *before, facts):
            point.capsule.drop()
        self._starts()

    # -- acts -----------------------------------------------------------------------------------

    def _prompt(self) -> ChatPoint:
        found = self.found
        found.prompt = f"{self.inventory.prompt()} {self.building.prompt()}"
        found.facts, found.hints = self.sizes.facts, self.sizes.hints
        return self.tell("facts", found.prompt)

    def _recall(self) -> ChatPoint:
        """A fact is recalled, changed, recalled."""
        thing, chat = self.inventory.things[self.sizes.facts // 3], self.chat
        moved_to = self.inventory.places[self.inventory.things[-1]]
        turns = self.ask(chat, self.inventory.question(thing), self.inventory.answer(thing))
        said = f"{goes_to(thing, moved_to)} {self.inventory.question(thing)}"
        turns += self.ask(chat, said, f"the {thing} is in the {moved_to} .")
        return self.branch("recall", "goes straight on", chat, turns)

    def _walk(self, facts: ChatPoint) -> ChatPoint:
        """A position after some moves, told in one turn."""
        self.step("restore the prompt", lambda: self.chat.restore(facts))
        walker = self.walker
        said = f"{walker.start()} {walker.walk(self.sizes.walk)} {walker.question()}"
        turns = self.ask(self.chat, said, walker.answer())
        return self.branch("walk", "restored on the same lane", self.chat, turns)

    def _errand(self, facts: ChatPoint) -> ChatPoint:
        """A thing is fetched with tools, in a fork."""
        thing = self._hidden()[0]
        truth = self.building.right_turns(thing)
        other = self.step("fork the prompt to another lane", lambda: self.chat.fork(facts))
        other.add("user", self.building.request(thing))
        turns = [Turn("user", self.building.request(thing))]
        turns += self._tools(other, self.building, truth)
        made = self.branch("errand", "forked to another lane", other, turns)
        other.close()
        return made

    def _mishap(self, facts: ChatPoint) -> list[ChatPoint]:
        """A tool call fails. One agent goes on with the failure; the other takes it back."""
        chat, building = self.chat, self.building
        hints, hidden = building.hints, building.hidden  # best in the first place of its hint
        thing = min(self._hidden(), key=lambda t: hints[t].index(hidden[t]))
        truth = building.right_turns(thing)
        self.step("restore the prompt again", lambda: chat.restore(facts))
        chat.add("user", building.request(thing))
        before = chat.snapshot("before the call")
        call = chat.reply(ANSWER_TOKENS)
        chat.add("tool", FAILURE)
        after = chat.snapshot("after the failure")
        other = copy.deepcopy(building)
        kept = self._tools(chat, other, [])
        self.step("roll back the failed call", lambda: chat.restore(before))
        retried = self._tools(chat, building, truth)
        self.found.mishap = Mishap(
            request=building.request(thing),
            failed=[Turn("assistant", call, truth[0]), Turn("tool", FAILURE)],
            kept=kept,
            is_done_kept=other.is_brought(thing),
            retried=retried,
            is_done=building.is_brought(thing),
            dropped_tokens=after.capsule.position - before.capsule.position,
        )
        return [before, after, chat.snapshot("called again")]

    def _ablation(self, facts: ChatPoint) -> None:
        seed, sizes = HELD_OUT + self.found.seed, self.sizes
        seeds = range(seed, seed + sizes.questions)
        things = self.inventory.things[:: sizes.facts // sizes.questions][: sizes.questions]
        ablation = Ablation(self.engine, self.chat, self.progress)
        asked = [(self.inventory.question(t), self.inventory.answer(t)) for t in things]
        other = Inventory(seed + OTHER, 2 * sizes.facts, 2 * sizes.filler).prompt()
        ablation.recall(facts, asked, other)
        ablation.walks(seeds, sizes.moves)
        ablation.updates(seeds, sizes.updates)
        self.found.answers, self.found.rows_only_differs = ablation.answers, ablation.differs

    def _starts(self) -> None:
        text = Inventory(HELD_OUT + self.found.seed, 384, 400).prompt()
        prompt = np.array(self.chat.tokens((("system", text),)), np.int32)
        turn = np.array(
            self.chat.tokens(
                (("user", self.inventory.question(self.inventory.things[0])),), is_asked=True
            ),
            np.int32,
        )
        self.found.turn_tokens = len(turn)
        self.chat.close()
        self.found.starts = measure_starts(
            self.engine, prompt, self.sizes.lengths, turn, self.progress
        )

    # -- tools ----------------------------------------------------------------------------------

    def _tools(self, chat: Chat, building: Building, truth: list[str]) -> list[Turn]:
        """Assistant turns with tool results between them, until one calls no tool."""
        turns: list[Turn] = []
        for i in range(MAX_CALLS):
            said = chat.reply(ANSWER_TOKENS)
            turns.append(Turn("assistant", said, truth[i] if i < len(truth) else None))
            if not parse_call(said):
                break
            result = building.call(said)
            chat.add("tool", result)
            turns.append(Turn("tool", result))
        return turns

    def _hidden(self) -> list[Thing]:
        """Things that can be found now, in the order of the prompt."""
        return [thing for thing in self.building.things if thing in self.building.hidden]


def _apart_from(inventory: Inventory, seed: int, hints: int) -> Building:
    """The first building from a seed on with none of the inventory's things, and two to bring."""
    known = set(inventory.things)
    while True:
        building = Building(seed, hints)
        if known.isdisjoint(building.things) and len(building.hidden) >= 2:
            return building
        seed += 1
