"""A demo's findings as a person reads them: a tree of conversations, tables, pictures, a verdict.

IS: findings -> text on the screen, capsules -> SVG files. IS NOT: measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flashrt.capsule.capsule import Capsule
from flashrt.commands import console
from flashrt.commands.console import Screen, Table, Tree, line, styled, yes_no
from flashrt.commands.demo.findings import (
    AgentFindings,
    Asked,
    Branch,
    ChatFindings,
    DocumentFindings,
    Findings,
    TokenFindings,
    Turn,
)
from flashrt.models.model import tapes_of
from flashrt.session.engine import SessionEngine
from flashrt.view.arena_map import arena_map, widest
from flashrt.view.session_tree import bytes_alone, session_tree
from flashrt.view.svg import save_svg
from flashrt.view.units import bytes_text, seconds_text, significant

SHOWN = 3  # questions of each kind that are shown whole
_EXCERPT = 150  # characters of the prompt
_STYLES = {"user": "cyan", "assistant": "bold", "tool": "magenta"}


def draw(
    findings: Findings, engine: SessionEngine, capsules: Sequence[Capsule],
    here: Mapping[str, Capsule], out: Path,
) -> None:  # fmt: skip
    """The arena and the tree of capsules, as pictures and in bytes. `here`: who stands where."""
    findings.tree_bytes = sum(c.nbytes for c in capsules)
    findings.tree_bytes_alone = sum(bytes_alone(c) for c in capsules)
    tapes = tapes_of(engine.model, len(engine.lanes))
    title = f"Arena: {len(engine.lanes)} lanes of {engine.max_positions:,} positions"
    pictures = {
        "arena.svg": arena_map(engine.arena.plan, widest(tapes), title),
        "session-tree.svg": session_tree(capsules, here),
    }
    findings.files = [str(save_svg(svg, out / name)) for name, svg in pictures.items()]


def show(findings: AgentFindings | DocumentFindings | TokenFindings) -> None:
    """Print everything on stdout."""
    screen = console.screen()
    if isinstance(findings, AgentFindings):
        _show_agent(screen, findings)
    elif isinstance(findings, DocumentFindings):
        _show_document(screen, findings)
    else:
        _show_tokens(screen, findings)
    shared = significant(findings.tree_bytes_alone / findings.tree_bytes)
    screen.print(
        f"All capsules of the tree take {bytes_text(findings.tree_bytes)}; without shared rows "
        f"{bytes_text(findings.tree_bytes_alone)} ({shared} times as much)."
    )
    screen.print(f"Pictures: {', '.join(findings.files)}")
    failed = [claim for claim, is_true in findings.checks.items() if not is_true]
    for claim in failed:
        screen.print(styled("FAILED", "bold red"), f" {claim}")
    if not failed:
        passed = styled(f"All {len(findings.checks)} checks of bits passed", "bold green")
        screen.print(passed, f" in {seconds_text(findings.seconds)}.")


def _show_steps(screen: Screen, findings: Findings, title: str, equal: str) -> None:
    """What was done, at which position, how long it took, what it moved, whether bits agree."""
    rows: list[list[console.Part]] = [
        [s.what, f"{s.position:,}", seconds_text(s.seconds), bytes_text(s.moved_bytes),
         yes_no(s.is_equal)]
        for s in findings.steps
    ]  # fmt: skip
    columns = ("", ">position", ">time", ">bytes moved", equal)
    screen.print(console.table(title, columns, rows))


def _show_starts(screen: Screen, findings: Findings) -> None:
    """The table of cold and warm starts."""
    rows: list[list[console.Part]] = [
        [
            f"{start.tokens:,}",
            seconds_text(start.cold_s),
            seconds_text(start.warm_s),
            styled(f"{significant(start.cold_s / start.warm_s)} x", "bold"),
            seconds_text(start.restore_s),
            bytes_text(start.restore_bytes),
            yes_no(start.is_equal),
        ]
        for start in findings.starts
    ]
    title = f"Time to first token (TTFT) of a turn of {findings.turn_tokens} tokens after a prompt"
    columns = (
        ">prompt", ">TTFT cold", ">TTFT warm", ">ratio", ">restore", ">bytes moved", "bits equal",
    )  # fmt: skip
    screen.print(console.table(title, columns, rows))
    screen.print(
        "cold: prefill prompt and turn, first token. warm: restore the prompt's capsule into a "
        "lane that holds another text, prefill the turn, first token.\n",
        style="dim",
    )


# -- on random token ids --------------------------------------------------------------------------


def _show_tokens(screen: Screen, found: TokenFindings) -> None:
    rate = significant(found.prompt_tokens / found.prefill_s)
    screen.print(
        "\n", styled(f"An agent's prompt of {found.prompt_tokens:,} tokens", "bold"),
        f", prefilled in {seconds_text(found.prefill_s)} ({rate} tokens/s, {found.device}); its "
        f"capsule: {bytes_text(found.capsule_bytes)} in {seconds_text(found.snapshot_s)}.\n",
    )  # fmt: skip
    title = f"Three branches from it, each a turn of {found.turn_tokens} tokens and an answer"
    _show_steps(screen, found, title, "bits equal to a cold prefill")
    _show_starts(screen, found)
    if found.rows_only_token is not None:
        outcome = styled(f"diverges at token {found.rows_only_token}", "bold")
    elif found.rows_only_differs:
        agree = f"the first {found.answer_tokens} greedy tokens agree"
        outcome = line(f"has other logits, though {agree}")
    elif found.rows_only_differs is None:
        outcome = line("brings all back: this model has no recurrent state")
    else:
        outcome = styled("does not diverge", "bold red")
    screen.print(
        "A KV-only restore (rows without recurrent state), the same turn, then greedy decode: ",
        outcome,
        f".\nA full restore, the same turn, {found.answer_tokens} greedy tokens: equal to cold: ",
        yes_no(found.full_agrees),
        f".\nA capsule file ({bytes_text(found.file_bytes)}), saved and loaded: bits equal: ",
        yes_no(found.file_agrees),
        ".",
    )


# -- of an agent ----------------------------------------------------------------------------------


def _show_agent(screen: Screen, found: AgentFindings) -> None:
    screen.print(
        "\n", styled(found.model, "bold"), f", {significant(found.parameters / 1e6)} M parameters, "
        f"on {found.device}, in held-out world {found.seed}\n",
    )  # fmt: skip
    excerpt = found.prompt[:_EXCERPT].rpartition(" ")[0]
    screen.print(
        styled(f"1. A prompt of {found.prompt_tokens:,} tokens", "bold"),
        f": {found.facts} facts, a tale, {found.hints} hints",
    )
    screen.print(f"   {excerpt} ...", style="italic dim")
    screen.print(
        f"   prefilled in {seconds_text(found.prefill_s)} "
        f"({significant(found.prompt_tokens / found.prefill_s)} tokens/s); its capsule: "
        f"{bytes_text(found.capsule_bytes)} in {seconds_text(found.snapshot_s)}\n"
    )
    screen.print("2. Three branches from that capsule, and a failed call taken back", style="bold")
    screen.print(_branches(found))
    title = "Each state beside a cold prefill of its tokens"
    _show_steps(screen, found, title, "bits equal")
    _show_process(screen, found)
    screen.print("4. What half a restore would bring back", style="bold")
    screen.print(_ablation(found))
    screen.print(
        "KV only: keys and values, recurrent state empty. State only: recurrent state, keys "
        "and values of another text. Attention finds again what was said once; what is carried, "
        "a position after many moves, is in the state. With half of it, answers are fluent and "
        "wrong.\n",
        style="dim",
    )
    _show_starts(screen, found)


def _branches(found: AgentFindings) -> Tree:
    root = Tree(styled("facts", "bold"), f", position {found.prompt_tokens:,}")
    for branch in found.branches:
        _add_branch(root, branch, found.prompt_tokens)
    if (mishap := found.mishap) is not None:
        at = root.add(styled("mishap", "bold"), styled(" restored on the same lane", "dim"))
        _add_turns(at, [Turn("user", mishap.request), *mishap.failed])
        told = "the failure kept in the context: "
        _add_turns(at.add(styled(told, "dim"), _brought(mishap.is_done_kept)), mishap.kept)
        told = f"taken back, {mishap.dropped_tokens} tokens that never were; called again: "
        _add_turns(at.add(styled(told, "dim"), _brought(mishap.is_done)), mishap.retried)
    return root


def _add_branch(root: Tree, branch: Branch, prompt_tokens: int) -> None:
    more = branch.position - prompt_tokens
    told = f" {branch.how}: +{more} tokens, {bytes_text(branch.own_bytes)}; bits equal: "
    name, equal = styled(branch.name, "bold"), yes_no(branch.is_equal)
    _add_turns(root.add(name, styled(told, "dim"), equal), branch.turns)


def _add_turns(at: Tree, turns: Sequence[Turn]) -> None:
    for turn in turns:
        verdict = line()
        if turn.truth is not None:
            wrong = line("  ", styled("wrong", "red"), f": {turn.truth}")
            verdict = line("  ", styled("right", "green")) if turn.text == turn.truth else wrong
        at.add(styled(f"{turn.role:>9}", _STYLES[turn.role]), f"  {turn.text}", verdict)


def _brought(is_done: bool) -> console.Part:
    return styled("brought", "green") if is_done else styled("not brought", "red")


def _show_process(screen: Screen, findings: ChatFindings) -> None:
    found, branch = findings.process, findings.branches[0].name
    assert found is not None, "the demo is complete"
    screen.print(f"3. Another process goes on from branch {branch}, from disk", style="bold")
    screen.print(
        f"   {bytes_text(found.saved_bytes)} in the store; engine loaded in "
        f"{seconds_text(found.loaded_s)}, state restored and checked in\n   "
        f"{seconds_text(found.restored_s)}; digest equal: ",
        yes_no(found.is_equal),
    )
    screen.print("   ", styled("     user", "cyan"), f"  {found.question}")
    screen.print(
        "   ", styled("assistant", "bold"), f"  {found.answer}  ",
        styled(f"{seconds_text(found.answered_s)}; same as here: ", "dim"),
        yes_no(found.answer == found.answer_here), "\n",
    )  # fmt: skip


def _ablation(found: AgentFindings) -> Table:
    rows: list[list[console.Part]] = []
    for kind, (*right, asked) in found.scores.items():
        scores = [styled(f"{n} of {asked} right", "bold") for n in right]
        rows.append([styled(kind, "bold"), *scores])
        of_kind = [a for a in found.answers if a.kind == kind]
        rows += [_asked(a) for a in of_kind[:SHOWN]]
    columns = ("the truth", "full restore", "KV only", "state only")
    return console.table("", columns, rows)


def _asked(asked: Asked) -> list[console.Part]:
    subject = asked.truth.partition(" in ")[0]
    answers = [
        styled(_brief(said, subject), "green" if said == asked.truth else "red")
        for said in (asked.full, asked.rows_only, asked.state_only)
    ]
    about = subject.removeprefix("the ").removesuffix(" is").removesuffix(" are")
    return [f"  {about}: {_brief(asked.truth, subject)}", *answers]


def _brief(said: str, subject: str) -> str:
    """What is said of the subject; the whole sentence if it is of something else."""
    about, _, place = said.partition(" in ")
    if about != subject:
        return said
    place = place.removeprefix("the ").removesuffix(" .")
    return place.removeprefix("column ").replace(" row ", ", ")


# -- of a document --------------------------------------------------------------------------------


def _show_document(screen: Screen, found: DocumentFindings) -> None:
    screen.print(
        "\n", styled(found.model, "bold"), f", {significant(found.parameters / 1e6)} M parameters, "
        f"on {found.device}\n",
    )  # fmt: skip
    screen.print(
        styled(f"1. A document of {found.prompt_tokens:,} tokens", "bold"), f": {found.document}"
    )
    screen.print(f"   {' '.join(found.prompt[:_EXCERPT].split())} ...", style="italic dim")
    screen.print(
        f"   prefilled in {seconds_text(found.prefill_s)} "
        f"({significant(found.prompt_tokens / found.prefill_s)} tokens/s); its capsule: "
        f"{bytes_text(found.capsule_bytes)} in {seconds_text(found.snapshot_s)}\n"
    )
    screen.print("2. Questions branch from that capsule; one is taken back", style="bold")
    root = Tree(styled("document", "bold"), f", position {found.prompt_tokens:,}")
    for branch in found.branches:
        _add_branch(root, branch, found.prompt_tokens)
    told = f" {found.dropped_tokens} tokens that never were"
    _add_turns(root.add(styled("taken back", "bold"), styled(told, "dim")), found.taken_back)
    screen.print(root)
    _show_steps(screen, found, "Each state beside a cold prefill of its tokens", "bits equal")
    _show_process(screen, found)
    screen.print("4. What the capsule saves", style="bold")
    _show_starts(screen, found)
