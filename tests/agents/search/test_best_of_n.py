"""best_of_n: the best of several responses to each prompt, by its score."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym.agents.runs.evaluation import generate
from textgym.agents.search.best_of_n import best_of_n
from textgym.models.actor_critic import ActorCritic
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of

TEXTS = ["one", "three", "a", "hello", "xy"]


def letters(completions: list[str]) -> list[float]:
    return [float(sum(letter.isalpha() for letter in text)) for text in completions]


def make_envs(**changes: Any) -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=3,
        prompts=TEXTS,
        tokenizer=byte_tokenizer(),
        reward=letters,
        kl_mode="deferred",
        stop=list(range(64)),
        max_prompt_tokens=8,
        max_new_tokens=6,
        **changes,
    )


@pytest.fixture
def policy() -> ActorCritic:
    return ActorCritic.from_pretrained(mock_lm())


def test_best_of_n_picks_the_best_scored(policy: ActorCritic) -> None:
    envs = make_envs()
    rounds = [generate(policy, envs, range(5), seed) for seed in (7, 8, 9)]
    best = best_of_n(policy, envs, range(5), n=3, seed=7)
    scores = torch.stack([samples.rollout.scores for samples in rounds])
    assert len(set(scores.argmax(0).tolist())) > 1
    assert torch.equal(best.rollout.scores, scores.max(0).values)
    assert letters(best.completions) == best.rollout.scores.tolist()
    sequences = best.rollout.sequences
    rows = zip(sequences.input_ids.tolist(), sequences.prompt_lengths.tolist(), strict=True)
    prompts = [bytes(ids[:length]).decode() for ids, length in rows]
    assert prompts == [transcript["prompt"] for transcript in best.transcripts] == TEXTS
    for row, score in enumerate(best.rollout.scores):
        candidates = [samples.completions[row] for samples in rounds if samples.rollout.scores[row] == score]
        assert best.completions[row] == candidates[0]
    log_probs = policy.evaluate(best.rollout.sequences).log_prob.detach()
    assert_close(best.rollout.log_probs, log_probs, terms=terms_of(mock_lm()))


def test_scales_of_scores_change_no_choice(policy: ActorCritic) -> None:
    envs = (make_envs(), make_envs(score_scaling="running", score_clip=0.1))
    plain, scaled = (best_of_n(policy, e, range(5), 3, seed=0).completions for e in envs)
    assert plain == scaled
