"""What the model learns from: rows of tokens, loss weights, true positions, state resets.

IS: documents of the worlds sized to a row length, encoded as flashrt encodes them. IS NOT: the
curriculum (see train).

Weights: HARD on the assistant's words that carry the answer (places, numbers, directions, tool
names), EASY on its other words, 0 on what others say. Resets: in half of the recall rows the
recurrent states are wiped where the user's turn begins, so that only attention can answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import vocabulary
from torch import Tensor

from flashrt.worlds import building, inventory, mixed, moves, robot, story, updates
from flashrt.worlds.document import HELD_OUT, Document
from flashrt.worlds.names import COLORS, DIRECTIONS, NUMBERS, PLACES, THINGS

EASY, HARD = 0.3, 1.0
RESET_TOKENS = 4  # wiped at the opener and after each of the next three: the window of the conv
TOPIC_TOKENS = 8
TASKS = ("recall", "updates", "moves", "building", "robot", "mixed", "story")
LONGEST = {"robot": 256, "story": 256}
SHORTEST = {"building": 96, "robot": 96, "mixed": 128}


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of one task: [B, T] each, positions [B, T, 2] (-1 where there is none)."""

    task: str
    ids: Tensor
    weights: Tensor
    positions: Tensor
    resets: Tensor  # bool
    topics: Tensor  # colour and noun of the thing named last, [B, T, 2], -1 where there is none

    def to(self, device: str) -> Rows:
        """On another device."""
        tensors = (self.ids, self.weights, self.positions, self.resets, self.topics)
        return Rows(self.task, *(tensor.to(device) for tensor in tensors))


def draw(dice: random.Random, task: str, length: int) -> Document:
    """A training document of about `length` tokens; its seed is drawn below HELD_OUT."""
    seed = dice.randrange(HELD_OUT)
    if task == "recall":
        facts = max(1, min(384, int(length * dice.uniform(0.3, 0.8) / 8)))
        filler = int(dice.uniform(0, 0.5) * length / 13) if dice.random() < 0.4 else 0
        facts = max(1, min(facts, int((length - 20 - 13 * filler) / 8)))
        questions = max(1, (length - 8 * facts - 13 * filler) // 18)
        return inventory.Inventory(seed, facts, filler).document(questions)
    if task == "updates":
        questions = max(1, length // dice.choice((40, 64, 96, 160, 2048)))
        count = max(1, (length - 18 * questions) // 8)
        return updates.document(seed, count, questions, dice.choice((3, 6, 12)))
    if task == "moves":
        questions = dice.choice((1, 1, 2, max(1, length // 64)))
        return moves.document(seed, max(1, length - 8 - 15 * questions), questions)
    if task == "building":
        hints = max(1, min(32, int(length * dice.uniform(0.2, 0.6) / 12)))
        return building.Building(seed, hints).document(hints)
    if task == "robot":
        return robot.document(seed, 30)
    if task == "mixed":
        facts, hints = int(length * dice.uniform(0.1, 0.4) / 8), int(length * 0.2 / 12)
        filler = int(length * 0.2 / 13) if dice.random() < 0.3 else 0
        turns = max(2, length // 30)
        return mixed.document(seed, max(2, facts), max(1, min(hints, 32)), turns, filler)
    return story.document(seed, max(2, length // 13))


class Encoder:
    """Documents -> arrays, with the tokenizer that is exported."""

    def __init__(self) -> None:
        self.tokenizer = vocabulary.build()
        one = self.tokenizer.token_to_id
        self.opener = {role: one(text) for role, text in vocabulary.OPENERS.items()}
        self.turn_end = one(vocabulary.TURN_END)
        size = self.tokenizer.get_vocab_size()
        self.is_hard = np.zeros(size, bool)
        names = ("look", "take", "go", "lost", "was", "at")
        for word in (*PLACES, *NUMBERS, *DIRECTIONS, *names):
            self.is_hard[one(f"\u0120{word}")] = True
        self.is_hard[one("<tool_call>")] = True
        self.is_move = np.zeros(size, bool)
        for word in DIRECTIONS:
            self.is_move[one(f"\u0120{word}")] = True
        self.color, self.noun = np.full(size, -1), np.full(size, -1)
        for table, words in ((self.color, COLORS), (self.noun, THINGS)):
            for i, word in enumerate(words):
                table[one(f"\u0120{word}")] = i

    def encode(self, document: Document) -> np.ndarray:
        """Token ids of a document."""
        text = vocabulary.render(document.messages)
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def roles(self, ids: np.ndarray) -> np.ndarray:
        """True where the assistant writes: after its opener, through the end of its turn."""
        marks = np.zeros(len(ids), np.int64)
        starts = [i + 1 for i in np.flatnonzero(ids == self.opener["assistant"])]
        ends = np.flatnonzero(ids == self.turn_end)
        for start in starts:
            after = ends[ends >= start]
            marks[start : (after[0] + 1 if len(after) else len(ids))] = 1
        return marks.astype(bool)

    def topics(self, ids: np.ndarray) -> np.ndarray:
        """Colour and noun of the thing named last, up to TOPIC_TOKENS back; else -1. [T, 2]"""
        color, noun = self.color[ids], self.noun[ids]
        index = np.arange(len(ids))
        is_named = np.zeros(len(ids), bool)
        is_named[1:] = (noun[1:] >= 0) & (color[:-1] >= 0)
        last = np.maximum.accumulate(np.where(is_named, index, -1))
        known = (last > 0) & (index - last < TOPIC_TOKENS) & (color < 0)
        return np.where(known[:, None], np.stack([color[last - 1], noun[last]], 1), -1)


def row(encoder: Encoder, dice: random.Random, task: str, length: int) -> tuple[np.ndarray, ...]:
    """ids, weights, positions, resets of one row, each cut to `length`."""
    document = draw(dice, task, length)
    ids = encoder.encode(document)
    written = encoder.roles(ids)
    weights = np.where(written, EASY, 0.0)
    if task != "story":
        weights[written & encoder.is_hard[ids]] = HARD
    positions = np.full((len(ids), 2), -1)
    if document.positions:
        said = np.flatnonzero(encoder.is_move[ids] & ~written)
        positions[said] = np.array(document.positions[1:])
    resets = np.zeros(len(ids), bool)
    if task == "recall" and dice.random() < 0.5:
        for at in np.flatnonzero(ids == encoder.opener["user"]):
            resets[at : at + RESET_TOKENS] = True
    parts = (ids, weights, positions, resets, encoder.topics(ids))
    return tuple(part[:length] for part in parts)


def batch(encoder: Encoder, dice: random.Random, task: str, rows: int, length: int) -> Rows:
    """`rows` rows of `length` tokens, each one document cut or padded with token 0."""
    ids = np.zeros((rows, length), np.int64)
    weights = np.zeros((rows, length), np.float32)
    positions = np.full((rows, length, 2), -1)
    resets = np.zeros((rows, length), bool)
    topics = np.full((rows, length, 2), -1)
    arrays = (ids, weights, positions, resets, topics)
    for i in range(rows):
        size = length if dice.random() < 0.7 else dice.randint(length * 2 // 3, length)
        parts = row(encoder, dice, task, size)
        for target, part in zip(arrays, parts, strict=True):
            target[i, : len(part)] = part
    return Rows(task, *(torch.from_numpy(array) for array in arrays))
