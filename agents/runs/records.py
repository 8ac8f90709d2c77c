"""Recorder: prompts, responses and the numbers of their tokens, of some updates, for `textgym view`.

Log-probs, values, KL and rewards are those of the rollout; advantages are those that the update used. Entropies and the
most likely tokens are computed by one more pass of policy and reference before the update, and the ratios of new to old
probabilities by one more pass of the policy after it, for the recorded rows alone. Nothing of the run depends on them.
"""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from textgym.data.continuations import added_text, decode_continuation
from textgym.errors import DamagedFolderError
from textgym.models.distributions.log_probs import in_chunks
from textgym.models.machine.transfer import to_host
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.engine.completions_to_score import RewardError
from textgym.settings import Count, check_arguments
from textgym.viewer.records import FORMAT, Record, read_record, records_of, rounded, update_of, write_record

from ..callbacks import Callback
from ..common.means import masked
from ..common.policy_gradient import PolicyGradientAgent
from ..common.replay_agent import ReplayAgent
from ..common.rollout import Rollout
from ..common.rollout_agent import Metrics, RolloutAgent
from ..configs.grpo import GRPOConfig
from ..configs.ppo import PPOConfig
from ..nlpo import NLPO
from .evaluation import Judge

ALTERNATIVES = 5


class Recorder(Callback):
    """Callback that records the tokens of the first, every n-th and the last update in a run folder.

    Args:
        folder: The run folder. Records of updates that the agent has not made yet are removed.
        agent: The agent.
        every: Number of updates between records.
        rows: Number of rows that are recorded of an update. Prompts that were recorded before are preferred, so that
            their responses can be compared, and rows of one prompt stay together.
        judge: Scores prompts and responses of the recorded rows; the policy is not trained on it.
    """

    @check_arguments
    def __init__(
        self,
        folder: str | Path,
        agent: RolloutAgent,
        every: Count = 20,
        rows: Count = 64,
        judge: Judge | None = None,
    ) -> None:
        self.folder, self.every, self.rows, self.judge = Path(folder), every, rows, judge
        self.pieces = Pieces(agent.base_env.tokenizer)
        self.seen: set[str] = set()  # texts of recorded prompts
        for path in records_of(self.folder):
            if update_of(path) > agent.updates:
                path.unlink()
            else:
                self.seen |= _prompts_in(path)
        self.before: Before | None = None

    def on_rollout_end(self, agent: RolloutAgent, rollout: Rollout, kl: Tensor) -> None:
        """Keep what is known before the update, if it is to be recorded."""
        number = agent.updates + 1
        last = agent.episodes + agent.config.episodes_per_update >= agent.total_episodes
        self.before = None
        if number == 1 or number % self.every == 0 or last:
            prompts = [self._prompt(ids) for ids in rollout.sequences.host.prompts]
            rows = chosen_rows(prompts, self.seen, self.rows)
            self.before = Before.of(agent, rollout, kl, torch.tensor(rows), [prompts[row] for row in rows])

    def on_update_end(self, agent: RolloutAgent, metrics: Metrics) -> None:
        """Write the record of the update; if the disk refuses it, there is a warning, and the run continues."""
        if self.before is None:
            return
        record = self._record(agent, metrics, self.before)
        self.before = None
        self.seen.update(record["prompts"])
        try:
            write_record(self.folder, record)
        except OSError as error:
            warnings.warn(f"update {agent.updates} is not recorded for `textgym view`: {error}", stacklevel=2)

    def _prompt(self, ids: bytes) -> str:
        """Return the text of a prompt, with its special tokens."""
        return str(self.pieces.tokenizer.decode(np.frombuffer(ids, dtype=np.int64).tolist(), skip_special_tokens=False))

    def _record(self, agent: RolloutAgent, metrics: Metrics, before: Before) -> Record:
        columns = {**before.numbers, **after_update(agent, before)}  # (n, T) each
        if "val/explained_variance" not in metrics:  # there is no critic, so values and returns mean nothing
            columns = {name: values for name, values in columns.items() if name not in ("value", "return")}
        host = HostRollout.read(before.rollout, {**columns, **before.alternatives})
        pieces = self.pieces.local()
        prompts = list(dict.fromkeys(before.prompts))

        tokens = {
            "piece": [pieces.index(token) for response in host.responses for token in response],
            "reward": host.rewards[host.is_real].tolist(),
        }
        if not bool(host.mask[host.is_real].all()):
            tokens["mine"] = host.mask[host.is_real].int().tolist()

        def alternatives_of(model: str) -> dict[str, Any]:
            ids, probabilities = host.further[f"{model}_tokens"], host.further[f"{model}_probabilities"]
            return {
                "piece": [pieces.index(token) for token in ids.flatten().tolist()],
                "percent": (100 * probabilities).round().int().flatten().tolist(),
            }

        models = [model for model in ("policy", "reference") if f"{model}_tokens" in before.alternatives]
        alternatives = {model: alternatives_of(model) for model in models}
        texts = self._texts(host)
        rows = {"prompt": [prompts.index(prompt) for prompt in before.prompts], **host.outcomes}
        judges = judges_among_rewards(agent, rows)
        if self.judge is not None:
            rows["judge"] = self._judged(host, texts)
            judges.append("judge")
        return {
            "format": FORMAT,
            "textgym": importlib.metadata.version("textgym"),
            "agent": type(agent).__name__,
            "update": agent.updates,
            "episodes": agent.episodes,
            "kl_coef": before.kl_coef,
            "clip": before.clip,
            "num_rows": before.num_rows,
            "pieces": pieces.texts,
            "prompts": prompts,
            "rows": rows,
            "judges": judges,
            "texts": self._texts_beside_pieces(host, texts),
            "tokens": tokens,
            "numbers": {name: host.further[name][host.mask].tolist() for name in columns},
            "each": before.alternatives["reference_tokens"].shape[1],
            "alternatives": alternatives,
        }

    def _texts(self, host: HostRollout) -> list[str]:
        """Return the texts of responses."""
        pairs = zip(host.prompts, host.responses, strict=True)
        return [decode_continuation(self.pieces.tokenizer, prompt, response) for prompt, response in pairs]

    def _texts_beside_pieces(self, host: HostRollout, texts: list[str]) -> dict[str, str]:
        """Return the texts of responses that are not those of their pieces, such as those with half characters."""
        pairs = enumerate(zip(texts, host.responses, strict=True))
        return {str(row): text for row, (text, ids) in pairs if text != "".join(self.pieces[token] for token in ids)}

    def _judged(self, host: HostRollout, texts: list[str]) -> list[float | int | None]:
        """Return what the judge says of each row; `None` for rows of which it has no opinion."""
        assert self.judge is not None
        prompts = [str(self.pieces.tokenizer.decode(ids, skip_special_tokens=True)) for ids in host.prompts]
        scores = self.judge(prompts, texts)
        if len(scores) != len(texts):
            raise RewardError(f"the judge of the recorded rows gave {len(scores)} scores for {len(texts)} responses")
        return rounded(math.nan if score is None else float(score) for score in scores)


@dataclass(frozen=True)
class HostRollout:
    """Episodes on the host.

    Attributes:
        prompts: Ids of each prompt.
        responses: Ids of each response, with the tokens of the environment.
        mask: Bool `(n, T)`, the tokens that the policy generated.
        is_real: Bool `(n, T)`, those and the tokens of the environment.
        rewards: `(n, T)`.
        outcomes: Columns of the record's rows.
        further: Other tensors by name.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    mask: Tensor
    is_real: Tensor
    rewards: Tensor
    outcomes: dict[str, list[Any]]
    further: dict[str, Tensor]

    @classmethod
    def read(cls, rollout: Rollout, further: dict[str, Tensor]) -> HostRollout:
        """Copy episodes and further tensors from the device, in one transfer."""
        sequences = rollout.sequences
        components = {name: x for name, x in rollout.components.items() if name.startswith("reward/")}
        ids, lengths, mask, rewards, scores, stopped, *rest = to_host(
            sequences.input_ids,
            sequences.response_lengths,
            rollout.response_mask,
            rollout.rewards,
            rollout.raw_scores,
            rollout.ended_by_stop.bool(),
            *components.values(),
            *further.values(),
        )
        starts, ends = sequences.host.prompt_lengths, sequences.host.prompt_lengths + lengths.numpy()
        outcomes = {"length": lengths.tolist(), "score": rounded(scores.tolist()), "stopped": stopped.tolist()}
        outcomes |= {name: rounded(x.tolist()) for name, x in zip(components, rest, strict=False)}
        return cls(
            [row[:start].tolist() for row, start in zip(ids, starts, strict=True)],
            [row[start:end].tolist() for row, start, end in zip(ids, starts, ends, strict=True)],
            mask,
            torch.arange(mask.shape[1]) < lengths[:, None],
            rewards,
            outcomes,
            dict(zip(further, rest[len(components) :], strict=True)),
        )


class Before(NamedTuple):
    """What is known of the recorded rows before the update.

    Attributes:
        rollout: Their episodes.
        rows: Their indices in the rollout, on the host.
        prompts: Texts of their prompts.
        num_rows: Number of rows of the rollout.
        numbers: `(n, T)` by name.
        alternatives: `(M, 5)` by name: the most likely tokens of policy and reference, and their probabilities.
        kl_coef: beta.
        clip: Lowest and highest ratio that the loss does not clip; `None` for algorithms without clipping.
    """

    rollout: Rollout
    rows: Tensor
    prompts: list[str]
    num_rows: int
    numbers: dict[str, Tensor]
    alternatives: dict[str, Tensor]
    kl_coef: float
    clip: tuple[float, float] | None

    @classmethod
    def of(cls, agent: RolloutAgent, rollout: Rollout, kl: Tensor, rows: Tensor, prompts: list[str]) -> Before:
        """Look at some rows of a rollout, with one pass of policy and reference."""
        part = rollout[rows]
        kl = kl[rows.to(kl.device), : part.log_probs.shape[1]]
        sequences = part.sequences
        numbers = {"log_prob": part.log_probs, "kl": kl, "value": part.values}
        allowed = agent.allowed(sequences) if isinstance(agent, NLPO) else None
        reference = agent.penalty.reference
        there = sequences.to(reference.device)
        likely = most_likely(reference, there, None if allowed is None else allowed.to(reference.device))
        log_probs, _, probabilities, tokens = (x.to(kl.device) for x in likely)
        if agent.penalty.estimator != "k1":  # else it is the log-prob minus the KL
            numbers["reference_log_prob"] = sequences.pad(log_probs)
        alternatives = {"reference_tokens": tokens, "reference_probabilities": probabilities}
        # A greedy Q-learner has values of tokens and no probabilities.
        if not (isinstance(agent, ReplayAgent) and agent.greedy):
            _, entropies, probabilities, tokens = most_likely(agent.policy, sequences, allowed)
            numbers["entropy"] = sequences.pad(entropies)
            alternatives |= {"policy_tokens": tokens, "policy_probabilities": probabilities}
        clip = clip_bounds(agent.config)
        return cls(part, rows, prompts, len(rollout), numbers, alternatives, agent.penalty.coef, clip)


def judges_among_rewards(agent: RolloutAgent, rows: Mapping[str, Any]) -> list[str]:
    """Return the columns of reward functions of weight 0, which are only reported while others are trained on."""
    scorer = agent.base_env.scorer
    if not any(scorer.weights):
        return []
    names = [f"reward/{name}" for name, weight in zip(scorer.names, scorer.weights, strict=True) if weight == 0]
    return [name for name in names if name in rows]


@torch.no_grad()
def after_update(agent: RolloutAgent, before: Before) -> dict[str, Tensor]:
    """Return advantages, returns, ratios of new to old probabilities, and which were clipped, `(n, T)` each.

    A token counts as clipped if its ratio is now beyond the bounds in the direction in which its advantage pushes it,
    so that the loss has no gradient there.
    """
    if not isinstance(agent, PolicyGradientAgent) or agent.advantages is None:
        return {}
    part, sequences = before.rollout, before.rollout.sequences
    width = sequences.longest
    rows = before.rows.to(agent.advantages.device)
    advantages = agent.advantages[rows, :width]
    returns = torch.zeros_like(advantages) if agent.returns is None else agent.returns[rows, :width]
    columns = {"advantage": advantages}
    if agent.returns is not None:
        columns["return"] = returns
    if isinstance(agent, NLPO) and agent.updates % (agent.config.mask_update_interval or agent.updates + 1) == 0:
        return columns  # the mask is another one now, and ratios would be of other distributions
    log_ratio = agent.new_log_probs(part) - part.log_probs
    ratio = masked(log_ratio, part.response_mask).exp()
    columns["ratio"] = ratio
    if before.clip is not None:
        low, high = before.clip
        columns["clipped"] = ((advantages > 0) & (ratio > high) | (advantages < 0) & (ratio < low)).float()
    return columns


@torch.no_grad()
def most_likely(model: TokenModel, sequences: Sequences, allowed: Tensor | None) -> tuple[Tensor, ...]:
    """Return log-probs and entropies `(M,)`, and probabilities and ids `(M, 5)` of the most likely tokens.

    Args:
        model: The model.
        sequences: Sequences with M tokens that the policy generated.
        allowed: Bool `(M, V)`, the tokens that were allowed; `None` for those that the stop rule allows.
    """
    distribution = model.distribution_of(sequences) if allowed is None else model.distribution(allowed)
    number = min(ALTERNATIVES, model.vocab_size)

    def score(
        hidden: Tensor, actions: Tensor, banned: Tensor | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chunk = replace(distribution, banned=banned, allowed=allowed)
        log_probs = chunk.log_probs(model.head(hidden), actions)
        probabilities = log_probs.exp()
        entropies = -(probabilities * log_probs).sum(-1)
        top = probabilities.topk(number)
        return log_probs.gather(1, actions[:, None])[:, 0], entropies, top.values, top.indices

    hidden = model.hidden(sequences.states())
    inputs = hidden, sequences.actions, distribution.banned, distribution.allowed
    return in_chunks(score, model.vocab_size, *inputs)


def clip_bounds(config: Any) -> tuple[float, float] | None:
    """Return the lowest and the highest ratio of a token that the loss does not clip; `None` if it clips none."""
    if not isinstance(config, PPOConfig | GRPOConfig) or getattr(config, "variant", "clip") != "clip":
        return None
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    return 1 - config.clip_range, 1 + high


def _prompts_in(path: Path) -> set[str]:
    """Return the prompts of a record; none if it is damaged, because this must not stop a run."""
    try:
        return set(read_record(path)["prompts"])
    except DamagedFolderError:
        return set()


def chosen_rows(prompts: list[str], seen: set[str], limit: int) -> list[int]:
    """Return at most `limit` rows, those of prompts that were seen before first, and rows of one prompt together."""
    order = sorted(dict.fromkeys(prompts), key=lambda prompt: prompt not in seen)  # otherwise as they come
    places: dict[str, list[int]] = {prompt: [] for prompt in order}
    for row, prompt in enumerate(prompts):
        places[prompt].append(row)
    return [row for rows in places.values() for row in rows][:limit]


class Pieces:
    """Texts of single tokens, as continuations of a letter, so that their first space is there."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before = tokenizer.encode("a", add_special_tokens=False)
        self.known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        """Return the text of a token; the name of a special token, and `<id>` for ids that the tokenizer lacks."""
        if token not in self.known:
            known = token < len(self.tokenizer)
            text = added_text(self.tokenizer, self.before, [token]) if known else f"<{token}>"
            self.known[token] = text or str(self.tokenizer.convert_ids_to_tokens(token))
        return self.known[token]

    def local(self) -> LocalPieces:
        """Return an empty list of pieces for one record."""
        return LocalPieces(self)


class LocalPieces:
    """The pieces of one record, in the order of their first use."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.places: dict[int, int] = {}

    def index(self, token: int) -> int:
        """Return the index of a token's piece."""
        return self.places.setdefault(token, len(self.places))

    @property
    def texts(self) -> list[str]:
        """The texts of the pieces."""
        return [self.pieces[token] for token in self.places]
