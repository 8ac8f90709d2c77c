"""Evaluation by people: sheets of pairs for raters, and how far raters agree."""
