"""`flashrt chat`, as a process of its own: at a terminal, and at the end of a pipe."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "flashrt", "chat", "--device", "cpu", "--max-positions", "1024"]
# The first terminal that a session's leader opens is the one whose Ctrl-C reaches it.
OPEN_IT = "os.close(os.open(os.ttyname(0), os.O_RDWR))"
OWN_TERMINAL = f"import os, sys; {OPEN_IT}; os.execv(sys.argv[1], sys.argv[1:])"
# More than a terminal holds unread: the reply is not over before it is interrupted.
ENDLESS = ("--max-positions", "8192", "--max-tokens", "8000")
SYSTEM = "the red box may be in the tower or the stable ."


def piped(*lines: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], input="\n".join(lines) + "\n", capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


def test_branches_undo_and_files(tmp_path: Path) -> None:
    """Red when branches share messages, when /back undoes half a turn, when the state of a file is
    not the one that was saved, or when an error in a script goes unnoticed.
    """
    saved = tmp_path / "talk"
    ask, look = "bring me the red box .", "<tool_call> look tower</tool_call>"
    done = piped(
        ask, "/fork", ask, "/tree", "/back", f"/save {saved}", "/switch 1", "/back", "/tree",
        arguments=("--system", SYSTEM),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == look
    first, second = done.stdout.split("2 branches")[1:]
    assert first.count(f"user: {ask}") == 2 and first.count("branch ") == 2
    assert first.index("branch 1") < first.index("branch 2 (here)")
    assert second.count(f"user: {ask}") == 1, "branch 2 keeps what branch 1 has undone"
    messages = json.loads(Path(f"{saved}.json").read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]

    again = piped("/branches", ask, "/sing", "never", arguments=("--load", str(saved)))
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("flashrt: /sing is")
    assert again.stdout.count("assistant: " + look) == 1
    fed = next(line for line in again.stderr.splitlines() if " tokens in" in line)
    assert int(fed.split()[0]) < 20, "only what is new was fed"


def test_ctrl_c_ends_a_reply_and_ctrl_d_leaves() -> None:
    """Red when what was said is lost, when Ctrl-C ends the program, or an error does."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_TERMINAL, *COMMAND, *ENDLESS],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    told = ""

    def until(text: str) -> None:
        nonlocal told
        deadline = time.monotonic() + 60
        while text not in told:
            assert time.monotonic() < deadline, told
            told += os.read(leader, 4096).decode()

    try:
        until("> ")
        os.write(leader, b"/nothing\n")
        until("is no command")
        os.write(leader, b"tell me a story about a fox .\n")
        until("once there")
        os.write(leader, b"\x03")
        until("interrupted")
        told = ""
        os.write(leader, b"/tree\n")
        until("branch 1 (here)")
        assert "assistant: once there" in told
        told = told[told.index("branch 1 (here)") :]
        until("> ")  # before it, the terminal would not hand on what ends the input
        os.write(leader, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
