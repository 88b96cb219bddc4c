"""The demo's findings as tables.

IS: Story -> what a person reads. IS NOT: measurement (demo). Called by: demo.
"""

from __future__ import annotations

from flashrt.commands import console
from flashrt.commands.demo_story import Story
from flashrt.view.units import bytes_text, seconds_text, significant


def show(story: Story) -> None:
    """Print everything on stdout."""
    screen = console.screen()
    rate = significant(story.prompt_tokens / story.prefill_s)
    screen.print(
        f"\n[bold]An agent's prompt of {story.prompt_tokens:,} tokens[/], prefilled in "
        f"{seconds_text(story.prefill_s)} ({rate} tokens/s, {story.device}); its capsule: "
        f"{bytes_text(story.capsule_bytes)} in {seconds_text(story.snapshot_s)}.\n"
    )
    title = f"Three branches from it, each a turn of {story.turn_tokens} tokens and an answer"
    rows = [
        [
            step.what,
            f"{step.position:,}",
            seconds_text(step.seconds),
            bytes_text(step.moved_bytes),
            console.yes_no(step.is_equal),
        ]
        for step in story.steps
    ]
    columns = ("", ">position", ">time", ">bytes moved", "bits equal to a cold prefill")
    screen.print(console.table(title, columns, rows))
    _show_starts(story)
    _show_ablation(story)
    shared = story.tree_bytes_alone / story.tree_bytes
    screen.print(
        f"Four capsules take {bytes_text(story.tree_bytes)}; without shared rows "
        f"{bytes_text(story.tree_bytes_alone)} ({significant(shared)} times as much)."
    )
    screen.print(
        f"A capsule file ({bytes_text(story.file_bytes)}), saved and loaded: bits equal: "
        f"{console.yes_no(story.file_agrees)}."
    )
    screen.print(f"Pictures: {', '.join(story.files)}")
    failed = [claim for claim, is_true in story.checks.items() if not is_true]
    for claim in failed:
        screen.print(f"[bold red]FAILED[/] {claim}")
    if not failed:
        took = seconds_text(story.seconds)
        screen.print(f"[bold green]All {len(story.checks)} checks passed[/] in {took}.")


def _show_starts(story: Story) -> None:
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
        for start in story.starts
    ]
    title = f"Time to first token (TTFT) of a turn of {story.turn_tokens} tokens after a prompt"
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


def _show_ablation(story: Story) -> None:
    screen = console.screen()
    if story.rows_only_token is not None:
        outcome = f"[bold]diverges at token {story.rows_only_token}[/]"
    elif story.rows_only_differs:
        outcome = f"has other logits, though the first {story.answer_tokens} greedy tokens agree"
    else:
        outcome = "[bold red]does not diverge[/]"
    screen.print(
        f"A KV-only restore (rows without recurrent state), the same turn, then greedy decode: "
        f"{outcome}.\nA full restore, the same turn, {story.answer_tokens} greedy tokens: equal to "
        f"cold: {console.yes_no(story.full_agrees)}."
    )
