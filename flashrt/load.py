"""Loading: a checkpoint directory and a device name -> an engine that hands out sessions.

IS: `flashrt.load`, the choice of backend, and the free list of lanes. IS NOT: planning or kernels.
Called by: users, cli.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashrt.backends.choose import DEVICES, PRECISIONS, Precision, open_backend
from flashrt.base.errors import LaneBusy, PlanError, PoolFull
from flashrt.capsule import file as blob
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.eviction import Budgets, make_room
from flashrt.capsule.lineage import Lane
from flashrt.core.backend import Backend, Bytes, Progress
from flashrt.core.region import DType
from flashrt.engine.admission import check_state
from flashrt.engine.tokens import Engine
from flashrt.models import Model, model_for
from flashrt.session.session import Session
from flashrt.store.spill import Spill
from flashrt.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from flashrt.text.tokenizer import Tokenizer

KvDType = Literal["bfloat16", "float32"]
__all__ = [
    "DEVICES",
    "KV_DTYPES",
    "PRECISIONS",
    "KvDType",
    "Precision",
    "SessionEngine",
    "load",
    "load_on",
    "open_backend",
]

DRAFT_HEAD_TENSOR, HEAD_TENSOR = "mtp.fc.weight", "lm_head.weight"
KV_DTYPES: tuple[KvDType, ...] = ("bfloat16", "float32")


class SessionEngine(Engine):
    """An engine with a free list of lanes. Returned by `flashrt.load`."""

    def __init__(self, *arguments: Any, tokenizer: Tokenizer | None, **options: Any) -> None:
        """See Engine; `tokenizer` is that of the checkpoint, if it has one."""
        super().__init__(*arguments, **options)
        self.tokenizer = tokenizer
        self._free = self.lanes[::-1]
        self.forgotten: list[Lane] = []  # lanes of sessions that were dropped without `close`
        self.capsules.shelf = Spill()
        self.budgets = Budgets()

    def session(self) -> Session:
        """An empty session on a free lane. Raises LaneBusy when there is none."""
        if not self._free:
            gc.collect()
        while self.forgotten:
            self.release(self.forgotten.pop())
        if not self._free:
            raise LaneBusy(f"all {len(self.lanes)} lanes are in use; close a session, or load more")
        lane = self._free.pop()
        self.capsules.reset(lane)
        self.forget_host_view(lane)
        return Session(self, lane)

    def load_capsule(self, path: str | os.PathLike[str]) -> Capsule:
        """A capsule from a file that `Capsule.save` wrote.

        Raises CapsuleError when the file is foreign, truncated or damaged, or its position lies
        beyond max_positions; PoolFull when there is no room. Nothing is changed then.
        """
        return self.with_room(lambda: blob.load(self.capsules, path, self._admit))

    def with_room(self, take: Callable[[], Capsule]) -> Capsule:
        """`take()`, waypoints giving way: they cost only speed, so drop them oldest first; then
        capsules, to slower tiers, as far as `budgets` allow.
        """
        while True:
            try:
                return take()
            except PoolFull:
                lane = max(self.lanes, key=lambda lane: len(lane.waypoints))
                if lane.waypoints:
                    self.capsules.drop_waypoint(lane, lane.waypoints[0])
                    continue
                busy = [lane for lane in self.lanes if lane not in self._free]
                if not make_room(self.capsules, self.budgets, busy):
                    raise

    def _admit(
        self,
        header: blob.BlobHeader,
        tensors: Mapping[str, Bytes],
        tokens: NDArray[np.int32],
    ) -> None:
        cursor = tensors["fixed/cursor"]
        check_state(str(header.path), cursor, tokens, header.position, self.vocab_size)

    def release(self, lane: Lane) -> None:
        """Take a lane back from its session; what rows it holds may save its next user copies."""
        for waypoint in list(lane.waypoints):
            self.capsules.drop_waypoint(lane, waypoint)
        self._free.append(lane)


def load(
    checkpoint: str | os.PathLike[str],
    device: str = "auto",
    max_positions: int = 4096,
    lanes: int = 1,
    kv_dtype: KvDType = "bfloat16",
    pool_bytes: int | None = None,
    draft: bool | None = None,
    precision: Precision = "bfloat16",
    *,
    progress: Progress | None = None,
) -> SessionEngine:
    """Load a Hugging Face checkpoint directory (config.json + safetensors [+ tokenizer.json]).

    device: "cpu", "cuda", "simt", or "auto": cuda where it is usable, else cpu. max_positions:
    tokens per lane. kv_dtype: of keys and values. pool_bytes: room for capsules (default: 16 fixed
    bands and two lanes' rows). draft: load the draft head; None = where the checkpoint has one.
    precision: of cuda and simt. progress(what, done, total) is called while loading. Raises
    CheckpointError, BackendError, PlanError.
    """
    return load_on(
        lambda: open_backend(device, precision),
        checkpoint,
        max_positions=max_positions,
        lanes=lanes,
        kv_dtype=kv_dtype,
        pool_bytes=pool_bytes,
        draft=draft,
        progress=progress,
    )


def load_on(
    backend: Callable[[], Backend],
    checkpoint: str | os.PathLike[str],
    *,
    max_positions: int = 4096,
    lanes: int = 1,
    kv_dtype: KvDType = "bfloat16",
    pool_bytes: int | None = None,
    draft: bool | None = None,
    adapt: Callable[[Model], Model] | None = None,
    progress: Progress | None = None,
) -> SessionEngine:
    """`load` on a backend of your own making, opened once config and options are known to be fine.

    For a simt device with a seed, a device with kernels of your own, or a new backend. `adapt` may
    wrap the model, to add regions and launches (examples/custom_kernel.py).
    """
    from flashrt.text.tokenizer import tokenizer_of  # its library is slow to import

    if kv_dtype not in KV_DTYPES:
        raise PlanError(f"kv_dtype={kv_dtype!r}; choose one of {', '.join(KV_DTYPES)}")
    source = open_checkpoint(Path(checkpoint))
    model = model_for(
        source.config,
        max_positions=max_positions,
        kv_dtype=DType(kv_dtype),
        has_draft_head=DRAFT_HEAD_TENSOR in source.tensors if draft is None else draft,
        is_tied=HEAD_TENSOR not in source.tensors,
    )
    return SessionEngine(
        adapt(model) if adapt is not None else model,
        source,
        backend(),
        lanes=lanes,
        pool_bytes=pool_bytes,
        progress=progress,
        tokenizer=tokenizer_of(source.path),
    )
