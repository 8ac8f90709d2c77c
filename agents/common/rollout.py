"""Collect whole episodes from a TextVectorEnv, as padded tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textgym.envs.interface import RolloutEnv, rollout_env
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.masks import ActionMask, narrow
from textgym.models.machine.devices import check_one_device
from textgym.models.machine.profiled_phases import phase
from textgym.models.machine.transfer import to_device
from textgym.models.sequences import Sequences, on_both

from .means import masked


@dataclass(frozen=True)
class Rollout:
    """N finished episodes of at most T response tokens.

    Attributes:
        sequences: Prompts and responses.
        log_probs: `(N, T)`, log-probs under the distribution that the tokens were sampled from (behaviour policy).
        values: `(N, T)`, value of the state before each token.
        rewards: `(N, T)`, token-level rewards at their tokens, and the rest of the score at the last token.
        scores: `(N,)`, the sum of a row's rewards.
        raw_scores: `(N,)`, scores before scaling and clipping; NaN in rows without a score, whose rewards are 0.
        ended_by_stop: Bool `(N,)`.
        components: `(N,)` for each `reward/<name>` (unweighted) and `metric/<name>` (of the batch that the row was
            scored in); NaN in rows that the function did not score.
    """

    sequences: Sequences
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    scores: Tensor
    raw_scores: Tensor
    ended_by_stop: Tensor
    components: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, chosen: slice | Tensor) -> Rollout:
        """Return some of the episodes, with the width of the longest; indices are on the host."""
        rows, host_rows = on_both(chosen, self.scores.device)
        sequences = self.sequences.take(rows, host_rows)
        width = sequences.longest
        return Rollout(
            sequences,
            self.log_probs[rows, :width],
            self.values[rows, :width],
            self.rewards[rows, :width],
            self.scores[rows],
            self.raw_scores[rows],
            self.ended_by_stop[rows],
            {name: values[rows] for name, values in self.components.items()},
        )

    def component(self, name: str) -> Tensor:
        """Return a component `(N,)`; NaN if no row has it, such as a reward whose function scored none of them."""
        unknown = torch.full_like(self.scores, torch.nan, dtype=torch.float64)
        return self.components.get(name, unknown)

    @property
    def response_mask(self) -> Tensor:
        """Bool `(N, T)`: the tokens that the policy generated, without padding."""
        return self.sequences.response_mask

    @property
    def scored(self) -> Tensor:
        """Bool `(N,)`: the rows that have a score; the others are not trained on."""
        return ~self.raw_scores.isnan()

    @property
    def training_mask(self) -> Tensor:
        """Bool `(N, T)`: the response mask of the rows that have a score; False in all others."""
        return self.response_mask & self.scored[:, None]


@torch.no_grad()
def collect(
    envs: Any,
    policy: ActorCritic,
    options: dict[str, Any] | None = None,
    deterministic: bool = False,
    action_mask: ActionMask | None = None,
) -> Rollout:
    """Collect one episode in every row, or of every prompt of the options, from `reset` until the last row has ended.

    Args:
        envs: A `TextVectorEnv`, perhaps with wrappers. Rows that have ended wait for the others. Afterwards the
            environment has its old settings.
        policy: The policy that generates.
        options: Options of `reset`, such as `{"prompt_index": ...}`; with fewer prompts than rows, the other rows are
            not in the result.
        deterministic: Whether to choose the most likely token at every step instead of sampling.
        action_mask: Further restriction of the actions, which applies to the log-probs too.
    """
    base_env = rollout_env(envs)
    check_one_device(policy=policy.device, environment=base_env.device)
    options, wanted = for_all_rows(options, envs.num_envs)
    with base_env.whole_episodes(wrapped=envs is not base_env):
        return first_rows(_collect(envs, base_env, policy, options, deterministic, action_mask), wanted)


def for_all_rows(options: dict[str, Any] | None, num_envs: int) -> tuple[dict[str, Any] | None, int]:
    """Return options of `reset` with a prompt for every row, and the number of rows that are wanted."""
    if options is None or not 0 < len(options.get("prompt_index", ())) < num_envs:
        return options, num_envs
    prompts = list(options["prompt_index"])
    return {**options, "prompt_index": prompts + prompts[-1:] * (num_envs - len(prompts))}, len(prompts)


def first_rows(rollout: Rollout, number: int) -> Rollout:
    """Return the first episodes of a rollout."""
    return rollout if number == len(rollout) else rollout[:number]


def _collect(
    envs: Any,
    base_env: RolloutEnv,
    policy: ActorCritic,
    options: dict[str, Any] | None,
    deterministic: bool,
    action_mask: ActionMask | None,
) -> Rollout:
    wrapped = envs is not base_env
    with phase("environment"):
        observation, _ = envs.reset(options=options)
    alone = base_env.takes_whole_responses and action_mask is None and not base_env.decoder_start
    if alone and not wrapped and policy.generates_what_act_would and not policy.rules:
        with phase("decode"):
            ids, lengths = observation["input_ids"], observation["attention_mask"].sum(1)
            whole = policy.generate(ids, lengths, base_env.max_new_tokens, base_env.stop, deterministic)
        shared_values = whole.values if policy.critic is None else None
        return score_whole(envs, policy, whole.tokens, whole.lengths, whole.log_probs, shared_values)
    waiting = base_env.waiting
    assert waiting is not None  # since the reset
    alive = torch.ones(envs.num_envs, dtype=torch.bool, device=base_env.device)
    scores = torch.zeros(envs.num_envs, device=base_env.device)
    outcomes: dict[str, np.ndarray] = {
        "score": np.full(envs.num_envs, np.nan),
        "ended_by_stop": waiting.copy(),
    }
    # A shared critic computes the value with every token. A separate critic evaluates whole episodes afterwards.
    shared = policy.critic is None
    log_probs, values = [], []
    while not waiting.all():
        masks = base_env.allowed_tokens() if base_env.restricts_actions else None
        if action_mask is not None:
            masks = narrow(base_env.allowed_tokens(), action_mask(observation))
        with phase("decode"):
            step = policy.act(observation, deterministic, masks, with_value=shared)
        with phase("environment"):
            action = step.action.cpu().numpy() if wrapped else step.action
            observation, *columns, infos = envs.step(action)
            rewards, terminated, truncated = (torch.as_tensor(x, device=base_env.device) for x in columns)
        waiting = base_env.waiting
        assert waiting is not None
        log_probs.append(step.log_prob)
        values.append(step.value)
        scores += masked(rewards, alive)
        alive = alive & ~(terminated | truncated)
        further = [key for key in infos if key.startswith(("reward/", "metric/"))]
        for name in ("score", "ended_by_stop", *further):
            if name in infos:
                before = outcomes.get(name, np.full(envs.num_envs, np.nan))
                outcomes[name] = np.where(infos[f"_{name}"], infos[name], before)
    sequences = base_env.sequences()
    mask = sequences.response_mask
    step_of_token = (mask.cumsum(1) - 1).clamp(min=0)  # (N, T); tokens of the environment are not steps

    def by_token(steps: list[Tensor]) -> Tensor:
        """Return values of each step `(N,)` at the tokens that these steps generated, `(N, T)`."""
        return masked(torch.stack(steps, 1).gather(1, step_of_token), mask)

    with phase("critic"):
        state_values = by_token(values) if shared else policy.sequence_values(sequences)
    rollout = _rollout(base_env, sequences, by_token(log_probs), state_values, scores, outcomes)
    # Rewards that are not from reward functions, such as those of wrappers, are added to the last token.
    last = (sequences.response_lengths - 1)[:, None]
    rollout.rewards.scatter_add_(1, last, (scores - rollout.rewards.sum(1))[:, None])
    return rollout


def score_whole(
    envs: Any,
    policy: ActorCritic,
    tokens: Tensor,
    lengths: Tensor,
    log_probs: Tensor | None = None,
    values: Tensor | None = None,
) -> Rollout:
    """Return the rollout of given responses to the prompts that `envs` was just reset with.

    Args:
        envs: See `TextVectorEnv.submit`.
        policy: Computes log-probs and values that are not given, by packed passes.
        tokens: Responses `(B, T)`; positions after their end are ignored, here and in the arguments below.
        lengths: Number of tokens of each response, with the stop token, `(B,)`.
        log_probs: `(B, T)`, if they are known.
        values: `(B, T)`, if they are known.
    """
    base_env = rollout_env(envs)
    with phase("environment"):
        scores, infos = base_env.submit(tokens, lengths)
    sequences = base_env.sequences()
    mask = sequences.response_mask

    def real(columns: Tensor) -> Tensor:
        return masked(columns[:, : mask.shape[1]], mask)

    with phase("decode"):
        log_probs = policy.sequence_log_probs(sequences) if log_probs is None else real(log_probs)
    with phase("critic"):
        values = policy.sequence_values(sequences) if values is None else real(values)
    return _rollout(base_env, sequences, log_probs, values, scores, infos)


def _rollout(
    base_env: RolloutEnv,
    sequences: Sequences,
    log_probs: Tensor,
    values: Tensor,
    scores: Tensor,
    outcomes: dict[str, np.ndarray],
) -> Rollout:
    """Make a rollout, and copy the outcomes of its episodes to the device in one transfer."""
    names = [name for name in outcomes if name.startswith(("reward/", "metric/"))]
    raw = outcomes.get("score", np.full(len(scores), np.nan))  # infos of rows without a score have none
    columns = [raw.astype(np.float32), outcomes["ended_by_stop"], *(outcomes[name] for name in names)]
    columns.append(_padded(base_env.token_rewards(), sequences.longest))
    raw_scores, by_stop, *components, rewards = to_device(base_env.device, *map(torch.from_numpy, columns))
    return Rollout(
        sequences,
        log_probs,
        values,
        rewards,
        scores,
        raw_scores,
        by_stop,
        dict(zip(names, components, strict=True)),
    )


def merge(rollouts: list[Rollout]) -> Rollout:
    """Concatenate rollouts, padded to the longest response."""
    if len(rollouts) == 1:
        return rollouts[0]
    longest = max(rollout.log_probs.shape[1] for rollout in rollouts)
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.components)

    def padded(name: str) -> Tensor:
        columns = [getattr(rollout, name) for rollout in rollouts]
        return torch.cat([torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in columns])

    return Rollout(
        Sequences.cat([rollout.sequences for rollout in rollouts]),
        padded("log_probs"),
        padded("values"),
        padded("rewards"),
        torch.cat([rollout.scores for rollout in rollouts]),
        torch.cat([rollout.raw_scores for rollout in rollouts]),
        torch.cat([rollout.ended_by_stop for rollout in rollouts]),
        {name: torch.cat([rollout.component(name) for rollout in rollouts]) for name in names},
    )


def _padded(rows: list[Any], longest: int) -> np.ndarray:
    """Return the rewards of each row's tokens as `(N, longest)` float32, zero in the padding."""
    rewards = np.zeros((len(rows), longest), dtype=np.float32)
    for row, values in enumerate(rows):
        rewards[row, : len(values)] = values
    return rewards
