"""The findings of the demo on token ids as tables.

IS: Story -> what a person reads. IS NOT: measurement (demo_bits). Called by: demo.
"""

from __future__ import annotations

from flashrt.commands import console
from flashrt.commands.demo.bits_story import Story
from flashrt.commands.demo.report import show_outcome, show_starts, steps_table
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
    screen.print(steps_table(story.steps, title, "bits equal to a cold prefill"))
    show_starts(story.starts, story.turn_tokens)
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
    show_outcome(story.checks, story.seconds)


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
