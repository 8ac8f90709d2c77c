"""Token-level reinforcement learning algorithms for language models, SFT and DPO, installed as `textgym.agents`."""

from __future__ import annotations

from .a2c import A2C, A2CConfig
from .dpo import DPO, DPOConfig
from .dqn import DQN, DQNConfig
from .expert_iteration import ExpertIteration, ExpertIterationConfig
from .grpo import GRPO, GRPOConfig
from .nlpo import NLPO, NLPOConfig
from .pathwise import Pathwise, PathwiseConfig
from .ppo import PPO, PPOConfig
from .reinforce import REINFORCE, REINFORCEConfig
from .rloo import RLOO, RLOOConfig
from .sft import SFT, SFTConfig

__all__ = [
    "A2C",
    "DPO",
    "DQN",
    "GRPO",
    "NLPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "SFT",
    "A2CConfig",
    "DPOConfig",
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
    "SFTConfig",
]
