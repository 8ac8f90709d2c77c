"""Words of every script, for metrics that compare words."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any


class UnicodeWords:
    """Tokenizer for rouge-score: words in lower case; single characters in scripts without spaces between words.

    A word is a run of letters, marks and digits. The marks matter: without them the vowel signs of Hindi would cut its
    words. In Chinese, Japanese, Thai, Lao, Khmer and Burmese each character is a word, as is usual for ROUGE there.

    >>> UnicodeWords().tokenize("Déjà vu: हिन्दी 東京!")
    ['déjà', 'vu', 'हिन्दी', '東', '京']
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        words: list[str] = _pattern().findall(unicodedata.normalize("NFC", text).lower())
        return words


def unread_share(text: str) -> float:
    """Return the share of a text's letters that are no Latin letters without accents; 0 without letters.

    >>> unread_share("abc"), unread_share("где"), unread_share("1.")
    (0.0, 1.0, 0.0)
    """
    if text.isascii():
        return 0.0
    letters = [letter for letter in text if letter.isalpha()]
    return sum(not letter.isascii() for letter in letters) / max(len(letters), 1)


@lru_cache(maxsize=1)
def _pattern() -> Any:
    import regex  # not `re`, which knows no scripts; nltk, which rouge-score needs, brings it

    unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    return regex.compile(rf"(?=[{unspaced}])\X|[[\p{{L}}\p{{M}}\p{{N}}]--[{unspaced}]]+", regex.VERSION1)
