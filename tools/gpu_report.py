"""Everything that needs a GPU, in one call of under eight minutes: tests, figures, sanitizer.

IS: parts one after another, each a process of its own with a time limit, so that a hang costs one
part; what is done is on disk before the next begins. IS NOT: installed; run it from a checkout with
`pip install -e '.[cuda,dev]'`:

    python tools/gpu_report.py --out gpu-report

Writes log.txt, summary.md, and <device>-<date>.json, .md and .png with the figures of all shapes.
`--device simt --shapes tiny` is its dry run on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "golden" / "tiny"
SHAPES = ("0.8b", "27b", "4b", "9b")  # those with targets first
BUDGET_S = 460.0
LIMIT_S = {"mma": 45, "exactness": 90, "memcheck": 60, "racecheck": 60, "suite": 150}
BENCH_LIMIT_S = {"0.8b": 60, "4b": 60, "9b": 70, "27b": 110}
OK, FAILED, TIMED_OUT, LEFT_OUT = "ok", "FAILED", "TIMED OUT", "left out"
_MEMORY_ERRORS = 9  # exit code that the sanitizer is asked for
_NO_TESTS = 5  # pytest's exit code


@dataclass(frozen=True, slots=True)
class Part:
    """One process."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """How a part ended."""

    name: str
    state: str
    seconds: float
    last_line: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; returns 1 if any did not end well."""
    options = _parser().parse_args(arguments)
    if options.tiny_model:
        return tiny_model(options.device)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.budget
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="flashrt-report-") as folder,
        (out / "log.txt").open("w", encoding="utf-8") as log,
    ):
        figures = Path(folder)
        for part in parts(options.device, options.shapes, figures):
            results.append(run(part, deadline - time.monotonic(), log))
            merge(figures, out)
            (out / "summary.md").write_text(summary(results), encoding="utf-8")
    print(summary(results))
    return 0 if all(r.state in (OK, LEFT_OUT) for r in results) else 1


def parts(device: str, shapes: Sequence[str], figures: Path) -> list[Part]:
    """What to run, what must not be missed first."""
    python, is_gpu = sys.executable, device == "cuda"
    test = (python, "-m", "pytest", "-rs", "--test-limit", "60", "-p", "no:cacheprovider")
    marked = ("-m", "gpu") if is_gpu else ("-m", "not gpu and not slow")
    bench = (python, "-m", "flashrt", "bench", "--device", device, "--out", str(figures))
    tiny = (python, str(Path(__file__).resolve()), "--tiny-model", "--device", device)
    columns = "tests/gpu/test_mma.py"
    found = [
        Part("doctor", (python, "-m", "flashrt", "doctor"), 30),
        Part("mma columns", (*test, *marked, columns), LIMIT_S["mma"]),
        Part("exactness", (*test, *marked, "tests/gpu", "--ignore", columns), LIMIT_S["exactness"]),
    ]
    found += [Part(f"bench {s}", (*bench, "--shape", s), BENCH_LIMIT_S.get(s, 60)) for s in shapes]
    if sanitizer := find_sanitizer():
        code = ("--error-exitcode", str(_MEMORY_ERRORS))
        for tool in ("memcheck", "racecheck"):
            found.append(Part(tool, (sanitizer, "--tool", tool, *code, *tiny), LIMIT_S[tool]))
    else:
        print("compute-sanitizer: not found (CUDA toolkit); its parts are left out")
        found.append(Part("tiny model", tiny, 60))
    if is_gpu:  # compiles far more variants than any model has: last, with the time that is left
        suite = (*test, *marked, "tests", "--ignore", "tests/gpu")
        found.append(Part("suite", suite, LIMIT_S["suite"]))
    return found


def run(part: Part, left_s: float, log: TextIO) -> Result:
    """Run a part within its limit and what is left of the budget; its output goes to the log."""
    limit_s = min(part.limit_s, left_s)
    if limit_s < 5:
        print(f"{part.name}: left out, the budget is spent", flush=True)
        return Result(part.name, LEFT_OUT, 0.0, "the budget is spent")
    print(f"{part.name}: at most {limit_s:.0f} s ...", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        text = output.read().decode(errors="replace")
    seconds = time.monotonic() - started
    log.write(f"==== {part.name}: {' '.join(part.command)}\n{text}\n")
    log.write(f"==== {part.name}: exit {code} after {seconds:.1f} s\n\n")
    log.flush()
    lines = text.strip().splitlines()
    state = _state(code, text)
    print(f"{part.name}: {state} after {seconds:.1f} s", flush=True)
    return Result(part.name, state, seconds, lines[-1].strip() if lines else "")


def _state(code: int | None, text: str) -> str:
    if code is None:
        return TIMED_OUT
    has_tests = code != _NO_TESTS and not ("skipped" in text and " passed" not in text)
    return OK if code == 0 and has_tests else FAILED


def merge(figures: Path, out: Path) -> None:
    """The documents of all shapes so far, as one report."""
    from flashrt.commands.bench.gpu.report import stem, write

    documents: list[dict[str, Any]] = []
    for path in sorted(figures.glob("*.json"), key=lambda p: p.stat().st_ctime_ns):
        documents.append(json.loads(path.read_text(encoding="utf-8")))
    if documents:
        write(documents, out, stem(documents[0]).removesuffix(f"-{documents[0]['shape']}"))


def summary(results: Sequence[Result]) -> str:
    """A table of how the parts ended."""
    lines = ["| part | result | seconds | last line |", "|---|---|---|---|"]
    for r in results:
        last = r.last_line.replace("|", "/")[:120]
        lines.append(f"| {r.name} | {r.state} | {r.seconds:.1f} | {last} |")
    return "\n".join(lines) + "\n"


def find_sanitizer() -> str | None:
    """compute-sanitizer: on the path, in a CUDA toolkit, or in a Python package of NVIDIA's."""
    if found := shutil.which("compute-sanitizer"):
        return found
    places = [(Path("/usr/local"), "cuda*/bin/compute-sanitizer")]
    places.append((Path("/opt/cuda"), "bin/compute-sanitizer"))
    packages = [Path(p) / "nvidia" for p in sys.path if "site-packages" in p]
    places += [(package, "**/compute-sanitizer") for package in packages]
    for folder, pattern in places:
        for path in sorted(folder.glob(pattern), reverse=True):
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


def tiny_model(device: str) -> int:
    """Every kernel of a tiny model once or twice, and a capsule: what the sanitizer watches."""
    from flashrt.load import load

    engine = load(TINY, device=device, max_positions=512, lanes=2, draft=False)
    prompt = [(7 * i + 3) % engine.vocab_size for i in range(300)]
    with engine.session() as session:
        for part in (prompt[:256], prompt[256:295], prompt[295:]):
            session.prefill(part)
        capsule = session.snapshot()
        generated = list(session.generate(3, temperature=0.8, top_k=20, top_p=0.9, seed=1))
        session.restore(capsule)
        digests = {session.digest(), capsule.digest}
        with session.fork() as twin:
            digests.add(twin.digest())
    engine.arena.check_guards()
    engine.close()
    print(f"tiny model on {device}: tokens {generated}, digest {sorted(digests)}")
    return 0 if len(digests) == 1 else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "simt"), default="cuda")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=SHAPES)
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--tiny-model", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
