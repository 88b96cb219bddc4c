"""The model as the policy of a gymnasium environment, with and without looking ahead.

FrozenLake on the 6 x 6 grid of the model's robot world: it was trained to walk to a goal that it is
told once, and knows nothing of holes. Looking ahead, plans of up to two steps are tried on from the
present capsule and the environment's present state (one integer), each followed by the policy to
the end; the first step of the best is taken. The next episode begins by a restore.

Needs gymnasium: pip install 'flashrt[gym]'

    python examples/robot_rollout.py [CHECKPOINT]
"""

import itertools
import sys
import time
from typing import Any

try:
    import gymnasium
    from gymnasium.envs.toy_text.frozen_lake import generate_random_map
except ImportError:
    sys.exit("this example needs gymnasium: pip install 'flashrt[gym]'")

import flashrt
from flashrt.session.chat import Chat, open_chat
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.building import call_text, parse_call
from flashrt.worlds.moves import GRID, cell

WAYS = {"west": 0, "north": 1, "east": 2, "south": 3}  # row numbers grow to the north here
EPISODES, MAX_STEPS, START, GOAL = 8, 14, 0, GRID * GRID - 1


def place(state: int) -> str:
    """What the model is told of a state."""
    return f"{cell((state % GRID, state // GRID))} ."


def step(chat: Chat, lake: Any, said: str) -> tuple[float, bool]:
    """Do what the model said, tell it where that led; returns reward and whether it is over."""
    words = parse_call(said)
    if len(words) != 2 or words[1] not in WAYS:
        return 0.0, True
    state, reward, is_over, _, _ = lake.step(WAYS[words[1]])
    chat.add("tool", place(state))
    return float(reward), bool(is_over)


def outcome(chat: Chat, lake: Any, plan: tuple[str, ...], steps: int) -> tuple[float, int]:
    """Say the plan's words, then the policy's own; the reward, and for how many steps it went."""
    for went in range(1, steps + 1):
        if went > len(plan):
            said = chat.reply(16)
        else:
            chat.add("assistant", said := plan[went - 1])
        reward, is_over = step(chat, lake, said)
        if is_over:
            return reward, went
    return 0.0, steps


def look_ahead(chat: Chat, lake: Any, steps: int) -> tuple[str, int]:
    """What to say here, and how many tokens no plan had to feed again: the policy's own word if it
    leads to the goal, else one or two steps of another way that do, else what lasts.
    """
    now, state, digest = chat.snapshot("now"), lake.unwrapped.s, chat.session.digest()
    own = chat.reply(16)
    ways = [call_text("go", way) for way in WAYS]
    plans = [(own,), *((way,) for way in ways), *itertools.product(ways, ways)]
    found: dict[tuple[str, ...], tuple[float, int]] = {}
    for plan in plans:
        chat.restore(now)
        found[plan] = outcome(chat, lake, plan, steps)
        lake.unwrapped.s = state
        if found[plan][0]:
            break
    chat.restore(now)
    assert chat.session.digest() == digest, "the rollouts left no bit behind"
    now.capsule.drop()
    is_fine = found[own,][1] > 1 and not found[plan][0]
    best = own if is_fine else max(found, key=lambda plan: found[plan])[0]
    chat.add("assistant", best)
    return best, (len(found) + 1) * now.capsule.position


def main() -> None:
    """The same lakes with and without looking ahead."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else bundled_checkpoint()
    engine = flashrt.load(checkpoint, device="cpu", max_positions=1024, pool_bytes=64 << 20)
    chat = open_chat(engine)
    chat.add("user", f"the goal is {place(GOAL)} the robot is in {place(START)}")
    begin = chat.snapshot("begin")
    for is_looking in (False, True):
        returns, steps, spared, fed = 0.0, 0, 0, chat.fed_tokens
        started = time.perf_counter()
        for episode in range(EPISODES):
            desc = generate_random_map(size=GRID, p=0.85, seed=episode)
            lake = gymnasium.make("FrozenLake-v1", desc=desc, is_slippery=False)
            lake.reset(seed=0)
            chat.restore(begin)  # the episode's reset
            for left in range(MAX_STEPS, 0, -1):
                said, kept = look_ahead(chat, lake, left) if is_looking else (chat.reply(16), 0)
                reward, is_over = step(chat, lake, said)
                returns, steps, spared = returns + reward, steps + 1, spared + kept
                if is_over:
                    break
        rate, fed = steps / (time.perf_counter() - started), chat.fed_tokens - fed
        print(f"{'looking ahead' if is_looking else 'policy alone':14} mean return "
              f"{returns / EPISODES:.2f}, {rate:5.1f} steps/s; tokens per step: {fed / steps:.0f} "
              f"fed, {spared / steps:.0f} spared")  # fmt: skip


if __name__ == "__main__":
    main()
