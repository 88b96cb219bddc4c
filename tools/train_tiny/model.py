"""The Qwen3.5 text model for training: parameter names as in transformers, plus `mtp.*`.

IS: forward over whole rows, with optional resets of the recurrent state; two heads that only
training has. IS NOT: generation.

On a CPU the element-wise and recurrent parts go through the fused kernels (fused), elsewhere
through torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fused
import torch
from delta_rule import delta_rule
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3_5TextConfig

from flashrt.worlds.moves import GRID
from flashrt.worlds.names import COLORS, THINGS

VOCAB_SIZE = 704  # of the model; the tokenizer has fewer
WIPE = -60.0  # log decay of a reset: exp(-60) of the state stays
KINDS = {"L": "linear_attention", "F": "full_attention"}


def config(layers: str = "LLFLF", hidden: int = 128, intermediate: int = 256) -> Qwen3_5TextConfig:
    """`layers`: L for a gated delta rule, F for full attention."""
    return Qwen3_5TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=len(layers),
        layer_types=[KINDS[kind] for kind in layers],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [1, 1, 2],
            "mrope_interleaved": True,
        },
    )


def linear(inputs: int, outputs: int) -> nn.Linear:
    """No projection has a bias."""
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    """Zero-centred: scales by 1 + weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), 1.0 + self.weight, self.eps)


class GatedDeltaNet(nn.Module):
    """Causal convolution, gated delta rule, gated norm. As many key heads as value heads."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.heads, self.taps = c.linear_num_value_heads, c.linear_conv_kernel_dim
        self.dk, self.dv = c.linear_key_head_dim, c.linear_value_head_dim
        channels = self.heads * (2 * self.dk + self.dv)
        self.in_proj_qkv = linear(c.hidden_size, channels)
        self.in_proj_z = linear(c.hidden_size, self.heads * self.dv)
        self.in_proj_b = linear(c.hidden_size, self.heads)
        self.in_proj_a = linear(c.hidden_size, self.heads)
        self.conv1d = nn.Conv1d(
            channels, channels, self.taps, groups=channels, bias=False, padding=self.taps - 1
        )
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(0.3, 8).log())
        # decay steps between 1e-4 and 0.1: memory spans long contexts from the start
        steps = torch.exp(torch.empty(self.heads).uniform_(-9.2, -2.3))
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(self.dv))
        self.out_proj = linear(self.heads * self.dv, c.hidden_size)

    def forward(self, x: Tensor, resets: Tensor | None) -> Tensor:
        u, taps = self.in_proj_qkv(x), self.conv1d.weight[:, 0].T  # [taps, channels]
        g = -self.A_log.exp() * functional.softplus(self.in_proj_a(x) + self.dt_bias)
        if resets is not None:
            g = g.masked_fill(resets[..., None], WIPE)
        beta = self.in_proj_b(x).sigmoid()
        if fused.fits(x, self.dk, self.dv):
            o = fused.Delta.apply(fused.ConvSilu.apply(u, taps), g, beta, self.dk, self.dv)
        else:
            o = self.mix(u, taps, g, beta)
        o = functional.rms_norm(o, (self.dv,), self.norm.weight, 1e-6)
        gated = fused.gated(self.in_proj_z(x).view(o.shape), o)
        return self.out_proj(gated.flatten(2))

    def mix(self, u: Tensor, taps: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """What the fused kernels do, with torch. -> [B, T, H, dv]"""
        length, keys = u.shape[1], self.heads * self.dk
        padded = functional.pad(u, (0, 0, self.taps - 1, 0))
        y = functional.silu(sum(padded[:, j : j + length] * taps[j] for j in range(self.taps)))
        q, k, v = (
            t.unflatten(-1, (self.heads, -1))
            for t in y.split([keys, keys, y.shape[-1] - 2 * keys], -1)
        )
        q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
        parts = (q * self.dk**-0.5, k, v, g, beta)
        return delta_rule(*(t.transpose(1, 2) for t in parts)).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with an output gate, normed queries and keys, partial RoPE."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.query_heads, self.kv_heads, self.size = (
            c.num_attention_heads, c.num_key_value_heads, c.head_dim
        )  # fmt: skip
        queries, keys = self.query_heads * self.size, self.kv_heads * self.size
        self.q_proj = linear(c.hidden_size, 2 * queries)  # per head: query, gate
        self.o_proj = linear(queries, c.hidden_size)
        self.k_proj, self.v_proj = linear(c.hidden_size, keys), linear(c.hidden_size, keys)
        self.q_norm, self.k_norm = RMSNorm(self.size), RMSNorm(self.size)
        rope = c.rope_parameters
        turned = int(self.size * rope["partial_rotary_factor"])
        powers = torch.arange(0, turned, 2).float() / turned
        self.register_buffer("frequencies", rope["rope_theta"] ** -powers, persistent=False)

    def rope(self, x: Tensor, start: int = 0) -> Tensor:
        """x [B, heads, T, size] at positions start, start + 1, ..."""
        half = self.frequencies.numel()
        at = torch.arange(start, start + x.shape[2], device=x.device)
        angles = at[:, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values [B, query heads, T, size], and the gate [B, T, all]."""
        batch, length, _ = x.shape
        both = self.q_proj(x).view(batch, length, self.query_heads, 2, self.size)
        q, gate = both.unbind(3)
        k, v = (
            p(x).view(batch, length, self.kv_heads, self.size) for p in (self.k_proj, self.v_proj)
        )
        group = self.query_heads // self.kv_heads
        q = self.rope(self.q_norm(q).transpose(1, 2), start)
        k = self.rope(self.k_norm(k).transpose(1, 2), start).repeat_interleave(group, 1)
        v = v.transpose(1, 2).repeat_interleave(group, 1)
        return q, k, v, gate.reshape(batch, length, -1).sigmoid()

    def forward(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        del resets  # keys and values stay: that is the point of a reset
        q, k, v, gate = self.project(x)
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(o.transpose(1, 2).flatten(2) * gate)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(fused.gated(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """A mixer and an MLP, each on the normed residual stream."""

    def __init__(self, c: Any, kind: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size)
        self.post_attention_layernorm = RMSNorm(c.hidden_size)
        self.kind = kind
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(c)
        else:
            self.self_attn = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, resets: Tensor | None) -> Tensor:
        mixer = self.linear_attn if self.kind == "linear_attention" else self.self_attn
        x = x + mixer(self.input_layernorm(x), resets)
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftHead(nn.Module):
    """The multi-token-prediction head; mtp runs it."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.fc = linear(2 * c.hidden_size, c.hidden_size)
        self.pre_fc_norm_embedding = RMSNorm(c.hidden_size)
        self.pre_fc_norm_hidden = RMSNorm(c.hidden_size)
        self.norm = RMSNorm(c.hidden_size)
        self.layers = nn.ModuleList([Layer(c, "full_attention")])


class Trunk(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, kind) for kind in c.layer_types)
        self.norm = RMSNorm(c.hidden_size)


class Model(nn.Module):
    """Trunk, draft head, and the two heads of training: true position, thing talked about."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.config = c
        self.model = Trunk(c)
        self.mtp = DraftHead(c)
        self.position_head = nn.Linear(c.hidden_size, 2 * GRID)
        self.topic_head = nn.Linear(c.hidden_size, len(COLORS) + len(THINGS))
        self.first_attention = c.layer_types.index("full_attention")
        last_scale = (2 * len(c.layer_types)) ** -0.5  # of what writes into the residual stream
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_embedding = "embed" in name
                nn.init.normal_(parameter, std=0.1 if is_embedding else parameter.shape[1] ** -0.5)
                if "o_proj" in name or "out_proj" in name or "down_proj" in name:
                    parameter.data *= last_scale

    def forward(
        self, ids: Tensor, resets: Tensor | None = None, early: list[Tensor] | None = None
    ) -> Tensor:
        """ids [B, T] -> hidden after the final norm [B, T, H]. resets [B, T]: where recurrent
        states are wiped before they are written. early: takes the normed stream before the first
        attention layer.
        """
        x = self.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.layers):
            if early is not None and i == self.first_attention:
                early.append(functional.rms_norm(x, x.shape[-1:]))
            x = layer(x, resets)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head is the embedding table."""
        return hidden @ self.model.embed_tokens.weight.T


def load(path: Path) -> Model:
    """The model of a checkpoint that train or mtp wrote."""
    held = torch.load(path, map_location="cpu", weights_only=False)
    model = Model(config(held["layers"]))
    model.load_state_dict(held["model"])
    return model.eval()
