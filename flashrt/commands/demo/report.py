"""The demo's story as a person reads it: a tree of conversations, tables, a verdict.

IS: Story -> rich renderables. IS NOT: measurement. Called by: demo; demo_bits_report shares parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from flashrt.commands import console
from flashrt.commands.demo.findings import Asked, Story, Turn
from flashrt.commands.demo.starts import Start, Step
from flashrt.view.units import bytes_text, seconds_text, significant

SHOWN = 3  # questions of each kind that are shown whole
_EXCERPT = 150  # characters of the prompt
_STYLES = {"user": "cyan", "assistant": "bold", "tool": "magenta"}


def show(story: Story) -> None:
    """Print everything on stdout."""
    screen = console.screen()
    screen.print(
        f"\n[bold]{story.model}[/], {significant(story.parameters / 1e6)} M parameters, on "
        f"{story.device}, in held-out world {story.seed}\n"
    )
    excerpt = story.prompt[:_EXCERPT].rpartition(" ")[0]
    screen.print(f"[bold]1. A prompt of {story.prompt_tokens:,} tokens[/]: {story.facts} facts, a "
                 f"tale, {story.hints} hints")  # fmt: skip
    screen.print(f"   [italic dim]{escape(excerpt)} ...[/]")
    screen.print(
        f"   prefilled in {seconds_text(story.prefill_s)} "
        f"({significant(story.prompt_tokens / story.prefill_s)} tokens/s); its capsule: "
        f"{bytes_text(story.capsule_bytes)} in {seconds_text(story.snapshot_s)}\n"
    )
    screen.print("[bold]2. Three branches from that capsule, and a failed call taken back[/]")
    screen.print(_branches(story))
    screen.print(
        steps_table(story.steps, "Each state beside a cold prefill of its tokens", "bits equal")
    )
    _show_process(story)
    screen.print("[bold]4. What half a restore would bring back[/]")
    screen.print(_ablation(story))
    screen.print(
        "[dim]KV only: keys and values, recurrent state empty. State only: recurrent state, keys "
        "and values of another text. Attention finds again what was said once; what is carried, "
        "a position after many moves, is in the state. With half of it, answers are fluent and "
        "wrong.[/]\n"
    )
    show_starts(story.starts, story.turn_tokens)
    shared = story.tree_bytes_alone / story.tree_bytes
    screen.print(
        f"All capsules of the tree take {bytes_text(story.tree_bytes)}; without shared rows "
        f"{bytes_text(story.tree_bytes_alone)} ({significant(shared)} times as much)."
    )
    screen.print(f"Pictures: {', '.join(story.files)}")
    show_outcome(story.checks, story.seconds)


def show_starts(starts: Sequence[Start], turn_tokens: int) -> None:
    """The table of cold and warm starts."""
    rows = [
        [
            f"{start.tokens:,}",
            seconds_text(start.cold_s),
            seconds_text(start.warm_s),
            f"[bold]{significant(start.cold_s / start.warm_s)} x[/]",
            seconds_text(start.restore_s),
            bytes_text(start.restore_bytes),
            console.yes_no(start.is_equal),
        ]
        for start in starts
    ]
    title = f"Time to first token (TTFT) of a turn of {turn_tokens} tokens after a prompt"
    columns = (
        ">prompt", ">TTFT cold", ">TTFT warm", ">ratio", ">restore", ">bytes moved", "bits equal",
    )  # fmt: skip
    note = (
        "cold: prefill prompt and turn, first token. warm: restore the prompt's capsule into a "
        "lane that holds another text, prefill the turn, first token."
    )
    screen = console.screen()
    screen.print(console.table(title, columns, rows))
    screen.print(f"[dim]{note}[/]\n")


def show_outcome(checks: Mapping[str, bool], seconds: float) -> None:
    """What failed, or that nothing did."""
    screen = console.screen()
    failed = [claim for claim, is_true in checks.items() if not is_true]
    for claim in failed:
        screen.print(f"[bold red]FAILED[/] {claim}")
    if not failed:
        took = seconds_text(seconds)
        screen.print(f"[bold green]All {len(checks)} checks of bits passed[/] in {took}.")


def _branches(story: Story) -> Tree:
    root = Tree(f"[bold]facts[/], position {story.prompt_tokens:,}", guide_style="dim")
    for branch in story.branches:
        more = branch.position - story.prompt_tokens
        at = root.add(
            f"[bold]{branch.name}[/] [dim]{branch.how}: +{more} tokens, "
            f"{bytes_text(branch.own_bytes)}; bits equal:[/] {console.yes_no(branch.is_equal)}"
        )
        _add_turns(at, branch.turns)
    if story.mishap is not None:
        mishap = story.mishap
        at = root.add("[bold]mishap[/] [dim]restored on the same lane[/]")
        _add_turns(at, [Turn("user", mishap.request)])
        _add_turns(at, mishap.failed)
        kept = at.add(f"[dim]the failure kept in the context:[/] {_brought(mishap.is_done_kept)}")
        _add_turns(kept, mishap.kept)
        again = at.add(
            f"[dim]taken back, {mishap.dropped_tokens} tokens that never were; called again:[/] "
            f"{_brought(mishap.is_done)}"
        )
        _add_turns(again, mishap.retried)
    return root


def _add_turns(at: Tree, turns: Sequence[Turn]) -> None:
    for turn in turns:
        text = f"[{_STYLES[turn.role]}]{turn.role:>9}[/]  {escape(turn.text)}"
        at.add(text if turn.truth is None else f"{text}  {_mark(turn.text, turn.truth)}")


def _brought(is_done: bool) -> str:
    return "[green]brought[/]" if is_done else "[red]not brought[/]"


def _mark(said: str, truth: str) -> str:
    return "[green]right[/]" if said == truth else f"[red]wrong[/]: {escape(truth)}"


def steps_table(steps: Sequence[Step], title: str, equal: str) -> Table:
    """What was done, at which position, how long it took, what it moved, whether bits agree."""
    rows = [
        [
            step.what,
            f"{step.position:,}",
            seconds_text(step.seconds),
            bytes_text(step.moved_bytes),
            console.yes_no(step.is_equal),
        ]
        for step in steps
    ]
    return console.table(title, ("", ">position", ">time", ">bytes moved", equal), rows)


def _show_process(story: Story) -> None:
    found = story.process
    assert found is not None, "the story is complete"
    screen = console.screen()
    screen.print("[bold]3. Another process goes on from branch recall, from disk[/]")
    screen.print(
        f"   {bytes_text(found.saved_bytes)} in the store; engine loaded in "
        f"{seconds_text(found.loaded_s)}, state restored and checked in\n   "
        f"{seconds_text(found.restored_s)}; digest equal: {console.yes_no(found.is_equal)}"
    )
    screen.print(f"   [cyan]     user[/]  {escape(found.question)}")
    screen.print(
        f"   [bold]assistant[/]  {escape(found.answer)}  [dim]{seconds_text(found.answered_s)}; "
        f"same as here:[/] {console.yes_no(found.answer == found.answer_here)}\n"
    )


def _ablation(story: Story) -> Table:
    rows: list[list[str]] = []
    for kind, (*right, asked) in story.scores.items():
        rows.append([f"[bold]{kind}[/]", *(f"[bold]{n} of {asked} right[/]" for n in right)])
        of_kind = [a for a in story.answers if a.kind == kind]
        rows += [_asked(a) for a in of_kind[:SHOWN]]
    columns = ("the truth", "full restore", "KV only", "state only")
    return console.table("", columns, rows)


def _asked(asked: Asked) -> list[str]:
    subject = asked.truth.partition(" in ")[0]
    answers = [
        f"[{'green' if said == asked.truth else 'red'}]{escape(_brief(said, subject))}[/]"
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
