"""Rollouts that a generation engine writes, such as vLLM in a process of its own, in the form that agents learn from.

An engine takes token ids and gives token ids. An agent uses one by a `collect` of its own:

    class EnginePPO(PPO):
        def collect(self) -> Rollout:
            self.engine.load_weights(self.policy.lm.named_parameters())
            return collect_from(self.engine, self.envs, self.policy, self.episode_options())

Another library's kernels give other log-probs than the trainer's, and a ratio of the two would not start from 1. So the
trainer computes the behaviour log-probs again, in one packed pass over what was written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule
from textgym.models.machine.devices import check_one_device

from ..common.rollout import Rollout, score_whole


class Engine(Protocol):
    """Writes responses with weights that it is given now and then."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights by their names in transformers."""

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, stop: StopRule, temperature: float, seed: int
    ) -> list[list[int]]:
        """One response to each prompt, drawn from softmax(logits / temperature) with no filter.

        A response ends with one of `stop.ids`, which have probability zero before `stop.min_new_tokens`, or has
        `max_new_tokens` tokens.
        """


def collect_from(engine: Engine, envs: Any, policy: ActorCritic, options: dict[str, Any] | None = None) -> Rollout:
    """`collect`, with responses that an engine writes: one episode in every row.

    Args:
        engine: has the policy's weights of now.
        envs: as for `collect`; one turn an episode.
        policy: scores what was written; its generator seeds the engine.
        options: for `reset`.

    Raises:
        ValueError: a response is no whole one, or the environment has to be stepped through: it has stop strings, or
            answers.
    """
    check_one_device(policy=policy.device, environment=envs.unwrapped.task.device)
    observation, _ = envs.reset(options=options)
    episodes = envs.unwrapped.task.episodes
    ids, lengths = observation["input_ids"], observation["attention_mask"].sum(-1).tolist()
    responses = engine.generate(
        [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)],
        max_new_tokens=episodes.max_new_tokens,
        stop=episodes.stop,
        temperature=policy.temperature,
        seed=int(torch.randint(2**31, (), generator=policy.generator, device=policy.device)),
    )
    rows = [torch.tensor(response, device=ids.device) for response in responses]
    return score_whole(envs, policy, pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]))
