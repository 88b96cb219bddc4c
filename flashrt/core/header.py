"""The generated C header: what kernels and Python must agree on, written once, in Python.

IS: argument structs, dtype codes, words of operands and values of attributes by name, constants of
the digest; one text that C and CUDA compile. IS NOT: code. Without it an offset or a word would be
kept in step by hand, in three languages.

C names: CursorWord.ROWS is CURSOR_ROWS, Activation.SILU is ACTIVATION_SILU; where an operand whose
words have names is of a fixed size, CURSOR_WORDS is that size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

from flashrt.base.errors import PlanError
from flashrt.core import digest
from flashrt.core.groups import Scales
from flashrt.core.op import Op
from flashrt.core.region import DType
from flashrt.core.runs import RUN_WORDS, STRIDE_UNIT, RunsWord, RunWord

Values = dict[str, int]


def c_header(ops: Sequence[Op], used_by: str | None = None) -> str:
    """The header for kernels of these ops.

    With `used_by`, a kernel's source: only structs and words that it names, so that a new op does
    not change the header of every kernel. Raises PlanError when two enums share a C name.
    """
    wanted = [op for op in ops if used_by is None or f"{op.name}_args" in used_by]
    enums = {
        prefix: values
        for prefix, values in _enums(ops).items()
        if used_by is None or any(name in used_by for name in values)
    }
    runs = _words("RUNS", RunsWord) | {"RUNS_STRIDE_UNIT": STRIDE_UNIT}
    run = _words("RUN", RunWord) | {"RUN_WORDS": RUN_WORDS}
    words = (_dtypes(), _scales(), _layouts(), runs, run)
    lines = [_enum(values) for values in (*words, *enums.values())]
    lines += [f"#define DIGEST_{name} {value:#x}ull" for name, value in digest.CONSTANTS.items()]
    structs = [op.c_struct() for op in wanted]
    movers = [op.c_mover() for op in wanted]
    return "\n".join(
        ["#pragma once", *lines, "", *structs, "#ifdef RUN_FUNCTION", *movers, "#endif", ""]
    )


def _words(prefix: str, names: type[IntEnum]) -> Values:
    return {f"{prefix}_{name}": int(value) for name, value in names.__members__.items()}


def _dtypes() -> Values:
    stored = [d for d in DType if d not in (DType.ACT, DType.ACT_WIDE)]
    return {f"DTYPE_{d.name}": d.code for d in stored}


def _scales() -> Values:
    return {f"SCALES_{s.name}": s.code for s in Scales}


def _layouts() -> Values:
    return {f"LAYOUT_{name.upper()}": code for name, code in digest.LAYOUT_CODE.items()}


def _enums(ops: Iterable[Op]) -> Mapping[str, Values]:
    """Every enum and constant that the ops name, each once, by prefix."""
    found: dict[str, Values] = {}
    for op in ops:
        for param in op.params:
            if param.words is not None:
                size = param.dims[-1]
                sizes = {"words": size} if isinstance(size, int) else {}
                _add(found, op, param.words, sizes)
        for attr in op.attrs:
            if attr.names is not None:
                _add(found, op, attr.names, {})
        if op.constants:
            found[op.name] = dict(op.constants)
    return found


def _add(found: dict[str, Values], op: Op, names: type[IntEnum], sizes: Mapping[str, int]) -> None:
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", names.__name__.removesuffix("Word")).upper()
    values = {f"{prefix}_{name}": int(value) for name, value in names.__members__.items()}
    values |= {f"{prefix}_{name.upper()}": size for name, size in sizes.items()}
    known = found.setdefault(prefix, values)
    if known != values:
        raise PlanError(f"{op.name}: {names.__name__} gives {values}, another op gives {known}")


def _enum(values: Values) -> str:
    return f"enum {{ {', '.join(f'{name} = {value}' for name, value in values.items())} }};"
