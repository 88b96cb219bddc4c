"""Sampling: arg max, filters, and noise that depends on seed, position and token alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.core.region import DType
from flashrt.ops.table import SAMPLER_WORDS
from tests.backend.cases import cursor, randn
from tests.backend.runner import Case, Runner, rng_for
from tests.reference import filtered, gumbel, philox, scores

Logits = NDArray[np.float32]


@pytest.fixture(autouse=True)
def once_per_kernel(request: pytest.FixtureRequest) -> None:
    """Sampling knows no activations: in precision "high" it is the same kernels again."""
    if "runner" in request.fixturenames:
        runner: Runner = request.getfixturevalue("runner")
        if runner.backend.act is DType.BF16X2:
            pytest.skip("the same kernels as in the other precision")


def sampler(
    temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> NDArray[np.uint32]:
    words = np.zeros(SAMPLER_WORDS, np.uint32)
    words[:2] = seed & 0xFFFFFFFF, seed >> 32
    words[2:3].view(np.int32)[0] = top_k
    words[3:6].view(np.float32)[:] = temperature, top_p, min_p
    return words


def sample_case(logits: Logits, words: NDArray[np.uint32], position: int = 11) -> Case:
    operands = {
        "logits": logits[None], "sampler": words, "work": (2, len(logits)),
        "cursor": cursor(position, 1),
    }  # fmt: skip
    return Case("sample", operands)


def sample(runner: Runner, logits: Logits, words: NDArray[np.uint32], position: int = 11) -> int:
    after = runner.run(sample_case(logits, words, position))["cursor"]
    assert np.array_equal(np.delete(after, 2), np.delete(cursor(position, 1), 2))
    return int(after[2])


def sample_cases() -> list[Case]:
    """Settings over vocabularies on and off the grid; peaked and flat logits."""
    cases = []
    grid = itertools.product(
        (4, 37, 1000, 4099), (1.0, 4.0), (0, 1, 5, 50), (1.0, 0.9, 0.3), (0.0, 0.1)
    )
    for i, (V, scale, top_k, top_p, min_p) in enumerate(grid):
        logits = randn(rng_for("sample", i), V, scale=scale)
        words = sampler((0.7, 1.0, 1.6)[i % 3], top_k, top_p, min_p, seed=i * 0x123456789)
        cases.append(sample_case(logits, words, position=i))
    return cases


def test_philox_known_answers() -> None:
    """Vectors published with Random123 (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert pi == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("V", [4, 5, 33, 512, 4097, 70_001])
def test_greedy_takes_the_lowest_of_equals(runner: Runner, V: int) -> None:
    logits = randn(rng_for("greedy", V), V)
    assert sample(runner, logits, sampler(0)) == int(np.argmax(logits))
    for ids in ([V - 1], [0, V - 1], [V // 2, V // 2 + 1], [V // 3, V - 2]):
        logits[:] = -np.inf
        logits[ids] = 3.5
        assert sample(runner, logits, sampler(0)) == ids[0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_gives_minus_one(runner: Runner, temperature: float) -> None:
    for V, at in ((5, 4), (1000, 0), (1000, 517), (1000, 999)):
        logits = randn(rng_for("nan", V), V)
        logits[at] = np.nan
        assert sample(runner, logits, sampler(temperature)) == -1


def test_token_is_the_reference_arg_max(runner: Runner) -> None:
    compared = 0
    for case in sample_cases():
        words, logits = case.operands["sampler"], case.operands["logits"]
        position = int(case.operands["cursor"][0])  # type: ignore[arg-type]
        score = scores(np.asarray(logits, np.float64)[0], np.asarray(words), position)
        order = np.argsort(score)
        if score[order[-1]] - score[order[-2]] < 1e-4:
            continue  # a tie within rounding
        compared += 1
        assert int(runner.run(case)["cursor"][2]) == order[-1], f"settings {words[:6]}"
    assert compared > 150


def test_top_k_keeps_exactly_k_of_equals(runner: Runner) -> None:
    logits = np.zeros(300, np.float32)
    logits[[7, 100]] = 1
    seen = {sample(runner, logits, sampler(1.0, top_k=4), position=p) for p in range(80)}
    assert seen == {7, 100, 0, 1}


def test_filters_that_leave_one_token(runner: Runner) -> None:
    logits = randn(rng_for("one"), 500)
    best = int(np.argmax(logits))
    for words in (
        sampler(1.5, top_k=1),
        sampler(1.5, top_p=0.0),
        sampler(1.5, min_p=1.0),
        sampler(1e-30),
    ):
        assert {sample(runner, logits, words, position=p) for p in range(5)} == {best}


def test_masked_tokens_are_never_drawn(runner: Runner) -> None:
    logits = np.full(600, -np.inf, np.float32)
    logits[[3, 599]] = 0, -1
    for words in (sampler(1.0), sampler(1.0, top_k=5), sampler(1.0, top_p=0.999)):
        assert {sample(runner, logits, words, position=p) for p in range(40)} == {3, 599}


def test_frequencies_follow_the_softmax(runner: Runner) -> None:
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    n = 1500
    logits = np.log(p).astype(np.float32)
    drawn = [sample(runner, logits, sampler(1.0, seed=i % 3), position=i) for i in range(n)]
    counts = np.bincount(drawn, minlength=5)
    assert (
        np.sum((counts - n * p) ** 2 / (n * p)) < 18.5
    )  # chi-squared, 4 degrees of freedom, p = 0.001


def test_noise_depends_on_seed_and_position() -> None:
    base = gumbel(64, (1, 0), 5)
    assert np.array_equal(base[:10], gumbel(10, (1, 0), 5))
    for other in (gumbel(64, (2, 0), 5), gumbel(64, (1, 1), 5), gumbel(64, (1, 0), 6)):
        assert not np.any(base == other)


def test_reference_filters() -> None:
    z = np.log(np.array([0.1, 0.4, 0.3, 0.2]))
    assert filtered(z, 2, 1.0, 0.0).tolist() == [False, True, True, False]
    assert filtered(z, 0, 0.71, 0.0).tolist() == [False, True, True, True]
    assert filtered(z, 0, 0.69, 0.0).tolist() == [False, True, True, False]
    assert filtered(z, 0, 1.0, 0.6).tolist() == [False, True, True, False]
    assert filtered(z, 3, 0.45, 0.0).tolist() == [False, True, True, False]  # 4/9 is below 0.45
