"""Make the page of `make gpu` from its JSON."""

from __future__ import annotations

from typing import Any


def write_page(results: dict[str, Any], order: list[str]) -> str:
    """Return the page in Markdown, with the parts in this order."""
    lines = [
        "# Results of `make gpu`",
        "",
        f"Commit {results.get('commit', 'unknown')}, {results.get('date', '')}. Written by scripts/gpu/gpu.py.",
        "Parts that were measured at another commit say so. Ratios are medians of pairs in one run, sides in turns.",
        "",
    ]
    if machine := results.get("machine"):
        lines += table(["machine", ""], [[name, value] for name, value in machine.items()])
    parts = {name: results["parts"][name] for name in order if name in results["parts"]}
    lines += summary(parts)
    for part in parts.values():
        lines += section(part, results.get("commit", "unknown"))
    return "\n".join(lines).rstrip()


def summary(parts: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of all goals, and a list of what was not measured."""
    rows = [
        [part["title"], figure["name"], number(figure), figure["goal"], verdict(figure)]
        for part in parts.values()
        for figure in part.get("figures", [])
        if "goal" in figure
    ]
    lines = table(["part", "figure", "value", "goal", ""], rows) if rows else []
    others = [part for part in parts.values() if part["state"] != "done"]
    lines += [f"- {part['title']}: {part['state']}: {part.get('why', '')}" for part in others]
    return [*lines, ""] if others else lines


def section(part: dict[str, Any], commit: str) -> list[str]:
    """Return the section of a part: its command, metrics and notes."""
    if part["state"] in ("left out", "skipped") and not part.get("figures"):
        return []
    at = "" if part.get("commit") == commit else f" at commit {part.get('commit')}"
    lines = [
        f"## {part['title']}",
        "",
        f"`{part['command']}`: {part['state']} in {part.get('seconds', 0):.0f} s{at}",
        "",
    ]
    if part.get("figures"):
        rows = [
            [figure["name"], number(figure), figure["unit"], figure.get("goal", ""), verdict(figure), figure["note"]]
            for figure in part["figures"]
        ]
        lines += table(["figure", "value", "unit", "goal", "", "note"], rows)
    notes = [f"- {note}" for note in part.get("notes", [])]
    return [*lines, *notes, ""] if notes else lines


def verdict(figure: dict[str, Any]) -> str:
    """Return "met" or "missed"; empty if there is no goal, or it is not checked at this size."""
    return {True: "met", False: "missed"}.get(figure.get("met"), "")  # type: ignore[arg-type]


def number(figure: dict[str, Any]) -> str:
    """Return the rounded value."""
    value = figure["value"]
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table in Markdown and an empty line."""
    cells = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells), ""]
