"""The command line as a user meets it: outputs, exit codes, one clear line when it refuses."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import tokenizers

import flashrt
from flashrt import cli
from flashrt.commands.demo import acts, agent, random_ids
from flashrt.commands.demo.document import read_document
from flashrt.commands.demo.starts import State, state_of
from flashrt.session.chat import open_chat
from flashrt.session.session import Session
from flashrt.weights.bundled import bundled_checkpoint

TINY = Path(__file__).parents[1] / "golden" / "tiny"
COMMANDS = ("demo", "run", "pull", "plan", "inspect", "quantize", "bench", "doctor")

Capture = pytest.CaptureFixture[str]


def document(capsys: Capture, *arguments: object, code: int = 0) -> Any:
    """The JSON document that a command prints."""
    assert cli.main([str(a) for a in arguments]) == code
    return json.loads(capsys.readouterr().out)


def refusal(capsys: Capture, *arguments: object) -> str:
    """The one line on stderr of a command that refuses."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("flashrt: ")
    assert "Traceback" not in captured.err
    return captured.err


# -- help, errors, exit codes ---------------------------------------------------------------------


def test_without_a_command_it_explains_itself(capsys: Capture) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert all(re.search(rf"^    {name} ", text, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_purpose_and_examples(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"  flashrt {name}" in text.partition("examples:")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["plan", "--lanes", "0"],
        ["run", str(TINY), "--tokens", "1,x"],
        ["run"],
        ["run", str(TINY), "text", "--prompt", "text"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: flashrt" in capsys.readouterr().err


def test_errors_are_one_clear_line(tmp_path: Path, capsys: Capture) -> None:
    missing = tmp_path / "nowhere"
    assert "no such file" in refusal(capsys, "inspect", missing)
    assert "config.json" in refusal(capsys, "plan", tmp_path)
    assert "--shape" in refusal(capsys, "plan")
    assert "no such directory" in refusal(capsys, "run", missing, "--tokens", "1")
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    assert "cannot write" in refusal(capsys, "plan", TINY, "--svg", unwritable / "arena.svg")


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(as_json: bool) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "flashrt: interrupted\n"


# -- run ------------------------------------------------------------------------------------------


def test_run_streams_what_a_session_generates(capsys: Capture) -> None:
    arguments = ("--tokens", "5,6,7", "--max-tokens", "9", "--temperature", "0.9", "--seed", "3")
    assert cli.main(["run", str(TINY), "--max-positions", "64", *arguments]) == 0
    captured = capsys.readouterr()
    session = flashrt.load(TINY, device="cpu", max_positions=64).session()
    session.prefill([5, 6, 7])
    expected = list(session.generate(9, temperature=0.9, seed=3))
    assert [int(word) for word in captured.out.split()] == expected
    assert "3 tokens in, 9 out" in captured.err


def test_run_needs_ids_where_there_is_no_tokenizer(capsys: Capture) -> None:
    assert "--tokens 1,2,3" in refusal(capsys, "run", TINY, "--prompt", "hello")
    assert "token 512 at index 1" in refusal(capsys, "run", TINY, "--tokens", "1,512")


def test_run_reads_and_writes_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    checkpoint = tmp_path / "with-tokenizer"
    shutil.copytree(TINY, checkpoint)
    words = {f"w{i}": i for i in range(512)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    arguments = ["run", str(checkpoint), "--max-positions", "64", "--max-tokens", "6"]
    assert cli.main([*arguments, "--prompt", "w5 w6 w7"]) == 0
    from_argument = capsys.readouterr().out
    session = flashrt.load(TINY, device="cpu", max_positions=64).session()
    session.prefill([5, 6, 7])
    assert from_argument.split() == [f"w{token}" for token in session.generate(6)]
    assert cli.main([*arguments, "w5 w6 w7"]) == 0  # as the second word, too
    assert capsys.readouterr().out == from_argument
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w5 w6\nw7")))
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == from_argument
    assert "the prompt is empty" in refusal(capsys, *arguments, "--prompt", "")


def test_run_asks_through_the_chat_template_unless_it_is_raw(capsys: Capture) -> None:
    """Red when a chat model is given the bare text, and continues it with nonsense."""
    arguments = ["run", str(bundled_checkpoint()), "--max-positions", "128", "--max-tokens", "12"]
    question = "tell me a story about a fox ."
    assert cli.main([*arguments, "--prompt", question]) == 0
    answered = capsys.readouterr()
    engine = flashrt.load(bundled_checkpoint(), device="cpu", max_positions=128)
    with open_chat(engine) as chat:
        chat.add("user", question)
        assert answered.out.strip() == chat.reply(12) != ""
        assert f"{chat.fed_tokens} tokens in, 12 out" in answered.err
        assert "ended by length" in answered.err
    assert cli.main([*arguments, "--raw", "--prompt", question]) == 0
    assert engine.tokenizer is not None
    with engine.session() as session:
        session.prefill(engine.tokenizer.encode(question))
        tokens = list(session.generate(12, stop=engine.checkpoint.stop_tokens))
    assert capsys.readouterr().out.strip() == engine.tokenizer.decode(tokens).strip()
    assert "the prompt is empty" in refusal(capsys, *arguments, "--prompt", " ")


# -- plan and inspect -----------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 3])
def test_plan_is_what_load_allocates(lanes: int, capsys: Capture) -> None:
    planned = document(capsys, "plan", TINY, "--max-positions", 300, "--lanes", lanes, "--json")
    engine = flashrt.load(TINY, device="cpu", max_positions=300, lanes=lanes)
    stats = engine.stats()
    assert planned["arena_bytes"] == stats["arena_bytes"]
    assert planned["weights_bytes"] == stats["weights_bytes"]
    assert planned["scratch_bytes"] == stats["scratch_bytes"]
    regions = [r for band in planned["bands"] for r in band["regions"]]
    slots = list(engine.arena.plan.slots())
    assert sorted((r["name"], r["offset"]) for r in regions) == sorted(
        (s.region.name, s.offset) for s in slots
    )
    stops = [0, *(band["offset"] + band["bytes"] for band in planned["bands"])]
    assert [band["offset"] for band in planned["bands"]] == stops[:-1]


def test_plan_prints_every_region_and_what_overlap_saves(tmp_path: Path, capsys: Capture) -> None:
    svg = tmp_path / "arena.svg"
    assert cli.main(["plan", "--shape", "tiny", "--svg", str(svg)]) == 0
    text = capsys.readouterr().out
    for name in ("cursor", "state", "keys", "values", "logits", "scratch", "pool", "saved"):
        assert name in text
    assert str(svg) in text.replace("\n", "")
    assert svg.read_text().startswith("<svg")


def test_inspect_a_checkpoint(capsys: Capture) -> None:
    found = document(capsys, "inspect", TINY, "--verify", "--json")
    with safetensors.safe_open(TINY / "model.safetensors", framework="np") as file:
        names = list(file.keys())
    assert found["tensors"] == len(names)
    assert found["config"]["hidden_size"] == 64
    assert len(found["verified"]["digest"]) == 32
    totals = [row["total_bytes"] for row in found["memory"]]
    assert totals == sorted(totals)
    assert cli.main(["inspect", str(TINY)]) == 0
    assert "Memory by context length" in capsys.readouterr().out


def test_inspect_finds_a_value_that_is_no_number(tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    weights = broken / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    header_nbytes = int.from_bytes(raw[:8], "little")
    offset = json.loads(raw[8 : 8 + header_nbytes])["model.embed_tokens.weight"]["data_offsets"][0]
    at = 8 + header_nbytes + offset + 100
    raw[at : at + 2] = b"\xc0\x7f"  # NaN in bfloat16
    weights.write_bytes(raw)
    assert "NaN or infinity in embed" in refusal(capsys, "inspect", broken, "--verify")


def test_inspect_a_capsule_file(session: Session, tmp_path: Path, capsys: Capture) -> None:
    session.prefill(range(40))
    capsule = session.snapshot("forty")
    path = tmp_path / "forty.capsule"
    capsule.save(path)
    found = document(capsys, "inspect", path, "--verify", "--json")
    assert (found["name"], found["position"]) == ("forty", 40)
    assert found["digest"] == session.digest()
    assert cli.main(["inspect", str(path)]) == 0
    assert "rows/keys" in capsys.readouterr().out
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert "is damaged" in refusal(capsys, "inspect", path, "--verify")


# -- demo and doctor ------------------------------------------------------------------------------


def test_demo_checks_all_its_claims(tmp_path: Path, capsys: Capture) -> None:
    arguments = ("--checkpoint", TINY, "--tokens", 600, "--device", "cpu", "--out", tmp_path)
    story = document(capsys, "demo", *arguments, "--json")
    assert len(story["checks"]) >= 9
    assert all(story["checks"].values())
    assert [start["tokens"] for start in story["starts"]] == [512, 600]
    assert story["prompt_tokens"] == 600
    by_name = {step["what"]: step for step in story["steps"]}
    # going back to the prompt moves the fixed band and no rows; a fork to a new lane moves both
    assert by_name["restore the prompt"]["moved_bytes"] < story["capsule_bytes"]
    assert (
        by_name["fork the prompt to another lane"]["moved_bytes"]
        > by_name["restore the prompt"]["moved_bytes"]
    )
    assert {Path(f).name for f in story["files"]} == {"arena.svg", "session-tree.svg"}
    assert all(Path(f).is_file() for f in story["files"])


def test_demo_fails_when_a_state_is_not_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The negative control: one wrong digest, and the exit code says so."""
    monkeypatch.setattr(random_ids, "state_of", wrong_once())
    arguments = ["demo", "--checkpoint", str(TINY), "--tokens", "100", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    text = capsys.readouterr().out
    assert "FAILED restore the prompt" in text
    assert "checks of bits passed" not in text


def wrong_once() -> Callable[[Session], State]:
    calls = iter(range(1000))

    def wrong(session: Session) -> State:
        state = state_of(session)
        return State(state.position, state.logits, "0" * 32) if next(calls) == 0 else state

    return wrong


def test_demo_prints_the_table_that_it_promises(tmp_path: Path, capsys: Capture) -> None:
    arguments = ["demo", "--checkpoint", str(TINY), "--tokens", "100", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    for words in (
        "bytes moved",
        "TTFT cold",
        "TTFT warm",
        "ratio",
        "bits equal",
        "KV-only restore",
    ):
        assert words in text
    assert "NO" not in text.split()


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the model reads slowly."""
    monkeypatch.setattr(agent, "FAST_TOKENS_PER_S", math.inf)


@pytest.mark.usefixtures("short_demo")
def test_demo_of_the_bundled_agent(tmp_path: Path, capsys: Capture) -> None:
    """Red, too, where the other process does not load with this one's options."""
    options = ("--device", "cpu", "--weights", "int8", "--seed", 3)
    story = document(capsys, "demo", *options, "--out", tmp_path, "--json")
    assert len(story["checks"]) >= 13
    assert all(story["checks"].values())
    assert [branch["name"] for branch in story["branches"]] == ["recall", "walk", "errand"]
    assert len(story["answers"]) == 6
    assert [asked for *_, asked in story["scores"].values()] == [2, 2, 2]
    assert story["process"]["answer"] == story["process"]["answer_here"]
    assert all(Path(f).is_file() for f in story["files"])
    roll_back = next(s for s in story["steps"] if s["what"] == "roll back the failed call")
    assert roll_back["moved_bytes"] < story["capsule_bytes"]  # the fixed band, and no rows
    assert story["mishap"]["dropped_tokens"] > 0


@pytest.mark.usefixtures("short_demo")
def test_demo_of_the_bundled_agent_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It tells the truth beside each answer; one wrong digest is a failure."""
    monkeypatch.setattr(acts, "state_of", wrong_once())
    assert cli.main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "FAILED branch recall" in text
    for words in (
        "the truth",
        "KV only",
        "2 right",
        "TTFT warm",
        "same as here: yes",
    ):
        assert words in text


def test_doctor_finds_the_compiler(capsys: Capture) -> None:
    found = {f["what"]: f for f in document(capsys, "doctor", "--json")}
    assert found["C compiler"]["is_fine"] is True
    assert found["cpu device"]["is_fine"] is True
    assert found["cuda device"]["finding"]


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return stand_in.fileno()

    with (tmp_path / "stand-in").open("w") as stand_in:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert cli.main(["plan", "--shape", "tiny", "--json"]) == 141


def test_the_demo_has_a_document_of_its_own() -> None:
    """Red where an install, or a clone, does not bring the text that the demo reads."""
    name, text = read_document(None)
    assert "flashrt" in name and "Apache License" in text
