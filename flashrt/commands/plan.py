"""`flashrt plan`: where everything will lie in the arena, without loading a weight.

IS: config.json -> model -> plan, as a table, JSON or an SVG map. IS NOT: the planner
(core.planner).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flashrt.backends.cpu.device import CpuDevice
from flashrt.base.errors import CheckpointError
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions
from flashrt.commands.console import Part, styled
from flashrt.core.planner import ArenaPlan, Band, Slot, plan_arena, plan_band
from flashrt.core.region import Region, Role
from flashrt.core.tape import Tape
from flashrt.engine.tokens import POOL_DEFAULT
from flashrt.load import kv_dtype_of, model_in
from flashrt.models import Model, model_for, promises_draft_head
from flashrt.models.model import USUAL_PREFILL_ROWS, tapes_of
from flashrt.models.released import RELEASED
from flashrt.view.arena_map import arena_map, bands, widest
from flashrt.view.svg import save_svg
from flashrt.view.units import bytes_text
from flashrt.weights.checkpoint import Checkpoint, read_json
from flashrt.weights.folder import CONFIG_FILE
from flashrt.weights.formats.quantisation import quantisation_of
from flashrt.weights.loader import check_sources
from flashrt.weights.opening import has_config_alone, open_weights
from flashrt.weights.quantising import quantising
from flashrt.weights.random_checkpoint import shape_config


@dataclass(frozen=True, slots=True)
class Planned:
    """A model with its arena and weight band laid out, and no memory behind them."""

    model: Model
    arena: ArenaPlan
    weights: Band
    tapes: tuple[Tape, ...]


def model_of(checkpoint: Checkpoint, options: EngineOptions) -> Model:
    """The model that `flashrt.load` would build; from the headers of the weight files.

    Raises CheckpointError where `flashrt.load` would, for the config or for a tensor.
    """
    weights = options.weights
    source = checkpoint if weights is None else quantising(checkpoint, weights)
    model = model_in(
        source,
        options.prefill_rows or USUAL_PREFILL_ROWS,
        max_positions=options.max_positions,
        kv_dtype=options.kv_dtype,
        draft=options.draft,
    )
    check_sources(model.weights, source)
    return model


def lay_out(model: Model, options: EngineOptions) -> Planned:
    """What `flashrt.load` would allocate on the CPU. Raises PlanError."""
    storage = CpuDevice().storage  # arithmetic only: no kernel is built, no memory is mapped
    tapes = tapes_of(model, options.lanes)
    pool_bytes = options.pool_bytes
    if pool_bytes is None:
        fixed, rows = (plan_band(_of(model, r), storage).nbytes for r in (Role.FIXED, Role.ROWS))
        pool_bytes = POOL_DEFAULT.fixed * fixed + POOL_DEFAULT.lanes * rows
    arena = plan_arena(
        model.lane_regions, tapes, storage, lanes=options.lanes, pool_nbytes=pool_bytes
    )
    weights = plan_band([rule.region for rule in model.weights], storage)
    return Planned(model, arena, weights, tapes)


def _model(checkpoint: Path | None, shape: str | None, options: EngineOptions) -> Model:
    """Of a named shape, of a checkpoint, or of a directory with nothing but a config.json."""
    if (checkpoint is None) == (shape is None):
        given = "not both" if shape is not None else "one of them"
        raise CheckpointError(f"give a checkpoint directory or --shape NAME, {given}")
    if shape is not None:
        config: Mapping[str, object] = RELEASED.get(shape) or shape_config(shape)
    else:
        root = checkpoint or Path()
        if not has_config_alone(root):
            return model_of(open_weights(root), options)
        config = read_json(root / CONFIG_FILE)
        if quantisation_of(root, config) is not None:
            raise CheckpointError(
                f"{root}: config.json describes quantised weights; which of them are is written in "
                "the weight files: fetch these too, to plan"
            )
    return model_for(
        config,
        max_positions=options.max_positions,
        kv_dtype=kv_dtype_of(options.kv_dtype),
        has_draft_head=promises_draft_head(config) if options.draft is None else options.draft,
        prefill_rows=options.prefill_rows or USUAL_PREFILL_ROWS,
    )


def plan(
    checkpoint: Path | None,
    shape: str | None,
    options: EngineOptions,
    svg: Path | None,
    as_json: bool,
) -> int:
    """The command."""
    planned = lay_out(_model(checkpoint, shape, options), options)
    title = (
        f"Arena of {shape or (checkpoint and checkpoint.name)}, {options.max_positions:,} positions"
    )
    if svg is not None:
        save_svg(arena_map(planned.arena, widest(planned.tapes), title), svg)
    if as_json:
        console.print_json(_document(planned, svg))
        return 0
    screen = console.screen()
    stored = f"{title}, as the CPU stores it"
    screen.print(console.table(stored, _COLUMNS, _rows(planned.arena)))
    arena = planned.arena
    saved = arena.scratch_unshared_nbytes - arena.scratch.nbytes
    screen.print(
        f"arena    {arena.nbytes:,} bytes ({bytes_text(arena.nbytes)}), one allocation\n"
        f"weights  {planned.weights.nbytes:,} bytes ({bytes_text(planned.weights.nbytes)}), "
        f"{len(planned.weights.slots)} regions in an allocation of their own\n"
        f"scratch  {bytes_text(arena.scratch.nbytes)} serves {len(planned.tapes)} tapes; without "
        f"overlap {bytes_text(arena.scratch_unshared_nbytes)}: {bytes_text(saved)} saved"
    )
    if svg is not None:
        screen.print(f"map      {svg}")
    return 0


_COLUMNS = ("region", "shape", "dtype", "~layout", ">offset", ">bytes")


def _rows(arena: ArenaPlan) -> list[list[Part]]:
    """A line per band, which is named by its role, and below it one per region."""
    rows: list[list[Part]] = []
    for _, label, band in bands(arena):
        name, nbytes = styled(label, "bold"), styled(f"{band.nbytes:,}", "bold")
        rows.append([name, "", "", "", f"{band.offset:,}", nbytes])
        for slot in band.slots:
            region = slot.region
            shape = "x".join(map(str, region.shape))
            place = [f"{slot.offset:,}", f"{slot.storage.nbytes:,}"]
            rows.append([region.name, shape, region.dtype, region.layout, *place])
    return rows


def _document(planned: Planned, svg: Path | None) -> dict[str, object]:
    arena = planned.arena
    return {
        "model": planned.model.name,
        "arena_bytes": arena.nbytes,
        "weights_bytes": planned.weights.nbytes,
        "scratch_bytes": arena.scratch.nbytes,
        "scratch_unshared_bytes": arena.scratch_unshared_nbytes,
        "bands": [
            {
                "band": label,
                "role": role,
                "offset": band.offset,
                "bytes": band.nbytes,
                "regions": [_region(slot) for slot in band.slots],
            }
            for role, label, band in bands(arena)
        ],
        "tapes": [
            {
                "phase": tape.phase,
                "rows": tape.rows,
                "launches": len(tape.launches),
                "scratch": [_region(slot) for slot in arena.tapes[tape.phase, tape.rows]],
            }
            for tape in planned.tapes
        ],
        "svg": None if svg is None else str(svg),
    }


def _region(slot: Slot) -> dict[str, object]:
    region = slot.region
    return {
        "name": region.name,
        "shape": region.shape,
        "dtype": region.dtype,
        "layout": region.layout,
        "offset": slot.offset,
        "bytes": slot.storage.nbytes,
    }


def _of(model: Model, role: Role) -> list[Region]:
    return [region for region in model.lane_regions if region.role is role]
