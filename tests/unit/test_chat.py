"""Conversations: messages become the template's tokens, fed once; capsules bring back both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import flashrt
from flashrt.session.chat import Chat, open_chat, shared
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.document import HELD_OUT
from flashrt.worlds.inventory import Inventory

TINY = Path(__file__).parents[1] / "golden" / "tiny"
WORLD = Inventory(HELD_OUT + 100, 30)
TURN = 12  # tokens of a question


@pytest.fixture(scope="module")
def engine() -> flashrt.Engine:
    return flashrt.load(bundled_checkpoint(), device="cpu", max_positions=600, lanes=3)


@pytest.fixture
def chat(engine: flashrt.Engine) -> Iterator[Chat]:
    with open_chat(engine) as chat:
        chat.add("system", WORLD.prompt())
        yield chat
    for capsule in list(engine.capsules.capsules):
        capsule.drop()


def ask(chat: Chat, index: int) -> str:
    chat.add("user", WORLD.question(WORLD.things[index]))
    return chat.reply(24)


def test_it_says_what_a_session_on_the_rendered_tokens_says(
    engine: flashrt.Engine, chat: Chat
) -> None:
    said = ask(chat, 3)
    assert said == chat.said[-1][1]
    with engine.session() as session:
        session.prefill(chat.tokens(chat.said[:-1], is_asked=True))
        tokens = list(session.generate(24, stop=engine.checkpoint.stop_tokens))
        assert engine.tokenizer is not None
        assert engine.tokenizer.decode(tokens).strip() == said
        assert session.digest() == chat.session.digest()


def test_each_message_is_fed_once(chat: Chat) -> None:
    ask(chat, 0)
    fed = chat.fed_tokens
    ask(chat, 1)
    assert chat.fed_tokens - fed <= TURN
    assert chat.session.tokens.tolist() == chat.tokens()[: chat.session.position]


def test_a_moment_brings_back_words_and_state(chat: Chat) -> None:
    moment = chat.snapshot("prompt")
    digest = chat.session.digest()
    first = ask(chat, 2)
    chat.restore(moment)
    assert (chat.said, chat.session.digest()) == (moment.said, digest)
    assert ask(chat, 2) == first
    with chat.fork(moment) as other:
        assert ask(other, 2) == first
        assert other.session.digest() == chat.session.digest()
    with chat.fork() as other:
        assert other.said == chat.said
        assert ask(other, 4) == ask(chat, 4)


def test_a_message_that_is_reworded_is_fed_again_from_there(
    engine: flashrt.Engine, chat: Chat
) -> None:
    ask(chat, 0)
    chat.said = (*chat.said[:-1], ("assistant", "no ."))
    after = chat.snapshot()
    with engine.session() as cold:
        cold.prefill(chat.tokens())
        assert cold.digest() == after.capsule.digest


def test_a_stream_closed_early_was_said_so_far(engine: flashrt.Engine, chat: Chat) -> None:
    chat.add("user", WORLD.question(WORLD.things[0]))
    stream = chat.stream(24)
    said = next(stream) + next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert chat.said[-1] == ("assistant", said.strip())
    after = chat.snapshot()
    with engine.session() as cold:
        cold.prefill(chat.tokens())
        assert cold.digest() == after.capsule.digest


def test_a_checkpoint_without_words_is_refused() -> None:
    engine = flashrt.load(TINY, device="cpu", max_positions=64)
    with pytest.raises(flashrt.CheckpointError, match="feed token ids"):
        open_chat(engine)


def test_shared_counts_a_common_beginning() -> None:
    assert shared([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared([], [1]) == 0
    assert shared([1, 2], [1, 2, 3]) == 2
