"""The bench of servers measures what it says. No assertion here depends on how fast anything is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashrt import cli
from flashrt.commands.bench import clients, serve
from flashrt.commands.bench.clients import conversation, run_clients
from flashrt.commands.bench.servers import Server, closing, llama_server, resident_nbytes
from flashrt.weights.bundled import bundled_checkpoint

# A double of llama.cpp's server: a first request is turned away, the second ends in a fault, the
# third breaks off; then each gives four tokens in two texts, and once the connection is closed.
# `--version` is all else it knows.
DOUBLE = f"""#!{sys.executable}
import http.server, json, sys, threading
if "--version" in sys.argv:
    print("version: 77 (abc)", file=sys.stderr)
    sys.exit()
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "broken" in given["-m"]:
    sys.exit("cannot read " + given["-m"])
assert int(given["-c"]) == 1024 * int(given["-np"]) and given["-t"].isdigit()
count, counting = 0, threading.Lock()

def event(**what):
    return b"data: " + json.dumps(what).encode() + b"\\n\\n"

def text(said):
    return event(choices=[{{"delta": {{"content": said}}}}])

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def do_GET(self):
        self.answer(200, b"{{}}")

    def do_POST(self):
        global count
        with counting:  # clients come at once
            count += 1
            number = count
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["stream"] and body["messages"][0]["role"] == "system"
        usage = {{"completion_tokens": 4, "prompt_tokens": 10,
                  "prompt_tokens_details": {{"cached_tokens": len(body["messages"])}}}}
        whole = (text("a ") + b": as a comment\\n\\n" + text("b") + event(choices=[], usage=usage)
                 + b"data: [DONE]\\n\\n")
        if number == 1:
            self.answer(429, b"{{}}", ("retry-after", "0"))
        elif number == 2:
            self.answer(200, text("a") + event(error={{"message": "no"}}))
        else:
            self.answer(200, text("a") if number == 3 else whole)
            self.close_connection = number == 5

    def answer(self, status, body, *headers):
        self.send_response(status)
        for name, value in (("content-length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""


HOST_NBYTES = 32 << 20


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_RETRY_S", 0.0)
    monkeypatch.setattr(serve, "WARM_UP_S", 0.0)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "llama-server"
    path.write_text(DOUBLE)
    path.chmod(0o755)
    return path


@pytest.fixture
def double(program: Path, tmp_path: Path) -> Iterator[Server]:
    server = llama_server(program, tmp_path / "m.gguf", 2)
    with closing([server]):
        yield server


def test_what_a_client_counts(double: Server) -> None:
    """Red when a request that failed counts as served, a kept connection that was closed as failed,
    when tokens are counted as texts, or the turns of a conversation are taken for one another.
    """
    assert double.name == "llama.cpp's server, 77 (abc)"
    load = run_clients(double.url, 1, 1.0)
    assert load.errors == {"429": 1, "within a stream": 1, "IncompleteRead": 1}
    assert len(load.turns) >= 5
    for i, turn in enumerate(load.turns):
        assert turn.is_first == (i % clients.TURNS == 0)
        assert (turn.tokens, turn.prompt_tokens, len(turn.events)) == (4, 10, 2)
        assert turn.cached_tokens == 2 + 2 * (i % clients.TURNS), "it sends the whole conversation"
        assert turn.tokens_before(turn.events[0]) == 2
    n_before = sum(turn.tokens_before(load.ended) for turn in load.turns)
    assert load.tokens_per_s == pytest.approx(n_before)
    assert len(load.first_token_s(True)) + len(load.first_token_s(False)) == len(load.turns)
    assert len(load.inter_token_s()) == len(load.turns)


def test_prompts_are_those_of_the_client_and_its_turn() -> None:
    """Red when servers are asked other things, or a conversation begins as another one did."""
    assert conversation(1, 0) == conversation(1, 0)
    systems = {conversation(client, count)[0] for client in range(9) for count in range(9)}
    assert len(systems) == 81


def test_servers_stand_beside_each_other(
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Red when rows of two servers are mixed, or an error of the peer's fails the run."""
    model, asked = tmp_path / "m.gguf", serve.flashrt_server
    model.write_bytes(b"0" * 100)
    monkeypatch.setattr(clients, "MOST_TOKENS", 4)
    monkeypatch.setattr(
        serve, "flashrt_server", lambda _, *rest: asked(bundled_checkpoint(), *rest)
    )
    path = tmp_path / "serve.json"
    arguments = ["--serve", "--clients", "2", "--seconds", "4", "--repeats", "1", "--device", "cpu"]
    arguments += ["--checkpoint", str(model), "--llama-server", str(program)]
    assert cli.main(["bench", *arguments, "--json", str(path)]) == 0
    document, printed = json.loads(path.read_text()), capsys.readouterr().out
    ours, theirs = document["rows"]
    assert document["peer"] == theirs["server"] == "llama.cpp's server, 77 (abc)"
    assert ours["server"] == "flashrt" and document["weights_bytes"] == 100
    assert set(theirs["errors"]) == {"429", "within a stream", "IncompleteRead"}
    assert not ours["errors"] and ours["requests"] >= 2 and theirs["requests"]
    assert "1 x 429" in printed
    assert "Ratios" in printed and "Memory of flashrt" in printed


def test_many_clients(capsys: pytest.CaptureFixture[str]) -> None:
    """Red when load alone makes an error, later turns begin cold, or memory is not given back."""
    arguments = ["--serve", "--clients", "64", "--seconds", "5", "--repeats", "1", "--json", "-"]
    assert cli.main(["bench", *arguments, "--host-bytes", str(HOST_NBYTES)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["requests"] >= 64 and set(row["errors"]) <= {"429"}
    grown = row["memory_end_bytes"] - row["memory_settled_bytes"]
    assert grown < 1.5 * HOST_NBYTES, "what it keeps is bounded"
    assert row["cached_fraction"] is None or row["cached_fraction"] > 0.5


def test_an_error_of_ours_fails_the_run(
    double: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red when the command ends well though clients saw errors."""
    monkeypatch.setattr(double, "get", lambda _: {"device": "cpu", "fingerprint": "f"})
    monkeypatch.setattr(serve, "flashrt_server", lambda *_: double)
    arguments = ["--serve", "--clients", "1", "--seconds", "0.5", "--repeats", "1"]
    assert cli.main(["bench", *arguments, "--json", "-"]) == 1
    assert "within a stream" in capsys.readouterr().out


def test_what_cannot_be_measured_is_said(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red when a bench begins that cannot end, or a reason is lost."""
    assert cli.main(["bench", "--serve", "--llama-server", str(program)]) == 2
    assert "GGUF" in capsys.readouterr().err
    assert cli.main(["bench", "--serve", "--plot", "x.png"]) == 2
    for model, why in (("broken.gguf", "cannot read"), ("m.gguf", "does not run")):
        with pytest.raises(serve.FlashrtError, match=why):
            llama_server(program if "broken" in model else tmp_path, tmp_path / model, 1)
    assert resident_nbytes(1 << 30) == 0
