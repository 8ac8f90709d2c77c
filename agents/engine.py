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
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from textgym.models.actor_critic import ActorCritic, Step
from textgym.models.log_probs import StopRule
from textgym.models.sequences import Sequences
from textgym.models.token_model import Observation

from .rollout import Rollout, collect


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
        ValueError: the engine ended a response that the environment does not end, or the environment answered.
    """
    rollout = collect(envs, _Writer(engine, envs.unwrapped.task, policy), options)  # type: ignore[arg-type]
    if rollout.sequences.written is not None:
        raise ValueError("an engine writes one response an episode: play games of several turns with `collect`")
    return replace(rollout, log_probs=policy.sequence_log_probs(rollout.sequences))


class _Writer:
    """Takes the policy's place in `collect`: hands out responses, written when it is first asked."""

    critic = "separate"  # values come from whole sequences

    def __init__(self, engine: Engine, task: Any, policy: ActorCritic) -> None:
        self.engine, self.task, self.policy = engine, task, policy
        self.responses: Tensor | None = None  # (B, T)
        self.written = 0

    def act(
        self, observation: Observation, deterministic: bool = False, action_masks: Any = None, with_value: bool = True
    ) -> Step:
        """The next token of each row; log-prob and value are left to the passes over whole sequences."""
        if self.responses is None:
            self._write(observation)
        assert self.responses is not None
        if self.written == self.responses.shape[1] or bool((self._next() < 0)[self.task.episodes.alive].any()):
            raise ValueError(
                "the engine ended a response before the environment did: let it stop at stop.ids and max_new_tokens"
            )
        tokens = self._next().clamp(min=0)
        self.written += 1
        unknown = torch.zeros(len(tokens), device=tokens.device)
        return Step(tokens, unknown, unknown)

    def sequence_values(self, sequences: Sequences) -> Tensor:
        """The critic's, of whole sequences."""
        return self.policy.sequence_values(sequences)

    def _next(self) -> Tensor:
        assert self.responses is not None
        return self.responses[:, self.written]

    def _write(self, observation: Observation) -> None:
        ids, lengths = observation["input_ids"], observation["attention_mask"].sum(-1).tolist()
        episodes = self.task.episodes
        responses = self.engine.generate(
            [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)],
            max_new_tokens=episodes.max_new_tokens,
            stop=episodes.stop,
            temperature=self.policy.temperature,
            seed=int(torch.randint(2**31, (), generator=self.policy.generator, device=self.policy.device)),
        )
        rows = [torch.tensor(response, dtype=torch.long, device=ids.device) for response in responses]
        self.responses = pad_sequence(rows, batch_first=True, padding_value=-1)
