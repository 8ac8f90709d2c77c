"""LogNames: names of metrics that stay different when SB3's logger cuts them."""

from __future__ import annotations

import itertools

WIDTH = 33
"""Longest name that SB3's table shows whole: 36 characters less the indentation by 3."""
CUT = 30
"""Characters of a longer name that it shows, before "..."."""


class LogNames:
    """Gives each name one under which it is logged: itself, unless the table would show it like an earlier one.

    >>> names = LogNames()
    >>> names.of("reward/politeness_of_the_answer_in_english")
    'reward/politeness_of_the_answer_in_english'
    >>> names.of("reward/politeness_of_the_answer_in_french")
    'reward/politene~_answer_in_french'
    """

    def __init__(self) -> None:
        self.logged: dict[str, str] = {}

    def of(self, name: str) -> str:
        """Return the name to log under; the same for every call."""
        if name not in self.logged:
            taken = {_shown(other) for other in self.logged.values()}
            numbered = (f"{name[:15]}~{number}~{name[-13:]}" for number in itertools.count(2))
            candidates = itertools.chain([name, f"{name[:15]}~{name[-17:]}"], numbered)
            self.logged[name] = next(candidate for candidate in candidates if _shown(candidate) not in taken)
        return self.logged[name]


def _shown(name: str) -> str:
    return name if len(name) <= WIDTH else name[:CUT]
