"""A robot on the grid that is sent to a goal, told once: the model as a policy.

IS: goal, position, tool calls `go <direction>`, wheels that slip by chance. IS NOT: a gymnasium
environment (examples wrap it). It exists to show a language model in a loop with a body.
"""

from __future__ import annotations

from flashrt.worlds.building import call_text, parse_call
from flashrt.worlds.document import Document, Message, dice_of
from flashrt.worlds.moves import cell, moved, random_cell
from flashrt.worlds.names import DIRECTIONS

ARRIVED = "the robot is at the goal ."


class Robot:
    """`prompt` tells the goal and the start; `call` moves; the trained policy goes along columns
    first, then along rows. With probability `slip` a step goes somewhere else.
    """

    def __init__(self, seed: int, slip: float = 0.1) -> None:
        self._dice = dice_of("robot", seed)
        self._slip = slip
        self.goal = random_cell(self._dice)
        self.position = random_cell(self._dice)

    @property
    def is_there(self) -> bool:
        """The robot stands on the goal."""
        return self.position == self.goal

    @property
    def distance(self) -> int:
        """Steps that are left."""
        return sum(abs(a - b) for a, b in zip(self.position, self.goal, strict=True))

    def prompt(self) -> str:
        """The user's message."""
        return f"the goal is {cell(self.goal)} . the robot is in {self.observation()}"

    def observation(self) -> str:
        """What a tool call returns: where the robot stands. The goal is not told again."""
        return f"{cell(self.position)} ."

    def call(self, text: str) -> str:
        """Run a tool call `<tool_call> go east</tool_call>`; the result for the tool turn."""
        words = parse_call(text)
        if len(words) != 2 or words[0] != "go" or words[1] not in DIRECTIONS:
            return "you can not do that ."
        way = words[1]
        if self._dice.random() < self._slip:
            way = self._dice.choice(list(DIRECTIONS))
        self.position = moved(self.position, way) or self.position
        return self.observation()

    def right_turn(self) -> str:
        """The assistant turn that the model was trained to write here."""
        if self.is_there:
            return ARRIVED
        (column, row), (goal_column, goal_row) = self.position, self.goal
        if column != goal_column:
            return call_text("go", "east" if column < goal_column else "west")
        return call_text("go", "north" if row < goal_row else "south")


def document(seed: int, max_turns: int, slip: float = 0.1) -> Document:
    """An episode by the trained policy, cut after `max_turns` assistant turns."""
    robot = Robot(seed, slip)
    messages = [Message("user", robot.prompt())]
    for _ in range(max_turns):
        turn = robot.right_turn()
        messages.append(Message("assistant", turn))
        if turn == ARRIVED:
            break
        messages.append(Message("tool", robot.call(turn)))
    return Document(tuple(messages))
