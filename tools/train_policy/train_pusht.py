"""Train a small SmolVLA to push the T where words say, by cloning the scripted expert.

    python tools/train_policy/train_pusht.py [--run runs/pusht] [--start CHECKPOINT]

Needs lerobot 0.4 with its `smolvla` extra, and gym-pusht; one thread, about 45 minutes. The class
is LeRobot's own SmolVLAPolicy with small sizes and random weights; what is written is a folder
that LeRobot and flashrt load. Demonstrations: push_demonstrations. All weights are trained, by flow
matching as SmolVLA's forward does, with FLOWS draws of noise and time for each picture, and a
second head that finds the T in the picture's tokens, which is thrown away.

IS NOT resumable to the same weights, as train.py is: batches are drawn from (seed, step), but the
run ends when its minutes are over, so the machine's speed decides how many there are.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, make_att_2d_masks
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from push_demonstrations import SEEN, Frames, demonstrate, turned
from safetensors.torch import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMImageProcessor

import flashrt
from flashrt.worlds import pusht

PATCH = 8
CHUNK = 8  # ticks
N_ACTION_STEPS = 4
EULER_STEPS = 10
EPISODES = 400  # by the disturbed expert
ROUND_STEPS = 150  # between rounds
ROUND_EPISODES = 12, 12  # that each adds: the expert's, the policy's
BATCH = 128  # pictures
FLOWS = 2  # draws of noise and time for each
LEARNING_RATE = 1e-3
WARM_UP = 100  # steps
GRADIENT_NORM = 1.0
AVERAGE = 0.998
PAD_WEIGHT = 0.1  # of the actions' padding in the loss
FIND_WEIGHT = 0.3  # of finding the T
REPORT_EVERY = 50


def make_vlm(folder: Path) -> None:
    """A SmolVLM of small sizes: its config, and a tokenizer that has the instructions' words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(list(pusht.INSTRUCTIONS.values()) * 2, trainer)
    image, fake = "<image>", "<fake_token_around_image>"
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={
            "fake_image_token": fake,
            "image_token": image,
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    wrapped.save_pretrained(folder)
    vision = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "image_size": SEEN,
        "patch_size": PATCH,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "vocab_size": len(wrapped),
        "pad_token_id": wrapped.pad_token_id,
        "rms_norm_eps": 1e-5,
    }
    SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        scale_factor=2,
        image_token_id=wrapped.convert_tokens_to_ids(image),
        pad_token_id=wrapped.pad_token_id,
    ).save_pretrained(folder)
    SmolVLMImageProcessor().save_pretrained(folder)
    tokens = (SEEN // PATCH // 2) ** 2
    text_of = json.dumps({"processor_class": "SmolVLMProcessor", "image_seq_len": tokens})
    (folder / "processor_config.json").write_text(text_of)


def make_policy(vlm: Path) -> SmolVLAPolicy:
    """LeRobot's policy of these sizes, its weights random."""
    features = {
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, pusht.IMAGE, pusht.IMAGE)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    }
    config = SmolVLAConfig(
        vlm_model_name=str(vlm),
        num_vlm_layers=4,
        resize_imgs_with_padding=(SEEN, SEEN),
        chunk_size=CHUNK,
        n_action_steps=N_ACTION_STEPS,
        num_steps=EULER_STEPS,
        freeze_vision_encoder=False,
        train_expert_only=False,
        device="cpu",
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    )
    policy = SmolVLAPolicy(config).float()
    # torch's fused attention is slow backwards on a CPU
    policy.model.vlm_with_expert.vlm.set_attn_implementation("eager")
    return policy


@dataclass(slots=True)
class Statistics:
    """Means and deviations of the pusher's state and of actions."""

    state_mean: Tensor
    state_std: Tensor
    action_mean: Tensor
    action_std: Tensor

    @classmethod
    def of(cls, frames: Frames) -> Statistics:
        """Over the frames in all symmetries: the same for x and y."""
        middle = (pusht.SIZE - 1) / 2
        place = float(np.sqrt(np.mean((frames.state[:, :2] - middle) ** 2)))
        speed = float(np.sqrt(np.mean(frames.state[:, 2:] ** 2)))
        action = float(np.sqrt(np.mean((frames.chunk - middle) ** 2)))
        return cls(
            torch.tensor([middle, middle, 0.0, 0.0]),
            torch.tensor([place, place, speed, speed]),
            torch.tensor([middle, middle]),
            torch.tensor([action, action]),
        )

    def named(self) -> dict[str, dict[str, Tensor]]:
        """As LeRobot's processors take them."""
        return {
            "observation.state": {"mean": self.state_mean, "std": self.state_std},
            "action": {"mean": self.action_mean, "std": self.action_std},
        }


class Finder(nn.Module):
    """Where the T is, of the tokens of a picture: for training alone."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.all = nn.Linear(tokens * width, 128)
        self.out = nn.Linear(128, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, C] -> [B, 4]."""
        return self.out(torch.nn.functional.gelu(self.all(self.norm(tokens).flatten(1))))


def in_bfloat16(policy: SmolVLAPolicy) -> SmolVLAPolicy:
    """A copy that calculates in bfloat16, twice as fast as float32 on a CPU with AMX; but where a
    patch stands, and the last projection, are worked out in float32, as where the policy acts.
    """
    work = copy.deepcopy(policy).to(torch.bfloat16).train()
    work.model.action_out_proj.float()
    tower = work.model.vlm_with_expert.get_vlm_model().vision_model
    tower.embeddings.float()
    tower.embeddings.register_forward_hook(lambda module, given, out: out.to(torch.bfloat16))
    return work


class Learner:
    """A policy in float32, its copy that calculates, its tokens of instructions, and its loss."""

    def __init__(self, policy: SmolVLAPolicy, vlm: Path, statistics: Statistics) -> None:
        self.policy, self.statistics = policy, statistics
        self.work = in_bfloat16(policy)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(vlm)
        texts = [pusht.INSTRUCTIONS[name] + "\n" for name in pusht.NAMES]
        held = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        self.tokens, self.masks = held["input_ids"], held["attention_mask"].bool()

    def prefix(self, image: Tensor, state: Tensor, place: Tensor) -> tuple[Any, Tensor, Tensor]:
        """The cache of picture, words and state; its mask; the picture's tokens."""
        model = self.work.model
        padded = torch.nn.functional.pad(state, (0, self.policy.config.max_state_dim - 4))
        there = torch.ones(len(image), dtype=torch.bool)
        embeddings, pads, marks = model.embed_prefix(
            [image], [there], self.tokens[place], self.masks[place], state=padded
        )
        _, cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pads, marks),
            position_ids=torch.cumsum(pads, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
            fill_kv_cache=True,
        )
        return cache, pads, embeddings[:, : -1 - self.tokens.shape[1]]

    def losses(
        self, frames: Frames, finder: Finder, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Of flows, and of finding the T."""
        s, config = self.statistics, self.policy.config
        image = torch.from_numpy(frames.image).permute(0, 3, 1, 2).float() / 127.5 - 1
        state = (torch.from_numpy(frames.state) - s.state_mean) / s.state_std
        chunk = (torch.from_numpy(frames.chunk) - s.action_mean) / s.action_std
        block = torch.from_numpy(frames.block)
        block = torch.cat(((block[:, :2] - s.action_mean) / s.action_std, block[:, 2:]), 1)
        n = len(image) * FLOWS
        actions = torch.nn.functional.pad(chunk, (0, config.max_action_dim - 2))
        actions = actions.repeat_interleave(FLOWS, 0)
        noise = torch.randn(actions.shape, generator=generator)
        uniform = torch.rand(n, generator=generator)
        time_at = uniform ** (1 / 1.5) * 0.999 + 0.001  # Beta(1.5, 1), as SmolVLA's own
        at = time_at[:, None, None]
        velocity, found = self.core(
            finder,
            image,
            state,
            torch.from_numpy(frames.place),
            at * noise + (1 - at) * actions,
            time_at,
        )
        wrong = (velocity.float() - (noise - actions)) ** 2
        flow = wrong[..., :2].mean() + PAD_WEIGHT * wrong[..., 2:].mean()
        return flow, ((found.float() - block) ** 2).mean()

    def core(
        self, finder: Finder, image: Tensor, state: Tensor, place: Tensor, x: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocities of noisy actions `x` at the times `at`, and where the T is found."""
        cache, pads, tokens = self.prefix(image, state.to(torch.bfloat16), place)
        cache = {
            layer: {name: part.repeat_interleave(FLOWS, 0) for name, part in held.items()}
            for layer, held in cache.items()
        }
        velocity = self.work.model.denoise_step(
            prefix_pad_masks=pads.repeat_interleave(FLOWS, 0),
            past_key_values=cache,
            x_t=x.to(torch.bfloat16),
            timestep=at,
        )
        return velocity, finder(tokens.float())

    @torch.no_grad()
    def put_weights(self) -> None:
        """Of the policy into the copy."""
        torch._foreach_copy_(list(self.work.parameters()), list(self.policy.parameters()))

    def take_gradients(self) -> None:
        """Of the copy to the policy."""
        pairs = zip(self.policy.parameters(), self.work.parameters(), strict=True)
        for held, calculated in pairs:
            held.grad = None if calculated.grad is None else calculated.grad.float()
            calculated.grad = None


def acting(folder: Path, seed: int) -> Any:
    """What `demonstrate` takes: a policy in a folder, closed loop, by flashrt."""
    engine = flashrt.load_policy(folder, device="cpu", lanes=1)
    loop = flashrt.ControlLoop(engine, pusht.FPS, overlap=0)
    episode = itertools.count(seed)

    def act(state: pusht.Array, tick: int) -> pusht.Array:
        if tick == 0:
            loop.reset(next(episode))
        return np.asarray(loop.tick(pusht.observe(state)), np.float64)

    return act


def success(folder: Path, seeds: range) -> tuple[float, float]:
    """Share of episodes that end at the place; ticks until then, of those."""
    ticks, act = [], acting(folder, seeds[0])
    for seed in seeds:
        state = pusht.initial_state(np.random.default_rng(seed))
        for tick in range(pusht.TICKS):
            state = pusht.advance(state, act(state, tick))
            if pusht.distance(state) <= pusht.REACHED:
                ticks.append(tick + 1)
                break
    return len(ticks) / len(seeds), float(np.mean(ticks or [pusht.TICKS]))


def take(frames: Frames, rng: np.random.Generator) -> Frames:
    """A batch, each eighth of it in another symmetry."""
    rows = rng.integers(len(frames.place), size=BATCH)
    parts = []
    for symmetry, some in enumerate(np.array_split(rows, 8)):
        part = Frames(*(getattr(frames, name)[some] for name in Frames.__slots__))
        parts.append(turned(part, symmetry))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def first_frames(folder: Path, seed: int) -> Frames:
    """By the disturbed expert; drawn once, then read."""
    path = folder / "frames-0.npz"
    if not path.exists():
        demonstrate(np.random.default_rng([seed, 0]), EPISODES, CHUNK).save(path)
    return Frames.load(path)


def more_frames(checkpoint: Path, seed: int, number: int) -> Frames:
    """A round's: the expert's, and the policy's own with the expert's labels."""
    rng = np.random.default_rng([seed, 1, number])
    drawn = demonstrate(rng, ROUND_EPISODES[0], CHUNK)
    own = acting(checkpoint, 1000 * number)
    return drawn + demonstrate(rng, ROUND_EPISODES[1], CHUNK, own)


def train(folder: Path, minutes: float, seed: int, start: Path | None) -> dict[str, float]:
    """For so many minutes, from random weights or those of `start`; the averaged policy is in
    folder/checkpoint. What it took.
    """
    torch.manual_seed(seed)
    vlm, checkpoint = folder / "vlm", folder / "checkpoint"
    make_vlm(vlm)
    frames = first_frames(folder, seed)
    policy = make_policy(vlm)
    if start is not None:
        load_model(policy, start / "model.safetensors")
    statistics = Statistics.of(frames)
    learner, mean = Learner(policy, vlm, statistics), copy.deepcopy(policy).eval()
    width = policy.model.vlm_with_expert.config.text_config.hidden_size
    finder = Finder((SEEN // PATCH // 2) ** 2, width)
    weights = [w for w in policy.parameters() if w.requires_grad]
    print(f"{sum(w.numel() for w in policy.parameters())} weights, {len(frames.place)} frames")
    optimiser = torch.optim.AdamW(
        [*weights, *finder.parameters()],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        fused=True,
    )
    began, cpu, step = time.monotonic(), time.process_time(), 0
    sums = [0.0, 0.0]
    while (share := (time.monotonic() - began) / (60 * minutes)) < 1:
        rng = np.random.default_rng([seed, 2, step])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        learner.put_weights()
        optimiser.zero_grad()
        flow, found = learner.losses(take(frames, rng), finder, generator)
        (flow + FIND_WEIGHT * found).backward()
        learner.take_gradients()
        rate = min(1.0, (step + 1) / WARM_UP) * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate
        torch.nn.utils.clip_grad_norm_(weights, GRADIENT_NORM)
        optimiser.step()
        keep = min(AVERAGE, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.parameters()), list(policy.parameters()), 1 - keep)
        step += 1
        sums = [sums[0] + flow.item(), sums[1] + found.item()]
        if step % REPORT_EVERY == 0:
            spent = time.monotonic() - began
            print(
                f"{step} flow {sums[0] / REPORT_EVERY:.4f} find {sums[1] / REPORT_EVERY:.4f} "
                f"{step * BATCH / spent:.0f}/s {spent:.0f} s",
                flush=True,
            )
            sums = [0.0, 0.0]
        if step % ROUND_STEPS == 0:
            export(mean, statistics, checkpoint, vlm)
            if step % (2 * ROUND_STEPS) == 0:
                solved, ticks = success(checkpoint, range(900_000, 900_010))
                print(f"  success {solved:.0%}, {ticks:.1f} ticks", flush=True)
            frames = frames + more_frames(checkpoint, seed, step // ROUND_STEPS)
    export(mean, statistics, checkpoint, vlm)
    spent, cpu = time.monotonic() - began, time.process_time() - cpu
    return {
        "steps": step,
        "minutes": spent / 60,
        "cpu_minutes": cpu / 60,
        "frames": len(frames.place),
    }


def export(mean: SmolVLAPolicy, statistics: Statistics, out: Path, vlm: Path) -> None:
    """A folder of LeRobot: config, bfloat16 weights, processors, and the VLM's files with them."""
    policy = copy.deepcopy(mean).to(torch.bfloat16)
    policy.save_pretrained(out)
    stats = statistics.named()
    before, after = make_smolvla_pre_post_processors(policy.config, stats)
    before.save_pretrained(out)
    after.save_pretrained(out)
    shutil.copytree(vlm, out / "vlm", dirs_exist_ok=True)
    for name in ("config.json", "policy_preprocessor.json"):  # a folder beside them, anywhere
        text = (out / name).read_text().replace(json.dumps(str(vlm)), json.dumps("vlm"))
        (out / name).write_text(text)


def main() -> None:
    """Train, judge, export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/pusht"))
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.run.mkdir(parents=True, exist_ok=True)
    took = train(options.run, options.minutes, options.seed, options.start)
    checkpoint = options.run / "checkpoint"
    solved, ticks = success(checkpoint, range(900_000, 900_050))
    print(json.dumps(took | {"success": solved, "ticks": ticks}))


if __name__ == "__main__":
    main()
