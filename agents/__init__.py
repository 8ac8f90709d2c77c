"""Token-level reinforcement learning algorithms for language models, installed as `textgym.agents`."""

from __future__ import annotations

from .a2c import A2C, A2CConfig
from .expert_iteration import ExpertIteration, ExpertIterationConfig
from .grpo import GRPO, GRPOConfig
from .nlpo import NLPO, NLPOConfig
from .ppo import PPO, PPOConfig
from .reinforce import REINFORCE, REINFORCEConfig
from .rloo import RLOO, RLOOConfig

__all__ = [
    "A2C",
    "GRPO",
    "NLPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "A2CConfig",
    "ExpertIteration",
    "ExpertIterationConfig",
    "GRPOConfig",
    "NLPOConfig",
    "PPOConfig",
    "REINFORCEConfig",
    "RLOOConfig",
]
