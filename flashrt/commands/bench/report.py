"""The documents of the benches as tables: sessions, lanes, servers, drafting, resuming, robots.

IS: figures -> what a person reads. IS NOT: measurement, nor pictures (view).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flashrt.commands import console
from flashrt.commands.bench.document import Document
from flashrt.commands.bench.peer_load import WHO
from flashrt.commands.console import Screen, Table, styled
from flashrt.view.units import bytes_text, percent_text, rate_text, seconds_text, significant

BUSY = 0.5  # load average before a run, beyond which a report warns
_BAR = 60  # characters of the longest bar
_QUANTILES = ("p50", "p99", "p999", "max")
Column = tuple[str, str, Callable[[Any], str]]  # header, key of a row, how it reads


def _count(value: int) -> str:
    return f"{value:,}"


def _times(value: float) -> str:
    return f"{significant(value)} x"


def _fraction(value: float | None) -> str:
    return "-" if value is None else percent_text(value)


def _table(title: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> Table:
    lines = [[text(row[key]) for _, key, text in columns] for row in rows]
    return console.table(title, [f">{header}" for header, _, _ in columns], lines)


def _opening(screen: Screen, document: Document) -> None:
    """Model, machine and date; a warning if others were using the machine."""
    screen.print(
        "\n", styled(document["model"], "bold"),
        f" ({bytes_text(document['weights_bytes'])} of weights) on "
        f"{document['device']}: {document['machine']['processor']}, {document['threads']} threads, "
        f"{document['date']}",
    )  # fmt: skip
    if document["load_average"] > BUSY:
        screen.print(
            f"The machine was busy before this run (load average {document['load_average']:.1f}): "
            "figures are lower than they would be.",
            style="yellow",
        )


def _notes(screen: Screen, *notes: str) -> None:
    screen.print("\n".join(notes), style="dim")


# -- sessions -------------------------------------------------------------------------------------

_SPEED: tuple[Column, ...] = (
    ("tokens", "tokens", _count),
    ("prefill tok/s", "prefill_tokens_per_s", significant),
    ("of FMA peak", "prefill_of_fma_peak", _fraction),
    ("decode tok/s", "decode_tokens_per_s", significant),
    ("bytes per token", "decode_bytes_per_token", bytes_text),
    ("of streaming", "decode_of_streaming", _fraction),
    ("ITL p50", "inter_token_p50_s", seconds_text),
    ("ITL p99", "inter_token_p99_s", seconds_text),
)
_STARTS: tuple[Column, ...] = (
    ("tokens", "tokens", _count),
    ("TTFT cold", "ttft_cold_s", seconds_text),
    ("TTFT warm", "ttft_warm_s", seconds_text),
    ("cold / warm", "ttft_ratio", _times),
    ("TTFT of a turn", "ttft_turn_s", seconds_text),
    ("in ITL", "ttft_turn_of_itl", _times),
)
_RESTORES: tuple[Column, ...] = (
    ("tokens", "tokens", _count),
    ("restore", "restore_s", seconds_text),
    ("bytes", "restore_bytes", bytes_text),
    ("bytes/s", "restore_bytes_per_s", rate_text),
    ("of memcpy", "restore_of_memcpy", _fraction),
    ("to an ancestor", "restore_ancestor_s", seconds_text),
    ("bytes", "restore_ancestor_bytes", bytes_text),
)
_SNAPSHOTS: tuple[Column, ...] = (
    ("tokens", "tokens", _count),
    ("snapshot", "snapshot_s", seconds_text),
    ("bytes", "snapshot_bytes", bytes_text),
    ("snapshot of a turn", "snapshot_turn_s", seconds_text),
    ("bytes", "snapshot_turn_bytes", bytes_text),
)


def show_session(document: Document) -> None:
    """Print everything on stdout."""
    screen, limits, rows = console.screen(), document["limits"], document["rows"]
    _opening(screen, document)
    if limits["fma_flops"] is not None:
        screen.print(
            f"limits in this run: {significant(limits['fma_flops'] / 1e9)} GFLOP/s multiply-add, "
            f"{rate_text(limits['read_bytes_per_s'])} reading the weights "
            f"({bytes_text(limits['streamed_bytes'])} in {seconds_text(limits['stream_s'])}), "
            f"{rate_text(limits['memcpy_bytes_per_s'])} memcpy of a large range"
        )
    ahead, back = document["rollback_tokens"]
    rollback: Column = (f"back {back} of {ahead}", "rollback_s", seconds_text)
    restores = "Restore: everything; to an ancestor, whose rows are there"
    snapshots = "Snapshot: everything; of a turn. Rollback, with replay"
    screen.print()
    screen.print(_table("Prefill from empty, decode at that position", _SPEED, rows))
    screen.print(_table("Time to first token of a turn after a prompt", _STARTS, rows))
    screen.print(_table(restores, _RESTORES, rows))
    screen.print(_table(snapshots, (*_SNAPSHOTS, rollback), rows))
    if document["peer"] is not None:
        screen.print(_against(document))
        if problem := document["peer"]["load"].get("problem"):
            _notes(screen, f"Loading was not compared: {problem}")
    _notes(
        screen,
        "Medians. Decode: tokens over the time of all of them; ITL: inter-token latency.",
        f"Warm: full restore into a lane that holds another text, {document['turn_tokens']} "
        "tokens, first token.",
        f"TTFT of a turn: after a reply of {document['reply_tokens']} tokens, "
        f"{document['short_turn_tokens']} tokens of the user, first token; in ITL p50 of that "
        "position.",
        "Restore of memcpy: the same bytes by libc's memcpy, taking turns, over the restore.",
    )
    exact = all(row["is_exact"] for row in rows)
    screen.print("Digests equal after every restore: ", console.yes_no(exact))


_COMPARED = (  # key, what, whether more is better
    ("prefill_tokens_per_s", "prefill tok/s", True),
    ("decode_tokens_per_s", "decode tok/s", True),
    ("ttft_warm_s", "TTFT warm", False),
)


_LOADING: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("load_s", "load, first logits", seconds_text),
    ("peak_bytes", "peak memory of that", bytes_text),
)


def _against(document: Document) -> Table:
    """Ours beside the peer's, at every length."""
    rows, peer = [], document["peer"]
    for key, what, is_rate in _COMPARED:
        for row in document["rows"]:
            theirs, ours = peer[key][row["tokens"]], row[key]
            times = ours / theirs if is_rate else theirs / ours
            text = significant if is_rate else seconds_text
            rows.append([what, _count(row["tokens"]), text(theirs), text(ours), _times(times)])
    if "problem" not in (load := peer["load"]):
        for key, what, shown in _LOADING:
            ours, theirs = (load[who][key] for who in WHO)
            rows.append([what, "", shown(theirs), shown(ours), _times(theirs / ours)])
    columns = ("", ">tokens", ">llama.cpp", ">flashrt", ">ratio, above 1 is better")
    return console.table(f"In turns with {peer['name']}, the same file", columns, rows)


# -- lanes ----------------------------------------------------------------------------------------

_LANES: tuple[Column, ...] = (
    ("lanes", "lanes", _count),
    ("tok/s in all", "tokens_per_s", significant),
    ("of a lane", "lane_tokens_per_s", significant),
    ("of one lane alone", "of_one", _times),
    ("ITL p50", "inter_token_p50_s", seconds_text),
    ("ITL p99", "inter_token_p99_s", seconds_text),
)
_BESIDE: tuple[Column, ...] = (
    ("llama.cpp in all", "peer_tokens_per_s", significant),
    ("speed ratio", "of_peer", _times),
)


def show_lanes(document: Document) -> None:
    """Print everything on stdout."""
    screen, rows, columns = console.screen(), document["rows"], _LANES
    if (peer := document["peer"]) is not None:
        columns = (*_LANES, *_BESIDE)
        theirs = [peer["tokens_per_s"][row["lanes"]] for row in rows]
        rows = [
            {**row, "peer_tokens_per_s": rate, "of_peer": row["tokens_per_s"] / rate}
            for row, rate in zip(rows, theirs, strict=True)
        ]
    best = document["best_of"]
    _opening(screen, document)
    screen.print()
    title = f"Decode of lanes side by side, each after a prompt of {document['prompt_tokens']:,}"
    screen.print(_table(title, columns, rows))
    screen.print(_newcomer(document["newcomer"]))
    screen.print(
        f"Best of {best['forks']}, {best['tokens']} tokens each from a prompt of "
        f"{best['prompt_tokens']:,}: {seconds_text(best['all_s'])}, of which "
        f"{seconds_text(best['fork_s'])} to fork; one of them alone: "
        f"{seconds_text(best['one_s'])}; so {_times(best['of_one'])} the time of one\n"
    )
    _notes(
        screen,
        f"{document['decoded_tokens']} tokens of each lane, {document['repeats']} times, counts in "
        "turns. ITL: inter-token latency. Best of: medians.",
        *([f"{peer['name']}: a batch with a token of each sequence; in turns, the same file."]
          if peer else ()),
    )  # fmt: skip
    exact = console.yes_no(document["is_exact"])
    screen.print("A lane says beside others what it says alone: ", exact)


def _newcomer(newcomer: dict[str, Any]) -> Table:
    ways = (
        ("nobody comes", newcomer["before"]),
        (f"in pieces of {newcomer['piece_tokens']}, beside them", newcomer["pieces"]),
        ("in one prefill, they wait", newcomer["blocking"]),
    )
    lines = [
        [
            what,
            str(way.get("steps", "")),
            seconds_text(way["inter_token_p50_s"]),
            seconds_text(way["inter_token_p99_s"]),
            seconds_text(way["first_token_s"]) if "first_token_s" in way else "",
        ]
        for what, way in ways
    ]
    title = f"A prompt of {newcomer['tokens']} tokens comes while {newcomer['lanes']} lanes decode"
    columns = ("it is fed", ">tokens of each", ">ITL p50", ">ITL p99", ">TTFT of the newcomer")
    return console.table(title, columns, lines)


# -- servers --------------------------------------------------------------------------------------

_RATIOS = (  # key, what, whether more is better
    ("tokens_per_s", "tok/s in all", True),
    ("ttft_cold_p50_s", "TTFT cold, p50", False),
    ("ttft_warm_p50_s", "TTFT warm, p50", False),
    ("ttft_warm_p99_s", "TTFT warm, p99", False),
    ("inter_token_p50_s", "ITL p50", False),
    ("inter_token_p99_s", "ITL p99", False),
)


def _maybe_seconds(value: float | None) -> str:
    return "-" if value is None else seconds_text(value)


def _errors(value: dict[str, int]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(value.items())) or "none"


_SERVE: tuple[Column, ...] = (
    ("clients", "clients", _count),
    ("tok/s in all", "tokens_per_s", significant),
    ("TTFT cold p50", "ttft_cold_p50_s", _maybe_seconds),
    ("p99", "ttft_cold_p99_s", _maybe_seconds),
    ("TTFT warm p50", "ttft_warm_p50_s", _maybe_seconds),
    ("p99", "ttft_warm_p99_s", _maybe_seconds),
    ("ITL p50", "inter_token_p50_s", _maybe_seconds),
    ("p99", "inter_token_p99_s", _maybe_seconds),
    ("cached", "cached_fraction", _fraction),
    ("requests", "requests", _count),
    ("errors", "errors", _errors),
)
_MEMORY: tuple[Column, ...] = (
    ("clients", "clients", _count),
    ("settled", "memory_settled_bytes", bytes_text),
    ("end", "memory_end_bytes", bytes_text),
    ("growth", "memory_growth", lambda value: f"{value:+.1%}"),
)


def show_serve(document: Document) -> None:
    """Print everything on stdout."""
    screen, peer = console.screen(), document["peer"]
    _opening(screen, document)
    names = ["flashrt", *([peer] if peer else [])]
    by_name = {n: [row for row in document["rows"] if row["server"] == n] for n in names}
    for name in names:
        screen.print()
        screen.print(_table(f"{name} under load", _SERVE, by_name[name]))
    for name in names:
        screen.print(_table(f"Memory of {name}", _MEMORY, by_name[name]))
    if peer:
        screen.print(_beside(*by_name.values()))
    _notes(
        screen,
        f"Clients that ask again at once; {document['repeats']} times {document['seconds_each']:g} "
        f"s each, counts and servers in turns; {document['lanes']} lanes of "
        f"{document['positions']:,} positions.",
        f"A conversation: a system message of its own, {document['turns']} turns of up to "
        f"{document['most_tokens']} tokens. TTFT: cold in its first turn, warm in later ones. "
        "cached: of the prompts of later turns.",
        "Settled: a quarter into the first run of a count; states are kept in host memory until "
        "that is full (--host-bytes). Times are those of the clients, which have the same machine.",
    )
    if document["host_bytes"] is not None:  # else what it keeps may still grow, as it is to
        flat = all(row["is_flat"] for row in by_name["flashrt"])
        screen.print("flashrt's memory grew by no more than 2 %: ", console.yes_no(flat))


def _beside(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Table:
    """Ratios, above 1 where flashrt is better."""
    lines = []
    for mine, other in zip(ours, theirs, strict=True):
        cells = [_count(mine["clients"])]
        for key, _, is_rate in _RATIOS:
            better, worse = (mine[key], other[key]) if is_rate else (other[key], mine[key])
            cells.append(_times(better / worse) if better and worse else "-")
        lines.append(cells)
    columns = (">clients", *(f">{what}" for _, what, _ in _RATIOS))
    return console.table("Ratios, above 1 is better for flashrt", columns, lines)


# -- drafting -------------------------------------------------------------------------------------


def show_draft(document: Document) -> None:
    """Print everything on stdout."""
    screen = console.screen()
    _opening(screen, document)
    for row in document["rows"]:
        screen.print()
        screen.print(_costs(row, document["replays"]))
        screen.print(_speeds(row, document["repeats"]))
    _notes(
        screen,
        "A replay: one verb of the engine from the same boundary, taking turns, with what the host "
        "writes and reads.",
        "Forced: true tokens were written over the drafts, each with the probability given; the "
        "drafts were still made.",
        "In brackets: share of all drafted tokens that were accepted; one that disagrees rejects "
        "those after it. auto learns within each run, from nothing.",
    )
    exact = all(row["is_exact"] for row in document["rows"])
    screen.print("Tokens of every run equal those of draft=0: ", console.yes_no(exact))


def _costs(row: dict[str, Any], replays: int) -> Table:
    cells = [
        [c["what"], str(c["rows"]), seconds_text(c["median_s"]), f"{c['of_decode']:.2f} x"]
        for c in row["costs"]
    ]
    title = f"One replay at position {row['position']:,}, median of {replays}"
    return console.table(title, ("", ">rows", ">time", ">of a decode"), cells)


def _speeds(row: dict[str, Any], repeats: int) -> Table:
    """A line per agreement, a column per draft length."""
    speeds = row["speeds"]
    lengths = list(dict.fromkeys(s["draft"] for s in speeds))
    columns = ("agreement", *(f">{f'draft={n}' if n != 'auto' else n}" for n in lengths))
    lines = [
        [_agreement(forced), *(_speed(s) for s in speeds if s["forced"] == forced)]
        for forced in dict.fromkeys(s["forced"] for s in speeds)
    ]
    title = (
        f"Tokens/s, greedy, {row['tokens']} tokens from position {row['position']:,}, "
        f"median of {repeats}"
    )
    return console.table(title, columns, lines)


def _agreement(forced: float | None) -> str:
    return "as the model agrees" if forced is None else f"forced: {forced:.1f}"


def _speed(speed: dict[str, Any]) -> str:
    text, share = significant(speed["tokens_per_s"]), speed["acceptance"]
    return text if share is None else f"{text} ({percent_text(share)})"


# -- resuming -------------------------------------------------------------------------------------

_RESUME: tuple[Column, ...] = (
    ("prompt", "tokens", _count),
    ("capsule", "nbytes", bytes_text),
    ("cold", "cold_s", seconds_text),
    ("from disk, cached", "cached_s", seconds_text),
    ("evicted", "evicted_s", seconds_text),
    ("faster", "faster", lambda value: f"{value:,.0f} x"),
    ("restore", "restore_bytes_per_s", rate_text),
    ("of a file read", "of_read", percent_text),
    ("of a refill", "of_refill", percent_text),
    ("save", "save_s", seconds_text),
)


def show_resume(document: Document) -> None:
    """Print everything on stdout."""
    screen = console.screen()
    _opening(screen, document)
    screen.print()
    screen.print(_table("First token after a restart", _RESUME, document["rows"]))
    _notes(
        screen,
        f"Medians of {document['repeats']}; cold and save once; restore, file read and refill: "
        f"of {document['turns']}, taking turns.",
        "From disk: open the store, find the prefix, read, check every checksum, restore, sample.",
        "Cached: the files are in the page cache. Evicted: the kernel was asked to forget them.",
        "Of a file read, of a refill: beside reading the same files into new memory, and into "
        f"memory that was touched before. The store was in {document['folder']}.",
    )


# -- control loops --------------------------------------------------------------------------------

_TIMES = (
    ("tick: observation to action", "latency"),
    ("plan, in the slack of every chunk's last tick", "planning"),
    ("tick begun late by", "lateness"),
    ("restore", "restore"),
    ("snapshot", "snapshot"),
    ("fork onto another lane", "fork"),
)


def show_policy(document: Document) -> None:
    """Everything but the picture."""
    screen, sizes = console.screen(), document["policy"]
    _opening(screen, document)
    screen.print(
        f"{document['ticks']:,} ticks at {document['hz']:g} Hz; executes {sizes['n_action_steps']} "
        f"of {sizes['chunk_size']} actions planned in {sizes['num_inference_steps']} Euler steps; "
        f"a capsule is {bytes_text(sizes['capsule_bytes'])}\n"
    )
    lines = [[label, *_quantiles(document, what)] for label, what in _TIMES]
    for row in document["rewind"]:
        lines.append([f"rewind by {row['seconds']:g} s", *_quantiles(row, "rewind")])
    screen.print(console.table("Times", ("", ">p50", ">p99", ">p99.9", ">max"), lines))
    edges, counts = document["histogram"]["edges_s"], document["histogram"]["counts"]
    screen.print("Latency of ticks", style="bold")
    for low, count, bar in zip(edges[:-1], counts, bars(counts), strict=True):
        screen.print(f"{seconds_text(low):>8} {bar} {count or ''}")
    screen.print()
    frozen = ", ".join(f"{document[n]} {n}" for n in ("allocations", "compilations", "captures"))
    screen.print(
        f"{document['overruns']} instants left out, {document['misses']} actions later than the "
        f"next instant; {frozen}"
    )
    exact = console.yes_no(document["is_exact"])
    screen.print("restored and rewound states go on to the bit: ", exact)
    for name, (limit, is_met) in document["targets"].items():
        what, quantile, _ = name.split("_")
        label = f"{what} {quantile}: {seconds_text(document[name])}, under {seconds_text(limit)}: "
        screen.print(label, console.yes_no(is_met))


def bars(counts: Sequence[int]) -> list[str]:
    """A bar per count; whatever occurred is seen."""
    most = max(counts, default=0)
    return ["█" * max(round(_BAR * n / most), 1) if n else "" for n in counts]


def _quantiles(document: Document, what: str) -> list[str]:
    return [seconds_text(document[f"{what}_{name}_s"]) for name in _QUANTILES]
