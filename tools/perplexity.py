"""Perplexity of a model on a text, by precision and by format of keys and values.

    python tools/perplexity.py smollm2 /usr/share/common-licenses/GPL-3 --tokens 4096

IS: exp of the mean negative log-likelihood of each token after the first, given those before it,
in one context. IS NOT: a benchmark of speed. With llama-cpp-python installed and a GGUF file,
llama.cpp's figure on the same tokens stands beside ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import flashrt
from flashrt.hub.resolve import resolve


def nll(logits: NDArray[np.float32], token: int) -> float:
    """Negative log-likelihood of a token, in float64."""
    x = logits.astype(np.float64)
    top = x.max()
    return float(top + np.log(np.exp(x - top).sum()) - x[token])


def ours(path: Path, ids: list[int], precision: Any, kv_dtype: Any, weights: Any) -> float:
    """Perplexity in flashrt: token by token, which gives the bits of any other way."""
    engine = flashrt.load(
        path, device="cpu", max_positions=len(ids), precision=precision, kv_dtype=kv_dtype,
        weights=weights, pool_bytes=0,
    )  # fmt: skip
    lost = 0.0
    with engine, engine.session() as session:
        for token, following in itertools.pairwise(ids):
            session.prefill([token])
            lost += nll(session.logits(), following)
    return float(np.exp(lost / (len(ids) - 1)))


def theirs(path: Path, ids: list[int]) -> float:
    """Perplexity in llama.cpp."""
    import llama_cpp

    llama = llama_cpp.Llama(
        model_path=str(path), n_ctx=len(ids), n_threads=2, logits_all=True, verbose=False
    )
    llama.eval(ids)
    lost = sum(nll(llama.scores[i], ids[i + 1]) for i in range(len(ids) - 1))
    return float(np.exp(lost / (len(ids) - 1)))


def main() -> None:
    """Print a line of JSON per figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--precisions", default="high,bfloat16")
    parser.add_argument("--kv", default="float32,bfloat16")
    parser.add_argument("--weights", default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    path = resolve(options.model)
    tokenizer = flashrt.load(path, device="cpu", max_positions=8, pool_bytes=0).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(options.text.read_text())[: options.tokens]
    print(json.dumps({"tokens": len(ids)}), flush=True)
    for precision in options.precisions.split(","):
        for kv_dtype in options.kv.split(","):
            began = time.perf_counter()
            found = ours(path, ids, precision, kv_dtype, options.weights)
            print(
                json.dumps({
                    "precision": precision, "kv_dtype": kv_dtype, "perplexity": round(found, 5),
                    "seconds": round(time.perf_counter() - began, 1),
                }),
                flush=True,
            )  # fmt: skip
    if importlib.util.find_spec("llama_cpp") and path.suffix == ".gguf":
        print(json.dumps({"llama.cpp": round(theirs(path, ids), 5)}))


if __name__ == "__main__":
    main()
