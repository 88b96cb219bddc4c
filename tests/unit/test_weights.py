"""Checkpoints and weight rules: what is read, how it is transformed, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError, PlanError
from flashrt.core.region import DType, Region, Role
from flashrt.weights import loader
from flashrt.weights.checkpoint import open_checkpoint
from flashrt.weights.loader import LoadReport, check_sources, load
from flashrt.weights.rules import (
    Source,
    Squares,
    Transform,
    WeightRule,
    as_stored,
    constant,
    depthwise_conv,
    matrix,
    vector,
)

Array = NDArray[np.generic]
BF16 = np.dtype(ml_dtypes.bfloat16)
_CODE = {BF16: "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
_CODE[np.dtype(np.int8)] = "I8"


def write_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    """By hand: the format is 8 bytes of length, JSON, data."""
    header, offset = {}, 0
    for name, array in tensors.items():
        stop = offset + array.nbytes
        header[name] = {
            "dtype": _CODE[array.dtype], "shape": array.shape, "data_offsets": [offset, stop]
        }  # fmt: skip
        offset = stop
    text = json.dumps(header).encode()
    data = b"".join(a.tobytes() for a in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensors(dtype: np.dtype[np.generic] = BF16) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    shapes = {"model.a": (70, 5), "model.b": (3, 5), "model.norm": (6,), "model.conv": (4, 1, 3)}
    return {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}


RULES = (
    matrix("ab", 5, ("model.a", 70), ("model.b", 3)),
    vector("norm", "model.norm", 6, Transform.ONE_PLUS),
    depthwise_conv("conv", "model.conv", 4, 3),
    constant("freq", (1.0, 0.5)),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    write_safetensors(tmp_path / "model.safetensors", tensors())
    return tmp_path


class Collected:
    """A sink: regions by name, and the first rows of the chunks."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self.first_rows: dict[str, list[int]] = {}

    def __call__(self, region: Region, first_row: int, rows: Array) -> None:
        array = self.arrays.setdefault(region.name, np.zeros(region.shape, rows.dtype))
        array[first_row : first_row + len(rows)] = rows
        self.first_rows.setdefault(region.name, []).append(first_row)


def loaded(folder: Path) -> tuple[dict[str, Array], LoadReport]:
    sink = Collected()
    report = load(RULES, open_checkpoint(folder), sink)
    return sink.arrays, report


# ---- what is read ----


def test_bits_and_transforms(folder: Path) -> None:
    arrays, report = loaded(folder)
    given = tensors()
    stacked = np.concatenate([given["model.a"], given["model.b"]]).view(np.uint16)
    assert arrays["ab"].dtype == np.uint16 and (arrays["ab"] == stacked).all()
    assert (arrays["norm"] == np.float32(1) + given["model.norm"].astype(np.float32)).all()
    assert (arrays["conv"] == given["model.conv"].astype(np.float32)[:, 0].T).all()
    assert arrays["conv"].dtype == arrays["freq"].dtype == np.float32
    assert (arrays["freq"] == [1.0, 0.5]).all()
    assert report.source_nbytes == sum(a.nbytes for a in given.values())


def test_chunks_begin_at_multiples_of_32_rows_across_sources(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, report = loaded(folder)
    monkeypatch.setattr(loader, "CHUNK_NBYTES", 1)
    sink, calls = Collected(), []
    again = load(RULES, open_checkpoint(folder), sink, lambda *call: calls.append(call))
    assert sink.first_rows == {"ab": [0, 32, 64], "norm": [0], "conv": [0], "freq": [0]}
    assert all((sink.arrays[name] == array).all() for name, array in whole.items())
    assert again == report  # the digest does not depend on chunks
    assert calls[-1] == ("weights", report.source_nbytes, report.source_nbytes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_wider_matrices_are_kept_as_they_are(folder: Path, dtype: type) -> None:
    """Red when float16 or float32 becomes bfloat16 on its way."""
    given = tensors(np.dtype(dtype))
    write_safetensors(folder / "model.safetensors", given)
    checkpoint, sink = open_checkpoint(folder), Collected()
    rules = as_stored(RULES, checkpoint.stored)
    load(rules, checkpoint, sink)
    assert rules[0].region.dtype == np.dtype(dtype).name
    assert sink.arrays["ab"].dtype == dtype
    assert (sink.arrays["ab"] == np.concatenate([given["model.a"], given["model.b"]])).all()


def test_stacked_sources_of_several_formats_are_parts(folder: Path) -> None:
    """Red when one source's format is taken for all of them, or parts change their order."""
    given = tensors() | {"model.c": tensors()["model.b"], "model.d": tensors()["model.b"]}
    given["model.b"] = given["model.b"].astype(np.float32)
    write_safetensors(folder / "model.safetensors", given)
    sources = [("model.a", 70), ("model.b", 3), ("model.c", 3), ("model.d", 3)]
    checkpoint, sink = open_checkpoint(folder), Collected()
    rules = as_stored((matrix("m", 5, *sources), *RULES[1:]), checkpoint.stored)
    load(rules, checkpoint, sink)
    shapes = [(r.region.name, r.region.dtype, r.region.shape) for r in rules[:3]]
    assert shapes == [
        ("m.0", DType.BF16, (70, 5)), ("m.1", DType.F32, (3, 5)), ("m.2", DType.BF16, (6, 5)),
    ]  # fmt: skip
    assert (sink.arrays["m.1"] == given["model.b"]).all()
    assert (sink.arrays["m.2"][3:] == given["model.d"].view(np.uint16)).all()


def test_digest_sees_every_byte_and_no_file_layout(folder: Path) -> None:
    _, report = loaded(folder)
    path = folder / "model.safetensors"
    write_safetensors(path, dict(reversed(tensors().items())))
    assert loaded(folder)[1].digest == report.digest
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert loaded(folder)[1].digest != report.digest


def test_both_prefixes_and_vision_tower(folder: Path) -> None:
    names = {n.replace("model.", "model.language_model."): a for n, a in tensors().items()}
    names["model.visual.x"] = np.zeros(3, np.float32)
    write_safetensors(folder / "model.safetensors", names)
    arrays, _ = loaded(folder)
    assert (arrays["ab"][:70] == tensors()["model.a"].view(np.uint16)).all()


def shard(folder: Path) -> None:
    given = tensors()
    first, second = dict(list(given.items())[:2]), dict(list(given.items())[2:])
    write_safetensors(folder / "one.safetensors", first)
    write_safetensors(folder / "two.safetensors", second)
    placed = dict.fromkeys(first, "one.safetensors") | dict.fromkeys(second, "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "model.safetensors").unlink()


def test_shards_equal_one_file(folder: Path) -> None:
    whole, report = loaded(folder)
    shard(folder)
    arrays, again = loaded(folder)
    assert again == report and all((arrays[n] == a).all() for n, a in whole.items())


def test_optional_part_is_ignored_as_a_whole_or_checked(folder: Path) -> None:
    given = tensors() | {"mtp.a": np.zeros(2, BF16), "mtp.b": np.zeros(2, BF16)}
    write_safetensors(folder / "model.safetensors", given)
    checkpoint = open_checkpoint(folder)
    check_sources(RULES, checkpoint)
    with pytest.raises(CheckpointError, match=r"unused mtp\.b"):
        check_sources((*RULES, vector("draft", "mtp.a", 2)), checkpoint)


@pytest.mark.parametrize(
    ("generation", "config", "stop"),
    [({"eos_token_id": [3, 4]}, {}, (3, 4)), ({}, {"eos_token_id": 5}, (5,)), ({}, {}, ()),
     ({}, {"text_config": {"eos_token_id": 6}}, (6,))],
)  # fmt: skip
def test_stop_tokens(
    folder: Path, generation: dict[str, object], config: dict[str, object], stop: tuple[int, ...]
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).stop_tokens == stop


# ---- what is refused ----


def test_one_error_names_every_misfit_before_anything_is_loaded(folder: Path) -> None:
    given = tensors()
    del given["model.norm"]
    given["model.a"] = np.zeros((70, 6), BF16)
    given["model.conv"] = given["model.conv"].astype(np.int8)
    given["model.extra"] = np.zeros(3, BF16)
    write_safetensors(folder / "model.safetensors", given)
    sink = Collected()
    with pytest.raises(CheckpointError) as caught:
        load(RULES, open_checkpoint(folder), sink)
    for words in (
        "missing model.norm [6]",
        "model.a is [70, 6], expected [70, 5]",
        "model.conv is I8, expected BF16, F16 or F32",
        "unused model.extra",
    ):
        assert words in str(caught.value)
    assert not sink.arrays


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        open_checkpoint(folder)


def test_every_header_byte_flipped_is_refused_or_harmless(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    refused = 0
    header_nbytes = int.from_bytes(raw[:8], "little")
    for i in range(8 + header_nbytes):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 0x55]) + raw[i + 1 :])
        try:
            check_sources(RULES, open_checkpoint(folder))
        except CheckpointError:
            refused += 1
    assert refused >= header_nbytes - 10  # white space may change without a meaning


def test_file_that_shrinks_after_opening(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"ends inside model\.conv"):
        load(RULES, checkpoint, Collected())


def test_missing_things(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin are PyTorch files"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"model.a": "../one.safetensors"}}, "a plain file name"),
        ({"weight_map": {"model.a": "gone.safetensors"}}, "shards missing: gone"),
        ({"weight_map": {"model.zzz": "one.safetensors"}}, "promises model.zzz"),
    ],
)
def test_bad_index(folder: Path, index: dict[str, object], words: str) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


def test_names_that_occur_twice(folder: Path) -> None:
    shard(folder)
    shutil.copy(folder / "one.safetensors", folder / "two.safetensors")
    placed = {"model.a": "one.safetensors", "model.b": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(CheckpointError, match=r"already in one\.safetensors"):
        open_checkpoint(folder)
    given = tensors() | {"model.language_model.a": np.zeros((70, 5), BF16)}
    write_safetensors(folder / "model.safetensors", given)
    with pytest.raises(CheckpointError, match="keep one"):
        open_checkpoint(folder)


def test_rules_that_cannot_be_filled() -> None:
    good = matrix("m", 5, ("a", 3)).region
    for sources in ((Source("a", (4, 5)),), (Source("a", (3, 4)),), ()):
        with pytest.raises(PlanError, match="weight rule 'm'"):
            WeightRule(good, sources)
    with pytest.raises(PlanError, match="weight rule 'v'"):
        WeightRule(vector("v", "a", 3).region, (Source("a", (4,)),))
    table = Region("p", (16, 5), DType.F32, Role.WEIGHT)
    with pytest.raises(PlanError, match="weight rule 'p'"):
        WeightRule(table, (Source("a", (16, 5), Squares(3, 1)),))


def test_rows_of_a_raster_by_squares(folder: Path) -> None:
    """Fault: rows stay line by line, or squares are taken column by column."""
    given = np.arange(32, dtype=np.float32).reshape(16, 2)
    write_safetensors(folder / "model.safetensors", {"a": given})
    table = Region("p", (16, 2), DType.F32, Role.WEIGHT)
    rule = WeightRule(table, (Source("a", (16, 2), Squares(4, 2)),))
    found: list[Any] = []
    load((rule,), open_checkpoint(folder), lambda _region, _row, rows: found.append(rows))
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert np.array_equal(found[0], given[order])
