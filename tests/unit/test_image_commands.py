"""Images on the command line: `run`, `chat` and `serve`, and when a tower is loaded by itself."""

from __future__ import annotations

import base64
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import flashrt
from flashrt import cli
from flashrt.base.errors import CheckpointWarning
from flashrt.session.chat import open_chat
from tests.seeing import FILE, GOLDEN, write
from tests.serve.commands import served

WIDE = GOLDEN / "wide.png"
ON = ("--device", "cpu", "--max-positions", "512")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("commands") / "seeing")


def image(path: Path) -> dict[str, Any]:
    return {"type": "image", "image": path}


def test_run_and_chat_show_images(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the library replies. Fault: an image is lost, comes with the wrong message, twice, or is
    not in what /save writes.
    """
    with flashrt.load(folder, "cpu", max_positions=512, images=True) as engine:
        with open_chat(engine) as chat:
            question = [image(FILE), image(WIDE), {"type": "text", "text": "what?"}]
            chat.add("user", question)
            wanted = chat.reply(5, temperature=0)
        options = ("--image", str(FILE), "--image", str(WIDE), "--max-tokens", "5")
        assert cli.main(["run", str(folder), *options, *ON, "what?"]) == 0
        assert capfd.readouterr().out == wanted + "\n"
        with open_chat(engine) as chat:
            expected = []
            for content in (
                [image(WIDE), {"type": "text", "text": "a"}],
                "b",
                [image(FILE), image(FILE), {"type": "text", "text": "c"}],
            ):
                chat.add("user", content)
                expected.append(chat.reply(3, temperature=0))
    saved, shown = tmp_path / "talk", f"/image {FILE}"
    lines = ("a", "b", shown, shown, "c", "/tree", f"/save {saved}")
    done = subprocess.run(
        [sys.executable, "-m", "flashrt", "chat", str(folder), "--image", str(WIDE), *ON,
         "--max-tokens", "3"],
        input="\n".join(lines).encode(), capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("\n".join(expected) + "\n")
    assert "[image] [image] c" in done.stdout.decode()
    told = json.loads(Path(f"{saved}.json").read_text())
    url = told[0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == WIDE.read_bytes()


def test_what_cannot_be_shown(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--image", "absent.png", "x"], "absent.png cannot be read"),
        (["--image", str(folder / "config.json"), "x"], "cannot be read as an image"),
        (["--image", str(FILE), "--tokens", "1"], "leave out --raw"),
        (["--image", str(FILE), "--raw", "x"], "leave out --raw"),
    ):
        assert cli.main(["run", str(folder), *ON, *arguments]) == 2
        assert words in capfd.readouterr().err
    assert cli.main(["run", "--image", str(FILE), *ON, str(GOLDEN.parents[1] / "tiny"), "x"]) == 2
    assert "sees no images" in capfd.readouterr().err


def test_a_server_sees_where_the_checkpoint_can(folder: Path) -> None:
    """Fault: a user has to know an option, or has no way to leave the tower out."""
    url = f"data:image/png;base64,{base64.b64encode(FILE.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    for options, status in (((), 200), (("--no-images",), 400)):
        with served(str(folder), *ON, "--lanes", "1", *options) as (_, address):
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == status, answer.text


def test_a_tower_that_cannot_be_run_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a note; where it was asked for it is an error. Fault: the text cannot be had either."""

    def load(path: Path, **options: Any) -> bool:
        with flashrt.load(path, "cpu", max_positions=64, images=None, **options) as engine:
            return engine.sight is not None

    assert load(folder)
    broken = write(tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.warns(CheckpointWarning, match=r"(?s)left out: .*hidden_act"):
        assert not load(broken)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "PIL" else found(name)
    )
    with pytest.warns(CheckpointWarning, match="need Pillow"):
        assert not load(folder)
    assert not load(GOLDEN.parents[1] / "tiny")
