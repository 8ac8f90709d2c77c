"""Token-level PPO as one loop in plain PyTorch, in the style of CleanRL; some six minutes on one CPU thread.

    python examples/cleanrl_loop.py

The KL penalty is beta (log pi - log pi_ref). The environment adds beta log pi_ref, and this loop subtracts beta log pi.
"""

from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro

from textgym import ActorCritic
from textgym.models.architectures.attention import PackedStates
from textgym.testing import Played, play


@dataclass
class Args:
    total_timesteps: int = 30_720
    num_envs: int = 32
    eval_episodes: int = 256


def main(args: Args, beta: float = 0.05, clip: float = 0.2) -> tuple[Played, Played]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    envs = gym.make_vec("textgym/Sentiment-v0", args.num_envs, kl_coef=beta, array="torch", autoreset_mode="SameStep")
    agent = ActorCritic.from_pretrained("tiny")
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-4, eps=1e-5, weight_decay=0.0)
    before = play("textgym/Sentiment-v0", lambda observations: agent.act(observations).action, args.eval_episodes)
    observation, _ = envs.reset(seed=0)
    for _ in range(args.total_timesteps // (24 * args.num_envs)):
        steps, batch = [], []
        for _ in range(24):
            seen, step = observation, agent.act(observation)
            observation, reward, done, _, _ = envs.step(step.action)
            steps.append((seen["input_ids"], seen["attention_mask"], *step, reward - beta * step.log_prob, done))
        advantage, value = 0.0, agent.value(observation)
        for *step, old_value, reward, done in reversed(steps):  # generalised advantage estimation, gamma 1
            advantage, value = reward + (value + 0.95 * advantage) * ~done - old_value, old_value
            batch.append((*step, value, advantage))
        ids, masks, actions, old, values, advantages = (torch.cat(part) for part in zip(*batch, strict=True))
        weights = (advantages - advantages.mean()) / advantages.std()
        for rows in (part for _ in range(2) for part in torch.randperm(len(actions)).chunk(2)):
            new = agent.evaluate_states(PackedStates.whole(ids[rows], masks[rows].sum(1)), actions[rows])
            ratio = (new.log_prob - old[rows]).exp()
            surrogate = torch.min(ratio * weights[rows], ratio.clamp(1 - clip, 1 + clip) * weights[rows]).mean()
            optimizer.zero_grad()
            (0.1 * (new.value - advantages[rows] - values[rows]).square().mean() - surrogate).backward()
            torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
            optimizer.step()
    after = play("textgym/Sentiment-v0", lambda observations: agent.act(observations).action, args.eval_episodes)
    print(f"score before {before}, after {after}")
    return before, after


if __name__ == "__main__":
    main(tyro.cli(Args))
