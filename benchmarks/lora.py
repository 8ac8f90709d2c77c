"""Time and memory of one PPO iteration of SmolLM2-135M with LoRA on two CPU cores.

    python benchmarks/lora.py

Policy, critic and reference share one copy of the base weights: the critic is a value head on the policy's trunk, and
the reference is the trunk with its own frozen adapter. One iteration has 16 episodes of 24 tokens on
`textgym/Sentiment-v0` with the embedded reward model, and two epochs of two minibatches. The time is that of the
slowest iteration, and the memory is the peak of the process, including Python and libraries. If other processes run,
set OMP_WAIT_POLICY=passive, so that waiting threads do not occupy a core.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from itertools import pairwise

import gymnasium as gym
import torch
import tyro
from measuring.peers import Figures, report

import textgym
from textgym.agents import PPO, PPOConfig

SECONDS_BAR, GIGABYTES_BAR = 90.0, 4.0


@dataclass
class Config:
    model: str = "smollm2"
    episodes: int = 16
    prompt_tokens: int = 16
    new_tokens: int = 24
    rank: int = 8
    iterations: int = 3
    threads: int = 2


def iterate(config: Config) -> Figures:
    """Return the row of the table."""
    from peft import LoraConfig

    adapter = LoraConfig(r=config.rank, target_modules=["q_proj", "v_proj"])
    envs = gym.make_vec(
        "textgym/Sentiment-v0",
        num_envs=config.episodes,
        tokenizer=config.model,
        reference=None,  # the initial policy
        kl_mode="deferred",
        max_prompt_tokens=config.prompt_tokens,
        max_new_tokens=config.new_tokens,
        min_new_tokens=config.new_tokens,
    )
    policy = textgym.ActorCritic.from_pretrained(config.model, lora=adapter)
    agent = PPO(policy, envs, PPOConfig(episodes_per_update=config.episodes, minibatch_size=config.episodes // 2))
    ends = [(time.perf_counter(), time.process_time())]

    def note(*_: object) -> None:
        ends.append((time.perf_counter(), time.process_time()))

    agent.learn(config.iterations * config.episodes, callback=[note])
    seconds, cpu_seconds = max((end[0] - start[0], end[1] - start[1]) for start, end in pairwise(ends))
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kB
    return {
        "parameters, M": sum(weight.numel() for weight in policy.lm.parameters()) / 1e6,
        "trained, M": sum(weight.numel() for weight in policy.parameters() if weight.requires_grad) / 1e6,
        "seconds, the slowest": seconds,
        "CPU seconds": cpu_seconds,
        f"bar {SECONDS_BAR:g} s": "met" if seconds <= SECONDS_BAR else "missed",
        "peak GB": gigabytes,
        f"bar {GIGABYTES_BAR:g} GB": "met" if gigabytes <= GIGABYTES_BAR else "missed",
    }


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    report([iterate(config)])


if __name__ == "__main__":
    main(tyro.cli(Config))
