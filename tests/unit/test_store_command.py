"""`flashrt store`: what it says of a store, as text and as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import flashrt
from flashrt import cli
from flashrt.commands import store as command
from flashrt.store.store import Store

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(session: flashrt.Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    store = Store(tmp_path)
    session.prefill(range(100))
    root = session.snapshot("root [bold]")
    store.save(root)
    session.prefill([1, 2])
    store.save(session.snapshot("leaf"))
    session.restore(root)
    session.prefill([3])
    store.save(session.snapshot())
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())

    def run(action: str, *words: str) -> tuple[int, str]:
        options = parser.parse_args(["store", action, str(tmp_path), *words])
        return options.command(options), capsys.readouterr().out

    return run


def test_lists(run: Run) -> None:
    status, text = run("ls")
    assert status == 0
    for words in ("root [bold]", "leaf", "102", "3 capsules in"):
        assert words in text
    _, document = run("ls", "--json")
    rows = json.loads(document)
    assert [r["position"] for r in rows] == [100, 101, 102]
    assert sum(r["own_bytes"] for r in rows) < sum(r["bytes"] for r in rows)


def test_tree(run: Run) -> None:
    _, text = run("tree")
    lines = text.splitlines()
    assert "root [bold]" in lines[1] and "(+100)" in lines[1]
    assert lines[2].startswith("    ├──") and "(+1)" in lines[2]
    assert "leaf" in lines[3] and "(+2)" in lines[3]
    run("rm", "root [bold]")
    _, text = run("tree")
    assert "leaf" in text and "root" not in text.split("\n", 1)[1]


def test_a_store_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("ls", "tree", "verify", "gc"):
        assert cli.main(["store", action, str(tmp_path / "absent")]) == cli.REFUSED
        assert "there is no store at" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()
    assert cli.main(["store"]) == cli.OK
    assert "tree" in capsys.readouterr().out


def test_show(run: Run, session: flashrt.Session) -> None:
    status, text = run("show", "leaf")
    assert status == 0
    assert "rows 100 to 102" in text and "rows 0 to 100" in text
    _, document = run("show", "leaf", "--json")
    found = json.loads(document)
    assert (found["position"], found["names"]) == (102, ["leaf"])
    with pytest.raises(flashrt.CapsuleError, match="no capsule is called 'absent'"):
        run("show", "absent")


def test_verify_and_sweep(run: Run, tmp_path: Path) -> None:
    assert run("verify")[0] == 0
    status, text = run("rm", "leaf", "--json")
    assert (status, len(json.loads(text))) == (0, 1)
    assert json.loads(run("verify", "--json")[1])["unused_nbytes"] > 0
    assert json.loads(run("gc", "--json")[1])["objects"] == 3
    assert "removed 0 objects" in run("gc")[1]
    victim = next(p for p in sorted(tmp_path.glob("objects/*/*")))
    victim.write_bytes(victim.read_bytes()[:-1])
    status, text = run("verify")
    assert (status, "1 problems" in text) == (1, True)
    assert json.loads(run("verify", "--json")[1])["problems"]
