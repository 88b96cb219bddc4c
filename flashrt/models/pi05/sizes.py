"""Sizes of a pi0.5 policy that its config.json does not tell: the tensors do.

IS: the names of LeRobot's tensors, and what their shapes say. IS NOT: rules (weights). LeRobot has
the sizes in its code, by `paligemma_variant` and `action_expert_variant`; read from the shapes,
they are those of any variant with one head of keys and values and a SigLIP tower of heads of 72.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, listed, shown
from flashrt.weights.checkpoint import Checkpoint

_ROOT = "model.paligemma_with_expert"
GEMMA = f"{_ROOT}.paligemma.model.language_model"
TOWER = f"{_ROOT}.paligemma.model.vision_tower.vision_model"
PROJECTOR = f"{_ROOT}.paligemma.model.multi_modal_projector.linear"
EXPERT = f"{_ROOT}.gemma_expert.model"
# The table of embeddings, and the head that it is tied to: files have one or both.
TABLE, HEAD = f"{GEMMA}.embed_tokens.weight", f"{_ROOT}.paligemma.lm_head.weight"
EXPERT_HEAD = f"{_ROOT}.gemma_expert.lm_head.weight"
_TOWER_HEAD = 72  # columns, of SigLIP So400m
_COMPILED = "_orig_mod."  # in names of policies that were saved compiled
_ONCE = {"action_time_mlp_": "time_mlp_"}  # names of files that came from openpi
_PLAIN_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the language model, the expert beside it, and the tower."""

    hidden: int
    intermediate: int
    depth: int
    heads: int
    head_dim: int
    vocab_size: int
    expert_hidden: int
    expert_intermediate: int
    patch: int
    vision_hidden: int
    vision_depth: int
    vision_heads: int
    vision_intermediate: int

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return 1


def named(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the names that LeRobot gives tensors when it loads them: of policies that
    were compiled or came from openpi too. What is tied or never used is left out.
    """
    found = {}
    for stored, tensor in checkpoint.tensors.items():
        name = stored.replace(_COMPILED, "")
        for before, now in _ONCE.items():
            name = name.replace(before, now)
        name = name if name.startswith("model.") else f"model.{name}"
        is_plain_norm = name.startswith(f"{EXPERT}.") and name.endswith(_PLAIN_NORMS)
        if not is_plain_norm and not name.startswith((EXPERT_HEAD, "model.state_proj.")):
            found[name] = tensor
    head = found.pop(HEAD, None)
    if head is not None:
        found.setdefault(TABLE, head)
    return dataclasses.replace(checkpoint, tensors=found)


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """The sizes; the checkpoint must be `named`. Raises CheckpointError that names all that is
    wrong.
    """
    problems: list[str] = []

    def shape(name: str, n: int = 2) -> tuple[int, ...]:
        tensor = checkpoint.tensors.get(name)
        if tensor is not None and len(tensor.shape) == n and min(tensor.shape) > 0:
            return tensor.shape
        found = "missing" if tensor is None else shown(list(tensor.shape))
        problems.append(f"tensor {listed([name])} is {found}")
        return (1,) * n

    vocab_size, hidden = shape(TABLE)
    attended = shape(f"{GEMMA}.layers.0.self_attn.q_proj.weight")[0]
    head_dim = shape(f"{GEMMA}.layers.0.self_attn.k_proj.weight")[0]
    expert_intermediate, expert_hidden = shape(f"{EXPERT}.layers.0.mlp.gate_proj.weight")
    vision_intermediate, vision_hidden = shape(f"{TOWER}.encoder.layers.0.mlp.fc1.weight")
    found = Sizes(
        hidden=hidden,
        intermediate=shape(f"{GEMMA}.layers.0.mlp.gate_proj.weight")[0],
        depth=_layers(checkpoint, GEMMA, "self_attn.k_proj.weight"),
        heads=max(attended // head_dim, 1),
        head_dim=head_dim,
        vocab_size=vocab_size,
        expert_hidden=expert_hidden,
        expert_intermediate=expert_intermediate,
        patch=shape(f"{TOWER}.embeddings.patch_embedding.weight", 4)[3],
        vision_hidden=vision_hidden,
        vision_depth=_layers(checkpoint, f"{TOWER}.encoder", "layer_norm1.weight"),
        vision_heads=max(vision_hidden // _TOWER_HEAD, 1),
        vision_intermediate=vision_intermediate,
    )
    if not problems:
        problems += _misfits(found, attended)
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: tensors are not those of a pi0.5 policy:{indented(problems)}"
        )
    return found


def _layers(checkpoint: Checkpoint, at: str, tensor: str) -> int:
    n = 0
    while f"{at}.layers.{n}.{tensor}" in checkpoint.tensors:
        n += 1
    return n


def _misfits(s: Sizes, attended: int) -> list[str]:
    found = []
    if attended != s.heads * s.head_dim or s.head_dim % 2:
        found.append(
            f"q_proj has {attended} rows and k_proj {s.head_dim}; one head of keys and values, of "
            "an even size, is supported"
        )
    if s.vision_hidden != s.vision_heads * _TOWER_HEAD:
        found.append(
            f"the tower has {s.vision_hidden} columns; heads of {_TOWER_HEAD} are supported"
        )
    if s.expert_hidden % 2 or s.expert_hidden < 4:
        found.append(f"the expert has {s.expert_hidden} columns; an even number is needed")
    return found
