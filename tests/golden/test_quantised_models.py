"""Promise: a model whose weights are stored as codes is the model of their values.

Each format is written with the float32 values beside it, by formulas of its own
(tests/quantised_models.py). On the cpu the logits of both are equal to the bit; the CUDA kernels
sum in an order that depends on the format, and are held to the tolerance of float32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import flashrt
from flashrt.core.region import DType
from flashrt.load import Weights
from flashrt.weights.checkpoint import open_checkpoint
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.quantise import TARGETS, quantise
from flashrt.weights.formats.write import quantise_checkpoint
from flashrt.weights.random_checkpoint import write_random_checkpoint
from flashrt.weights.rules import part_name
from tests.families import SETS
from tests.golden.expected import TOLERANCE
from tests.quantised_models import (
    FORMS,
    SHAPE,
    Array,
    Form,
    Kind,
    write_both,
    write_both_ggufs,
    write_file,
)
from tests.unit.test_gguf import converted

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint means activations")
PROMPT = [(7 * i * i + 3 * i) % SHAPE.vocab_size for i in range(45)]
KINDS = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K)
SIMT_FORMS = [f for f in FORMS if f.name in ("fp8", "nvfp4", "gptq", "awq", "mixed")]


def opened(path: Path, device: str = "cpu", weights: Weights | None = None) -> flashrt.Engine:
    return flashrt.load(
        path, device, max_positions=300, kv_dtype="float32", precision="high", weights=weights
    )


def logits(engine: flashrt.Engine) -> tuple[Array, list[int]]:
    """After many rows at once, after few, and after single ones; and what is then generated."""
    seen = []
    with engine.session() as session:
        for start, stop in ((0, 40), (40, 44), (44, 45)):
            session.prefill(PROMPT[start:stop])
            seen.append(session.logits())
        tokens = list(session.generate(4))
        seen.append(session.logits())
    return np.array(seen), tokens


def formats(engine: flashrt.Engine) -> set[tuple[str, str]]:
    regions = [slot.region for slot in engine.arena.weights.slots]
    return {(r.dtype, r.groups.scales) for r in regions if r.groups is not None}


def check(paths: tuple[Path, Path], device: str, wanted: object, tolerance: float) -> None:
    """Codes and their values give the same logits and tokens, and kernels were given the codes."""
    found = []
    for path in paths:
        engine = opened(path, device)
        assert formats(engine) == (wanted if path == paths[0] else set())
        found.append(logits(engine))
        engine.close()
    (got, tokens), (want, expected) = found
    assert 0.5 < want.std() < 10, "logits of another size: the tolerance means little"
    worst = np.abs(got - want).max(axis=1)
    assert (worst <= tolerance).all(), f"off by {worst}"
    assert tokens == expected


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_give_the_logits_of_their_values(form: Form, tmp_path: Path) -> None:
    """Red when a nibble, a scale or a part of a stacked matrix is another's; when a matrix is
    widened at load (the regions are looked at); when a kernel's value is not the format's."""
    check(write_both(tmp_path, form), "cpu", form.regions, 0)


@pytest.mark.slow
@pytest.mark.parametrize("form", SIMT_FORMS, ids=str)
def test_cuda_kernels_give_the_logits_of_the_values(form: Form, tmp_path: Path) -> None:
    """Red when a tile of codes is packed otherwise than its kernel reads it."""
    check(write_both(tmp_path, form), "simt", form.regions, TOLERANCE)


# -- GGUF -----------------------------------------------------------------------------------------

REGIONS = {
    Kind.Q8_0: {(DType.I8, "float16")},
    Kind.Q4_0: {(DType.U4, "float16")},
    Kind.Q4_1: {(DType.U4, "float16_min")},
    Kind.Q4_K: {(DType.U4, "two_level_min"), (DType.I8, "float16")},
}


def gguf_files(folder: Path, kind: Kind) -> tuple[Path, Path]:
    made = write_random_checkpoint(folder / "plain", SHAPE, seed=4, has_draft_head=True)
    config = json.loads((made / "config.json").read_text())
    config["rope_parameters"]["mrope_section"] = [2, 1, 1]
    (made / "config.json").write_text(json.dumps(config))
    keys, tensors = converted(open_checkpoint(made))
    for key in ("general.alignment", "tokenizer.ggml.eot_token_id"):
        del keys[key]
    return write_both_ggufs(folder, kind, keys, tensors)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_gguf_gives_the_logits_of_ggml_s_values(kind: Kind, tmp_path: Path) -> None:
    """Red when a block is read otherwise than ggml does, or heads are put in order without their
    scales; the embedding is quantised too."""
    check(gguf_files(tmp_path, kind), "cpu", REGIONS[kind], 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", (Kind.Q4_1, Kind.Q4_K), ids=lambda kind: kind.name)
def test_cuda_kernels_give_the_logits_of_ggml_s_values(kind: Kind, tmp_path: Path) -> None:
    check(gguf_files(tmp_path, kind), "simt", REGIONS[kind], TOLERANCE)


# -- weights= and flashrt quantize ----------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("models") / "plain", SHAPE, seed=5, is_tied=False
    )


def bytes_of_weights(engine: flashrt.Engine) -> dict[str, bytes]:
    found = {}
    for slot in engine.arena.weights.slots:
        raw = np.empty(slot.storage.nbytes, np.uint8)
        engine.backend.read(engine.arena.weight_memory.address + slot.offset, raw)
        found[slot.region.name] = raw.tobytes()
    return found


def with_int8_tables(plain: Path, folder: Path) -> Path:
    """The same checkpoint, its embedding and head the float32 values of their int8 codes."""
    shutil.copytree(plain, folder)
    tensors = safetensors.numpy.load_file(plain / "model.safetensors")
    target = TARGETS["int8"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        codes = quantise(tensors[name].astype(np.float32), target)
        tensors[name] = dequantise(target.dtype, target.groups, codes)
    write_file(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_weights_at_load_are_those_that_quantize_writes(
    weights: Weights, plain: Path, tmp_path: Path
) -> None:
    """Red when the two choose other matrices, or round a layer's otherwise. Tables differ: a file
    keeps them whole, `weights=` makes them int8."""
    quantise_checkpoint(with_int8_tables(plain, tmp_path / "tables"), tmp_path / "made", weights)
    at_load, written = opened(plain, weights=weights), opened(tmp_path / "made")
    ours, theirs = bytes_of_weights(at_load), bytes_of_weights(written)
    tables = {"embed", "head"}
    assert ours.keys() == theirs.keys() > tables
    assert {name for name in ours if ours[name] != theirs[name]} == tables
    kinds = {s.region.name: s.region.dtype for s in at_load.arena.weights.slots}
    assert {kinds[name] for name in tables} == {DType.I8}
    got, want = logits(at_load), logits(written)
    assert (got[0] == want[0]).all() and got[1] == want[1]
    at_load.close()
    written.close()


def test_stacked_experts_are_quantised_one_by_one(tmp_path: Path) -> None:
    """Red when `quantize` leaves a stack as it is, or a slice of one is another expert's."""
    quantise_checkpoint(SETS / "qwen3-5-moe", tmp_path / "made", "int4")
    at_load, written = opened(SETS / "qwen3-5-moe", weights="int4"), opened(tmp_path / "made")
    ours, theirs = bytes_of_weights(at_load), bytes_of_weights(written)
    assert {name for name in ours if ours[name] != theirs[name]} == {"embed", "head"}
    kinds = {s.region.name: s.region.dtype for s in written.arena.weights.slots}
    experts = {kind for name, kind in kinds.items() if ".experts_" in name}
    assert experts == {DType.U4} and kinds["layers.0.router"] is DType.BF16
    at_load.close()
    written.close()


def test_a_capsule_of_int4_is_foreign_to_bfloat16(plain: Path, tmp_path: Path) -> None:
    """Red when the fingerprint covers the checkpoint's bytes and not what was made of them."""
    first, again, other = (opened(plain, weights=w) for w in ("int4", "int4", None))
    with first.session() as session:
        session.prefill(PROMPT)
        session.snapshot().save(tmp_path / "a.capsule")
    again.load_capsule(tmp_path / "a.capsule")
    with pytest.raises(flashrt.CapsuleError, match="fingerprint"):
        other.load_capsule(tmp_path / "a.capsule")
    for engine in (first, again, other):
        engine.close()


def test_stacked_matrices_of_several_formats_are_parts(tmp_path: Path) -> None:
    """Red when matrices of several formats are brought to one: a part keeps its own."""
    form = next(f for f in FORMS if f.name == "mixed")
    engine = opened(write_both(tmp_path, form)[0])
    kinds = {s.region.name: s.region.dtype for s in engine.arena.weights.slots}
    engine.close()
    for stack, dtypes in (
        ("layers.3.qkv", (DType.E4M3, DType.BF16, DType.E2M1)),
        ("layers.0.in_proj", (DType.E2M1, DType.E4M3, DType.BF16)),
        ("layers.0.gate_up", (DType.E4M3, DType.E2M1)),
    ):
        assert stack not in kinds
        assert tuple(kinds[part_name(stack, i)] for i in range(len(dtypes))) == dtypes
