"""Streams and locales as they come: one clear line and an exit code, never a traceback.

Each test runs the command line as a process of its own, as a shell would.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from flashrt import cli

TINY = Path(__file__).parents[1] / "golden" / "tiny"
FULL = Path("/dev/full")
PLAN = ("plan", "--shape", "tiny")

needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


def run(
    *arguments: str | bytes, shell: str = "", stdin: bytes | None = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """`python -m flashrt ARGUMENTS`; `shell` is what a shell would say after it."""
    command: list[str | bytes] = [sys.executable, "-m", "flashrt", *arguments]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(
        command, input=stdin, capture_output=True, check=False, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


def refusal(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line on stderr of a process that refused."""
    text = done.stderr.decode()
    assert done.returncode == 2, text
    last = text.splitlines()[-1]
    assert "Traceback" not in text and "Exception ignored" not in text
    assert last.startswith("flashrt")
    return last


@pytest.fixture(scope="module")
def with_words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose tokens are words that ASCII cannot write."""
    checkpoint = tmp_path_factory.mktemp("c") / "words"
    shutil.copytree(TINY, checkpoint)
    words = {f"é{i}": i for i in range(512)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="é0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    return str(checkpoint)


def test_text_that_is_no_utf_8(with_words: str) -> None:
    """Red when surrogates go on to the tokenizer, or stdin is decoded as it comes."""
    done = run("run", with_words, "--prompt", b"caf\xe9")
    assert "--prompt: not valid UTF-8 at byte 3" in refusal(done)
    done = run("run", with_words, stdin=b"caf\xe9")
    assert "stdin is not valid UTF-8 at byte 3" in refusal(done)
    done = run("run", with_words, shell="<&-")
    assert "standard input is closed" in refusal(done)


def test_text_in_an_ascii_locale(with_words: str) -> None:
    """Red when the locale decides what the bytes of a prompt say, or what may be written."""
    command = ("run", with_words, "--max-tokens", "4", "--prompt", "é5 é6")
    expected = run(*command).stdout.decode()
    assert expected.count("é") == 4
    done = run(*command, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.encode("ascii", "backslashreplace")


def test_reports_in_an_ascii_locale() -> None:
    """Red when a report or an error holds what the locale does not have."""
    done = run("inspect", "/nowhere/é\udcff", PYTHONIOENCODING="ascii")
    assert r"/nowhere/\xe9\udcff" in refusal(done)
    done = run(*PLAN, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and b"\\u" not in done.stdout


def test_a_closed_stdout() -> None:
    """Red when stdout is None, or when a file that is opened later gets its number."""
    assert "standard output is closed" in refusal(run(*PLAN, shell=">&-"))
    assert run(*PLAN, shell="2>&-").returncode == 0
    assert run(*PLAN, shell="<&- 2>&-").returncode == 0


@needs_full
@pytest.mark.parametrize("arguments", [PLAN, (*PLAN, "--json"), ("--help",)], ids=" ".join)
def test_a_full_disk_as_output(arguments: tuple[str, ...]) -> None:
    """Red when the error shows only when the interpreter ends: exit code 120 and its own words."""
    said = refusal(run(*arguments, shell=">/dev/full"))
    assert "cannot write the output: No space left on device" in said


@needs_full
def test_a_full_disk_for_a_file() -> None:
    said = refusal(run(*PLAN, "--svg", "/dev/full"))
    assert "cannot write /dev/full" in said and "No space left" in said


def test_nobody_reads_the_output() -> None:
    """Red when a closed pipe is an error, at the write or at the last flush."""
    for arguments in (PLAN, (*PLAN, "--json")):
        done = run(*arguments, shell="| true; exit ${PIPESTATUS[0]}")
        assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_ends_quietly() -> None:
    command = [sys.executable, "-m", "flashrt", "run", str(TINY), "--max-tokens", "4000",
               "--tokens", "1,2"]  # fmt: skip

    # A background job of a shell, as a suite may be, ignores interrupts, and so would its children:
    # what a process handles is back at the default in a program that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read() == b"flashrt: interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "x", "--temperature", "nan"), "--temperature: nan is not a finite number"),
        (("run", "x", "--temperature", "-1"), "-1 is not a finite number at least 0"),
        (("run", "x", "--top-p", "0"), "0 is not a finite number above 0 and at most 1"),
        (("run", "x", "--min-p", "two"), "'two' is not a number"),
        (("run", "x", "--top-k", "1.0"), "'1.0' is not a whole number"),
        (("run", "x", "--seed", "-1"), "-1 is not at least 0"),
        (("run", "x", "--tokens", ","), "is not a list like 1,2,3"),
        (("run", "x", "--tokens", "1,-2"), "-2 is not at least 0"),
        (("plan", "--max-positions", "0"), "0 is not at least 1"),
        (("plan", "--max-positions", "9" * 30), "is more than 2147483647"),
        (("plan", "--max-positions", "9" * 5000), "is not a whole number"),
        (("plan", "--pool-bytes", "-1"), "-1 is not at least 0"),
        (("plan", "--lanes", "1000000000"), "is more than 65536"),
        (("bench", "--lengths", "0"), "0 is not at least 1"),
        (("bench", "--policy", "--seconds", "inf"), "inf is not a finite number above 0"),
        (("bench", "--policy", "--hz", "1e12"), "above 0 and at most 1e+06"),
    ],
)
def test_numbers_that_make_no_sense(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red when an option takes what later fails, runs for ever, or divides by zero."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
