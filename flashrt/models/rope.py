"""Rotary positions: which frequencies the heads of a model turn by, scaled for long texts or not.

IS: the rotary settings of a config.json, read as transformers reads them, and its formulas
(modeling_rope_utils.py of transformers 5), in the same steps of float32. IS NOT: the rotation
itself, which is the op `rope_append`.

Angles are position times frequency, in float32: at position 100,000 one unit in the last place of
a frequency moves an angle by 0.01. So each step is rounded where torch rounds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.base.messages import listed, shown
from flashrt.models.fields import Fields

F32 = NDArray[np.float32]
# Frequencies of unscaled positions: (theta, turning dims of a head) -> radians per position.
Plain = Callable[[float, int], F32]
_PLAIN_KINDS = ("default", "mrope")  # mrope is the identity on text: its three positions are equal
_SCALED_KINDS = ("linear", "llama3", "yarn", "dynamic")
_MOST_FACTOR = 1e6


@dataclass(frozen=True, slots=True)
class Rotation:
    """How heads turn."""

    inv_freq: tuple[float, ...]  # radians per position of a pair; 2 * len dims of a head turn
    magnitude: float = 1.0  # what turned dims are multiplied by: transformers' attention_scaling


def plain(theta: float, dims: int) -> F32:
    """theta^(-j / dims) for even j, as float32 arithmetic gives it."""
    return np.float32(1) / _powers(theta, dims)


def _powers(theta: float, dims: int) -> F32:
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    powers = np.float64(np.float32(theta)) ** exponents.astype(np.float64)
    return np.asarray(powers, np.float32)


def plain_rounded_once(theta: float, dims: int) -> F32:
    """The same in float64, rounded at the end: a third of the values differ by a last place."""
    return np.array([theta ** (-j / dims) for j in range(0, dims, 2)], np.float32)


def linear(theta: float, dims: int, factor: float) -> F32:
    """Positions divided by a factor."""
    return plain(theta, dims) / np.float32(factor)


def llama3(theta: float, dims: int, factor: float, low: float, high: float, trained: int) -> F32:
    """Waves longer than trained / low are slowed by the factor, those shorter than trained / high
    stay, and between them the two are mixed.
    """
    fast = plain(theta, dims)
    wave = np.float32(2 * math.pi) / fast
    is_long = wave > np.float32(trained / low)
    is_short = wave < np.float32(trained / high)
    slow = fast / np.float32(factor)
    smooth = (np.float32(trained) / wave - np.float32(low)) / np.float32(high - low)
    mixed = (np.float32(1) - smooth) * fast / np.float32(factor) + smooth * fast
    return np.where(is_long, slow, np.where(is_short, fast, mixed)).astype(np.float32)


def yarn(
    theta: float,
    dims: int,
    factor: float,
    trained: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    *,
    is_truncated: bool = True,
) -> F32:
    """Pairs that turn more than beta_fast times within the trained positions stay, those that turn
    less than beta_slow times are slowed by the factor, and between them there is a ramp.
    """
    low, high = (
        dims * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (beta_fast, beta_slow)
    )
    if is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    powers = _powers(theta, dims)
    slow, fast = (np.float32(1) / (np.float32(f) * powers) for f in (factor, 1.0))
    mixed: F32 = slow * (np.float32(1) - kept) + fast * kept
    return mixed


def yarn_magnitude(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """What yarn multiplies queries and keys by, where the config does not say it."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return of(mscale) / of(mscale_all_dim)
    return of(1.0)


def rotation(
    fields: Fields,
    outer: Sequence[Mapping[str, object]],
    head_dim: int,
    max_positions: int,
    *,
    theta: float = 10000.0,
    turning: float = 1.0,
    unscaled: Plain = plain,
) -> Rotation:
    """The rotation that a config asks for; what is wrong goes to the problems of `fields`.

    `outer`: levels around the fields, for nested configs. `theta`, `turning`: defaults of the
    family, the second of partial_rotary_factor. `unscaled`: frequencies of unscaled positions.
    """
    rope = _settings(fields, outer)
    base = rope.number("rope_theta", default=theta, least=1.0, most=1e12)
    part = rope.number("partial_rotary_factor", default=turning, least=0.0, most=1.0)
    dims = int(head_dim * part)
    if not rope.problems and (dims < 2 or dims % 2):
        rope.problems.append(
            f"partial_rotary_factor {part} of head_dim {head_dim} turns {dims} dims, expected an "
            f"even number in [2, {head_dim}]"
        )
    found = None if rope.problems else _rotation(rope, base, dims, max_positions, unscaled)
    fields.problems += rope.problems
    return found if found is not None and not rope.problems else Rotation((1.0,))


def reach(fields: Mapping[str, object]) -> int | None:
    """Positions that a model was made for, by max_position_embeddings, or by the factor where that
    makes it more: configs that add yarn leave the former as it was.
    """
    trained = fields.get("max_position_embeddings")
    if not isinstance(trained, int):
        return None
    rope = fields.get("rope_scaling") or fields.get("rope_parameters")
    if isinstance(rope, Mapping) and _kind(rope) == "yarn":
        original = rope.get("original_max_position_embeddings", trained)
        factor = rope.get("factor")
        if isinstance(original, int) and isinstance(factor, int | float):
            return max(trained, int(original * factor))
    return trained


def _rotation(
    rope: Fields, theta: float, dims: int, max_positions: int, unscaled: Plain
) -> Rotation:
    kind = _kind(rope.fields)
    if kind in _PLAIN_KINDS:
        return _of(unscaled(theta, dims))
    factor = rope.number("factor", default=None, least=1.0, most=_MOST_FACTOR)
    if kind == "linear":
        return _of(linear(theta, dims, factor))
    if kind == "dynamic":
        return _dynamic(rope, theta, dims, max_positions, unscaled)
    if "original_max_position_embeddings" in rope.fields:
        trained = rope.size("original_max_position_embeddings")
    else:
        trained = rope.size("max_position_embeddings")
    if kind == "llama3":
        low = rope.number("low_freq_factor", default=None, most=_MOST_FACTOR)
        high = rope.number("high_freq_factor", default=None, most=_MOST_FACTOR)
        if not rope.problems and low >= high:
            rope.problems.append(f"high_freq_factor {high} is not above low_freq_factor {low}")
        return (
            Rotation(()) if rope.problems else _of(llama3(theta, dims, factor, low, high, trained))
        )
    fast, slow = (
        rope.number(name, default=default, most=_MOST_FACTOR) if rope.fields.get(name) else default
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if theta <= 1:
        rope.problems.append(f"rope_theta is {theta}, and yarn needs more than 1")
    is_truncated = rope.is_set("truncate", default=True)
    magnitude = _yarn_magnitude(rope, factor)
    if rope.problems:
        return Rotation(())
    return _of(yarn(theta, dims, factor, trained, fast, slow, is_truncated=is_truncated), magnitude)


def _yarn_magnitude(rope: Fields, factor: float) -> float:
    if rope.fields.get("attention_factor") is not None:
        return rope.number("attention_factor", default=None, most=_MOST_FACTOR)
    scales = [
        rope.number(name, default=None, most=_MOST_FACTOR) if rope.fields.get(name) else None
        for name in ("mscale", "mscale_all_dim")
    ]
    return yarn_magnitude(factor, *scales)


def _dynamic(
    rope: Fields, theta: float, dims: int, max_positions: int, unscaled: Plain
) -> Rotation:
    """Unscaled within the trained positions. Beyond them, transformers computes other frequencies
    with every token: what a key was turned by would depend on how long the text was when it came,
    and no cached key would equal a new one.
    """
    trained = rope.size("max_position_embeddings")
    if max_positions > trained:
        rope.problems.append(
            f"rope_type is 'dynamic': beyond max_position_embeddings, {trained:,}, frequencies "
            "change with the length of the text, and cached keys would no longer hold; load with "
            f"max_positions up to {trained:,}, or set rope_type to 'yarn', which does not change"
        )
    return _of(unscaled(theta, dims))


def _of(frequencies: F32, magnitude: float = 1.0) -> Rotation:
    return Rotation(tuple(map(float, frequencies)), magnitude)


def _settings(fields: Fields, outer: Sequence[Mapping[str, object]]) -> Fields:
    """The rotary settings that transformers would apply, over the fall-backs of the top level.

    It takes `rope_scaling` where that and `rope_parameters` both stand; two that disagree are
    refused. It ignores the outer level of a nested config, which other programs apply: scaled
    positions are refused there.
    """
    problems: list[str] = []
    chosen: list[Mapping[str, object]] = []
    for level in (fields.fields, *outer):
        is_inner = level is fields.fields
        for name in ("rope_scaling", "rope_parameters"):
            own = level.get(name)
            if own is not None and not isinstance(own, Mapping):
                problems.append(f"{name} is {shown(own)}, expected an object")
            elif own:
                problems += _problems(name, own, is_inner=is_inner)
                chosen += [own] if is_inner else []
    rope = Fields({**fields.fields, **(chosen[0] if chosen else {})}, "rope_parameters.")
    rope.problems += problems
    for own in chosen[1:]:
        for setting in ("rope_theta", "partial_rotary_factor", "factor"):
            given, used = own.get(setting), rope.fields.get(setting)
            if given is not None and given != used:
                rope.problems.append(
                    f"rope_parameters.{setting} is {shown(given)}, but rope_scaling takes its "
                    f"place, with {shown(used)}; keep one of the two"
                )
    return rope


def _kind(own: Mapping[str, object]) -> object:
    """The kind of scaling; older files say `type`."""
    return own.get("rope_type", own.get("type", "default"))


def _problems(name: str, own: Mapping[str, object], *, is_inner: bool) -> list[str]:
    kind = _kind(own)
    if kind not in (*_PLAIN_KINDS, *_SCALED_KINDS):
        return [
            f"{name}.rope_type is {shown(kind)}, which is not supported; remove it from "
            "config.json to run within the context that the model was trained for"
        ]
    if kind not in _PLAIN_KINDS and not is_inner:
        return [
            f"{name}.rope_type is {shown(kind)} beside text_config, where transformers does not "
            "read it; move it into text_config, or remove it"
        ]
    by_layer = [key for key in own if isinstance(key, str) and key.endswith("_attention")]
    if by_layer:
        return [f"{name} differs by layer ({listed(by_layer)}), which is not supported"]
    return []
