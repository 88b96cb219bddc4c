"""What an exported folder can do, measured by flashrt on worlds that training never saw.

    python evaluate.py [FOLDER] [--n 200] [--device cpu] [--json figures.json]

IS: accuracy per task, tool turns, agreement of drafts, and the ablations. IS NOT: torch.

An answer is right when every token to the end of the turn is. Ablations, between prompt and
question, by `Session.restore`:
    rows only     keys and values of the prompt, recurrent state of another prompt
    state only    recurrent state of the prompt, keys and values of another prompt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from flashrt.load import load
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session
from flashrt.text.template import ChatTemplate, chat_template_of
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds import mixed, robot, story
from flashrt.worlds.building import Building, parse_call
from flashrt.worlds.document import HELD_OUT, Document, Message
from flashrt.worlds.inventory import Inventory
from flashrt.worlds.moves import Moves
from flashrt.worlds.robot import Robot
from flashrt.worlds.updates import Updates

ABLATIONS = ("full", "rows only", "state only")
OTHER = 500_000  # added to a seed: the other prompt of an ablation
MAX_ANSWER = 24  # tokens


@dataclass(frozen=True, slots=True)
class Exam:
    """A prompt and questions that are asked one at a time, each from the state after the prompt.

    `prompt`: whole turns, and `opening`: the begun user turn that the questions finish.
    """

    prompt: tuple[Message, ...]
    opening: str
    questions: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Cell:
    """Right answers of those asked, by ablation."""

    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ABLATIONS, 0))
    asked: int = 0


class Chat:
    """An engine with its chat template."""

    def __init__(self, folder: Path, device: str, max_positions: int = 2560) -> None:
        self.engine: SessionEngine = load(folder, device, max_positions, lanes=2)
        template, tokenizer = chat_template_of(folder), self.engine.tokenizer
        assert template is not None and tokenizer is not None, "both are bundled"
        self.template: ChatTemplate = template
        self.tokenizer = tokenizer
        stop = tokenizer.token_id("<|im_end|>")
        assert stop is not None, "the template uses it"
        self.stop = stop

    def tokens(self, messages: tuple[Message, ...], prompt: bool = False) -> list[int]:
        """Ids of messages; with `prompt`, the assistant's turn is begun."""
        text = self.template.render(
            [message.as_dict() for message in messages], add_generation_prompt=prompt
        )
        return self.tokenizer.encode(text)

    def reply(self, session: Session, draft: int = 0) -> str:
        """The assistant's turn, greedy."""
        made = list(session.generate(MAX_ANSWER, stop=[self.stop], draft=draft))
        return self.tokenizer.decode(made).strip() if len(made) < MAX_ANSWER else ""


def recall(facts: int, filler: int) -> Callable[[int], Exam]:
    """Eight questions to an inventory."""

    def exam(seed: int) -> Exam:
        world = Inventory(seed, facts, filler)
        asked = world.things[:: max(1, facts // 8)][:8]
        questions = tuple((world.question(t), world.answer(t)) for t in asked)
        return Exam((Message("system", world.prompt()),), "", questions)

    return exam


def last_write(count: int) -> Callable[[int], Exam]:
    """Where each of four of twelve things is after `count` updates."""

    def exam(seed: int) -> Exam:
        world = Updates(seed)
        told = world.move(count)
        asked = list(world.places)[:4]
        return Exam((), told, tuple((world.question(t), world.answer(t)) for t in asked))

    return exam


def position(count: int) -> Callable[[int], Exam]:
    """Where the walker is after `count` moves."""

    def exam(seed: int) -> Exam:
        world = Moves(seed)
        told = f"{world.start()} {world.walk(count)}"
        return Exam((), told, ((world.question(), world.answer()),))

    return exam


EXAMS: dict[str, tuple[Callable[[int], Exam], int]] = {  # and questions per exam
    "recall, 8 facts": (recall(8, 0), 8),
    "recall, 45 facts": (recall(45, 0), 8),
    "recall, 150 facts": (recall(150, 0), 8),
    "recall, 150 facts + story, 2k tokens": (recall(150, 60), 8),
    "last write, 20 updates": (last_write(20), 4),
    "last write, 50 updates": (last_write(50), 4),
    "last write, 200 updates": (last_write(200), 4),
    "position, 20 moves": (position(20), 1),
    "position, 50 moves": (position(50), 1),
    "position, 200 moves": (position(200), 1),
}


def examine(
    chat: Chat, exam_of: Callable[[int], Exam], per_exam: int, n: int, ablate: bool
) -> Cell:
    """At least `n` questions."""
    cell = Cell()
    with chat.engine.session() as session, chat.engine.session() as other:
        for seed in range(HELD_OUT, HELD_OUT + -(-n // per_exam)):
            exam = exam_of(seed)
            for run, at in ((session, seed), (other, seed + OTHER)):
                if run is other and not ablate:
                    continue
                run.rollback(0)
                run.prefill(prefix(chat, exam_of(at)))
            here = session.snapshot()
            there = other.snapshot() if ablate else here
            for question, answer in exam.questions:
                cell.asked += 1
                for kind in ABLATIONS if ablate else ABLATIONS[:1]:
                    if kind == "full":
                        session.restore(here)
                    elif kind == "rows only":
                        session.restore(there)
                        session.restore(here, bands=("rows",))
                    else:
                        session.restore(here)
                        session.restore(there, bands=("rows",))
                    session.prefill(rest(chat, exam, question))
                    cell.right[kind] += chat.reply(session) == answer
            here.drop()
            if ablate:
                there.drop()
    return cell


def prefix(chat: Chat, exam: Exam) -> list[int]:
    """Tokens up to where the questions differ."""
    if not exam.opening:
        return chat.tokens(exam.prompt)
    user = (*exam.prompt, Message("user", exam.opening))
    return chat.tokens(user)[:-1]  # without the end of the turn


def rest(chat: Chat, exam: Exam, question: str) -> list[int]:
    """The tokens of a question after the prefix, through the opening of the answer."""
    if not exam.opening:
        return chat.tokens((Message("user", question),), prompt=True)
    whole = (*exam.prompt, Message("user", f"{exam.opening} {question}"))
    return chat.tokens(whole, prompt=True)[len(prefix(chat, exam)) :]


def tool_dialogues(chat: Chat, n: int) -> dict[str, tuple[int, int]]:
    """The model plays, the simulators answer; a wrong turn is counted and put right."""
    right = {
        "tool turns, 8 hints": [0, 0],
        "robot turns": [0, 0],
        "robot episodes without a fault": [0, 0],
    }
    with chat.engine.session() as session:
        for seed in range(HELD_OUT, HELD_OUT + -(-n // 12)):
            building = Building(seed)
            session.rollback(0)
            session.prefill(chat.tokens((Message("system", building.prompt()),)))
            for thing in building.things[:4]:
                turns = building.right_turns(thing)
                said = Message("user", building.request(thing))
                for turn in turns:
                    good = answers(chat, session, said, turn)
                    right["tool turns, 8 hints"][0] += good
                    right["tool turns, 8 hints"][1] += 1
                    said = Message("tool", building.call(turn) if parse_call(turn) else "")
        for seed in range(HELD_OUT, HELD_OUT + n):
            moving = Robot(seed)
            session.rollback(0)
            said, flawless = Message("user", moving.prompt()), True
            for _ in range(24):
                turn = moving.right_turn()
                good = answers(chat, session, said, turn)
                flawless &= good
                right["robot turns"][0] += good
                right["robot turns"][1] += 1
                if turn == robot.ARRIVED:
                    break
                said = Message("tool", moving.call(turn))
            right["robot episodes without a fault"][0] += flawless
            right["robot episodes without a fault"][1] += 1
    return {name: (good, asked) for name, (good, asked) in right.items()}


def answers(chat: Chat, session: Session, said: Message, turn: str) -> bool:
    """Whether the model's turn is the right one; the right one is what stays."""
    session.prefill(chat.tokens((said,), prompt=True))
    before = session.position
    good = chat.reply(session) == turn
    session.rollback(before)
    right = chat.tokens((Message("assistant", turn),))[1:]  # its opener is there already
    session.prefill(right)
    return good


def documents(seed: int) -> Iterator[Document]:
    """Text of every kind of world, for the agreement of drafts."""
    dice_seed = seed
    yield Inventory(dice_seed, 45).document(4)
    updates = Updates(dice_seed)
    told, thing = updates.move(30), updates.any_thing()
    asked = Message("user", f"{told} {updates.question(thing)}")
    yield Document((asked, Message("assistant", updates.answer(thing))))
    walker = Moves(dice_seed)
    told = f"{walker.start()} {walker.walk(30)} {walker.question()}"
    yield Document((Message("user", told), Message("assistant", walker.answer())))
    yield Building(dice_seed).document(3)
    yield robot.document(dice_seed, 12)
    yield mixed.document(dice_seed, 12, 4, 8)
    yield story.document(dice_seed, 5)


DOCUMENT_KINDS = ("recall", "updates", "moves", "building", "robot", "mixed", "story")


def draft_agreement(chat: Chat, n: int) -> dict[str, tuple[int, int]]:
    """First drafts that the model agreed with, of those made, in text that it writes itself."""
    found = dict.fromkeys(DOCUMENT_KINDS, (0, 0))
    with chat.engine.session() as session:
        for seed in range(HELD_OUT, HELD_OUT + n):
            for kind, document in zip(DOCUMENT_KINDS, documents(seed), strict=True):
                session.rollback(0)
                before = chat.engine.stats()
                for message in document.messages:
                    if message.role != "assistant":
                        session.prefill(chat.tokens((message,)))
                        continue
                    right = chat.tokens((message,))
                    session.prefill(right[:1])
                    start = session.position
                    for _ in session.generate(96, stop=[chat.stop], draft=1):
                        pass
                    session.rollback(start)
                    session.prefill(right[1:])
                after = chat.engine.stats()
                accepted, drafted = found[kind]
                found[kind] = (
                    accepted + int(after["accepted"] - before["accepted"]),
                    drafted + int(after["drafted"] - before["drafted"]),
                )
    return found


def markdown(figures: dict[str, dict[str, float]]) -> str:
    """The table of the model card."""
    lines = ["| | full restore | rows only | state only | asked |", "|---|---|---|---|---|"]
    for name, found in figures.items():
        shares = " | ".join(f"{found[k]:.3f}" if k in found else "" for k in ABLATIONS)
        lines.append(f"| {name} | {shares} | {found['asked']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=None)
    parser.add_argument("--n", type=int, default=200, help="questions per cell, at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--only", default="", help="exams whose names contain this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true", help="the table of the model card too")
    a = parser.parse_args()
    chat = Chat(a.folder or bundled_checkpoint(), a.device)
    figures: dict[str, dict[str, float]] = {}
    table = Table("task", *ABLATIONS, "asked")
    for name, (exam, per_exam) in track(EXAMS.items(), "exams", console=Console(stderr=True)):
        if a.only not in name:
            continue
        cell = examine(chat, exam, per_exam, a.n, not a.no_ablations)
        figures[name] = {kind: cell.right[kind] / cell.asked for kind in ABLATIONS}
        figures[name]["asked"] = cell.asked
        table.add_row(name, *(f"{figures[name][k]:.3f}" for k in ABLATIONS), str(cell.asked))
    if not a.only:
        drafts = {f"first draft, {k}": v for k, v in draft_agreement(chat, -(-a.n // 10)).items()}
        sums = [sum(v[i] for v in drafts.values()) for i in range(2)]
        drafts["first draft, all text"] = (sums[0], sums[1])
        for name, (good, asked) in (tool_dialogues(chat, a.n) | drafts).items():
            figures[name] = {"full": good / max(1, asked), "asked": asked}
            table.add_row(name, f"{good / max(1, asked):.3f}", "", "", str(asked))
    Console().print(table)
    if a.markdown:
        print(markdown(figures))
    if a.json:
        a.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
