"""What transformers computes from the tiny Granite-4.0-H models of the tests, in float32.

    python tools/granite_golden.py

IS: logits after each prompt, 48 greedy tokens, and the logits that chose the last of them, written
to tests/golden/granite. Needs torch and transformers 5. Every token is the end of a whole forward
pass without a cache: transformers' step with one leaves the limits of a time step out. IS NOT: run
by the tests, which need neither library.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests import granite_models  # noqa: E402

N_TOKENS = 48


@torch.no_grad()
def computed(folder: Path) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """Greedy tokens and arrays, by prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    greedy, first, last, margins = [], [], [], []
    for prompt in granite_models.prompts():
        ids = list(prompt)
        for i in range(N_TOKENS):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            best = torch.topk(logits, 2).values
            margins.append(float(best[0] - best[1]))
            if i == 0:
                first.append(logits.numpy())
            ids.append(int(logits.argmax()))
        greedy.append(ids[len(prompt) :])
        last.append(logits.numpy())
    print(
        f"{folder.name}: logits of deviation {np.std(first):.2f}, least margin {min(margins):.1e}"
    )
    print(f"  distinct tokens {[len(set(tokens)) for tokens in greedy]}")
    return greedy, {"logits_last": np.stack(first), "greedy_logits_last": np.stack(last)}


def main() -> None:
    """Write a pair of files for each config."""
    out = ROOT / "tests" / "golden" / "granite"
    out.mkdir(exist_ok=True)
    for name, config in granite_models.CONFIGS.items():
        with tempfile.TemporaryDirectory() as made:
            greedy, arrays = computed(granite_models.write(Path(made) / name, config))
        made_by = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
        text = json.dumps({"made_by": made_by, "greedy": greedy})
        (out / f"{name}.json").write_text(text + "\n")
        save_file(arrays, out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
