"""Ready-made reward functions; docs/rewards.md lists them, with the extra that each needs.

They follow the protocol of `textgym.rewards.engine.scoring`. Those with settings are classes; all of them can be
pickled. They also work as metrics, with weight 0 or in `textgym.agents.runs.evaluation.measure`.
"""

from __future__ import annotations

from textgym.rewards.functions.bert_score import BertScore
from textgym.rewards.functions.formats import GrammarMatch, JsonSchema
from textgym.rewards.functions.overlap import Bleu, Chrf, Meteor, Rouge, Ter
from textgym.rewards.functions.perplexity import Perplexity
from textgym.rewards.functions.rules import (
    DistinctN,
    LengthTarget,
    NumericAnswer,
    RegexMatch,
    RepetitionPenalty,
    SoftOverlong,
    completion_length,
    contains_all,
    exact_match,
    json_valid,
)
from textgym.rewards.functions.short_answers import token_f1
from textgym.rewards.functions.similarity import SemanticSimilarity
from textgym.rewards.functions.verifiers import lexicon_sentiment, reasoning_gym_score

__all__ = [
    "BertScore",
    "Bleu",
    "Chrf",
    "DistinctN",
    "GrammarMatch",
    "JsonSchema",
    "LengthTarget",
    "Meteor",
    "NumericAnswer",
    "Perplexity",
    "RegexMatch",
    "RepetitionPenalty",
    "Rouge",
    "SemanticSimilarity",
    "SoftOverlong",
    "Ter",
    "completion_length",
    "contains_all",
    "exact_match",
    "json_valid",
    "lexicon_sentiment",
    "reasoning_gym_score",
    "token_f1",
]
