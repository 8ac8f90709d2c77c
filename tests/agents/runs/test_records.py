"""Recorder: the numbers in a record are those of the run, and the run is the same without it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym.agents import A2C, DQN, GRPO, NLPO, PPO, REINFORCE, RLOO, ExpertIteration
from textgym.agents.callbacks import Callback
from textgym.agents.common.rollout import Rollout
from textgym.agents.common.rollout_agent import RolloutAgent
from textgym.agents.runs.claims import RunClaim
from textgym.agents.runs.records import Pieces, Recorder, chosen_rows
from textgym.data.continuations import decode_continuation
from textgym.games.game_env import GameVectorEnv
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.engine.completions_to_score import RewardError
from textgym.testing import byte_tokenizer, mock_lm, mock_seq2seq_lm
from textgym.viewer import write_page
from textgym.viewer.records import read_record, records_of
from textgym.viewer.rows import rows_of

EOS = 256
PROMPTS = ["one", "two", "six", "ten"]


def length_or_nothing(completions: list[str]) -> list[float | None]:
    return [None if len(text) == 2 else float(len(text)) for text in completions]


def make(algorithm: Any = PPO, reward: Any = length_or_nothing, temperature: float = 0.7, **settings: Any) -> Any:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=PROMPTS,
        tokenizer=byte_tokenizer(),
        reward=reward,
        kl_coef=0.1,
        max_new_tokens=4,
        min_new_tokens=1,
    )
    config = algorithm.config_class(episodes_per_update=4, learning_rate=1e-2, **settings)
    return algorithm(ActorCritic.from_pretrained(mock_lm(), temperature=temperature), envs, config)


class Look(Callback):
    """Looks at rollouts before their update."""

    def __init__(self, look: Any) -> None:
        self.on_rollout_end = look


def recorded(tmp_path: Path, agent: Any, updates: int = 2, look: Any = None, **arguments: Any) -> list[dict[str, Any]]:
    looks = [] if look is None else [Look(look)]
    agent.learn(4 * updates, [*looks, Recorder(tmp_path, agent, **arguments)])
    return [read_record(path) for path in records_of(tmp_path)]


def test_the_first_every_nth_and_the_last_update_are_recorded(tmp_path: Path) -> None:
    records = recorded(tmp_path, make(minibatch_size=4), updates=5, every=2)
    assert [record["update"] for record in records] == [1, 2, 4, 5]
    assert [record["episodes"] for record in records] == [4, 8, 16, 20]


def test_numbers_of_tokens_are_those_of_the_rollout(tmp_path: Path) -> None:
    agent = make(minibatch_size=4)
    seen: list[tuple[Rollout, Any]] = []
    [record] = recorded(tmp_path, agent, updates=1, look=lambda agent, rollout, kl: seen.append((rollout, kl)))
    [(rollout, kl)] = seen
    order = [PROMPTS.index(record["prompts"][i]) for i in record["rows"]["prompt"]]
    assert sorted(order) == [0, 1, 2, 3]

    mask, numbers = rollout.response_mask, record["numbers"]
    expected = {
        "log_prob": rollout.log_probs,
        "kl": kl,
        "value": rollout.values,
        "advantage": agent.advantages,
        "return": agent.returns,
    }
    for name, values in expected.items():
        assert numbers[name] == pytest.approx(values[mask].tolist(), abs=0.0051), name
    assert record["tokens"]["reward"] == pytest.approx(rollout.rewards[mask].tolist(), abs=0.0051)
    assert record["rows"]["length"] == rollout.sequences.response_lengths.tolist()
    scores = [None if score != score else score for score in rollout.raw_scores.tolist()]
    assert record["rows"]["score"] == record["rows"]["reward/length_or_nothing"] == scores
    assert record["rows"]["stopped"] == rollout.ended_by_stop.bool().tolist()

    pieces = [record["pieces"][i] for i in record["tokens"]["piece"]]
    ids = [
        row[start : start + length].tolist()
        for row, start, length in zip(
            rollout.sequences.input_ids,
            rollout.sequences.prompt_lengths,
            rollout.sequences.response_lengths,
            strict=True,
        )
    ]
    tokenizer = byte_tokenizer()
    for piece, token in zip(pieces, itertools.chain(*ids), strict=True):
        assert piece in (tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token))


def test_alternatives_and_entropy_are_those_of_the_sampling_policy(
    tmp_path: Path, plainly: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make(minibatch_size=4, temperature=0.05)  # so that some tokens are almost certain
    looked: list[tuple[Any, Any]] = []

    def look(agent: RolloutAgent, rollout: Rollout, kl: Any) -> None:
        looked.append((rollout.sequences, plainly(agent.policy, rollout.sequences)))

    [record] = recorded(tmp_path, agent, updates=1, look=look)
    [(sequences, expected)] = looked
    mask = sequences.response_mask
    assert record["numbers"]["entropy"] == pytest.approx(expected.entropy[mask].tolist(), abs=0.0051)

    each, policy = record["each"], record["alternatives"]["policy"]
    assert each == 5
    for i, (piece, log_prob) in enumerate(
        zip(record["tokens"]["piece"], expected.log_prob[mask].exp().tolist(), strict=True)
    ):
        percents = policy["percent"][each * i : each * i + each]
        assert percents == sorted(percents, reverse=True)
        pieces = policy["piece"][each * i : each * i + each]
        if piece in pieces:
            assert percents[pieces.index(piece)] == pytest.approx(100 * log_prob, abs=0.51)
    assert max(policy["percent"]) > 90
    # Before the first update the policy is the reference.
    assert record["alternatives"]["reference"]["percent"] == policy["percent"]


def test_ratios_are_of_the_policy_after_the_update_and_clipped_where_the_gradient_is_gone(tmp_path: Path) -> None:
    agent = make(minibatch_size=4, clip_range=0.01)
    seen: list[Rollout] = []
    [record] = recorded(tmp_path, agent, updates=1, look=lambda agent, rollout, kl: seen.append(rollout))
    [rollout] = seen
    mask = rollout.response_mask
    new = agent.policy.sequence_log_probs(rollout.sequences)
    ratio = (new - rollout.log_probs)[mask].exp()
    assert record["numbers"]["ratio"] == pytest.approx(ratio.tolist(), abs=0.0051)
    advantages = agent.advantages[mask]
    clipped = (advantages > 0) & (ratio > 1.01) | (advantages < 0) & (ratio < 0.99)
    assert record["numbers"]["clipped"] == clipped.float().tolist()
    assert clipped.any()
    assert not clipped.all()
    assert record["clip"] == [0.99, 1.01]


@pytest.mark.filterwarnings("ignore:sampling is filtered")
@pytest.mark.parametrize(
    ("algorithm", "columns"),
    [
        pytest.param(A2C, {"value", "return", "advantage", "ratio"}, marks=pytest.mark.slow),
        (GRPO, {"advantage", "ratio", "clipped"}),
        pytest.param(RLOO, {"advantage", "ratio"}, marks=pytest.mark.slow),
        pytest.param(REINFORCE, {"advantage", "ratio"}, marks=pytest.mark.slow),
        (NLPO, {"value", "return", "advantage", "ratio", "clipped"}),
        pytest.param(ExpertIteration, {"advantage", "ratio"}, marks=pytest.mark.slow),
        (DQN, set()),
    ],
)
def test_every_algorithm_records_the_columns_that_it_has(tmp_path: Path, algorithm: Any, columns: set[str]) -> None:
    groups = {"group_size": 2} if algorithm in (GRPO, RLOO, ExpertIteration) else {}
    record = recorded(tmp_path, make(algorithm, reward=lambda completions: [1.0] * len(completions), **groups))[-1]
    assert record["numbers"].keys() == columns | {"log_prob", "kl", "entropy"}
    assert record["alternatives"].keys() == {"policy", "reference"}


@pytest.mark.filterwarnings("ignore:sampling is filtered")
def test_alternatives_of_nlpo_are_within_its_mask(tmp_path: Path) -> None:
    record = recorded(tmp_path, make(NLPO, top_p=0.3, minibatch_size=4), updates=1)[0]
    each, policy = record["each"], record["alternatives"]["policy"]
    sampled = [round(100 * torch.tensor(x).exp().item()) for x in record["numbers"]["log_prob"]]
    for i, (piece, percent) in enumerate(zip(record["tokens"]["piece"], sampled, strict=True)):
        pieces = policy["piece"][each * i : each * i + each]
        if piece in pieces:
            assert policy["percent"][each * i + pieces.index(piece)] == pytest.approx(percent, abs=1.1)


@pytest.mark.filterwarnings("ignore:sampling is filtered")
def test_nlpo_has_no_ratios_when_its_mask_is_another_one(tmp_path: Path) -> None:
    agent = make(NLPO, top_p=0.9, mask_update_interval=2, minibatch_size=4)
    records = recorded(tmp_path, agent, updates=3, every=1)
    assert ["ratio" in record["numbers"] for record in records] == [True, False, True]
    assert all("advantage" in record["numbers"] for record in records)


def test_a_judge_scores_the_texts_of_the_recorded_rows(tmp_path: Path) -> None:
    heard: list[tuple[str, str]] = []

    def judge(prompts: list[str], completions: list[str]) -> list[float]:
        heard.extend(zip(prompts, completions, strict=True))
        return [float(place) if place else math.nan for place in range(len(prompts))]

    [record] = recorded(tmp_path, make(minibatch_size=4), updates=1, rows=3, judge=judge)
    assert heard == [(row.prompt, row.text) for row in rows_of(record)]
    assert record["rows"]["judge"] == [None, 1, 2], "of the first row it has no opinion"
    assert record["judges"] == ["judge"]
    assert [row.judges for row in rows_of(record)] == [("judge",)] * 3


def test_a_judge_with_too_few_scores_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="2 scores for 4 responses"):
        recorded(tmp_path, make(minibatch_size=4), updates=1, judge=lambda prompts, completions: [0.0, 0.0])


@pytest.mark.parametrize(("weights", "judges"), [((1, 0), ["reward/shortness"]), ((1, 1), []), ((0, 0), [])])
def test_reward_functions_that_the_policy_is_not_trained_on_are_judges(
    tmp_path: Path, weights: tuple[float, float], judges: list[str]
) -> None:
    def shortness(completions: list[str]) -> list[float]:
        return [-float(len(text)) for text in completions]

    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=PROMPTS,
        tokenizer=byte_tokenizer(),
        reward=[length_or_nothing, shortness],
        reward_weights=list(weights),
        max_new_tokens=2,
    )
    agent = PPO(ActorCritic.from_pretrained(mock_lm()), envs, PPO.config_class(episodes_per_update=4, minibatch_size=4))
    [record] = recorded(tmp_path, agent, updates=1)
    assert record["judges"] == judges


def test_a_run_is_the_same_with_and_without_records(tmp_path: Path) -> None:
    def run(recording: bool) -> list[dict[str, float]]:
        agent = make(minibatch_size=4)
        metrics: list[dict[str, float]] = []
        recorder = [Recorder(tmp_path, agent, every=1)] if recording else []
        agent.learn(12, [*recorder, lambda _, row: metrics.append(row)])
        return [{name: x for name, x in row.items() if not name.startswith("time/")} for row in metrics]

    assert run(recording=True) == run(recording=False)
    assert len(records_of(tmp_path)) == 3


def test_a_resumed_run_replaces_the_records_after_its_checkpoint(tmp_path: Path) -> None:
    agent = make(minibatch_size=4)
    recorded(tmp_path, agent, updates=3, every=1)
    agent.updates = 2
    again = Recorder(tmp_path, agent)
    assert [read_record(path)["update"] for path in records_of(tmp_path)] == [1, 2]
    assert again.seen <= set(PROMPTS)
    assert again.seen


def test_a_damaged_record_does_not_stop_a_resumed_run(tmp_path: Path) -> None:
    agent = make(minibatch_size=4)
    recorded(tmp_path, agent, updates=1)
    records_of(tmp_path)[0].write_bytes(b"half")
    assert Recorder(tmp_path, agent).seen == set()


def test_a_full_disk_is_warned_of_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("textgym.agents.runs.records.write_record", full)
    agent = make(minibatch_size=4)
    with pytest.warns(UserWarning, match="update 1 is not recorded .*No space left"):
        recorded(tmp_path, agent, updates=1)
    assert agent.updates == 1


def test_prompts_that_were_seen_come_first_and_their_rows_stay_together() -> None:
    prompts = ["a", "b", "a", "c", "b", "a"]
    assert chosen_rows(prompts, set(), 3) == [0, 2, 5]
    assert chosen_rows(prompts, {"c", "b"}, 4) == [1, 4, 3, 0]
    assert chosen_rows(prompts, set(), 64) == [0, 2, 5, 1, 4, 3]


class Parrot:
    """Two turns; the environment repeats what it hears."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        return f"{seed}?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return "ab", 1.0, False, self.turn == 2, {}


def test_tokens_of_a_game_are_told_from_those_of_the_policy(tmp_path: Path) -> None:
    stop = list(range(128))  # half of all tokens end a turn
    envs = GameVectorEnv(4, Parrot, byte_tokenizer(), max_prompt_tokens=6, max_new_tokens=12, stop=stop)
    agent = PPO(ActorCritic.from_pretrained(mock_lm()), envs, PPO.config_class(episodes_per_update=4, minibatch_size=4))
    seen: list[Rollout] = []
    [record] = recorded(tmp_path, agent, updates=1, look=lambda agent, rollout, kl: seen.append(rollout))
    [rollout] = seen
    mask, lengths = rollout.response_mask, rollout.sequences.response_lengths
    real = torch.arange(mask.shape[1]) < lengths[:, None]
    assert record["tokens"]["mine"] == mask[real].int().tolist()
    assert 0 in record["tokens"]["mine"]
    assert len(record["numbers"]["log_prob"]) == sum(record["tokens"]["mine"])
    assert record["numbers"]["log_prob"] == pytest.approx(rollout.log_probs[mask].tolist(), abs=0.0051)
    rows = rows_of(record)
    assert [len(row.pieces) for row in rows] == lengths.tolist()
    assert [len(row.numbers["kl"]) for row in rows] == mask.sum(1).tolist()


@pytest.mark.parametrize(
    "estimator", ["k3", pytest.param("k2", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)]
)
def test_the_reference_is_recorded_where_it_does_not_follow_from_the_kl(tmp_path: Path, estimator: str) -> None:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=PROMPTS,
        tokenizer=byte_tokenizer(),
        reward=length_or_nothing,
        reference=mock_lm(seed=1),
        kl_coef=0.1,
        kl_estimator=estimator,
        max_new_tokens=4,
    )
    agent = PPO(ActorCritic.from_pretrained(mock_lm()), envs, PPO.config_class(episodes_per_update=4, minibatch_size=4))
    seen: list[Rollout] = []
    [record] = recorded(tmp_path, agent, updates=1, look=lambda agent, rollout, kl: seen.append(rollout))
    mask = seen[0].response_mask
    expected = agent.penalty.reference.sequence_log_probs(seen[0].sequences)[mask]
    assert record["numbers"]["reference_log_prob"] == pytest.approx(expected.tolist(), abs=0.0051)


def test_encoder_decoder_models_are_recorded(tmp_path: Path) -> None:
    policy = ActorCritic.from_pretrained(mock_seq2seq_lm())
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=PROMPTS,
        tokenizer=byte_tokenizer(),
        reward=length_or_nothing,
        kl_coef=0.1,
        max_new_tokens=4,
        decoder_start_ids=policy.decoder_start_ids,
    )
    agent = PPO(policy, envs, PPO.config_class(episodes_per_update=4, minibatch_size=4))
    [record] = recorded(tmp_path, agent, updates=1)
    assert sorted(record["prompts"]) == sorted(PROMPTS)
    assert len(record["numbers"]["ratio"]) == sum(record["rows"]["length"])


def test_texts_of_rows_are_those_of_their_tokens_in_context(tmp_path: Path) -> None:
    """Random bytes are rarely whole characters, so most texts are not those of their pieces."""
    agent, tokenizer = make(minibatch_size=4), byte_tokenizer()
    seen: list[Rollout] = []
    [record] = recorded(tmp_path, agent, updates=1, look=lambda agent, rollout, kl: seen.append(rollout))
    sequences = seen[0].sequences
    for row, ids, start, length in zip(
        rows_of(record), sequences.input_ids, sequences.prompt_lengths, sequences.response_lengths, strict=True
    ):
        response = ids[start : start + length].tolist()
        assert row.text == decode_continuation(tokenizer, ids[:start].tolist(), response)
    assert record["texts"]


def test_pieces_of_tokens() -> None:
    pieces = Pieces(byte_tokenizer())
    assert pieces[ord("x")] == "x"
    assert pieces[EOS] == "<eos>"
    assert pieces[10**6] == "<1000000>"


def test_overwriting_a_run_removes_its_records_and_its_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunClaim(run).release()
    agent = make(minibatch_size=4)
    recorded(run, agent, updates=1)
    page = write_page([run])
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "notes.txt").write_text("mine")
    RunClaim(run, overwrite=True).release()
    assert records_of(run) == []
    assert not page.exists()
    assert (run / "notes.txt").read_text() == "mine"
