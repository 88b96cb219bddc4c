"""The bench of lanes measures what it says. No assertion here depends on how fast anything is."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt import cli
from flashrt.base.errors import FlashrtError
from flashrt.commands.bench import lanes
from flashrt.commands.bench.document import BenchOptions
from flashrt.commands.bench.lanes import bench_lanes
from flashrt.commands.bench.peer import LlamaLanes, lanes_peer_of
from flashrt.commands.checkpoints import EngineOptions
from flashrt.view import figure

TINY = Path(__file__).parents[1] / "golden" / "tiny"
OPTIONS = BenchOptions(checkpoint=TINY, lengths=[32, 64], repeats=1, engine=EngineOptions("cpu"))

# A double of the package's low level: each sequence counts its tokens, and what it says next is
# its prompt's last token. It refuses what llama.cpp would: a position out of turn, or too many
# sequences.
DOUBLE = """
import ctypes, sys, types
__version__ = "0.0.1"
def llama_backend_init(): sys.stderr.write("x" * 200_000 + "\\n")  # more than a pipe holds
def llama_model_default_params(): return None
def llama_model_load_from_file(path, params): return None if b"broken" in path else "model"
def llama_context_default_params(): return types.SimpleNamespace()
def llama_init_from_model(model, options):
    options.at = {}
    return options
def llama_model_get_vocab(model): return None
def llama_vocab_n_tokens(vocab): return 8
def llama_batch_init(n, embd, n_seq_max):
    none = [[0] for _ in range(n)]
    return types.SimpleNamespace(token=[0] * n, pos=[0] * n, n_seq_id=[0] * n, seq_id=none,
                                 logits=[0] * n, n_tokens=0)
def llama_get_memory(context): return context
def llama_memory_clear(context, data): context.at = {}
def llama_state_seq_get_size(context, i): return 2
def llama_state_seq_get_data(context, state, size, i):
    state[0], state[1] = divmod(context.at[i], 256)
    return size
def llama_state_seq_set_data(context, state, size, i):
    context.at[i] = 256 * state[0] + state[1]
    return size
def llama_decode(context, batch):
    context.said = []
    for k in range(batch.n_tokens):
        i = batch.seq_id[k][0]
        if batch.pos[k] != context.at.get(i, 0) or i >= context.n_seq_max:
            return -1
        context.at[i] = batch.pos[k] + 1
        if context.at[i] > context.n_ctx // context.n_seq_max:
            return 1
        if batch.logits[k]:
            context.said.append(batch.token[k])
    return 0
def llama_get_logits(context):
    rows = [float(token == j) for token in context.said for j in range(8)]
    return ctypes.cast((ctypes.c_float * len(rows))(*rows), ctypes.POINTER(ctypes.c_float))
"""


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "llama_cpp.py").write_text(DOUBLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DECODED", 4), ("NEWCOMER", 70), ("FORKS", 2), ("FORK_TOKENS", 4)):
        monkeypatch.setattr(lanes, name, value)


@pytest.mark.usefixtures("short")
def test_every_figure_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "lanes.json", tmp_path / "lanes.svg"
    assert bench_lanes(OPTIONS, [3, 2], path, picture) == 0
    document, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert picture.read_text().lstrip().startswith("<?xml")
    assert [row["lanes"] for row in document["rows"]] == [1, 2, 3], "one lane is measured anyhow"
    for row in document["rows"]:
        assert len(row["samples"]["inter_token_s"]) == row["lanes"] * 4, "of every lane"
        assert row["tokens_per_s"] == pytest.approx(row["lanes"] * row["lane_tokens_per_s"])
        assert row["inter_token_p50_s"] <= row["inter_token_p99_s"]
    assert document["rows"][0]["of_one"] == 1
    newcomer, best = document["newcomer"], document["best_of"]
    assert newcomer["lanes"] == 2 and newcomer["piece_tokens"] == 62
    assert (newcomer["pieces"]["steps"], newcomer["blocking"]["steps"]) == (2, 1)
    assert (best["forks"], best["prompt_tokens"], best["tokens"]) == (2, 64, 4)
    assert best["of_one"] > 0 and best["is_exact"] and document["is_exact"]
    assert document["peer"] is None and "llama.cpp" not in printed
    assert "while 2 lanes decode" in printed and "Best of 2" in printed


@pytest.mark.usefixtures("short")
def test_a_lane_that_says_something_else_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red when the bench passes over lanes that disturb each other."""
    real = lanes.together

    def disturbed(*generations: Any) -> Any:
        for index, token in real(*generations):
            yield index, token ^ (len(generations) == 2)

    monkeypatch.setattr(lanes, "together", disturbed)
    assert bench_lanes(OPTIONS, [2], None, None) == 1
    assert "says beside others what it says alone: NO" in capsys.readouterr().out


@pytest.mark.usefixtures("short")
def test_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(TINY), "--lengths", "16", "--repeats", "1", "--device", "cpu"]
    assert cli.main(["bench", "--lanes", "2", *arguments, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prompt_tokens"] == document["best_of"]["prompt_tokens"] == 16
    for wrong in ("0", "2,x", ""):
        with pytest.raises(SystemExit):
            cli.main(["bench", "--lanes", wrong])
    with pytest.raises(SystemExit):
        cli.main(["bench", "--lanes", "2", "--draft"])
    monkeypatch.setattr(figure, "has_matplotlib", lambda: False)
    monkeypatch.setattr(lanes, "checkpoint_of", lambda _: pytest.fail("it measures"))
    assert cli.main(["bench", "--lanes", "2", "--plot", "x.png"]) == 2


@pytest.mark.usefixtures("short")
def test_the_peer_stands_beside_each_count(
    double: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def peer_of(path: Path, positions: int, threads: int, prompts: Any) -> LlamaLanes | None:
        assert path == TINY and positions >= 32 + 4 + 1
        small = [prompt % 8 for prompt in prompts]
        return lanes_peer_of(double / "m.gguf", positions, threads, small)

    monkeypatch.setattr(lanes, "lanes_peer_of", peer_of)
    path, picture = double / "lanes.json", double / "lanes.svg"
    assert bench_lanes(OPTIONS, [1, 2], path, picture) == 0
    document, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert set(document["peer"]["tokens_per_s"]) == {"1", "2"} and picture.exists()
    assert "llama.cpp in all" in printed and "0.0.1" in printed


def test_sequences_decode_from_the_ends_of_their_prompts(double: Path) -> None:
    """Red when a sequence goes on from elsewhere, or figures are of another count."""
    prompts = [np.arange(n, dtype=np.int32) % 8 for n in (600, 7, 30)]  # one over two batches
    peer = lanes_peer_of(double / "m.gguf", 640, 1, prompts)
    assert isinstance(peer, LlamaLanes)
    for count in (3, 1, 3):
        peer.measure(count, 5)
    found = peer.close()
    assert "0.0.1" in found["name"] and found["load_s"] >= 0
    for key in ("tokens_per_s", "inter_token_p50_s"):
        assert set(found[key]) == {1, 3} and all(v > 0 for v in found[key].values())


def test_a_peer_that_fails_says_why(double: Path) -> None:
    prompts = [np.ones(8, np.int32)]
    with pytest.raises(FlashrtError, match=r"cannot read .*broken\.gguf"):
        lanes_peer_of(double / "broken.gguf", 64, 1, prompts)
    peer = lanes_peer_of(double / "m.gguf", 9, 1, prompts)
    assert peer is not None
    with pytest.raises(FlashrtError, match="llama_decode of 1 tokens: 1"):
        peer.measure(1, 5)


def test_no_package_or_no_gguf_is_no_peer(double: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lanes_peer_of(double, 64, 1, []) is None
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(double)])
    importlib.invalidate_caches()
    if importlib.util.find_spec("llama_cpp") is None:
        assert lanes_peer_of(double / "m.gguf", 64, 1, []) is None
