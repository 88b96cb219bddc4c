"""Whole models with and without fusion: the same bits alone, drafting and side by side, in fewer
launches; and how many launches a token of the real sizes takes.

IS: the tiny golden model on the simt device, and tapes of real sizes, placed by the planner and
counted without a device. IS NOT: each pattern by itself, see test_fusion.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashrt
from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.device import ACTS
from flashrt.backends.cuda.fusion import fuse
from flashrt.backends.cuda.graph import CudaGraph
from flashrt.backends.simt.device import SimtDevice
from flashrt.commands.bench.gpu.cost.formats import model_of
from flashrt.commands.bench.gpu.cost.paper import lay_out
from flashrt.core.graph import GraphKey
from flashrt.core.groups import Groups, Scales
from flashrt.core.region import DType
from flashrt.load import load_on
from flashrt.models import Model, model_for
from flashrt.weights.random_checkpoint import shape_config
from flashrt.weights.rules import Source, Stored

CHECKPOINT = Path(__file__).parents[1] / "golden" / "tiny"
PROMPTS = ([1, 2, 3], list(range(20, 61)), [4], [99, 98])
LANES = len(PROMPTS)
Found = tuple[list[int], str]  # tokens and a digest of the state


def engine(device: SimtDevice) -> flashrt.Engine:
    return load_on(lambda: device, CHECKPOINT, max_positions=128, lanes=LANES)


@pytest.fixture(scope="module")
def plain() -> Iterator[list[Found]]:
    """What each prompt gives, alone and without fusion."""
    made = engine(SimtDevice(is_fused=False))
    found: list[Found] = []
    for prompt in PROMPTS:
        with made.session() as session:
            session.prefill(prompt)
            found.append((list(session.generate(12)), session.digest()))
    yield found
    made.close()


@pytest.fixture(scope="module")
def fused() -> Iterator[flashrt.Engine]:
    """With fusion, threads and blocks in random order."""
    made = engine(SimtDevice(seed=7, multiprocessors=108))
    yield made
    made.close()


@pytest.mark.parametrize("draft", [0, 4])
def test_a_lane_alone(plain: list[Found], fused: flashrt.Engine, draft: int) -> None:
    for prompt, (tokens, digest) in zip(PROMPTS, plain, strict=True):
        with fused.session() as session:
            session.prefill(prompt)
            assert list(session.generate(12, draft=draft)) == tokens
            assert session.digest() == digest


def test_lanes_side_by_side(plain: list[Found], fused: flashrt.Engine) -> None:
    """Red: operands of a fused launch that move from run to run by another launch's strides; one
    counter for the value heads of all lanes.
    """
    sessions = [fused.session() for _ in PROMPTS]
    for session, prompt in zip(sessions, PROMPTS, strict=True):
        session.prefill(prompt)
    got: dict[int, list[int]] = defaultdict(list)
    for index, token in flashrt.together(*(s.generate(12) for s in sessions)):
        got[index].append(token)
    for i, (tokens, digest) in enumerate(plain):
        assert got[i] == tokens
        assert sessions[i].digest() == digest
        sessions[i].close()


def test_kernels_of_a_decode(fused: flashrt.Engine) -> None:
    """A layer takes a norm and products, a delta rule or an attention, and the products of an MLP.

    The draft head reads the last layer's norm too: its sum and norm stay a launch.
    """
    graph = fused.graphs.graphs[GraphKey("decode", 1)]
    assert isinstance(graph, CudaGraph)
    names = Counter(node.name for node in graph.nodes)
    of_layers = {"norm_linear": 5, "delta_few": 3, "rope_append": 2, "norm_silu": 4}
    assert {name: names[name] for name in of_layers} == of_layers
    assert names["linear_add"] == 7
    assert not any(names[n] for n in ("conv_window", "delta_rule", "gated_rmsnorm", "silu_mul"))


# launches of a decode with and without fusion, on 132 multiprocessors; quantised weights leave the
# projections of gates in bfloat16, and one format more is what a mixed checkpoint has
DECODES = {
    ("0.8b", "bfloat16"): (271, 145), ("0.8b", "int4"): (289, 145),
    ("27b", "bfloat16"): (701, 365), ("27b", "nvfp4"): (749, 365), ("27b", "mixed"): (813, 365),
}  # fmt: skip


def model_with(size: str, form: str) -> Model:
    if form != "mixed":
        return model_of(size, form, 4096)
    q4, q6 = Groups(32, Scales.TWO_LEVEL_MIN, 256), Groups(16, Scales.TWO_LEVEL, 256)

    def stored(source: Source) -> Stored:
        if source.name.endswith(("in_proj_b.weight", "in_proj_a.weight")):
            return DType.BF16, None
        is_wide = source.name.endswith(("v_proj.weight", "in_proj_z.weight"))
        return (DType.U6, q6) if is_wide else (DType.U4, q4)

    return model_for(shape_config(size), max_positions=4096, stored=stored)


@pytest.mark.parametrize(("size", "form"), DECODES)
def test_launches_of_a_token(size: str, form: str) -> None:
    """Red: a plan of scratch that keeps launches apart; a block that is recorded another way than
    the pass knows; a launch for each format of a matrix that is stored in parts.
    """
    acts, model = ACTS["bfloat16"], model_with(size, form)
    launches = lay_out(model, acts, [model.record("decode", 1)]).bound["decode", 1]
    counted = tuple(
        sum(len(kernels.expand(bound.launch, acts, 132, "sm_90")) for bound in tape)
        for tape in (launches, fuse(launches, acts, 0))
    )
    assert counted == DECODES[size, form]
    assert counted[1] < 400
