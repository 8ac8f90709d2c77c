"""What a policy writes and how it is measured, against computations by hand."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym.agents.common.rollout import Rollout
from textgym.agents.runs.evaluation import (
    Samples,
    distinct_2,
    generate,
    measure,
    score_gains,
    score_intervals,
    score_samples,
)
from textgym.models.actor_critic import ActorCritic
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.engine.completions_to_score import RewardError
from textgym.rewards.functions import Bleu, Chrf, DistinctN, Rouge
from textgym.testing import byte_tokenizer, mock_lm, terms_of, tolerance

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

TEXTS = ["one", "three", "a", "hello", "xy"]


def letters(completions: list[str]) -> list[float]:
    return [float(sum(letter.isalpha() for letter in text)) for text in completions]


def make_envs(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "prompts": [{"prompt": text, "row": i} for i, text in enumerate(TEXTS)],
        "tokenizer": byte_tokenizer(),
        "reward": letters,
        "kl_mode": "deferred",
        "stop": list(range(64)),
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
    }
    return gym.make_vec("textgym/Text-v0", num_envs=3, **{**settings, **changes})


@pytest.fixture
def policy() -> ActorCritic:
    return ActorCritic.from_pretrained(mock_lm())


def prompts_of(samples: Samples) -> list[str]:
    sequences = samples.rollout.sequences
    rows = zip(sequences.input_ids.tolist(), sequences.prompt_lengths.tolist(), strict=True)
    return [bytes(ids[:length]).decode() for ids, length in rows]


@pytest.mark.parametrize("chosen", [[4, 0, 2, 1, 3], [1], [2, 2, 2], range(4)])
def test_samples_are_in_the_order_of_the_prompts(policy: ActorCritic, chosen: list[int]) -> None:
    """Also where the last batch is not full."""
    samples = generate(policy, make_envs(), chosen, seed=0)
    assert [transcript["row"] for transcript in samples.transcripts] == list(chosen)
    assert [transcript["prompt"] for transcript in samples.transcripts] == [TEXTS[i] for i in chosen]
    assert prompts_of(samples) == [TEXTS[i] for i in chosen]
    assert samples.rollout.scores.tolist() == letters(samples.completions)
    assert len(samples.rollout) == len(chosen)


def test_generation_depends_on_the_seed_alone(policy: ActorCritic) -> None:
    envs = make_envs()
    first = generate(policy, envs, range(5), seed=0)
    other = generate(policy, envs, range(5), seed=1)
    again = generate(policy, envs, range(5), seed=0)
    fresh = generate(ActorCritic.from_pretrained(mock_lm()), make_envs(), range(5), seed=0)
    assert first.completions == again.completions == fresh.completions != other.completions
    greedy = [generate(policy, envs, range(5), seed, deterministic=True).completions for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_an_environment_made_for_stepping_is_taken_over(policy: ActorCritic) -> None:
    envs = make_envs(autoreset_mode="SameStep", array="numpy")
    envs.reset(seed=0)
    envs.step(np.full(3, 97))
    assert len(generate(policy, envs, range(5), seed=0).completions) == 5


def test_no_prompts_is_an_error(policy: ActorCritic) -> None:
    with pytest.raises(ValueError, match="choose at least one"):
        generate(policy, make_envs(), [], seed=0)


def test_figures_against_a_computation_by_hand(policy: ActorCritic) -> None:
    samples = generate(policy, make_envs(), range(5), seed=0)
    other = mock_lm(seed=3)

    def judge(prompts: list[str], completions: list[str]) -> list[float]:
        assert prompts == TEXTS
        return [float(len(completion)) for completion in completions]

    kl, reference_total, count, bigrams = 0.0, 0.0, 0, []
    for row in range(5):
        first, last = int(samples.rollout.sequences.prompt_lengths[row]), int(samples.rollout.sequences.lengths[row])
        ids = samples.rollout.sequences.input_ids[row : row + 1, :last]
        with torch.no_grad():
            p, q = (lm(ids).logits.log_softmax(-1)[0, first - 1 : last - 1] for lm in (policy.lm, other))
        tokens = ids[0, first:]
        kl += float((p - q).gather(1, tokens[:, None]).sum()) / 5
        reference_total += float(q.gather(1, tokens[:, None]).sum())
        count += len(tokens)
        bigrams += [tuple(pair) for pair in tokens.unfold(0, 2, 1).tolist()] if len(tokens) > 1 else []
    scores = letters(samples.completions)
    expected = {
        "score": np.mean(scores),
        "score_std": np.std(scores),
        "kl": kl,
        "reference_ppl": np.exp(-reference_total / count),
        "distinct_2": len(set(bigrams)) / len(bigrams),
        "length": count / 5,
        "ended_by_stop": np.mean(samples.rollout.ended_by_stop.tolist()),
        "judge": np.mean([len(text) for text in samples.completions]),
    }
    figures = measure(samples, TokenModel.load(other), judge)
    assert figures == pytest.approx(expected, rel=1e-5, abs=ROUNDING)
    assert "judge" not in measure(samples, TokenModel.load(other))


def test_reward_functions_serve_as_metrics(policy: ActorCritic) -> None:
    prompts = [{"prompt": text, "references": f"{text} is a text"} for text in TEXTS]
    samples = generate(policy, make_envs(prompts=prompts), range(5), seed=0)

    def tokens(completion_ids: list[list[int]]) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    metrics = [tokens, DistinctN(1), Chrf(), "textgym.rewards.functions:Rouge"]
    figures = measure(samples, policy.reference(), metrics=metrics)
    assert figures["tokens"] == pytest.approx(figures["length"])
    assert figures["DistinctN"] == pytest.approx(np.mean(DistinctN(1)(samples.completions)))
    references = [row["references"] for row in prompts]
    assert figures["Chrf"] == Chrf().corpus(samples.completions, references)
    assert figures["Rouge"] == pytest.approx(np.mean(Rouge()(samples.completions, references=references)))


def test_metrics_read_the_tokens_of_the_text_without_the_stop_token(policy: ActorCritic) -> None:
    samples = generate(policy, make_envs(stop=list(range(0, 256, 2))), range(5), seed=0)

    def of_text(text_ids: list[list[int]]) -> list[float]:
        return [float(len(ids)) for ids in text_ids]

    ended = samples.rollout.ended_by_stop
    assert ended.any()
    expected = (samples.rollout.sequences.response_lengths - ended.long()).float().mean()
    assert measure(samples, policy.reference(), metrics=[of_text])["of_text"] == pytest.approx(float(expected))


@pytest.mark.slow
def test_intervals_are_the_bootstraps(policy: ActorCritic) -> None:
    """Of a mean they are near the normal ones; a corpus score is within; without spread they have no width."""

    def length(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    def constant(completions: list[str]) -> list[float]:
        return [2.0] * len(completions)

    prompts = [{"prompt": f"{text}{i}", "references": f"{text} is a text"} for i in range(12) for text in TEXTS]
    samples = generate(policy, make_envs(prompts=prompts), range(60), seed=0)
    metrics = [length, constant, Chrf()]
    intervals = score_intervals(samples, metrics, resamples=100)
    assert {name: interval.value for name, interval in intervals.items()} == score_samples(samples, metrics)
    # Of 10,000 resamples each end has a standard error of 0.014 of the half width, so 0.2 leaves room for skewness.
    exact = score_intervals(samples, [length], resamples=10_000)["length"]
    lengths = np.array(length(samples.completions))
    half = 1.96 * lengths.std() / np.sqrt(60)
    assert exact.low == pytest.approx(lengths.mean() - half, abs=0.2 * half)
    assert exact.high == pytest.approx(lengths.mean() + half, abs=0.2 * half)
    assert str(intervals["constant"]) == "2.000 [2.000, 2.000]"
    assert intervals["Chrf"].low < intervals["Chrf"].value < intervals["Chrf"].high


@pytest.mark.parametrize("repeats", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_intervals_resample_prompts_and_not_rows(policy: ActorCritic, repeats: int) -> None:
    """A metric of the prompt alone has the same interval, however many samples of each prompt there are."""

    def of_prompt(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]

    once = generate(policy, make_envs(), range(5), seed=0)
    often = generate(policy, make_envs(), [*range(5)] * repeats, seed=0)
    expected = score_intervals(once, [of_prompt])["of_prompt"]
    assert expected.high - expected.low > 1
    assert score_intervals(often, [of_prompt])["of_prompt"] == expected
    texts = [{"prompt": text, "shift": 0.5 * row} for row, text in enumerate(TEXTS * repeats)]
    repeated = generate(policy, make_envs(prompts=texts), range(5 * repeats), seed=0)
    assert score_intervals(repeated, [of_prompt])["of_prompt"] == expected, "rows of one prompt, as rows of a data set"

    def nothing(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    gains = score_gains(often, often, [of_prompt, nothing])
    assert str(gains["of_prompt"]) == str(gains["nothing"]) == "0.000 [0.000, 0.000]"


def test_conversations_are_prompts_of_intervals_too(policy: ActorCritic) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in TEXTS]

    def said(prompts: Any, completions: Any) -> list[float]:
        return [float(len(prompt[0]["content"])) for prompt in prompts]

    envs = make_envs(prompts=prompts, tokenizer=tokenizer, reward=said)
    once, often = (generate(policy, envs, [*range(5)] * repeats, seed=0) for repeats in (1, 8))
    assert score_intervals(once, [said]) == score_intervals(often, [said])


def test_metrics_leave_out_rows_without_a_value_in_every_resample(policy: ActorCritic) -> None:
    """One row of five has a reference: resamples without it would have no value at all."""
    prompts = [{"prompt": text, "references": "a text" if text == "hello" else None} for text in TEXTS]
    samples = generate(policy, make_envs(prompts=prompts), range(5), seed=0)
    metrics = [Rouge(), Bleu(), Chrf()]
    scores, intervals = score_samples(samples, metrics), score_intervals(samples, metrics)
    completion = samples.completions[3]
    assert scores["Chrf"] == Chrf().corpus([completion], ["a text"])
    assert scores["Rouge"] == Rouge()([completion], references=["a text"])[0]
    for name, interval in intervals.items():
        assert (interval.low, interval.value, interval.high) == (scores[name],) * 3
    assert score_gains(samples, samples, metrics)["Bleu"].value == 0


def test_gains_are_of_the_rows_that_both_have_a_value_for(policy: ActorCritic) -> None:
    prompts = [
        [{"prompt": text, "grade": grade} for text, grade in zip(TEXTS, grades, strict=True)]
        for grades in ([1, 1, 100, None, None], [2, 3, None, 100, None])
    ]

    def grade(completions: list[str], grade: list[float | None]) -> list[float | None]:
        return grade

    before, after = (generate(policy, make_envs(prompts=rows), range(5), seed=0) for rows in prompts)
    assert score_gains(before, after, [grade])["grade"].value == 1.5
    other = generate(
        policy, make_envs(prompts=[{"prompt": t, "grade": None} for t in TEXTS[:3]] + prompts[1][3:]), range(5), seed=0
    )
    with pytest.raises(RewardError, match=r"'grade' has no value for any of the 5 samples"):
        score_gains(before, other, [grade])


def test_a_metric_without_any_value_is_an_error_that_names_it(policy: ActorCritic) -> None:
    prompts = [{"prompt": text, "references": None} for text in TEXTS]
    samples = generate(policy, make_envs(prompts=prompts), range(5), seed=0)
    for metric in (Rouge(), Bleu(), "textgym.rewards.functions:token_f1"):
        for use in (score_samples, score_intervals):
            with pytest.raises(RewardError, match=r"no value for any of the 5 samples.*leave it out"):
                use(samples, [metric])
    with pytest.raises(ValueError, match="none of the 2 rows has one"):
        Bleu().corpus(["a", "b"], [None, []])


def test_gains_are_of_the_same_prompts(policy: ActorCritic) -> None:
    """A gain that all rows share has no width, however far apart the rows are; other prompts are refused."""

    def shifted(completions: list[str], prompts: list[str], shift: list[float]) -> list[float]:
        return [100.0 * len(prompt) + extra for prompt, extra in zip(prompts, shift, strict=True)]

    before, after = (
        generate(policy, make_envs(prompts=[{"prompt": t, "shift": shift} for t in TEXTS]), range(5), seed=0)
        for shift in (0.0, 0.25)
    )
    assert str(score_gains(before, after, [shifted])["shifted"]) == "0.250 [0.250, 0.250]"
    assert str(score_gains(after, before, [shifted])["shifted"]) == "-0.250 [-0.250, -0.250]"
    wide = score_intervals(after, [shifted])["shifted"]
    assert wide.high - wide.low > 50
    fewer = generate(policy, make_envs(), [4, 3, 2, 1, 0], seed=0)
    with pytest.raises(ValueError, match="samples of the same prompts"):
        score_gains(before, fewer, [shifted])


def test_metrics_see_what_rewards_saw(policy: ActorCritic) -> None:
    """Conversations as messages, the prompts' own columns and no logged ones, and ids where a metric reads them."""

    def says(completions: Any, answer: list[str], log_extra: Any = None) -> list[float]:
        if log_extra is not None and len(completions) > 1:
            log_extra("seen", [1] * len(completions))
        return [float(len(completion[0]["content"])) for completion in completions]

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    prompts = [{"prompt": [{"role": "user", "content": text}], "answer": "x"} for text in TEXTS]
    samples = generate(policy, make_envs(prompts=prompts, tokenizer=tokenizer, reward=says), range(5), seed=0)
    assert measure(samples, policy.reference(), metrics=[says])["says"] == pytest.approx(
        np.mean([len(text) for text in samples.completions])
    )


def test_measuring_leaves_the_scales_of_training_alone(policy: ActorCritic) -> None:
    plain, envs = (make_envs(**changes) for changes in ({}, {"score_scaling": "running", "score_clip": 0.1}))
    before = envs.unwrapped.task.scorer.state()
    samples = [generate(policy, e, range(5), seed=0) for e in (plain, envs)]
    assert envs.unwrapped.task.scorer.state() == before
    figures = [measure(s, policy.reference()) for s in samples]
    assert figures[0]["score"] == figures[1]["score"], "in the units of the reward function"


def test_figures_of_a_policy_to_itself(policy: ActorCritic) -> None:
    figures = measure(generate(policy, make_envs(), [0], seed=0), policy.reference())
    assert figures["kl"] == pytest.approx(0.0, abs=ROUNDING)
    assert figures["score_std"] == 0, "one sample has no spread"


def test_distinct_2() -> None:
    """[1 2 1 2], [1 2] and [5]: four bigrams, of which (1, 2) and (2, 1) are distinct."""
    responses = [[1, 2, 1, 2], [1, 2], [5]]
    ids = torch.tensor([[9, *response, *[0] * (4 - len(response))] for response in responses])
    lengths = torch.tensor([len(response) for response in responses])
    assert distinct_2(rollout_of(Sequences(ids, torch.ones_like(lengths), lengths))) == 2 / 4
    one = Sequences(ids[2:], torch.ones(1, dtype=torch.long), lengths[2:])
    assert distinct_2(rollout_of(one)) == 0


def test_distinct_2_has_no_tokens_of_the_environment() -> None:
    """Tokens 5 and 6 with two of a game between them are one bigram in both rows."""
    ids = torch.tensor([[9, 5, 1, 2, 6], [9, 5, 3, 4, 6]])
    mine = torch.tensor([[True, False, False, True]] * 2)
    sequences = Sequences(ids, torch.ones(2, dtype=torch.long), torch.full((2,), 4), generated=mine)
    assert distinct_2(rollout_of(sequences)) == 1 / 2


def rollout_of(sequences: Sequences) -> Rollout:
    nothing = torch.zeros(sequences.response_mask.shape)
    ended = torch.ones(len(sequences), dtype=torch.bool)
    return Rollout(sequences, nothing, nothing, nothing, nothing.sum(1), nothing.sum(1), ended, {})
