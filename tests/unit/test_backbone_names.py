"""Files of Nemotron-H say `backbone.` for `model.`: tensors, and modules in a configuration.

Red when weights in 8 bits of such a file are taken for whole ones, or are not found.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from flashrt.models import model_for
from flashrt.weights.checkpoint import open_checkpoint
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.loader import check_sources
from tests.families import SETS
from tests.quantised_models import write_file


def test_modules_of_a_configuration(tmp_path: Path) -> None:
    """MIXED_PRECISION lists modules: by the names of the file, not by ours."""
    original = SETS / "nemotron"
    tensors, listed = dict(load_file(original / "model.safetensors")), {}
    assert "backbone.embeddings.weight" in tensors
    module = "backbone.layers.1.mixer.up_proj"
    values = tensors[f"{module}.weight"].astype(np.float32)
    codes = (values / np.float32(0.03125)).astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{module}.weight"] = codes
    tensors[f"{module}.weight_scale"] = np.float32([0.03125])
    listed[module] = {"quant_algo": "FP8"}
    write_file(tmp_path / "model.safetensors", tensors)
    config = json.loads((original / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    section = {"quant_algo": "MIXED_PRECISION", "quantized_layers": listed}
    side = {"producer": {"name": "modelopt"}, "quantization": section}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(side))
    checkpoint = open_checkpoint(tmp_path)
    model = model_for(config, max_positions=64, stored=checkpoint.stored)
    check_sources(model.weights, checkpoint)
    matrix = checkpoint.matrix("model.layers.1.mixer.up_proj.weight")
    assert matrix is not None and matrix.dtype == "float8_e4m3"
    rows = matrix.read(0, matrix.shape[0], checkpoint.read_into)
    found = dequantise(matrix.dtype, matrix.groups, rows)
    assert (found == codes.astype(np.float32) * np.float32(0.03125)).all()
