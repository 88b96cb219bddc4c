"""/slots as llama.cpp's clients use it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from flashrt.serve.access import Access
from flashrt.serve.wire.openapi import document
from flashrt.store.store import Store
from tests.serve.commands import served
from tests.serve.test_slots import forget_entries
from tests.serve.wire.running import WALK, Running

SAVE, RESTORE, ERASE = (f"/slots/0?action={verb}" for verb in ("save", "restore", "erase"))
BODY: dict[str, Any] = {"prompt": WALK, "max_tokens": 12, "temperature": 0}


def is_told(answer: dict[str, Any]) -> bool:
    """Whether the document describes the answer."""
    schema = {"$ref": "#/components/schemas/SlotDone", **document()}
    jsonschema.validate(answer, schema, jsonschema.Draft202012Validator)
    return set(answer) <= set(document()["components"]["schemas"]["SlotDone"]["properties"])


def test_a_slot_outlives_a_kill(tmp_path: Path) -> None:
    """Fault: a save is told before it is on disk; or a restore makes nothing warm."""
    store = ("--store", str(tmp_path / "store"), "--lanes", "1")
    with served(*store) as (process, url):
        first = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).json()
        saved = httpx.post(url + SAVE, json={"filename": "walk.bin"}, timeout=60).json()
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    n = first["usage"]["total_tokens"]
    assert (saved["id_slot"], saved["filename"], saved["n_saved"]) == (0, "walk.bin", n)
    assert saved["n_written"] > 0 and saved["timings"]["save_ms"] > 0 and is_told(saved)
    forget_entries(Store(tmp_path / "store"))
    more = {**BODY, "prompt": WALK + first["choices"][0]["text"] + " where am i ?"}
    with served(*store) as (_, url):
        restored = httpx.post(url + RESTORE, json={"filename": "walk.bin"}, timeout=60).json()
        assert (restored["n_restored"], restored["n_read"]) == (n, saved["n_written"])
        assert restored["timings"]["restore_ms"] > 0 and is_told(restored)
        assert [slot["n_past"] for slot in httpx.get(f"{url}/slots").json()] == [n]
        warm = httpx.post(f"{url}/v1/completions", json=more, timeout=60).json()
        position = warm["usage"]["total_tokens"]
        assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] == n
        erased = httpx.post(url + ERASE, timeout=60).json()
        assert erased == {"id_slot": 0, "n_erased": position} and is_told(erased)
        again = httpx.post(f"{url}/v1/completions", json={**more, "max_tokens": 1}, timeout=60)
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == n
    with served("--lanes", "1") as (_, url):
        cold = httpx.post(f"{url}/v1/completions", json=more, timeout=60).json()
        assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert cold["choices"] == warm["choices"], "the same bytes as without"


@pytest.mark.parametrize(
    "at, body, status, param",
    [
        (SAVE, {}, 400, "filename"),
        (SAVE, {"filename": 3}, 400, "filename"),
        (SAVE, {"filename": "../x"}, 400, "filename"),
        (RESTORE, {"filename": "none.bin"}, 404, "filename"),
        ("/slots/0", {"filename": "x"}, 400, "action"),
        ("/slots/0?action=copy", {"filename": "x"}, 400, "action"),
        ("/slots/9?action=erase", {}, 400, "id"),
        ("/slots/-1?action=erase", {}, 400, "id"),
        ("/slots/zero?action=erase", {}, 400, "id"),
    ],
)
def test_what_is_wrong_is_named(kept: Running, at: str, body: Any, status: int, param: str) -> None:
    answer = kept.post(at, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    running = Running(store=Store(tmp_path_factory.mktemp("slots") / "store"), lanes=1)
    yield running
    running.end()


def test_without_a_store_the_option_is_named(server: Running) -> None:
    for at in (SAVE, RESTORE):
        answer = server.post(at, {"filename": "x"})
        assert answer.status_code == 501 and "--store" in answer.json()["error"]["message"]
    assert server.post("/slots/3?action=erase").status_code == 200


def test_keys_do_not_see_each_other(started: Callable[..., Running], tmp_path: Path) -> None:
    """Fault: the slots of one key are another's to save, restore or erase."""
    access = Access(keys=("one", "two"))
    running = started(access, store=Store(tmp_path / "store"), lanes=1)
    one, two = ({"x-api-key": key} for key in ("one", "two"))
    name = {"filename": "mine"}
    running.post("/v1/completions", BODY, headers=one)
    empty = running.post(SAVE, name, headers=two)
    assert empty.status_code == 400 and "no state of yours" in empty.text
    assert running.post(ERASE, headers=two).json()["n_erased"] == 0
    assert running.post(SAVE, name, headers=one).status_code == 200
    assert running.post(RESTORE, name, headers=two).status_code == 404
    assert running.post(SAVE, name).status_code == 401
