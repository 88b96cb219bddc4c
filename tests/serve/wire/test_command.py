"""`flashrt serve` as a process: it starts, says where, ends by a signal, and remembers."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from flashrt.cli import main
from tests.serve.commands import served
from tests.serve.wire.running import WALK

ASKED: list[Any] = [{"role": "user", "content": WALK}]


def turn(url: str, messages: list[Any], **headers: str) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 20}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_a_server_remembers_after_its_end(tmp_path: Path, end: signal.Signals) -> None:
    """Red when an end, even a sudden one, loses what finished turns left; or is no clean end."""
    store = ("--store", str(tmp_path / "store"))
    with served(*store) as (process, url):
        first = turn(url, ASKED)
        process.send_signal(end)
        code = process.wait(20)
        assert code == (-9 if end is signal.SIGKILL else 0)
    said = first["choices"][0]["message"]
    with served(*store) as (_, url):
        second = turn(url, [*ASKED, said, *ASKED])
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= first["usage"]["prompt_tokens"] > 10


def test_a_key_file_and_a_name(tmp_path: Path) -> None:
    """Red when keys of a file are not asked for, or a prompt stands in the log."""
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret-one\n\nsecret-two\n")
    options = ("--api-key-file", str(keys), "--name", "mine", "--lanes", "1")
    with served(*options) as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"authorization": "Bearer secret-two"}
        models = httpx.get(f"{url}/v1/models", headers=headers).json()
        assert [model["id"] for model in models["data"]] == ["mine"]
        turn(url, ASKED, **headers)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0 and "POST /v1/chat/completions 200" in log
        assert "secret-" not in log and "column" not in log


def test_a_port_that_is_taken_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Red when that ends in a traceback."""
    with served("--lanes", "1") as (_, url):
        port = url.rpartition(":")[2]
        assert main(["serve", "--lanes", "1", "--port", port]) == 2
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err
