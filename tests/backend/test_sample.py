"""Sampling: arg max, filters, and noise that depends on seed, position and token alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.ops.sample import SamplerParams
from flashrt.ops.table import BIAS_ENTRIES, SAMPLER_WORDS, mask_words
from tests.backend.cases import cursor, randn
from tests.backend.runner import Case, Runner, rng_for
from tests.reference import adjusted, filtered, gumbel, masked, philox, scores

Logits = NDArray[np.float32]


# Sampling knows no activations: in precision "high" it is the same kernels again.
pytestmark = pytest.mark.only_on("cpu", "simt", "cuda")


def sampler(
    temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> NDArray[np.uint32]:
    words = np.zeros(SAMPLER_WORDS, np.uint32)
    words[:2] = seed & 0xFFFFFFFF, seed >> 32
    words[2:3].view(np.int32)[0] = top_k
    words[3:7].view(np.float32)[:] = temperature, top_p, min_p, 1.0
    return words


def sample_case(
    logits: Logits,
    words: NDArray[np.uint32],
    position: int = 11,
    bias: NDArray[np.uint32] | None = None,
    history: Sequence[int] = (),
    mask: NDArray[np.uint32] | None = None,
) -> Case:
    """A launch at `position`; the journal holds `history`, and garbage from the position on. A mask
    that is not asked for allows nothing: red where it is read all the same.
    """
    journal = np.full((1, max(position, 1) + 3, 1), np.iinfo(np.int32).min, np.int32)
    journal[0, :position, 0] = [*history, *[0] * position][:position]
    operands = {
        "logits": logits[None], "sampler": words, "work": (2, len(logits)),
        "bias": np.zeros((BIAS_ENTRIES, 2), np.uint32) if bias is None else bias,
        "mask": np.zeros(mask_words(len(logits)), np.uint32) if mask is None else mask,
        "journal": journal, "cursor": cursor(position, 1),
    }  # fmt: skip
    return Case("sample", operands)


def params_case(logits: Logits, params: SamplerParams, history: Sequence[int]) -> Case:
    """A launch with packed parameters after a history."""
    words = np.frombuffer(params.pack(), np.uint32)
    bias = np.frombuffer(params.pack_bias(), np.uint32).reshape(BIAS_ENTRIES, 2)
    mask = None if params.allowed is None else np.frombuffer(params.allowed, np.uint32)
    return sample_case(logits, words, len(history), bias, history, mask)


def sample(runner: Runner, logits: Logits, words: NDArray[np.uint32], position: int = 11) -> int:
    after = runner.run(sample_case(logits, words, position))["cursor"]
    assert np.array_equal(np.delete(after, 2), np.delete(cursor(position, 1), 2))
    return int(after[2])


def sample_cases() -> list[Case]:
    """Settings over vocabularies on and off the grid; peaked and flat logits."""
    cases = []
    grid = itertools.product(
        (8, 37, 1000, 4099), (1.0, 4.0), (0, 1, 5, 50), (1.0, 0.9, 0.3), (0.0, 0.1)
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


@pytest.mark.parametrize("V", [8, 9, 33, 512, 4097, 70_001])
def test_greedy_takes_the_lowest_of_equals(runner: Runner, V: int) -> None:
    logits = randn(rng_for("greedy", V), V)
    assert sample(runner, logits, sampler(0)) == int(np.argmax(logits))
    for ids in ([V - 1], [0, V - 1], [V // 2, V // 2 + 1], [V // 3, V - 2]):
        logits[:] = -np.inf
        logits[ids] = 3.5
        assert sample(runner, logits, sampler(0)) == ids[0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_gives_minus_one(runner: Runner, temperature: float) -> None:
    for V, at in ((9, 8), (1000, 0), (1000, 517), (1000, 999)):
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


@pytest.mark.parametrize("V", [16_383, 16_384, 40_001])  # one block alone; blocks that share
def test_filters_over_many_tokens(runner: Runner, V: int) -> None:
    """Against the reference: peaked, flat, and rounded so that most tokens have equals. Red where
    blocks add up less than all, digits of top_k are taken for those of top_p, or a cut through
    equals is not by id.
    """
    compared = 0
    filters = ((50, 1.0), (0, 0.9), (3000, 0.95), (V - 1, 0.5), (1, 0.3), (40, 1.0), (V, 0.999))
    for i, (top_k, top_p) in enumerate(filters):
        logits = randn(rng_for("many", V, i), V, scale=(3.0, 0.01)[i % 2])
        if i in (2, 3, 5):
            logits = np.round(logits * 20) / 20  # most tokens have equals
        words = sampler((0.7, 1.0, 1.6)[i % 3], top_k, top_p, seed=i)
        score = scores(logits.astype(np.float64), words, 5)
        order = np.argsort(score)
        if score[order[-1]] - score[order[-2]] > 1e-4:  # else a tie within rounding
            assert sample(runner, logits, words, 5) == order[-1], f"filter {top_k}, {top_p}"
            compared += 1
    assert compared >= 5


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
    logits = np.full(8, -np.inf, np.float32)
    logits[:5] = np.log(p)
    drawn = [sample(runner, logits, sampler(1.0, seed=i % 3), position=i) for i in range(n)]
    counts = np.bincount(drawn, minlength=5)
    assert counts.size == 5
    assert (
        np.sum((counts - n * p) ** 2 / (n * p)) < 18.5
    )  # chi-squared, 4 degrees of freedom, p = 0.001


PENALTIES = (
    SamplerParams(repetition_penalty=1.7),
    SamplerParams(presence_penalty=0.8, frequency_penalty=0.3),
    SamplerParams(presence_penalty=-0.5, repetition_penalty=0.6),
    SamplerParams(logit_bias=((3, 2.5), (0, -np.inf), (511, -1.0))),
    SamplerParams(1.1, 40, 0.9, 0.02, 77, 1.3, 0.2, 0.1, ((5, 1.0), (9, -np.inf))),
)


@pytest.mark.parametrize("params", PENALTIES)
def test_penalties_and_bias(runner: Runner, params: SamplerParams) -> None:
    """Against numpy, token by token: the history grows by what was sampled."""
    rng, history, compared = rng_for("penalties", params), [1, 1, 5], 0
    words = np.frombuffer(params.pack(), np.uint32)
    bias = np.frombuffer(params.pack_bias(), np.uint32).reshape(BIAS_ENTRIES, 2)
    base = randn(rng, 512, scale=2)
    base[[0, 3]] += 6, 4  # so that a bias on them shows
    for _ in range(40):
        logits = base + randn(rng, 512, scale=0.3)
        token = int(runner.run(params_case(logits, params, history))["cursor"][2])
        x = adjusted(logits.astype(np.float64), words, bias, np.array(history))
        score = scores(x, words, len(history))
        order = np.argsort(score)
        if score[order[-1]] - score[order[-2]] > 1e-4:  # else a tie within rounding
            assert token == order[-1]
            compared += 1
        history.append(token)
    assert compared > 30


def mask_of(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Bits of a mask; those beyond the vocabulary are set, and must not matter."""
    bits = np.ones(32 * mask_words(len(allowed)), bool)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("V", [8, 33, 512, 4097, 70_001])
def test_a_mask_forbids_whatever_else_is_asked(runner: Runner, V: int) -> None:
    """Against numpy, with few, half and most of the tokens allowed. Red when a bit belongs to
    another token, or a bias or penalty comes before the mask.
    """
    rng, compared = rng_for("mask", V), 0
    history = rng.integers(0, V, 5).tolist()
    for i, (share, base) in enumerate(
        itertools.product((0.02, 0.5, 0.98), (SamplerParams(), SamplerParams(0.8), *PENALTIES[3:]))
    ):
        logits = randn(rng, V, scale=2)
        allowed = rng.random(V) < share
        allowed[[0, i % V]] = False, True
        logits[~allowed] += 30  # the likeliest are forbidden
        mask = mask_of(allowed)
        asked = replace(base, logit_bias=((0, 50.0),), seed=i, allowed=mask.tobytes())
        token = int(runner.run(params_case(logits, asked, history))["cursor"][2])
        assert allowed[token]
        words = np.frombuffer(asked.pack(), np.uint32)
        bias = np.frombuffer(asked.pack_bias(), np.uint32).reshape(BIAS_ENTRIES, 2)
        x = adjusted(masked(logits.astype(np.float64), mask), words, bias, np.array(history))
        score = scores(x, words, len(history))
        order = np.argsort(score)
        if score[order[-1]] - score[order[-2]] > 1e-4:  # else a tie within rounding
            assert token == order[-1]
            compared += 1
    assert compared > 8


def test_an_empty_mask_leaves_no_token(runner: Runner) -> None:
    """And one that allows a NaN alone neither; a NaN that is forbidden is no fault."""
    logits = randn(rng_for("empty mask"), 300)
    logits[7] = np.nan
    for temperature in (0.0, 0.7):
        for allowed in ([], [7]):
            mask = mask_of(np.isin(np.arange(300), allowed))
            params = SamplerParams(temperature, allowed=mask.tobytes())
            assert int(runner.run(params_case(logits, params, [1]))["cursor"][2]) == -1
        params = SamplerParams(temperature, allowed=mask_of(np.arange(300) == 299).tobytes())
        assert int(runner.run(params_case(logits, params, [1]))["cursor"][2]) == 299


def test_a_neutral_penalty_changes_nothing(runner: Runner) -> None:
    """The journal is not even read."""
    logits, params = randn(rng_for("neutral"), 700), SamplerParams(0.9, 30, 0.9, 0.0, 4)
    plain = sample(runner, logits, np.frombuffer(params.pack(), np.uint32), 5)
    for history in ([0] * 5, [-1, 9999999, 3, 2, 1]):
        assert int(runner.run(params_case(logits, params, history))["cursor"][2]) == plain


def test_penalties_work_on_infinities(runner: Runner) -> None:
    logits = randn(rng_for("infinities"), 300)
    logits[[40, 200]] = np.inf
    for temperature in (0.0, 0.7, 3.0):
        assert sample(runner, logits, sampler(temperature)) == 40
        params = SamplerParams(temperature, repetition_penalty=2, logit_bias=((7, -np.inf),))
        assert int(runner.run(params_case(logits, params, [40, 7]))["cursor"][2]) == 40
        forbidden = np.full(300, -np.inf, np.float32)
        assert sample(runner, forbidden, sampler(temperature)) == -1
        clash = SamplerParams(temperature, logit_bias=((40, -np.inf),))  # inf - inf
        assert int(runner.run(params_case(logits, clash, [1]))["cursor"][2]) == -1


def test_an_invalid_row_is_left_alone(runner: Runner) -> None:
    case = sample_case(np.full(64, np.nan, np.float32), sampler(0.0))
    assert int(runner.run(case.but(cursor=cursor(11, 0)))["cursor"][2]) == 7


@pytest.mark.only_on("cpu")  # thousands of launches; the others are held against the reference
def test_frequencies_with_filters_follow_the_renormalised_softmax(runner: Runner) -> None:
    """Chi-squared over fixed seeds, for each filter that leaves several tokens."""
    rng, n = rng_for("chi"), 1200
    logits = randn(rng, 12, scale=1.2)
    for words in (
        sampler(0.7, top_k=5), sampler(1.3, top_p=0.8), sampler(1.0, min_p=0.15),
        sampler(1.5, top_k=8, top_p=0.9, min_p=0.05),
    ):  # fmt: skip
        top_k = int(words[2])
        temperature, top_p, min_p = (float(x) for x in words[3:6].view(np.float32))
        z = logits.astype(np.float64) / temperature
        p = np.where(filtered(z, top_k, top_p, min_p), np.exp(z - z.max()), 0)
        p /= p.sum()
        drawn = [sample(runner, logits, words, position=i) for i in range(n)]
        counts, kept = np.bincount(drawn, minlength=12), p > 0
        assert counts[~kept].sum() == 0
        statistic = np.sum((counts[kept] - n * p[kept]) ** 2 / (n * p[kept]))
        freedom = int(kept.sum()) - 1
        assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 6  # beyond p = 0.001


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
