"""Token-level reinforcement learning algorithms for language models, installed as `textgym.agents`."""

from __future__ import annotations

from .a2c import A2C, A2CConfig
from .dqn import DQN, DQNConfig
from .expert_iteration import ExpertIteration, ExpertIterationConfig
from .grpo import GRPO, GRPOConfig
from .nlpo import NLPO, NLPOConfig
from .pathwise import Pathwise, PathwiseConfig
from .ppo import PPO, PPOConfig
from .reinforce import REINFORCE, REINFORCEConfig
from .rloo import RLOO, RLOOConfig

__all__ = [
    "A2C",
    "DQN",
    "GRPO",
    "NLPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "A2CConfig",
    "DQNConfig",
    "ExpertIteration",
    "ExpertIterationConfig",
    "GRPOConfig",
    "NLPOConfig",
    "PPOConfig",
    "Pathwise",
    "PathwiseConfig",
    "REINFORCEConfig",
    "RLOOConfig",
]
