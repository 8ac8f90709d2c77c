"""Sampling rules and beam search give what transformers' `generate` gives with the same settings."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from textgym.agents import DQN, GRPO, PPO
from textgym.agents.runs.evaluation import Samples, generate, measure
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.sampling_rules import NO_RULES, SamplingRules
from textgym.testing import assert_close, byte_tokenizer, mock_lm, mock_seq2seq_lm

TOKENIZER = byte_tokenizer()
PROMPTS = ["ab", "abcabcab", "a", "zzzz"]
LONGEST = 8
RULES = {
    "min_p": SamplingRules(min_p=0.3),
    "repetition_penalty": SamplingRules(repetition_penalty=1.7),
    "for repetition": SamplingRules(repetition_penalty=0.6),
    "no_repeat_ngram_size": SamplingRules(repetition_penalty=0.6, no_repeat_ngram_size=2),
    "all": SamplingRules(min_p=0.1, repetition_penalty=1.3, no_repeat_ngram_size=1),
}


def make_envs(**arguments: Any) -> Any:
    settings = {"max_prompt_tokens": 8, "max_new_tokens": LONGEST, "reward": lambda completions, **_: [0.0] * 4}
    return gym.make_vec(
        "textgym/Text-v0", num_envs=4, prompts=PROMPTS, tokenizer=TOKENIZER, **{**settings, **arguments}
    )


def make_policy(rules: SamplingRules = NO_RULES, temperature: float = 1.0, **model: Any) -> ActorCritic:
    return ActorCritic(mock_lm(**model), temperature=temperature, rules=rules)


def responses(samples: Samples) -> list[list[int]]:
    sequences = samples.rollout.sequences
    rows = sequences.pad(sequences.actions).tolist()
    return [row[:length] for row, length in zip(rows, sequences.response_lengths.tolist(), strict=True)]


def theirs(policy: ActorCritic, prompt: str, **settings: Any) -> Any:
    """One prompt without padding, in transformers, with the policy's settings."""
    rules = policy.rules
    config = GenerationConfig(
        max_new_tokens=LONGEST,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        repetition_penalty=float(rules.repetition_penalty),
        no_repeat_ngram_size=rules.no_repeat_ngram_size or 0,
        return_dict_in_generate=True,
        **settings,
    )
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    return policy.lm.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids)), ids.shape[1]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_greedy_responses_are_those_of_transformers(name: str, architecture: str) -> None:
    policy = make_policy(RULES[name], architecture=architecture)
    ours = responses(generate(policy, make_envs(), range(4), seed=0, deterministic=True))
    for prompt, response in zip(PROMPTS, ours, strict=True):
        found, first = theirs(policy, prompt, do_sample=False)
        assert response == found.sequences[0, first:].tolist()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=pytest.mark.slow)])
def test_log_probs_of_samples_are_those_of_transformers(name: str, temperature: float) -> None:
    """transformers samples; then `act` has the same distribution in each of the contexts."""
    policy = make_policy(RULES[name], temperature)
    torch.manual_seed(0)
    for prompt in PROMPTS:
        settings = {} if policy.rules.min_p is None else {"min_p": policy.rules.min_p}
        found, first = theirs(
            policy, prompt, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, output_scores=True, **settings
        )
        for step, scores in enumerate(found.scores):
            context = found.sequences[:, : first + step]
            distribution = policy.distribution()
            logits = policy.lm(context).logits[:, -1].detach()
            padded = torch.nn.functional.pad(context, (0, 3))  # junk on the right
            ours = policy.rules.log_probs(logits, distribution, padded, torch.tensor([first + step]))
            assert_close(ours.exp(), scores.softmax(-1), terms=policy.vocab_size)


def test_log_probs_of_a_rollout_are_those_of_the_distribution_that_was_sampled() -> None:
    rules = SamplingRules(min_p=0.2, repetition_penalty=1.5, no_repeat_ngram_size=2)
    policy = make_policy(rules, temperature=0.8)
    rollout = generate(policy, make_envs(), range(4), seed=0).rollout
    sequences = rollout.sequences
    for row, (length, prompt) in enumerate(
        zip(sequences.response_lengths.tolist(), sequences.prompt_lengths.tolist(), strict=True)
    ):
        for step in range(length):
            context = sequences.input_ids[row : row + 1, : prompt + step]
            logits = policy.lm(context).logits[:, -1].detach()
            lengths = torch.tensor([prompt + step])
            log_probs = rules.log_probs(logits, policy.distribution(), context, lengths)
            expected = log_probs[0, sequences.input_ids[row, prompt + step]]
            assert_close(rollout.log_probs[row, step], expected, terms=policy.vocab_size)


def test_a_rule_that_would_forbid_all_tokens_forbids_none() -> None:
    logits, ids = torch.zeros(1, 3), torch.tensor([[0, 1, 2]])
    rules = SamplingRules(no_repeat_ngram_size=1)
    log_probs = rules.log_probs(logits, ActorCritic(mock_lm()).distribution(), ids, torch.tensor([3]))
    assert_close(log_probs.exp(), torch.full((1, 3), 1 / 3), terms=3)


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rules", [NO_RULES, SamplingRules(repetition_penalty=1.2, no_repeat_ngram_size=2)], ids=str)
def test_beams_are_those_of_transformers(architecture: str, rules: SamplingRules) -> None:
    """Prompts of unequal lengths in one batch; the model's own generation config says something else."""
    policy = make_policy(rules, architecture=architecture)
    expected = []
    for prompt in PROMPTS:
        found, first = theirs(policy, prompt, do_sample=False, num_beams=3)
        expected.append(found.sequences[0, first:].tolist())
    policy.lm.generation_config = GenerationConfig(
        num_return_sequences=2, num_beams=2, eos_token_id=256, max_length=3, repetition_penalty=9.0
    )
    samples = generate(policy, make_envs(), range(4), seed=0, num_beams=3)
    assert responses(samples) == expected
    assert policy.lm.generation_config.num_beams == 2
    assert_close(samples.rollout.log_probs, policy.sequence_log_probs(samples.rollout.sequences), terms=258)


def total(policy: ActorCritic, samples: Samples) -> Tensor:
    return policy.sequence_log_probs(samples.rollout.sequences).sum(1)


def test_beams_find_more_likely_texts_than_greedy_choices() -> None:
    """Of the same length, at another temperature."""
    policy, envs = make_policy(temperature=2.0), make_envs(min_new_tokens=LONGEST)
    beams = generate(policy, envs, range(4), seed=0, num_beams=8)
    greedy = generate(policy, envs, range(4), seed=0, deterministic=True)
    assert (total(policy, beams) >= total(policy, greedy) - 1e-4).all()
    assert (total(policy, beams) > total(policy, greedy) + 1e-3).any()


def test_beams_of_an_encoder_decoder_model() -> None:
    lm = mock_seq2seq_lm()
    policy = ActorCritic(lm)
    envs = make_envs(decoder_start_ids=policy.decoder_start_ids)
    samples = generate(policy, envs, range(4), seed=0, num_beams=3)
    ids = torch.tensor([TOKENIZER("abcabcab")["input_ids"]])
    start = policy.decoder_start_ids[0]
    config = GenerationConfig(
        max_new_tokens=LONGEST, num_beams=3, eos_token_id=256, pad_token_id=257, decoder_start_token_id=start
    )
    assert responses(samples)[1] == lm.generate(ids, generation_config=config)[0, 1:].tolist()


@pytest.mark.parametrize("kind", [PPO, GRPO, DQN])
def test_agents_refuse_a_policy_with_rules(kind: Any) -> None:
    policy = make_policy(SamplingRules(repetition_penalty=1.2))
    with pytest.raises(ConfigError, match=rf"{kind.__name__}.*repetition_penalty=1.2"):
        kind(policy, make_envs(), kind.config_class(episodes_per_update=4))


@pytest.mark.parametrize("kind", [PPO, DQN])
def test_agents_refuse_rules_that_their_policy_was_given_later(kind: Any) -> None:
    """To evaluate it, for example between two calls of `learn`, or in a callback."""
    agent = kind(make_policy(), make_envs(kl_coef=0.1), kind.config_class(episodes_per_update=4))
    agent.learn(4)
    agent.policy.rules = SamplingRules(min_p=0.9)
    with pytest.raises(ConfigError, match=rf"{kind.__name__}.*min_p=0.9"):
        agent.learn(8)
    assert agent.episodes == 4
    agent.policy.rules = NO_RULES
    agent.learn(8)


def test_what_does_not_go_together_is_refused_with_both_names() -> None:
    policy = make_policy(SamplingRules(min_p=0.1))
    with pytest.raises(ConfigError, match=r"num_beams=2 and min_p=0.1"):
        generate(policy, make_envs(), range(4), seed=0, num_beams=2)
    with pytest.raises(ConfigError, match=r"num_beams=3.*stop strings"):
        generate(make_policy(), make_envs(stop=["xy"]), range(4), seed=0, num_beams=3)
    with pytest.raises(ConfigError, match=r"generate.*min_p=0.1"):
        policy.generate(torch.zeros(1, 9, dtype=torch.long), torch.ones(1).long(), 4, make_envs().unwrapped.stop)
    with pytest.raises(ConfigError, match=r"kl_mode='exact'.*min_p=0.1"):
        make_envs(kl_mode="exact", reference=mock_lm()).unwrapped.attach_policy(policy)
    for settings in ({"min_p": 0.0}, {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"no_repeat_ngram_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            SamplingRules(**settings)


def test_the_kl_of_an_evaluation_is_that_of_the_sampled_distribution() -> None:
    """A policy that equals its reference has a positive KL with a rule, and none without."""
    reference = make_policy().reference()
    kls = [
        measure(generate(make_policy(rules), make_envs(), range(4), seed=0), reference)["kl"]
        for rules in (NO_RULES, SamplingRules(min_p=0.5))
    ]
    assert abs(kls[0]) < 1e-4
    assert kls[1] > 1.0
