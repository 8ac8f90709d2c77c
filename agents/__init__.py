"""Token-level reinforcement learning algorithms for language models, SFT and DPO, installed as `textgym.agents`."""

from __future__ import annotations

from .a2c import A2C as A2C, A2CConfig as A2CConfig
from .dpo import DPO as DPO, DPOConfig as DPOConfig
from .dqn import DQN as DQN, DQNConfig as DQNConfig
from .expert_iteration import ExpertIteration as ExpertIteration, ExpertIterationConfig as ExpertIterationConfig
from .grpo import GRPO as GRPO, GRPOConfig as GRPOConfig
from .nlpo import NLPO as NLPO, NLPOConfig as NLPOConfig
from .online_dpo import OnlineDPO as OnlineDPO, OnlineDPOConfig as OnlineDPOConfig
from .pathwise import Pathwise as Pathwise, PathwiseConfig as PathwiseConfig
from .ppo import PPO as PPO, PPOConfig as PPOConfig
from .reinforce import REINFORCE as REINFORCE, REINFORCEConfig as REINFORCEConfig
from .rloo import RLOO as RLOO, RLOOConfig as RLOOConfig
from .sft import SFT as SFT, SFTConfig as SFTConfig

__all__ = [name for name, value in tuple(vars().items()) if isinstance(value, type)]
