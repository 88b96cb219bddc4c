"""What conversations in a demo are made of: a prompt, questions, branches, another process.

IS: the acts that an agent (agent) and a reader of a document (document) share, each noted for a
comparison of bits. IS NOT: what is said. Sessions called `cold` never see a capsule: what they
compute is the truth about bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from flashrt.base.errors import FlashrtError
from flashrt.commands.checkpoints import EngineOptions
from flashrt.commands.demo.findings import Branch, ChatFindings, NewProcess, Operation, Turn
from flashrt.commands.demo.starts import State, state_of
from flashrt.commands.timing import Tokens, prefill, timed
from flashrt.core.backend import Progress
from flashrt.session.chat import Chat, ChatPoint, open_chat
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session
from flashrt.store.store import Store

ANSWER_TOKENS = 48


class Acts:
    """An engine with three lanes; `chat` is the conversation."""

    def __init__(
        self,
        engine: SessionEngine,
        options: EngineOptions,
        found: ChatFindings,
        progress: Progress,
    ) -> None:
        self.engine, self.options, self.progress = engine, options, progress
        self.chat = open_chat(engine)
        self._findings = found
        # tokens, the state that was reached, and who wants to know whether it is right
        self._noted: list[tuple[Tokens, State, Callable[[bool], None]]] = []

    def tell(self, name: str, prompt: str) -> ChatPoint:
        """The prompt, as the system's message, and its capsule."""
        found = self._findings
        self.chat.add("system", prompt)
        tokens = np.array(self.chat.tokens(), np.int32)
        found.prompt_tokens = len(tokens)
        found.prefill_s = prefill(self.engine, self.chat.session, tokens, self.progress, "prompt")
        point, found.snapshot_s, _ = timed(self.engine, lambda: self.chat.snapshot(name))
        found.capsule_bytes = point.capsule.nbytes
        return point

    def ask(
        self,
        chat: Chat,
        question: str,
        truth: str | None = None,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> list[Turn]:
        """A question and its answer."""
        chat.add("user", question)
        return [Turn("user", question), Turn("assistant", chat.reply(answer_tokens), truth)]

    def branch(self, name: str, how: str, chat: Chat, turns: list[Turn]) -> ChatPoint:
        """A capsule at the end of a branch."""
        point = chat.snapshot(name)
        position, own = point.capsule.position, point.capsule.nbytes

        def tell(is_equal: bool) -> None:
            self._findings.branches.append(Branch(name, how, turns, position, own, is_equal))

        self._note(chat.session, tell)
        return point

    def step(self, what: str, act: Callable[[], Chat | None]) -> Chat:
        """Do something to the conversation, or make another one of it."""
        made, seconds, moved = timed(self.engine, act)
        chat = made or self.chat
        position = chat.session.position

        def tell(is_equal: bool) -> None:
            self._findings.steps.append(Operation(what, position, seconds, moved, is_equal))

        self._note(chat.session, tell)
        return chat

    def resume(self, point: ChatPoint, question: str, answer_tokens: int = ANSWER_TOKENS) -> None:
        """Another process goes on from a branch, by way of a store on disk."""
        with tempfile.TemporaryDirectory(prefix="flashrt-demo-") as folder:
            saved = Store(folder).save(point.capsule, "branch")
            told = {
                "checkpoint": str(self.engine.checkpoint.path),
                "options": {
                    "device": self.engine.device,
                    "precision": self.options.precision,
                    "kv_dtype": self.options.kv_dtype,
                    "weights": self.options.weights,
                    "draft": self.options.draft,
                },
                "store": folder,
                "name": "branch",
                "messages": point.messages,
                "question": question,
                "answer_tokens": answer_tokens,
            }
            found = _in_a_new_process(told)
        self.step("switch to a branch", lambda: self.chat.restore(point))
        self.chat.add("user", question)
        self._findings.process = NewProcess(
            question=question,
            answer=found["answer"],
            answer_here=self.chat.reply(answer_tokens),
            saved_bytes=saved.new_nbytes,
            loaded_s=found["loaded_s"],
            restored_s=found["restored_s"],
            answered_s=found["answered_s"],
            is_equal=found["digest"] == point.capsule.digest,
        )

    def ask_the_witness(self) -> None:
        """Cold prefills of the tokens of every step and branch, and the states compared."""
        for i, (tokens, state, tell) in enumerate(self._noted):
            self.progress("cold prefills, to compare", i, len(self._noted))
            with self.engine.session() as cold:
                cold.prefill(tokens)
                tell(state_of(cold) == state)
        self.progress("cold prefills, to compare", len(self._noted), len(self._noted))

    def _note(self, session: Session, tell: Callable[[bool], None]) -> None:
        self._noted.append((session.tokens, state_of(session), tell))


def _in_a_new_process(told: dict[str, Any]) -> dict[str, Any]:
    """What `resume` found. Raises FlashrtError when it failed."""
    command = [sys.executable, "-m", "flashrt.commands.demo.resume"]
    ran = subprocess.run(
        command, input=json.dumps(told), capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise FlashrtError(f"the new process failed:\n{ran.stderr}")
    found: dict[str, Any] = json.loads(ran.stdout)
    return found
