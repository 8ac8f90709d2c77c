"""Cost of stock SB3 PPO on text with textgym's policy and buffer, compared with a plain policy and SB3's own buffer.

    python benchmarks/sb3.py                               # 24, 48 and 96 new tokens, one thread, about 20 minutes
    python benchmarks/sb3.py --new-tokens 48 --repeats 5

Both sides are the unmodified `stable_baselines3.PPO` on the same environment, with the same number of tokens. The plain
side is a straightforward implementation: it encodes the whole padded context for every token, in the rollout and in
every epoch. For each length the table has the median of the paired ratios of wall time (plain / textgym); the ratio of
counted floating-point operations; the number of positions that pass through the language model for each trained token;
this number for textgym's own PPO on the same work; and the bytes in the buffers for each step of a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import tyro
from measuring.episode_timing import clocked
from measuring.peers import in_turns
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from torch.utils.flop_counter import FlopCounterMode

from textgym import agents
from textgym.models.actor_critic import ActorCritic
from textgym.sb3 import EpisodeRolloutBuffer, TextActorCriticPolicy, make_vec_env


@dataclass
class Config:
    new_tokens: tuple[int, ...] = (24, 48, 96)
    rows: int = 16
    epochs: int = 4
    minibatches: int = 4
    """Number of minibatches in an epoch."""
    repeats: int = 3
    threads: int = 1
    model: str = "tiny"
    """Model with the tokenizer of the embedded one."""
    device: str = "auto"


class PlainPolicy(TextActorCriticPolicy):
    """Policy without cache and packing: every state is a padded row."""

    def last_hidden(self, obs: Any) -> torch.Tensor:
        ids, mask = obs["input_ids"], obs["attention_mask"]
        width = int(mask.sum(1).max())  # trimmed to the longest context of the batch
        output = self.actor_critic.lm.base_model(input_ids=ids[:, :width], attention_mask=mask[:, :width])
        return output.last_hidden_state[torch.arange(len(ids)), mask.sum(1) - 1]

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        hidden = self.last_hidden(obs)
        distribution = torch.distributions.Categorical(logits=self.actor_critic.head(hidden))
        actions = distribution.sample()
        return actions, self.actor_critic.value_head(hidden), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Any) -> Any:
        hidden = self.last_hidden(obs)
        distribution = torch.distributions.Categorical(logits=self.actor_critic.head(hidden))
        return self.actor_critic.value_head(hidden), distribution.log_prob(actions), distribution.entropy()

    def predict_values(self, obs: Any) -> Any:
        return self.actor_critic.value_head(self.last_hidden(obs))


def settings(new_tokens: int) -> dict[str, Any]:
    return {
        "kl_coef": 0.0,
        "kl_mode": "deferred",
        "max_prompt_tokens": 16,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,  # no text ends early
        "reward": lambda completions: [float(len(text)) for text in completions],
    }


def make_side(config: Config, new_tokens: int, plain: bool) -> PPO:
    env = make_vec_env("textgym/Sentiment-v0", n_envs=config.rows, **settings(new_tokens))
    return PPO(
        PlainPolicy if plain else TextActorCriticPolicy,
        env,
        n_steps=new_tokens,
        batch_size=config.rows * new_tokens // config.minibatches,
        n_epochs=config.epochs,
        gamma=1.0,
        seed=0,
        device=config.device,
        policy_kwargs={"model": config.model},
        rollout_buffer_class=DictRolloutBuffer if plain else EpisodeRolloutBuffer,
    )


def own_ppo(config: Config, new_tokens: int) -> tuple[Any, Callable[[], Any]]:
    """Return the model of textgym's PPO, and a function that runs one update with the same amount of work."""
    policy = ActorCritic.from_pretrained(config.model, device=config.device)
    kwargs = {**settings(new_tokens), "array": "torch", "device": str(policy.device)}
    envs = gym.make_vec("textgym/Sentiment-v0", num_envs=config.rows, **kwargs)
    agent = agents.PPO(
        policy,
        envs,
        agents.PPOConfig(
            episodes_per_update=config.rows,
            minibatch_size=config.rows // config.minibatches,
            num_epochs=config.epochs,
        ),
    )
    return agent.policy.lm, lambda: agent.learn(agent.episodes + config.rows)


@contextmanager
def counted_positions(lm: Any) -> Any:
    """Count the positions that pass through a model."""
    counts: list[int] = []
    hook = lm.base_model.register_forward_hook(
        lambda module, args, output: counts.append(output.last_hidden_state.shape[:2].numel())
    )
    yield counts
    hook.remove()


def positions(lm: Any, update: Callable[[], Any], tokens: int) -> float:
    """Return the number of positions per trained token in one update."""
    with counted_positions(lm) as counts:
        update()
    return sum(counts) / tokens


def buffer_bytes(model: PPO) -> float:
    """Return the bytes of the buffer for each step of a row."""
    buffer: Any = model.rollout_buffer
    if isinstance(buffer, EpisodeRolloutBuffer):
        return buffer.nbytes() / buffer.actions.size
    names = ("actions", "rewards", "returns", "episode_starts", "values", "log_probs", "advantages")
    total = sum(getattr(buffer, name).nbytes for name in names)
    return (total + sum(array.nbytes for array in buffer.observations.values())) / buffer.rewards.size


def compare(config: Config, new_tokens: int) -> dict[str, float]:
    ours, plain = make_side(config, new_tokens, False), make_side(config, new_tokens, True)
    tokens = config.rows * new_tokens

    def update(model: PPO) -> Callable[[], Any]:
        return lambda: model.learn(tokens, reset_num_timesteps=False, log_interval=None)

    flops, passed = [], []
    for model in (ours, plain):  # these runs are also the warm-up
        with FlopCounterMode(display=False) as counter:
            passed.append(positions(model.policy.actor_critic.lm, update(model), tokens))
        flops.append(counter.get_total_flops())
    lm, own_update = own_ppo(config, new_tokens)
    timed, *_ = in_turns(clocked(update(plain)), clocked(update(ours)), config.repeats)
    own = positions(lm, own_update, tokens)
    return {
        "new tokens": new_tokens,
        "wall time ratio": timed["wall time ratio"],
        "least": timed["least"],
        "FLOPs ratio": flops[1] / flops[0],
        "positions a token": passed[0],
        "plain": passed[1],
        "own PPO": own,
        "to own PPO": passed[0] / own,
        "bytes a step": buffer_bytes(ours),
        "stock": buffer_bytes(plain),
    }


def main(config: Config) -> list[dict[str, float]]:
    torch.set_num_threads(config.threads)
    warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
    rows = []
    for new_tokens in config.new_tokens:
        rows.append(compare(config, new_tokens))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
        print("| " + " | ".join(f"{value:.4g}" for value in rows[-1].values()) + " |", flush=True)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config))
