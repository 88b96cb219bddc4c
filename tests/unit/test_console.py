"""Nothing that others wrote is markup or a command to a terminal, wherever it is shown.

Each test plants names that rich would take for markup ("[/INST]" closes a tag that was never
opened: a MarkupError; "[bold]" vanishes) and escapes that a terminal would obey.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
from pathlib import Path

import pytest

import flashrt
from flashrt import cli
from flashrt.backends.cuda.probe import CudaStatus
from flashrt.commands import console, doctor
from flashrt.store.store import Store

PACKAGE = Path(flashrt.__file__).parent
PLANTED = "[/INST] [bold] :x: \x1b[31m\r\u202e"
SHOWN = r"[/INST] [bold] :x: \x1b[31m\r\u202e"
Capture = pytest.CaptureFixture[str]


def of(capsys: Capture, *arguments: object) -> str:
    """What a command prints; no character of it steers a terminal."""
    assert cli.main([str(a) for a in arguments]) == 0
    text = capsys.readouterr().out
    assert not set("\x1b\r\u202e") & set(text), text
    return text


def test_text_is_shown_as_it_is(capsys: Capture) -> None:
    """Red when strings reach rich as markup, or control characters reach the terminal."""
    screen = console.screen()
    screen.print(PLANTED, console.styled(PLANTED, "bold"), style="dim")
    screen.print(console.table(PLANTED, (f">{PLANTED}",), [[PLANTED]]))
    tree = console.Tree(PLANTED)
    tree.add(PLANTED).add(console.styled(PLANTED, "green"))
    screen.print(tree)
    console.complain(PLANTED)
    captured = capsys.readouterr()
    assert captured.out.count(SHOWN) == 2 + 3 + 3
    assert captured.err == f"flashrt: {SHOWN}\n"


def test_a_progress_bar_shows_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when `what` is a bar's description as markup."""
    seen = io.StringIO()
    monkeypatch.setattr("sys.stderr", seen)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with console.progress_bars() as progress:
        progress(PLANTED, 1, 2)
    assert "[/INST] [bold] :x: " in seen.getvalue()
    assert "\\x1b[31m" in seen.getvalue() and "\u202e" not in seen.getvalue()


def test_json_holds_no_character_that_steers(capsys: Capture) -> None:
    """Red with ensure_ascii=False alone: json leaves C1 controls and bidirectional marks."""
    value = f"{PLANTED}\x9b31m é"
    console.print_json({"name": value})
    text = capsys.readouterr().out
    assert json.loads(text) == {"name": value}
    assert "é" in text and not set("\x9b\x1b\r\u202e") & set(text)


def test_a_capsule_of_any_name_is_inspected(
    session: flashrt.Session, tmp_path: Path, capsys: Capture
) -> None:
    """Red when `inspect` hands names and paths to rich as markup: a MarkupError."""
    session.prefill(range(5))
    path = tmp_path / "[bold] [INST].capsule"
    session.snapshot(PLANTED).save(path)
    text = of(capsys, "inspect", path)
    assert SHOWN in text
    assert "[bold] [INST].capsule" in text.replace("\n", "")


def test_a_store_shows_any_name(session: flashrt.Session, tmp_path: Path, capsys: Capture) -> None:
    """Red when a name, or the store's own path, is markup in `ls`, `tree`, `show` or `verify`."""
    session.prefill(range(5))
    folder = tmp_path / "[bold]"
    Store(folder).save(session.snapshot(PLANTED))
    assert SHOWN in of(capsys, "store", "ls", folder)
    assert SHOWN in of(capsys, "store", "tree", folder)
    assert SHOWN in of(capsys, "store", "show", folder, PLANTED)
    assert "[bold]" in of(capsys, "store", "verify", folder)


def test_doctor_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Red when findings are markup: "pip install 'flashrt'" where [cuda] is meant."""
    reason = "cuda-bindings is missing: pip install 'flashrt[cuda]'"
    monkeypatch.setattr(doctor, "probe", lambda: CudaStatus(False, reason))
    assert "pip install 'flashrt[cuda]'" in " ".join(of(capsys, "doctor").split())


def test_doctor_names_what_fits_the_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    """A Jetson with packages for a newer driver. Red when memory, versions or power mode are left
    out, or the extra is not that of the driver.
    """
    tool = tmp_path / "nvpmodel"
    tool.write_text("#!/bin/sh\n[ $1 = -q ] && echo 'NV Power Mode: MAXN' && echo 0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    status = CudaStatus(
        False, "too new", "Orin", "sm_87", "12.6", "13.0", 8 << 30, True, "13.1.0", "cuda12", True
    )
    monkeypatch.setattr(doctor, "probe", lambda: status)
    text = " ".join(of(capsys, "doctor").split())
    for wanted in (
        "cuda-bindings 13.1.0, which needs a driver for CUDA 13", "flashrt[cuda12] fits it",
        "one memory for both", "compute capability 8.7", "MAXN (nvpmodel)",
    ):  # fmt: skip
        assert wanted in text


def test_an_error_shows_any_path(capsys: Capture) -> None:
    """Red when an error's text is written to the terminal as it is."""
    assert cli.main(["inspect", f"/nowhere/{PLANTED}"]) == 2
    assert SHOWN in (text := capsys.readouterr().err)
    assert "\x1b" not in text and text.count("\n") == 1


# -- one door -------------------------------------------------------------------------------------

MARKUP = re.compile(r"\[/\]|\[/?(bold|dim|italic|red|green|yellow|cyan|magenta)\b")


def test_no_other_module_knows_rich_or_its_markup() -> None:
    """Red when a module imports rich beside the door, or writes a style into a string."""
    door = PACKAGE / "commands/console.py"
    for path in {*PACKAGE.rglob("*.py")} - {door}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not [a for a in node.names if a.name.split(".")[0] == "rich"], path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "rich", path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not MARKUP.search(node.value), f"{path}:{node.lineno}: {node.value!r}"
