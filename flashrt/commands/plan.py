"""`flashrt plan`: where everything will lie in the arena, without loading a weight.

IS: config.json -> model -> plan, as a table, JSON or an SVG map; of language models and robot
policies. IS NOT: the planner (core.planner).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flashrt.backends.cpu.device import CpuDevice
from flashrt.base.errors import CheckpointError, PlanError
from flashrt.base.messages import listed
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions
from flashrt.commands.console import Part, styled
from flashrt.core.planner import ArenaPlan, Slot
from flashrt.engine import actions, engine, tokens
from flashrt.engine.engine import Layout, PoolDefault
from flashrt.load import kv_dtype_of, model_in
from flashrt.models import Model, model_for, promises_draft_head
from flashrt.models.actions import ActionModel
from flashrt.models.model import USUAL_PREFILL_ROWS
from flashrt.models.policies import is_policy, policy_for
from flashrt.models.released import RELEASED
from flashrt.view.arena_map import arena_map, bands, busiest, scratch_nbytes, tape_name, widest
from flashrt.view.svg import save_svg
from flashrt.view.units import bytes_text
from flashrt.weights.checkpoint import Checkpoint, read_json
from flashrt.weights.folder import CONFIG_FILE
from flashrt.weights.formats.quantisation import quantisation_of
from flashrt.weights.loader import check_sources
from flashrt.weights.opening import has_config_alone, open_weights
from flashrt.weights.quantising import quantising
from flashrt.weights.random_checkpoint import shape_config


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


def policy_of(checkpoint: Checkpoint, options: EngineOptions) -> tuple[ActionModel, Checkpoint]:
    """The model that `flashrt.load_policy` would build, and the checkpoint as its rules name it,
    by headers and processor files: no tokenizer is looked for.

    Raises CheckpointError or PlanError where `flashrt.load_policy` would, for all but that.
    """
    policy, source = policy_for(checkpoint, options.weights)
    check_sources(policy.weights, source)
    return policy, source


def lay_out(model: Model, options: EngineOptions) -> Layout:
    """What `flashrt.load` would allocate on the CPU. Raises PlanError."""
    return _laid_out(model, options, tokens.POOL_DEFAULT)


def lay_out_policy(policy: ActionModel, options: EngineOptions) -> Layout:
    """What `flashrt.load_policy` would allocate on the CPU. Raises PlanError."""
    return _laid_out(policy, options, actions.POOL_DEFAULT)


def _laid_out(model: Model, options: EngineOptions, pool_default: PoolDefault) -> Layout:
    storage_of = CpuDevice().storage  # arithmetic only: no kernel is built, no memory is mapped
    return engine.lay_out(
        model, storage_of, pool_default=pool_default, lanes=options.lanes,
        pool_bytes=options.pool_bytes,
    )  # fmt: skip


def _layout(
    checkpoint: Path | None, shape: str | None, options: EngineOptions, of_tokens: Sequence[str]
) -> tuple[Layout, bool]:
    """Of a named shape, of a checkpoint, or of a directory with nothing but a config.json; and
    whether it is a robot policy's.
    """
    if (checkpoint is None) == (shape is None):
        given = "not both" if shape is not None else "one of them"
        raise CheckpointError(f"give a checkpoint directory or --shape NAME, {given}")
    if shape is not None:
        config: Mapping[str, object] = RELEASED.get(shape) or shape_config(shape)
        return lay_out(_described(config, options), options), False
    root = checkpoint or Path()
    if has_config_alone(root):
        config = read_json(root / CONFIG_FILE)
        if quantisation_of(root, config) is not None:
            raise CheckpointError(
                f"{root}: config.json describes quantised weights; which of them are is written in "
                "the weight files: fetch these too, to plan"
            )
        if not is_policy(config):  # a policy's sizes are those of its tensors
            return lay_out(_described(config, options), options), False
    opened = open_weights(root)
    if not is_policy(opened.config):
        return lay_out(model_of(opened, options), options), False
    if of_tokens:
        raise PlanError(
            f"{root} is a robot policy; for language models alone are {listed(of_tokens)}: leave "
            "them out"
        )
    return lay_out_policy(policy_of(opened, options)[0], options), True


def _described(config: Mapping[str, object], options: EngineOptions) -> Model:
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
    of_tokens: Sequence[str] = (),
) -> int:
    """The command. `of_tokens`: options that the user gave and that mean nothing for a policy.

    Raises PlanError for a policy with any of these.
    """
    planned, is_of_policy = _layout(checkpoint, shape, options, of_tokens)
    title = f"Arena of {shape or (checkpoint and checkpoint.name)}"
    if is_of_policy:
        if n_rows := engine.max_positions_of(planned.model):
            title += f", {n_rows:,} rows"
        tape = busiest(planned.arena, planned.tapes)
        words = {
            "step": "tick or a plan",
            "io": "observations, and what is made of them and is no state",
            "name": tape_name(tape),
        }
    else:
        title += f", {options.max_positions:,} positions"
        tape, words = widest(planned.tapes), {}
    if svg is not None:
        save_svg(arena_map(planned.arena, tape, title, **words), svg)
    if as_json:
        console.print_json(_document(planned, svg))
        return 0
    screen = console.screen()
    stored = f"{title}, as the CPU stores it"
    screen.print(console.table(stored, _COLUMNS, _rows(planned.arena)))
    arena = planned.arena
    screen.print(console.table("Scratch by tape", _TAPE_COLUMNS, _tapes(planned)))
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


_TAPE_COLUMNS = ("tape", ">launches", ">bytes")
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


def _tapes(planned: Layout) -> list[list[Part]]:
    return [
        [
            tape_name(tape),
            f"{len(tape.launches):,}",
            f"{scratch_nbytes(planned.arena, tape):,}",
        ]
        for tape in planned.tapes
    ]


def _document(planned: Layout, svg: Path | None) -> dict[str, object]:
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
                "scratch_bytes": scratch_nbytes(arena, tape),
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
