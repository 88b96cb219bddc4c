"""llama.cpp beside flashrt: a double of its Python package takes its place."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashrt.base.errors import FlashrtError
from flashrt.commands.bench import peer_load
from flashrt.commands.bench.peer import LlamaCpp, peer_of, turn_of
from flashrt.weights.bundled import bundled_checkpoint

DOUBLE = """
import ctypes, sys, time
__version__ = "0.0.1"
class Llama:
    def __init__(self, model_path, **options):
        if "broken" in model_path:
            sys.exit("cannot read the model")
        sys.stderr.write("x" * 200_000)  # more than a pipe holds
        self.ctx, self.seen, self.saved = self, 0, None
    def reset(self): self.seen = 0
    def eval(self, tokens): self.seen += len(tokens); time.sleep(0.002)
    def n_vocab(self): return 4
    def save_state(self): return self.seen
    def load_state(self, state): self.seen = state
def llama_get_logits_ith(ctx, i):
    return ctypes.cast((ctypes.c_float * 4)(0, 1, 0, 0), ctypes.POINTER(ctypes.c_float))
"""


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "llama_cpp.py").write_text(DOUBLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_figures_are_by_length(double: Path) -> None:
    """Red when a figure is of another length, or the peer's words stop it."""
    peer = peer_of(double / "m.gguf", 256, 1)
    assert isinstance(peer, LlamaCpp)
    prompts = [np.arange(n, dtype=np.int32) for n in (8, 64)]
    for prompt in (*prompts, *prompts):
        peer.measure(prompt, turn_of(prompt, 4))
    found = peer.close()
    assert "0.0.1" in found["name"] and found["load_s"] >= 0
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_warm_s"):
        assert set(found[key]) == {8, 64} and all(v > 0 for v in found[key].values())
    assert found["prefill_tokens_per_s"][64] > found["prefill_tokens_per_s"][8]


def test_loading_is_measured_in_processes_of_their_own(double: Path) -> None:
    """Red when one side is measured in this process, whose memory is another's too."""
    found = peer_load.load_figures(bundled_checkpoint(), 256, 1)
    assert list(found) == ["flashrt", "llama.cpp"]
    for figures in found.values():
        assert 0 < figures["load_s"] < 60 and 8 << 20 < figures["peak_bytes"] < 4 << 30


def test_a_load_that_fails_leaves_the_other_figures(double: Path) -> None:
    peer = peer_of(double / "m.gguf", 256, 1)
    assert peer is not None
    prompt = np.arange(8, dtype=np.int32)
    peer.measure(prompt, turn_of(prompt, 4))
    found = peer.close()
    assert "flashrt does not load" in found["load"]["problem"] and found["ttft_warm_s"][8] > 0


def test_one_that_does_not_come_up_says_why(double: Path) -> None:
    with pytest.raises(FlashrtError, match="cannot read the model"):
        peer_of(double / "broken.gguf", 256, 1)


def test_no_package_or_no_gguf_is_no_peer(double: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer_of(double, 256, 1) is None
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(double)])
    importlib.invalidate_caches()
    if importlib.util.find_spec("llama_cpp") is None:
        assert peer_of(double / "m.gguf", 256, 1) is None


def test_the_peak_is_that_of_the_program_alone() -> None:
    """Red: Linux counts what a process held before it became another program: its parent's."""
    held = np.ones(300 << 20, np.uint8)
    code = "from flashrt.commands.bench.peer_load import peak_nbytes; print(peak_nbytes())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(said.stdout) < held.nbytes
