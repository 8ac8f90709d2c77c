"""Token-level reinforcement learning algorithms for language models, SFT and DPO, installed as `textgym.agents`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgym.lazy import on_first_use

from .callbacks import CallbackLike, use_session
from .configs.a2c import A2CConfig
from .configs.dpo import DPOConfig, OnlineDPOConfig
from .configs.dqn import DQNConfig
from .configs.expert_iteration import ExpertIterationConfig
from .configs.grpo import GRPOConfig
from .configs.pathwise import PathwiseConfig
from .configs.ppo import NLPOConfig, PPOConfig
from .configs.reinforce import REINFORCEConfig
from .configs.rloo import RLOOConfig
from .configs.supervised import SFTConfig

if TYPE_CHECKING:
    from .a2c import A2C
    from .dpo import DPO
    from .dqn import DQN
    from .expert_iteration import ExpertIteration
    from .grpo import GRPO
    from .nlpo import NLPO
    from .online_dpo import OnlineDPO
    from .pathwise import Pathwise
    from .ppo import PPO
    from .reinforce import REINFORCE
    from .rloo import RLOO
    from .runs.evaluate import evaluate
    from .runs.evaluation import measure
    from .runs.run_folder import RunFolder
    from .sft import SFT

# An algorithm `X` with its `XConfig` is a choice of `textgym train --agent`.
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
    "OnlineDPO",
    "OnlineDPOConfig",
    "PPOConfig",
    "Pathwise",
    "PathwiseConfig",
    "REINFORCEConfig",
    "RLOOConfig",
    "RunFolder",
    "SFTConfig",
    "evaluate",
    "measure",
]

# Loaded on first use, since algorithms need torch and the command line's help does not.
__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "A2C": ".a2c",
        "DPO": ".dpo",
        "DQN": ".dqn",
        "ExpertIteration": ".expert_iteration",
        "GRPO": ".grpo",
        "NLPO": ".nlpo",
        "OnlineDPO": ".online_dpo",
        "PPO": ".ppo",
        "Pathwise": ".pathwise",
        "REINFORCE": ".reinforce",
        "RLOO": ".rloo",
        "RunFolder": ".runs.run_folder",
        "SFT": ".sft",
        "evaluate": ".runs.evaluate",
        "measure": ".runs.evaluation",
    },
)


def _session(
    agent: Any, callback: CallbackLike, progress: bool, folder: str | Path | None, log_with: Sequence[str]
) -> Any:
    """Show and keep a run of `learn`. The import is here, because that module imports the agents."""
    from .watching.session import session

    return session(agent, callback, progress, folder, log_with)


use_session(_session)
