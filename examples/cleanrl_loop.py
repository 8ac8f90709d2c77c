"""PPO as a single loop in plain PyTorch, on tokens: the form of CleanRL's scripts. A minute on one CPU thread.

    python examples/cleanrl_loop.py

The agent knows Gymnasium alone: it sees token ids and masks, and the environment pays half of the KL, the reference's
log-prob; the other half, the policy's entropy, is earned here with every token.
"""

from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro

from textgym import ActorCritic
from textgym.models.attention import PackedStates


@dataclass
class Args:
    updates: int = 20
    num_envs: int = 32
    num_steps: int = 24
    kl_coef: float = 0.05
    clip: float = 0.2
    epochs: int = 2
    learning_rate: float = 3e-4


def main(args: Args) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    envs = gym.make_vec("textgym/Sentiment-v0", num_envs=args.num_envs, kl_coef=args.kl_coef,
                        max_new_tokens=args.num_steps, array="torch", autoreset_mode="SameStep")  # fmt: skip
    agent, scores = ActorCritic.from_pretrained("tiny"), []
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0)
    observation, _ = envs.reset(seed=0)
    for update in range(args.updates):
        steps, found = [], []  # of one rollout
        for _ in range(args.num_steps):
            step = agent.act(observation)
            following, reward, done, _, infos = envs.step(step.action)
            steps.append((observation, *step, reward - args.kl_coef * step.log_prob, done.float()))
            found += infos["final_info"]["score"][infos["_final_info"]].tolist() if "final_info" in infos else []
            observation = following
        advantage, value, advantages = 0.0, agent.value(observation), []
        for _, _, _, old_value, reward, done in reversed(steps):  # generalised advantage estimation, gamma 1
            delta = reward + value * (1 - done) - old_value
            advantage, value = delta + 0.95 * (1 - done) * advantage, old_value
            advantages.insert(0, advantage)
        ids, masks = (torch.cat([step[0][key] for step in steps]) for key in ("input_ids", "attention_mask"))
        actions, old, values = (torch.cat([step[i] for step in steps]) for i in (1, 2, 3))
        advantages = torch.cat(advantages)
        for rows in (part for _ in range(args.epochs) for part in torch.randperm(len(actions)).chunk(2)):
            new = agent.evaluate_states(PackedStates.whole(ids[rows], masks[rows].sum(1)), actions[rows])
            ratio, weight = (new.log_prob - old[rows]).exp(), advantages[rows]
            weight = (weight - weight.mean()) / (weight.std() + 1e-8)
            policy_loss = -torch.min(ratio * weight, ratio.clamp(1 - args.clip, 1 + args.clip) * weight).mean()
            value_loss = (new.value - advantages[rows] - values[rows]).square().mean()
            optimizer.zero_grad()
            (policy_loss + 0.1 * value_loss).backward()
            torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
            optimizer.step()
        scores.append(sum(found) / max(1, len(found)))
        print(f"update {update + 1}: score {scores[-1]:+.2f}")
    print(f"score before {scores[0]:+.2f}, after {scores[-1]:+.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
