"""Several answers as one: the prompts of one request, each an ask of its own.

IS: their events in the order in which they come, choices numbered through. IS NOT: scheduling.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from flashrt.serve.answer import Answer, Heard
from flashrt.serve.speaker import Ended, Event, Said


class Several:
    """Has what an `Answer` has."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers

    @property
    def heard(self) -> list[Heard]:
        """All choices, those of the first prompt first."""
        return [choice for answer in self._answers for choice in answer.heard]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(answer.prompt_tokens for answer in self._answers)

    @property
    def cached_tokens(self) -> int:
        """Of all prompts."""
        return sum(answer.cached_tokens for answer in self._answers)

    @property
    def token_count(self) -> int:
        """Of all choices."""
        return sum(answer.token_count for answer in self._answers)

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended."""
        return all(answer.is_over for answer in self._answers)

    async def begin(self) -> None:
        """See Answer: of the first, which runs first."""
        await self._answers[0].begin()

    async def whole(self) -> list[Heard]:
        """All choices, when they have ended. Raises Refusal."""
        async for _ in self.events():
            pass
        return self.heard

    async def events(self) -> AsyncIterator[Event | None]:
        """Events of all, as they come. Raises Refusal; the others are cancelled then."""
        if len(self._answers) == 1:
            async for event in self._answers[0].events():
                yield event
            return
        queue: asyncio.Queue[Event | BaseException | int | None] = asyncio.Queue()

        async def relay(answer: Answer, first: int) -> None:
            try:
                async for event in answer.events():
                    if isinstance(event, Said | Ended):
                        moved = dataclasses.replace(event, index=event.index + first)
                        queue.put_nowait(moved)
                    else:
                        queue.put_nowait(event)
                queue.put_nowait(first)
            except Exception as error:
                queue.put_nowait(error)

        firsts = [sum(len(a.heard) for a in self._answers[:i]) for i in range(len(self._answers))]
        tasks = [
            asyncio.ensure_future(relay(answer, first))
            for answer, first in zip(self._answers, firsts, strict=True)
        ]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, int):
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def cancel(self) -> None:
        """See Answer."""
        for answer in self._answers:
            answer.cancel()

    def timings(self) -> dict[str, Any]:
        """See Answer: of the first, with the tokens of all."""
        if len(self._answers) == 1:
            return self._answers[0].timings()
        fed = self.prompt_tokens - self.cached_tokens
        return {
            **self._answers[0].timings(),
            "cache_n": self.cached_tokens,
            "prompt_n": fed,
            "predicted_n": self.token_count,
        }
