"""Conversations: messages become the template's tokens, fed once; capsules bring back both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flashrt
from flashrt.base.errors import CheckpointError, SessionError
from flashrt.session.chat import Chat, ChatPoint, Reply, open_chat, recommended_sampling, shared
from flashrt.text.config import end_of_turn
from flashrt.text.template import ChatError
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


def test_a_point_brings_back_words_and_state(chat: Chat) -> None:
    point = chat.snapshot("prompt")
    digest = chat.session.digest()
    first = ask(chat, 2)
    chat.restore(point)
    assert (chat.said, chat.session.digest()) == (point.said, digest)
    assert ask(chat, 2) == first
    with chat.fork(point) as other:
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
    stream.close()
    assert chat.said[-1] == ("assistant", said.strip()) and stream.reason is chat.reason is None
    after = chat.snapshot()
    with engine.session() as cold:
        cold.prefill(chat.tokens())
        assert cold.digest() == after.capsule.digest


# -- what leaves the conversation as it was -------------------------------------------------------


def test_an_empty_reply_is_no_message(engine: flashrt.Engine, chat: Chat) -> None:
    """Red when ("assistant", "") joins."""
    chat.add("user", "hello .")
    before = chat.messages
    (end,) = engine.checkpoint.stop_tokens
    assert chat.reply(8, logit_bias={end: 1e6}) == ""
    assert chat.messages == before and str(chat.reason) == "stop"
    assert chat.reply(0) == "" and chat.messages == before and str(chat.reason) == "length"


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"stop": ("",)}, {"max_tokens": -1}])
def test_a_reply_that_fails_moves_nothing(chat: Chat, wrong: dict[str, Any]) -> None:
    """Red when the prompt is fed before parameters are looked at, or ("assistant", "") joins."""
    ask(chat, 0)
    chat.add("user", WORLD.question(WORLD.things[1]))
    before, digest, fed = chat.messages, chat.session.digest(), chat.fed_tokens
    with pytest.raises(SessionError):
        chat.reply(**wrong)
    assert (chat.messages, chat.session.digest(), chat.fed_tokens) == (before, digest, fed)
    chat.messages = before[:-1]
    assert ask(chat, 1) == chat.said[-1][1]


def test_a_reply_that_breaks_off_adds_nothing(chat: Chat) -> None:
    """Red when what came before a failure joins as if it were the answer."""
    chat.add("user", WORLD.question(WORLD.things[0]))
    before, stream = chat.messages, chat.stream(24)
    next(stream)
    chat.session.prefill([5])  # somebody else changes the session
    with pytest.raises(SessionError, match="changed meanwhile"):
        list(stream)
    assert chat.messages == before and chat.reason is None
    whole = chat.reply(24)
    chat.messages = before
    assert chat.reply(24) == whole


def test_while_a_reply_comes_nothing_else_begins(chat: Chat) -> None:
    """Red when a second stream moves the session back under the first."""
    point = chat.snapshot()
    expected = ask(chat, 5)
    chat.restore(point)
    chat.add("user", WORLD.question(WORLD.things[5]))
    stream = chat.stream(24)
    pieces = [next(stream)]
    for other in (
        lambda: next(chat.stream(4)),
        lambda: chat.add("user", "wait ."),
        chat.snapshot,
        chat.fork,
        lambda: chat.restore(point),
        lambda: setattr(chat, "messages", ()),
    ):
        with pytest.raises(SessionError, match="a reply is coming"):
            other()
    pieces += list(stream)
    assert "".join(pieces).strip() == expected == chat.said[-1][1]
    chat.add("user", "now .")


def test_a_stream_that_is_forgotten_blocks_nothing(chat: Chat) -> None:
    chat.add("user", WORLD.question(WORLD.things[0]))
    stream = chat.stream(24)
    said = next(stream)
    del stream
    assert chat.said[-1] == ("assistant", said.strip())
    chat.add("user", "go on .")


def test_a_message_too_long_moves_nothing(chat: Chat) -> None:
    """Red when the session is rolled back before its room is looked at."""
    ask(chat, 0)
    chat.said = (("system", "other words ."), *chat.said[1:])  # differs early: much to roll back
    before, position = chat.messages, chat.session.position
    chat.add("user", "the fox " * 600)
    for call in (chat.reply, chat.snapshot):
        with pytest.raises(SessionError, match=r"has 1,\d+ tokens, of 600"):
            call()
        assert chat.session.position == position
    chat.messages = before
    ask(chat, 1)


# -- how replies end ------------------------------------------------------------------------------


def test_a_reply_says_why_it_ended(engine: flashrt.Engine, chat: Chat) -> None:
    """Red at the end of the context when what was sampled is lost with an error."""
    chat.add("user", WORLD.question(WORLD.things[0]))
    stream = chat.stream(3)
    words = "".join(stream)
    assert [stream.reason, chat.reason] == ["length", "length"] and stream.token_count == 3
    assert chat.said[-1] == ("assistant", words.strip())
    ask(chat, 1)
    assert str(chat.reason) == "stop"
    room = engine.max_positions - chat.session.position
    chat.add("user", " fox" * (room - 15))
    assert chat.reply(64, logit_bias={engine.checkpoint.stop_tokens[0]: -1e6}) != ""
    assert str(chat.reason) == "context" and chat.session.position == engine.max_positions


def test_a_stop_string_ends_a_reply(chat: Chat) -> None:
    """Across tokens; red when it is yielded, or part of the conversation."""
    point = chat.snapshot()
    whole = ask(chat, 2)
    words = whole.split()
    cut = f"{words[1][-1]} {words[2][:1]}"  # within two words
    chat.restore(point)
    chat.add("user", WORLD.question(WORLD.things[2]))
    pieces = list(chat.stream(24, stop=[cut, "never said"]))
    assert "".join(pieces).strip() == whole[: whole.index(cut)] == chat.said[-1][1]
    assert str(chat.reason) == "stop" and cut not in "".join(pieces)
    assert chat.snapshot().capsule.tokens.tolist() == chat.tokens()


# -- templates, tools, thoughts -------------------------------------------------------------------

STRICT = """
{%- if messages | selectattr('role', 'equalto', 'user') | list | length == 0 -%}
    {{- raise_exception('No user query found in messages.') -}}
{%- endif -%}
{%- for m in messages -%}
    {{- '<|im_start|>' ~ ('user' if m.role == 'tool' else m.role) ~ '\n' -}}
    {%- if m.reasoning_content -%}{{- '<think>' ~ m.reasoning_content ~ '</think>' -}}{%- endif -%}
    {{- ' ' ~ (m.content or '') -}}
    {%- for call in m.tool_calls or [] -%}
        {%- for name, value in call.function.arguments | items -%}
            {{- '<tool_call> ' ~ call.function.name ~ ' ' ~ name ~ ' ' ~ value ~ '</tool_call>' -}}
        {%- endfor -%}
    {%- endfor -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if tools -%}{{- tools | tojson -}}{%- endif -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' ~ ('' if enable_thinking is false else '<think>') -}}
{%- endif -%}
"""


def checkpoint_with(folder: Path, **files: object) -> Path:
    """A copy of the bundled checkpoint; None leaves a file out, a mapping changes what it holds."""
    shutil.copytree(bundled_checkpoint(), folder, dirs_exist_ok=True)
    for name, given in files.items():
        path = folder / (f"{name}.jinja" if isinstance(given, str) else f"{name}.json")
        if given is None:
            path.unlink()
        elif isinstance(given, dict):
            path.write_text(json.dumps({**json.loads(path.read_text()), **given}))
        else:
            path.write_text(str(given))
    return folder


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> flashrt.Engine:
    """The bundled model with a template as strict as Qwen3.5's, which opens a thought."""
    path = checkpoint_with(tmp_path_factory.mktemp("strict"), chat_template=STRICT)
    return flashrt.load(path, device="cpu", max_positions=600, lanes=2)


def test_the_quick_start_works_with_a_template_that_wants_a_question(
    strict: flashrt.Engine,
) -> None:
    """Red without a user's turn that stands in: "No user query found in messages."."""
    with open_chat(strict, template_options={"enable_thinking": False}) as chat:
        chat.add("system", WORLD.prompt())
        point = chat.snapshot("facts")
        fed = chat.fed_tokens
        for thing in WORLD.things[:2]:
            chat.restore(point)
            chat.add("user", WORLD.question(thing))
            assert chat.reply(24) == WORLD.answer(thing)
        assert chat.fed_tokens - fed <= 2 * TURN
        chat.messages = chat.messages[:1]
        with pytest.raises(ChatError, match="No user query"):
            chat.reply()
        point.capsule.drop()


def test_a_thought_is_apart_from_the_answer(strict: flashrt.Engine) -> None:
    """Red when a thought that max_tokens cut off comes back as the answer."""
    with open_chat(strict) as chat:
        chat.add("user", "tell me a story about a fox .")
        (end,) = strict.checkpoint.stop_tokens
        assert chat.reply(6, logit_bias={end: -1e6}) == "" and str(chat.reason) == "length"
        message = chat.messages[-1]
        assert message["content"] == "" and message["reasoning_content"]
        assert chat.said[-1] == ("assistant", "")
        assert strict.tokenizer is not None
        text = strict.tokenizer.decode(chat.tokens(), skip_special=False)
        assert f"<think>{message['reasoning_content']}</think> <|im_end|>" in text


def test_tools_and_calls_reach_the_template(strict: flashrt.Engine) -> None:
    """Red when messages are pairs of role and content, and when arguments stay JSON text."""
    tools = [{"name": "look", "description": "look in a place"}]
    with open_chat(strict, tools=tools) as chat:
        chat.add("user", "where is it ?")
        call = {"function": {"name": "look", "arguments": '{"place": "cellar"}'}}
        chat.add("assistant", None, tool_calls=[call])
        chat.add("tool", "it is not there .", tool_call_id="1")
        assert strict.tokenizer is not None
        text = strict.tokenizer.decode(chat.tokens(), skip_special=False)
        assert "<tool_call> look place cellar</tool_call>" in text
        assert '"description": "look in a place"' in text
        with chat.fork(chat.snapshot()) as other:
            assert other.messages == chat.messages
            other.said = other.said[:2]  # what agrees is kept with all its fields
            assert other.messages == chat.messages[:2]
        with pytest.raises(ChatError, match="arguments are no JSON"):
            chat.add("assistant", None, tool_calls=[{"name": "look", "arguments": "{"}])
        assert len(chat.messages) == 3


# Drops thoughts before the last question, as Qwen3.5's; calls as it writes them.
DROPS = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}{{- '<|im_start|>system\n' ~ (tools | tojson) ~ '<|im_end|>' -}}{%- endif -%}
{%- for m in messages -%}
    {{- '<|im_start|>' ~ m.role ~ '\n' -}}
    {%- if m.role == 'assistant' and loop.index0 > ns.last -%}
        {{- '<think>' ~ (m.reasoning_content or '') ~ '</think>' -}}
    {%- endif -%}
    {{- ' ' ~ (m.content or '') -}}
    {%- for call in m.tool_calls or [] -%}
        {{- '<tool_call>\n<function=' ~ call.function.name ~ '>\n' -}}
        {%- for name, value in call.function.arguments | items -%}
            {{- '<parameter=' ~ name ~ '>\n' ~ value ~ '\n</parameter>\n' -}}
        {%- endfor -%}
        {{- '</function>\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n<think>' ~ ('</think>' if enable_thinking is false else '') -}}
{%- endif -%}
"""
LOOK = {"name": "look", "parameters": {"properties": {"place": {"type": "string"}}}}
CALL = (
    "<tool_call>\n<function=look>\n<parameter=place>\ncellar\n</parameter>\n"
    "</function>\n</tool_call>"
)


class Script:
    """What a model says, in place of what it would sample; the state is fed as ever. `rows`: that
    went through prefill, at the time of each reply's first token.
    """

    def __init__(self, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chat, self.rows, self._fed = chat, list[int](), 0
        engine = chat.session.engine
        prefill = engine.prefill

        def counted(lane: Any, tokens: Any, bucket: int | None = None) -> None:
            self._fed += len(tokens)
            prefill(lane, tokens, bucket)

        monkeypatch.setattr(engine, "prefill", counted)

    def fed(self) -> int:
        """Rows since the last call."""
        fed, self._fed = self._fed, 0
        return fed

    def stream(self, chat: Chat, said: str, **options: Any) -> Reply:
        """A reply that says this."""
        engine, session = chat.session.engine, chat.session
        assert isinstance(engine, flashrt.Engine) and engine.tokenizer is not None
        tokens = engine.tokenizer.encode(said)

        def generate(most: int, **_: Any) -> Any:
            self.rows.append(self.fed())
            try:
                for token in tokens[:most]:
                    session.prefill([token])
                    yield token
            finally:
                self.fed()

        reply = chat.stream(400, **options)
        session.generate = lambda most, **given: Scripted(generate(most, **given))  # type: ignore[method-assign]
        return reply


class Scripted:
    reason = "stop"

    def __init__(self, steps: Any) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def close(self) -> None:
        self.steps.close()


@pytest.fixture(scope="module")
def drops(tmp_path_factory: pytest.TempPathFactory) -> flashrt.Engine:
    path = checkpoint_with(tmp_path_factory.mktemp("drops"), chat_template=DROPS)
    return flashrt.load(path, device="cpu", max_positions=1500, lanes=2)


def test_turns_of_a_template_that_drops_thoughts_feed_new_tokens_only(
    drops: flashrt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red without a waypoint where the reply begins: the journal is fed again from one below it;
    and in a fork, which has none of them.
    """
    with open_chat(drops) as chat:
        script = Script(chat, monkeypatch)
        chat.add("system", WORLD.prompt())
        for turn in range(6):
            chat.add("user", WORLD.question(WORLD.things[turn]))
            before, wanted = chat.session.tokens, chat.tokens(is_asked=True)
            same = shared(before, wanted)
            assert turn == 0 or same < len(before) - 5, "the thought is still there"
            said = "where was it , it was there , I saw it </think> in the cellar ."
            assert "".join(script.stream(chat, said)).endswith("in the cellar .")
            assert script.rows[-1] == len(wanted) - same
        assert chat.messages[-1]["reasoning_content"] == "where was it , it was there , I saw it"
        with chat.fork() as other:
            other.add("user", "and now ?")
            wanted = other.tokens(is_asked=True)
            same = shared(other.session.tokens, wanted)
            script.fed()
            list(script.stream(other, "</think> there ."))
            assert script.rows[-1] == len(wanted) - same
        encoded = chat._encode(chat.messages, is_asked=True)
        assert len(encoded.turn_starts) == 6
        script.fed()
        digests = []
        for start in reversed(encoded.turn_starts[1:]):
            chat.session.rollback(start)
            digests.append((start, chat.session.digest()))
        assert script.fed() == 0
    with drops.session() as cold:
        for start, digest in reversed(digests):
            cold.prefill(wanted[cold.position : start])
            assert cold.digest() == digest
    drops.capsules.check_integrity()


def test_calls_in_replies_are_parts_of_the_message(
    drops: flashrt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when a call stays text, when its message is written in another way than it was sampled
    (the next turn feeds it again), or when events and message differ.
    """
    with open_chat(drops, tools=[LOOK]) as chat:
        script = Script(chat, monkeypatch)
        chat.add("user", "where is the fox ?")
        reply = script.stream(chat, f"I look</think> so{CALL}")
        kinds = [type(event).__name__ for event in reply.events()]
        assert list(dict.fromkeys(kinds)) == [
            "ThoughtDelta", "TextDelta", "CallBegun", "ArgumentsDelta", "CallEnded",
        ]  # fmt: skip
        assert reply.message == chat.messages[-1] and reply.reason == "stop"
        (call,) = chat.messages[-1]["tool_calls"]  # type: ignore[attr-defined]
        assert call["type"] == "function" and call["function"] == {
            "name": "look", "arguments": '{"place": "cellar"}',
        }  # fmt: skip
        assert chat.said[-1] == ("assistant", "so")
        chat.add("tool", "the fox is there .", tool_call_id=call["id"])
        assert shared(chat.session.tokens, chat.tokens(is_asked=True)) > chat.session.position - 6
        unread = script.stream(chat, CALL, tool_choice="none", thinking=False)
        assert "".join(unread) == CALL and chat.said[-1][1] == CALL
        chat.messages = chat.messages[:-1]
        events = script.stream(chat, f"</think>{CALL}{CALL}").events()
        assert type(next(events)).__name__ == "CallBegun"
        events.close()  # type: ignore[attr-defined]
        assert chat.messages[-1]["content"] and "tool_calls" not in chat.messages[-1]
        with pytest.raises(ChatError, match="tool_choice is 'some'"):
            chat.reply(tool_choice="some")


def test_a_call_can_be_forced(drops: flashrt.Engine, engine: flashrt.Engine) -> None:
    """Red when the choice is not held to, on or off in a thought, or when it is refused only after
    the prompt was fed.
    """
    place = {"type": "string", "enum": ["the cellar", "the tower"]}
    schema = {"type": "object", "properties": {"place": place}, "required": ["place"]}
    tools = [{"name": name, "parameters": schema} for name in ("look", "open")]
    one = {"type": "function", "function": {"name": "open"}}
    for choice, names in (("required", {"look", "open"}), (one, {"open"})):
        with open_chat(drops, tools=tools) as chat:
            chat.add("user", "where is the fox ?")
            chat.reply(60, tool_choice=choice, thinking=False, temperature=1.5, seed=4)
            calls = chat.messages[-1]["tool_calls"]
            assert {call["function"]["name"] for call in calls} <= names  # type: ignore[attr-defined]
            assert json.loads(calls[0]["function"]["arguments"])["place"] in place["enum"]  # type: ignore[index]
    with open_chat(engine, tools=tools) as chat:  # whose template says nothing of calls
        chat.add("user", "where is the fox ?")
        with pytest.raises(ChatError, match="syntax of calls"):
            chat.reply(tool_choice="required")
        with pytest.raises(ChatError, match="cannot follow a grammar"):
            chat.reply(tool_choice="required", grammar=flashrt.Grammar.regex("a+"))
        assert chat.session.position == 0


def test_none_as_tool_choice_keeps_the_model_from_calling(
    engine: flashrt.Engine, tmp_path: Path
) -> None:
    """The bundled model calls tools by itself; red when nothing keeps it from that."""
    say = (
        "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' ~ "
        "('' if m.content.startswith('<') else ' ') ~ m.content ~ '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
        "{# <tool_call> <function= <parameter= #}"
    )
    made = flashrt.load(
        checkpoint_with(tmp_path, chat_template=say), device="cpu", max_positions=256
    )
    with open_chat(made, tools=[LOOK]) as chat:
        chat.add("system", "the red box may be in the tower or the stable .")
        chat.add("user", "bring me the red box .")
        asked = chat.messages
        assert chat.reply(16) == "<tool_call> look tower</tool_call>", "its own syntax: text"
        chat.messages = asked
        assert "<tool_call>" not in chat.reply(16, tool_choice="none")


def test_thinking_is_switched_where_the_template_can(
    drops: flashrt.Engine, engine: flashrt.Engine, strict: flashrt.Engine
) -> None:
    """Red when an option that the template does not know is passed over in silence."""
    with open_chat(drops, thinking=False) as chat:
        assert drops.tokenizer is not None
        chat.add("user", "hello .")
        text = drops.tokenizer.decode(chat.tokens(is_asked=True), skip_special=False)
        assert text.endswith("<think></think>")
        (end,) = drops.checkpoint.stop_tokens
        chat.reply(4, thinking=True, logit_bias={end: -1e6})
        assert chat.messages[-1]["content"] == "" and chat.messages[-1]["reasoning_content"]
    with open_chat(engine, thinking=True) as chat:
        chat.add("user", "hello .")
        with pytest.raises(ChatError, match="knows no thoughts"):
            chat.reply(4)
        assert chat.reply(0, thinking=False) == ""


def test_a_final_message_is_continued(engine: flashrt.Engine, drops: flashrt.Engine) -> None:
    """Red when the turn is ended first, when a space is lost, or when a second message joins."""
    with open_chat(engine) as chat:
        chat.add("system", WORLD.prompt())
        whole = ask(chat, 2)
        asked = chat.messages[:-1]
        words = whole.split()
        chat.messages = (*asked, {"role": "assistant", "content": " ".join(words[:3])})
        pieces = list(chat.stream(24, continue_final=True))
        assert "".join(pieces) == whole.removeprefix(" ".join(words[:3]))
        assert chat.messages == (*asked, {"role": "assistant", "content": whole})
        chat.messages = asked
        with pytest.raises(ChatError, match="of the assistant"):
            chat.reply(continue_final=True)
    with open_chat(drops) as chat:  # within the thought
        chat.add("user", "hello .")
        chat.add("assistant", "", reasoning_content="the fox")
        (end,) = drops.checkpoint.stop_tokens
        chat.reply(3, continue_final=True, logit_bias={end: -1e6})
        assert chat.messages[-1]["reasoning_content"].startswith("the fox ")  # type: ignore[attr-defined]
        assert len(chat.messages) == 2 and chat.messages[-1]["content"] == ""


def test_a_point_of_a_file_brings_back_messages(chat: Chat) -> None:
    point = chat.snapshot()
    chat.messages = ()
    chat.restore(ChatPoint(point.capsule, tuple(json.loads(json.dumps(point.messages)))))
    assert chat.messages == point.messages
    with pytest.raises(ChatError, match="role"):
        chat.restore(ChatPoint(point.capsule, ({"content": "x"},)))


# -- what the checkpoint says ---------------------------------------------------------------------


def test_a_reply_ends_where_any_file_says(tmp_path: Path) -> None:
    """Red when only the first file that names a token counts: config.json has <|endoftext|>, and
    turns end with another token, which tokenizer_config.json names.
    """
    path = checkpoint_with(tmp_path, generation_config=None, config={"eos_token_id": 0})
    engine = flashrt.load(path, device="cpu", max_positions=600)
    assert engine.checkpoint.stop_tokens == (0, 1)
    with open_chat(engine) as chat:
        chat.add("system", WORLD.prompt())
        assert ask(chat, 3) == WORLD.answer(WORLD.things[3]) and str(chat.reason) == "stop"


@pytest.mark.parametrize("wrong", ["1", [], -1, 704, 1.0, True, [1, "2"], {}])
@pytest.mark.parametrize("place", ["generation_config", "config"])
def test_what_is_no_stop_token_is_refused(tmp_path: Path, place: str, wrong: object) -> None:
    """Red when it is passed over, and replies run on."""
    path = checkpoint_with(tmp_path, **{place: {"eos_token_id": wrong}})
    with pytest.raises(CheckpointError, match=rf"{place}\.json: eos_token_id is "):
        flashrt.load(path, device="cpu", max_positions=64)


def test_a_stop_token_beyond_the_model_is_refused(engine: flashrt.Engine) -> None:
    assert engine.tokenizer is not None
    path = engine.checkpoint.path
    assert end_of_turn(path, engine.tokenizer, 2) == (1,)
    with pytest.raises(CheckpointError, match=r"eos_token '<\|im_end\|>' has id 1 in tokenizer"):
        end_of_turn(path, engine.tokenizer, 1)


def test_sampling_as_the_checkpoint_recommends(tmp_path: Path) -> None:
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1}
    path = checkpoint_with(tmp_path, generation_config=said)
    engine = flashrt.load(path, device="cpu", max_positions=600, lanes=2)
    found: Any = recommended_sampling(engine.checkpoint)
    assert found == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    with open_chat(engine, sampling=found) as chat, open_chat(engine) as plain:
        for one in (chat, plain):
            one.add("user", "tell me a story about a fox .")
        assert chat.reply(16, seed=3) == plain.reply(16, seed=3, **found)
    checkpoint_with(tmp_path, generation_config={"temperature": "hot"})
    other = flashrt.load(tmp_path, device="cpu", max_positions=64).checkpoint
    assert recommended_sampling(other) == {"temperature": 0.0}
    checkpoint_with(tmp_path, generation_config={"do_sample": True, "temperature": "hot"})
    other = flashrt.load(tmp_path, device="cpu", max_positions=64).checkpoint
    with pytest.raises(CheckpointError, match="temperature is 'hot'"):
        recommended_sampling(other)


def test_a_checkpoint_without_words_is_refused() -> None:
    engine = flashrt.load(TINY, device="cpu", max_positions=64)
    with pytest.raises(flashrt.CheckpointError, match="feed token ids"):
        open_chat(engine)


def test_shared_counts_a_common_beginning() -> None:
    assert shared([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared([], [1]) == 0
    assert shared([1, 2], [1, 2, 3]) == 2
