"""Experts in checkpoints: stacked or one by one, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.models import model_for
from flashrt.models.qwen35.config import parse_config
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.quantise import TARGETS
from flashrt.weights.formats.reordered import RowsGathered
from flashrt.weights.formats.stored import PlainMatrix, StoredMatrix, Tensor
from flashrt.weights.loader import check_sources, load
from flashrt.weights.quantising import QuantisedMatrix
from flashrt.weights.rules import Interleaved
from tests.families import SETS
from tests.quantised_models import float8_rows, write_file

Array = NDArray[Any]
FUSED = SETS / "qwen3-5-moe"  # as transformers writes it
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
CONFIG: dict[str, Any] = json.loads((FUSED / "config.json").read_text())


def stored(folder: Path) -> dict[str, Array]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def apart(tensors: dict[str, Array]) -> dict[str, Array]:
    """A tensor for each matrix of an expert."""
    found = {}
    for name, tensor in tensors.items():
        before, is_gate_up, _ = name.partition(GATE_UP)
        if is_gate_up:
            for i, (gate, up) in enumerate(np.split(expert, 2) for expert in tensor):
                found[f"{before}mlp.experts.{i}.gate_proj.weight"] = gate
                found[f"{before}mlp.experts.{i}.up_proj.weight"] = up
        elif name.endswith(DOWN):
            before = name.removesuffix(DOWN)
            found |= {f"{before}mlp.experts.{i}.down_proj.weight": d for i, d in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def written(
    folder: Path, change: Callable[[dict[str, Array]], dict[str, Array]], **config: object
) -> Path:
    """The checkpoint with other tensors and fields."""
    folder.mkdir()
    write_file(folder / "model.safetensors", change(stored(FUSED)))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def regions(folder: Path) -> dict[str, bytes]:
    """What every weight region gets."""
    checkpoint = open_checkpoint(folder)
    model = model_for(
        checkpoint.config, max_positions=64, has_draft_head=True, stored=checkpoint.stored
    )
    found: dict[str, bytes] = {}

    def sink(region: Any, first_row: int, rows: Any) -> None:
        found[region.name] = found.get(region.name, b"") + rows.tobytes()

    load(model.weights, checkpoint, sink)
    return found


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        regions(folder)
    return str(caught.value)


def test_stacked_and_single_experts_are_the_same_weights(tmp_path: Path) -> None:
    """Red when a slice begins elsewhere, or halves of an expert change places."""
    single = regions(written(tmp_path / "single", apart))
    assert regions(FUSED) == single
    first = stored(FUSED)["model.layers.0.mlp.experts.gate_up_proj"]
    assert single["layers.0.experts_in"] == first.tobytes()


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    def change(tensors: dict[str, Array]) -> dict[str, Array]:
        single = apart(tensors)
        del single["model.layers.1.mlp.experts.2.up_proj.weight"]
        return single

    assert "missing model.layers.1.mlp.experts.2.up_proj.weight [32, 64]" in refusal(
        written(tmp_path / "c", change)
    )


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (7, "missing model.layers.0.mlp.experts.6.gate_proj"),
        (5, "unused model.layers.0.mlp.experts.down_proj[5]"),
    ],
)
def test_another_number_of_experts_than_the_config_says(n: int, words: str, tmp_path: Path) -> None:
    text = refusal(written(tmp_path / "c", dict, num_experts=n))
    assert words in text and len(text) < 4000


def test_stacked_experts_of_another_size(tmp_path: Path) -> None:
    text = refusal(written(tmp_path / "c", dict, moe_intermediate_size=64))
    assert "gate_up_proj[0][0] is [32, 64], expected [64, 64]" in text


def test_experts_of_several_formats(tmp_path: Path) -> None:
    """A matrix of all experts has one format; which one is odd is said, not the many others."""

    def change(tensors: dict[str, Array]) -> dict[str, Array]:
        single = apart(tensors)
        module = "model.layers.0.mlp.experts.3.down_proj"
        parts, _ = float8_rows(single.pop(f"{module}.weight").astype(np.float32))
        return single | {f"{module}.{part}": array for part, array in parts.items()}

    folder = written(
        tmp_path / "c", change,
        quantization_config={"quant_method": "fbgemm_fp8", "modules_to_not_convert": []},
    )  # fmt: skip
    text = refusal(folder)
    assert "experts.3.down_proj.weight is" in text
    assert text.count("unlike other experts of its layer") == 1


def test_both_kinds_of_an_expert(tmp_path: Path) -> None:
    def change(tensors: dict[str, Array]) -> dict[str, Array]:
        extra = np.zeros((32, 64), ml_dtypes.bfloat16)
        return tensors | {"model.layers.0.mlp.experts.1.up_proj.weight": extra}

    with pytest.raises(CheckpointError, match="keep one"):
        open_checkpoint(written(tmp_path / "c", change))


def test_a_stack_that_is_none_stays_a_stranger(tmp_path: Path) -> None:
    """Shapes that no experts have: refused by name, and no time or memory goes into slices."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for i, shape in enumerate([(6, 65, 64), (6 * 64, 64), (1 << 15, 2, 1)]):

        def change(tensors: dict[str, Array], shape: tuple[int, ...] = shape) -> dict[str, Array]:
            return tensors | {name: np.zeros(shape, ml_dtypes.bfloat16)}

        assert f"unused {name}" in refusal(written(tmp_path / str(i), change))


def test_rows_that_are_stored_by_head() -> None:
    """Two key heads: query, key, two values each; and back."""
    rows = Interleaved(2, (1, 1, 2))
    labels = np.array(["q0", "k0", "v0", "v1", "q1", "k1", "v2", "v3"])
    assert labels[rows.order()].tolist() == ["q0", "q1", "k0", "k1", "v0", "v1", "v2", "v3"]


BAD: list[tuple[dict[str, object], str]] = [
    ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than the 6 experts"),
    ({"moe_intermediate_size": 40}, "moe_intermediate_size 40 is no multiple of 32"),
    ({"hidden_size": 72}, "hidden_size 72 is no multiple of 32"),
    ({"num_experts": 1 << 20}, "num_experts is 1048576, expected 1 to"),
    ({"num_experts": 4096, "num_hidden_layers": 512, "layer_types": None}, "experts in 512 layers"),
    ({"norm_topk_prob": False}, "norm_topk_prob is False"),
    ({"mlp_only_layers": [1]}, "mlp_only_layers is [1]"),
    ({"model_type": "qwen3_next", "mlp_only_layers": "1"}, "expected numbers of layers"),
    ({"model_type": "qwen3_5_text", "intermediate_size": 64}, "num_experts is 6"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_refused_configs(change: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(CONFIG | change)
    assert words in str(caught.value)


def test_sparse_layers_of_qwen3_next() -> None:
    """As transformers places them: the list first, then every step-th layer."""
    fields = json.loads((SETS / "qwen3-next-odd" / "config.json").read_text())
    parsed = parse_config(fields)
    assert sorted(parsed.sparse) == [1] and parsed.intermediate == 70  # of five; 3 is listed
    assert sorted(parse_config(fields | {"mlp_only_layers": []}).sparse) == [1, 3]
    assert parse_config(fields | {"num_experts": 0}).experts is None


def test_quantised_experts_without_their_scales(tmp_path: Path) -> None:
    """A stack of codes is no format that is read: refused, whatever the configuration says."""

    def change(tensors: dict[str, Array]) -> dict[str, Array]:
        name = "model.layers.0.mlp.experts.down_proj"
        return tensors | {name: tensors[name].astype(np.float32).astype(ml_dtypes.float8_e4m3fn)}

    folder = written(
        tmp_path / "c", change,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )  # fmt: skip
    assert "down_proj" in refusal(folder)


def test_the_config_of_a_multimodal_model(tmp_path: Path) -> None:
    """Names and fields as released: text_config, and tensors below model.language_model."""
    folder = tmp_path / "c"
    shutil.copytree(FUSED, folder)
    nested = {"model_type": "qwen3_5_moe", "text_config": CONFIG, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(nested))
    tensors = {
        n.replace("model.", "model.language_model.") if n.startswith("model.") else n: a
        for n, a in stored(FUSED).items()
    }
    write_file(folder / "model.safetensors", tensors)
    assert regions(folder) == regions(FUSED)
    checkpoint = open_checkpoint(folder)
    model = model_for(checkpoint.config, max_positions=64, has_draft_head=False)
    check_sources(model.weights, checkpoint)  # a draft head that is not asked for is left out


@pytest.mark.parametrize("is_coded", [False, True])
def test_rows_that_are_gathered_in_chunks(is_coded: bool, tmp_path: Path) -> None:
    """Red when scales stay where codes move, or a chunk begins at another row."""
    values = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    write_file(tmp_path / "m.safetensors", {"w": values})
    at = 8 + int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little")
    tensor = Tensor("w", "F32", values.shape, tmp_path / "m.safetensors", at, values.nbytes)
    plain = PlainMatrix(tensor)
    stored: StoredMatrix = QuantisedMatrix(plain, TARGETS["int4"]) if is_coded else plain
    rows = Interleaved(4, (8, 16))
    gathered = RowsGathered(stored, rows.order())
    read = Checkpoint(tmp_path, {}, {}, {}).read_into
    got = [
        dequantise(gathered.dtype, gathered.groups, gathered.read(first, 32, read))
        for first in (0, 32, 64)
    ]
    whole = dequantise(stored.dtype, stored.groups, stored.read(0, 96, read))
    by_head = whole.reshape(4, 24, 64)
    kinds = by_head[:, :8].reshape(-1, 64), by_head[:, 8:].reshape(-1, 64)
    assert (np.concatenate(got) == np.concatenate(kinds)).all()
