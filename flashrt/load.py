"""Loading: a checkpoint and the name of a device -> an engine.

IS: `flashrt.load` and `flashrt.load_policy`, the only place that puts checkpoint, model, backend,
tokenizer and store together. IS NOT: planning or kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from flashrt.backends.choose import DEVICES, PRECISIONS, Precision, open_backend
from flashrt.base.errors import CheckpointError, CheckpointWarning, FlashrtError, PlanError
from flashrt.base.float_mode import DefaultFloatMode
from flashrt.core.backend import Backend, Progress
from flashrt.core.region import DType
from flashrt.engine.actions import CPU_ALONE_NBYTES, ActionEngine
from flashrt.engine.buckets import prefill_rows as rows_of_prefill
from flashrt.engine.images import ImageEngine
from flashrt.engine.sight import Sight
from flashrt.hub.resolve import resolve
from flashrt.models import TokenModel, model_for, notes_on
from flashrt.models.model import USUAL_PREFILL_ROWS
from flashrt.models.policies import policy_for
from flashrt.models.prefix import PrefixModel
from flashrt.models.qwen35.tower import Tower
from flashrt.models.qwen35.vision_config import vision_of
from flashrt.session.engine import SessionEngine
from flashrt.store.spill import Spill
from flashrt.text.checkpoint_text import CheckpointText, text_of_directory
from flashrt.text.gguf_tokenizer import TABLES, text_of_gguf
from flashrt.weights.bundled_policies import policy_path
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint, read_json
from flashrt.weights.gguf.checkpoint import GgufCheckpoint
from flashrt.weights.loader import LoadReport, check_sources, fill_weights
from flashrt.weights.opening import open_weights
from flashrt.weights.quantising import quantising

_T = TypeVar("_T")
KvDType = Literal["bfloat16", "float32", "int8", "float8"]
Weights = Literal["int8", "int4"]
__all__ = [
    "DEVICES",
    "KV_DTYPES",
    "PRECISIONS",
    "KvDType",
    "Precision",
    "SessionEngine",
    "Weights",
    "load",
    "load_on",
    "load_policy",
    "open_backend",
]

PREPROCESSOR_FILE = "preprocessor_config.json"
DRAFT_HEAD_TENSOR, HEAD_TENSOR = "mtp.fc.weight", "lm_head.weight"
KV_DTYPES: tuple[KvDType, ...] = ("bfloat16", "float32", "int8", "float8")


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
    weights: Weights | None = None,
    prefill_rows: int | None = None,
    images: bool | None = False,
    progress: Progress | None = None,
) -> SessionEngine:
    """Load a checkpoint: a Hugging Face directory (config.json + safetensors [+ tokenizer.json]), a
    GGUF file, or the name of what `flashrt pull` fetched.

    device: "cpu", "cuda", "simt", or "auto": cuda where it is usable, else cpu. max_positions:
    tokens per lane. kv_dtype: of keys and values; "int8" and "float8" take a byte per value and a
    scale per row and head. pool_bytes: room for capsules (default: 16 fixed bands and two lanes'
    rows). draft: load the draft head; None = where the checkpoint has one.
    precision: of activations. On cuda and simt "bfloat16" takes pairs of bfloat16 where one would
    show, "high" is finer, "fast" takes one throughout; on the cpu they differ over quantised
    weights, where "fast" is int8, and "fast" is bfloat16 over weights in bfloat16.
    docs/exactness.md has what each costs.
    weights: "int8" or "int4" quantises matrices that are stored as plain numbers; None keeps all as
    they are stored.
    prefill_rows: tokens of the largest launch of a prompt, 64, 256, 1024 or 2048; None is 256 on
    the cpu, and on cuda and simt what max_positions holds and whose scratch is at most an eighth of
    the weights.
    images: load the vision tower, so that prompts may hold images (`engine.image`). None = where
    the checkpoint has one that can be run.
    progress(what, done, total) is called while loading. Raises CheckpointError, BackendError,
    PlanError. Warns (CheckpointWarning) of what the checkpoint has and is not used, and of
    positions that the model was not trained on.
    """
    return load_on(
        lambda: open_backend(device, precision),
        checkpoint,
        max_positions=max_positions,
        lanes=lanes,
        kv_dtype=kv_dtype,
        pool_bytes=pool_bytes,
        draft=draft,
        weights=weights,
        prefill_rows=prefill_rows,
        images=images,
        progress=progress,
        tower_backend=lambda: open_backend(device, precision, cpu_gives_way=True),
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
    weights: Weights | None = None,
    prefill_rows: int | None = None,
    images: bool | None = False,
    adapt: Callable[[TokenModel], TokenModel] | None = None,
    progress: Progress | None = None,
    tower_backend: Callable[[], Backend] | None = None,
) -> SessionEngine:
    """`load` on a backend of your own making, opened once config and options are known to be fine.

    For a simt device with a seed, a device with kernels of your own, or a new backend. `adapt` may
    wrap the model, to add regions and launches (examples/custom_kernel.py). `tower_backend`:
    another one for the vision tower.
    """
    if draft not in (None, True, False):
        raise PlanError(
            f"draft={draft!r}; choose one of None (as the checkpoint has it), True, False"
        )
    if kv_dtype not in KV_DTYPES:
        raise PlanError(f"kv_dtype={kv_dtype!r}; choose one of {', '.join(KV_DTYPES)}")
    with DefaultFloatMode(), _without_collections():
        opened = open_weights(resolve(checkpoint) if isinstance(checkpoint, str) else checkpoint)
        tower: tuple[Tower, Checkpoint] | None = None
        notes: tuple[str, ...] = ()
        if images is None:
            tower, notes = _tower_if_usable(opened, max_positions)
        elif images:
            tower = tower_in(opened, max_positions)
        images = tower is not None
        source = opened if weights is None else quantising(opened, weights)
        of_rows = functools.partial(
            model_in, source, max_positions=max_positions, kv_dtype=kv_dtype, draft=draft,
            images=images,
        )  # fmt: skip
        model = of_rows(USUAL_PREFILL_ROWS if prefill_rows is None else prefill_rows)
        text = _Meanwhile(lambda: _text_taken(opened, model.vocab_size))

        def fill(*arguments: Any) -> LoadReport:
            text.check()
            return fill_weights(*arguments)

        try:
            device = backend()
            if prefill_rows is None:
                rows = rows_of_prefill(model, device, max_positions)
                model = model if rows == USUAL_PREFILL_ROWS else of_rows(rows)
            engine = SessionEngine(
                adapt(model) if adapt is not None else model,
                source,
                device,
                lanes=lanes,
                pool_bytes=pool_bytes,
                progress=progress,
                shelf=Spill(),
                fill=fill,
            )
        except FlashrtError:
            text.result()  # what is wrong with the text is said first
            raise
        try:
            engine.text = text.result()
            if tower is not None:
                engine.sight = Sight(
                    ImageEngine(*tower, (tower_backend or backend)(), progress=progress)
                )
        except FlashrtError:
            engine.close()
            raise
        stop_tokens = (*source.stop_tokens, *engine.text.stop_tokens)
        source.stop_tokens = tuple(dict.fromkeys(stop_tokens))
    for note in (*notes_on(source.config, max_positions), *source.notes, *notes):
        warnings.warn(note, CheckpointWarning, stacklevel=3)
    return engine


def _text_taken(source: Checkpoint, vocab_size: int) -> CheckpointText:
    """`text_of`; a GGUF file's vocabulary is dropped: the tokenizer has it now."""
    text = text_of(source, vocab_size)
    if isinstance(source, GgufCheckpoint):
        source.metadata = {k: v for k, v in source.metadata.items() if k not in TABLES}
    return text


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No collection of garbage meanwhile: loading makes some 100,000 objects that stay, and hardly
    any cycles; a fifth of its time would go into looking through them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Meanwhile(Generic[_T]):
    """A call in a thread of its own, beside what the caller does. What it raises comes with its
    result.
    """

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call = call
        self._value: _T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="flashrt-text")
        self._thread.start()

    def check(self) -> None:
        """Raise what the call raised, if it has by now."""
        if self._error is not None:
            raise self._error

    def result(self) -> _T:
        """What the call returned, once it has."""
        self._thread.join()
        self.check()
        return cast("_T", self._value)

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error


def kv_dtype_of(name: KvDType) -> DType:
    """The dtype of keys and values that a user means."""
    return DType.E4M3 if name == "float8" else DType(name)


def model_in(
    source: Checkpoint,
    prefill_rows: int = USUAL_PREFILL_ROWS,
    *,
    max_positions: int,
    kv_dtype: KvDType,
    draft: bool | None,
    images: bool = False,
) -> TokenModel:
    """The model of a checkpoint, its weights in the formats that the checkpoint has them in; by
    headers alone. Raises CheckpointError, PlanError.
    """
    return model_for(
        source.config,
        max_positions=max_positions,
        kv_dtype=kv_dtype_of(kv_dtype),
        has_draft_head=DRAFT_HEAD_TENSOR in source.tensors if draft is None else draft,
        is_tied=HEAD_TENSOR not in source.tensors,
        stored=source.stored,
        prefill_rows=prefill_rows,
        has_images=images,
    )


def tower_in(source: Checkpoint, max_positions: int) -> tuple[Tower, Checkpoint]:
    """The vision tower of a checkpoint, for images that a lane has room for, and its tensors as its
    rules name them: what is a convolution over a patch is a matrix. Raises CheckpointError, for
    tensors that do not fit too: before the text model is loaded.
    """
    file = source.path / PREPROCESSOR_FILE
    processor = read_json(file) if file.is_file() else {}
    config = vision_of(source.config, processor)
    tensors = {
        name: dataclasses.replace(t, shape=(t.shape[0], math.prod(t.shape[1:])))
        if len(t.shape) > 2
        else t
        for name, t in source.tower.items()
    }
    model = Tower(config, max_positions * config.merge**2)
    own = dataclasses.replace(source, tensors=tensors, tower={})
    check_sources(model.weights, own)
    return model, own


def _tower_if_usable(
    source: Checkpoint, max_positions: int
) -> tuple[tuple[Tower, Checkpoint] | None, tuple[str, ...]]:
    """The tower where there is one; where it cannot be run, None and a note that says why."""
    if not source.tower:
        return None, ()
    if importlib.util.find_spec("PIL") is None:
        return None, ("its vision tower is left out: images need Pillow: flashrt[vision]",)
    try:
        return tower_in(source, max_positions), ()
    except CheckpointError as error:
        return None, (f"its vision tower is left out: {error}",)


def text_of(source: Checkpoint, vocab_size: int | None = None) -> CheckpointText:
    """What a checkpoint says about text; ids are held against the size of the model's vocabulary,
    where that is known. Raises CheckpointError.
    """
    if not isinstance(source, GgufCheckpoint):
        return text_of_directory(source.path, vocab_size)
    found = text_of_gguf(source.metadata, source.path)
    if found is None:
        return CheckpointText()
    first = found.bos_token if found.adds_bos else None
    return CheckpointText(found.tokenizer, found.template, found.stop_tokens, first)


def load_policy(
    checkpoint: str | os.PathLike[str],
    device: str = "auto",
    lanes: int = 1,
    pool_bytes: int | None = None,
    *,
    precision: Precision = "bfloat16",
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> ActionEngine:
    """Load a policy: a directory with config.json and model.safetensors, or the name of a bundled
    one, or of what `flashrt pull` fetched. LeRobot's ACT, SmolVLA and pi0.5 policies load as it
    stores them, processor files included.

    device: "cpu", "cuda", "simt", or "auto": cuda where it is usable, else cpu. lanes: states that
    live at once. pool_bytes: room for capsules (default: 256 of them, and four lanes' rows where a
    policy has rows). precision: of activations, as for `load`; on the cpu, products with weights in
    float32 stay in float32. weights: "int8" or "int4" quantises the matrices of the layers of a
    policy with a language model in it, but for its vision tower's. progress(what, done, total) is
    called while loading. Raises CheckpointError, BackendError, PlanError.
    """
    with DefaultFloatMode():
        policy, source = policy_for(open_checkpoint(_policy_folder(checkpoint)), weights)
        if isinstance(policy, PrefixModel):
            policy.tokenizer()  # before a device is opened, like all that may be missing
        backend = open_backend(device, precision, cpu_alone_nbytes=CPU_ALONE_NBYTES)
        return ActionEngine(
            policy, source, backend, lanes=lanes, pool_bytes=pool_bytes, shelf=Spill(),
            progress=progress,
        )  # fmt: skip


def _policy_folder(checkpoint: str | os.PathLike[str]) -> Path:
    path = policy_path(checkpoint)
    is_bundled = not isinstance(checkpoint, str) or path != Path(checkpoint)
    return path if is_bundled else resolve(checkpoint)
