"""What the fingerprint of kernels covers: their code and the signatures of ops, not the prose.

IS: digests of sources and ops on each backend before and after a change. IS NOT: the rest of an
engine's fingerprint (weights, config, layouts).
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from pathlib import Path

import pytest

from flashrt.backends.code import tokens
from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cuda.kernels import ATTENTION_KEYS, KernelLaunch
from flashrt.backends.cuda.sources import Sources, folder, shipped
from flashrt.backends.simt import build as simt
from flashrt.base.errors import PlanError
from flashrt.core import digest
from flashrt.core.header import c_header
from flashrt.core.op import Attr, Op, Param
from flashrt.core.region import DType, Layout
from flashrt.ops import OPS, cursor
from flashrt.ops.attention import ATTENTION

Digest = Callable[[tuple[Op, ...], Path], str]


def cpu(ops: tuple[Op, ...], source: Path) -> str:
    return toolchain.source_digest(ops, [source])


def cuda(ops: tuple[Op, ...], source: Path) -> str:
    sources = Sources()
    sources.set_ops(ops)
    sources.add(source.name, source.read_text())
    return sources.digest()


SOURCE = """\
/* twice: y = 2 x */
#include "common.h"
#define TWICE(x) (2 * (x))

void op_twice(const twice_args *a, int tid, int nt) {  // one thread
  const char *name = "/* no comment */";
  if (tid == 0) a->y[0] = TWICE(a->x[0]);
}
"""
SAME = {
    "a comment": ("y = 2 x", "y = x + x"),
    "a comment less": ("  // one thread", ""),
    "a comment with quotes": ("one thread", 'one "thread'),
    "another indentation": ("  if (tid == 0)", "\n\tif (tid==0)\n     "),
    "a joined line": ("#define TWICE(x) (2", "#define TWICE(x) \\\n  (2"),
}
OTHER = {
    "a constant": ("(2 *", "(3 *"),
    "an operator": ("tid == 0", "tid >= 0"),
    "two operators of one": ("tid == 0", "tid = = 0"),
    "two words of one": ("TWICE(a", "TWI CE(a"),
    "what looks like a comment in a string": ("/* no comment */", "/* another */"),
    "a macro without an argument": ("TWICE(x)", "TWICE (x)"),
    "a directive that ends later": ("(2 * (x))\n\n", "(2 * (x)) "),
}


@pytest.mark.parametrize("digest_of", [cpu, cuda])
@pytest.mark.parametrize("change", [*SAME, *OTHER])
def test_code_counts_and_comments_do_not(change: str, digest_of: Digest, tmp_path: Path) -> None:
    """Red before: a corrected comment made every stored capsule foreign."""
    before, after = {**SAME, **OTHER}[change]
    assert SOURCE.count(before) == 1
    path = tmp_path / "twice.c"
    path.write_text(SOURCE)
    first = digest_of(OPS, path)
    path.write_text(SOURCE.replace(before, after))
    assert (digest_of(OPS, path) == first) is (change in SAME)


@pytest.mark.parametrize("digest_of", [cpu, cuda])
def test_a_source_s_name_counts(digest_of: Digest, tmp_path: Path) -> None:
    for name in ("one.c", "two.c"):
        (tmp_path / name).write_text(SOURCE)
    assert digest_of(OPS, tmp_path / "one.c") != digest_of(OPS, tmp_path / "two.c")


X, Y = Param("x", "r", ("N",)), Param("y", "w", ("N",))
TWICE = Op("twice", "y = 2 x", (X, Y), (Attr("n"),))


class Word(IntEnum):
    FIRST = 0


class Renumbered(IntEnum):
    FIRST = 1


Renumbered.__name__ = "Word"
NAMED = replace(X, dims=(4,), dtypes=(DType.I32,), words=Word)


@pytest.mark.parametrize("digest_of", [cpu, cuda])
def test_signatures_count_and_docs_do_not(digest_of: Digest, tmp_path: Path) -> None:
    """Red before: the doc of an op was part of the fingerprint."""
    path = tmp_path / "twice.c"
    path.write_text(SOURCE)
    first = digest_of((TWICE,), path)
    assert digest_of((replace(TWICE, doc="y = x + x */ twice"),), path) == first
    others = (
        replace(TWICE, params=(replace(X, name="z"), Y)),
        replace(TWICE, params=(replace(X, access="rw"), Y)),
        replace(TWICE, params=(replace(X, dims=("2*N",)), replace(Y, dims=("N",)))),
        replace(TWICE, params=(replace(X, layout=Layout.MATRIX), Y)),
        replace(TWICE, params=(replace(X, dtypes=(DType.ACT,)), replace(Y, dtypes=(DType.ACT,)))),
        replace(TWICE, params=(replace(X, is_strided=True), Y)),
        replace(TWICE, params=(NAMED, Y)),
        replace(TWICE, params=(replace(NAMED, words=Renumbered), Y)),
        replace(TWICE, attrs=(Attr("n", "float32"),)),
        replace(TWICE, constants=(("BLOCK", 1),)),
    )
    digests = {digest_of((op,), path) for op in others}
    assert len(digests) == len(others) and first not in digests


@pytest.mark.parametrize("device", ["cpu", "cuda", "simt"])
def test_shipped_sources_may_be_documented(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real sources, each with one comment more; then with one declaration more."""
    origin = {"cpu": toolchain.KERNELS, "cuda": folder(), "simt": simt.SHIM}[device]
    copied = tmp_path / "sources"
    shutil.copytree(origin, copied)
    monkeypatch.setattr(toolchain, "KERNELS", copied)
    monkeypatch.setattr(simt, "SHIM", copied)
    monkeypatch.setattr("flashrt.backends.cuda.sources.folder", lambda: copied)

    def digest_now() -> str:
        shipped.cache_clear()
        simt.shim_digest.cache_clear()
        sources = Sources()
        sources.set_ops(OPS)
        return {
            "cpu": lambda: toolchain.source_digest(OPS),
            "cuda": sources.digest,
            "simt": simt.shim_digest,
        }[device]()

    try:
        first = digest_now()
        for path in (files := [p for p in copied.iterdir() if p.is_file()]):
            path.write_text("/* It's one more. */\n" + path.read_text() + "// and another")
        assert digest_now() == first
        for path in files:
            text = path.read_text()
            path.write_text(text + "\nint one_more;\n")
            assert digest_now() != first, path.name
            path.write_text(text)
    finally:
        shipped.cache_clear()
        simt.shim_digest.cache_clear()


def test_tokens() -> None:
    text = "a->b++ <<= 0x1p-3f+1'000u; c = '\"'; // d\n# define e(f) R\"x(//)x\" /* g\n */ h\n"
    assert list(tokens(text)) == [
        "a", "->", "b", "++", "<<=", "0x1p-3f", "+", "1'000u", ";", "c", "=", "'\"'", ";",
        "#", "define", "e", "(of a macro", "f", ")", 'R"x(//)x"', "h", "\n",
    ]  # fmt: skip


# ---- the generated header: one fact, one place


def kernel_sources() -> dict[str, str]:
    paths = [*toolchain.sources(), *folder().iterdir()]
    return {p.name: p.read_text() for p in paths if p.suffix in (".c", ".h", ".cu", ".cuh")}


@pytest.mark.parametrize("name", sorted(kernel_sources()))
def test_no_kernel_numbers_a_word_itself(name: str) -> None:
    """Red before: kernels of both languages numbered the words of cursors and of the sampler, and
    held the digest's constants.
    """
    seen = list(tokens(kernel_sources()[name]))
    operands = {"cursor", "draft", "samples", "last", "sampler", "request", "verdict"}
    for operand, bracket, index in zip(seen, seen[1:], seen[2:], strict=False):
        assert not (operand in operands and bracket == "[" and index.isdigit()), (operand, index)
    constants = {f"{value:#x}" for value in digest.CONSTANTS.values()}
    assert not {token.lower().rstrip("ul") for token in seen} & constants
    words = [cursor.CursorWord, cursor.PolicyWord, cursor.RequestWord, cursor.VerdictWord]
    names = {f"{e.__name__.removesuffix('Word').upper()}_{w}" for e in words for w in e.__members__}
    for word, equals in itertools.pairwise(seen):
        assert not (word in names and equals == "="), f"{word} is numbered here too"


def test_kernels_and_python_cut_attention_alike() -> None:
    assert dict(ATTENTION.constants) == {"ATTENTION_BLOCK": ATTENTION_KEYS}


def test_a_header_holds_what_its_kernel_names() -> None:
    """A new op or a new word must not recompile every kernel."""
    sources = Sources()
    sources.set_ops(OPS)
    headers = {
        name: dict(sources.unit(KernelLaunch(name, "", (), (1, 1, 1), (1, 1, 1))).headers)["args.h"]
        for name in ("embed.cu", "policy.cu")
    }
    for name, own, foreign in (
        ("embed.cu", ("embed_args", "CURSOR_ROWS"), ("observe_args", "POLICY_TICK")),
        ("policy.cu", ("observe_args", "POLICY_TICK"), ("embed_args", "SAMPLER_TOP_K")),
    ):
        assert all(word in headers[name] for word in own)
        assert not any(word in headers[name] for word in foreign)


def test_two_enums_of_one_name_are_refused() -> None:
    with pytest.raises(PlanError, match=r"twice: Word gives .*FIRST.: 1.*gives .*FIRST.: 0"):
        c_header([replace(TWICE, params=(NAMED, replace(NAMED, name="z", words=Renumbered)))])
