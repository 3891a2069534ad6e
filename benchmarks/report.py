"""The lines of all goals as a table and plots, for the documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import GOALS

#: The command that installs matplotlib.
EXTRA = "pip install 'celery-eda[bench]'"
VERDICTS = {True: "met", False: "**not met**", None: "no verdict"}


def write(lines: Sequence[dict[str, Any]], page: Path) -> None:
    """Write ``results.md``, ``results.jsonl`` and a plot for each goal into the folder *page*."""
    page.mkdir(parents=True, exist_ok=True)
    plots = {line["goal"]: name for line in lines if (name := plot(line, page))}
    (page / "results.md").write_text(table(lines, plots))
    (page / "results.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )


def table(lines: Sequence[dict[str, Any]], plots: dict[str, str]) -> str:
    """The page: a row per condition, then per goal the comparison and the medians."""
    first = lines[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    disturbed = [line["goal"] for line in lines if line["disturbed"]]
    words = [
        "# Measured",
        "",
        "Written by `make bench`; what the goals mean stands in [the overview](index.md). Ratios "
        "are medians of rounds in which all cases ran by turns, with the least and the greatest "
        "of a round. Absolute figures hold for this machine and this run only.",
        "",
        f"{first['cores']} cores, Python {first['python']}; {versions}.",
        "",
    ]
    if disturbed:
        words += [
            f"Other work ran on the machine when {', '.join(disturbed)} began: these figures are "
            "disturbed.",
            "",
        ]
    words += ["| goal | condition | ratio | spread | target | |", "|---|---|---|---|---|---|"]
    for line in lines:
        for check in line.get("checks", []):
            sign = "≥" if check["at_least"] else "≤"
            ratio = "–" if check["ratio"] is None else f"{check['ratio']:g}"
            low, high = check["spread"] or ("", "")
            words.append(
                f"| {line['goal']} | {check['what']} | {ratio} | {low} – {high} | "
                f"{sign} {check['target']:g} | {VERDICTS[check['met']]} |"
            )
        if "checks" not in line:
            words.append(f"| {line['goal']} | {line['why']} | – | | | no verdict |")
    for line in lines:
        words += ["", *_section(line, plots.get(line["goal"]))]
    return "\n".join(words) + "\n"


def _section(line: dict[str, Any], picture: str | None) -> list[str]:
    goal = line["goal"]
    words = [f"## {goal}: {GOALS[goal].says}", ""]
    if "compared" not in line:
        return [*words, f"Not measured: {line['why']}"]
    words += [f"{line['compared']} {line['runs']} rounds, scale {line['scale']:g}.", ""]
    if line.get("why"):
        words += [f"No verdict: {line['why']}.", ""]
    for name, why in line["not_compared"].items():
        words += [f"Not compared: {name}: {why}", ""]
    if picture:
        words += [f"![{goal}: {line['unit']}]({picture})", ""]
    words += ["| median | |", "|---|---|"]
    words += [f"| {name} | {value:g} |" for name, value in line["medians"].items()]
    words += [
        f"| CPU per message, µs: {name} | {value:g} |"
        for name, value in line["cpu_us_per_message"].items()
    ]
    return words


def plot(line: dict[str, Any], page: Path) -> str | None:
    """Plot the figures of each case by round; returns the name of the picture, if any.

    Raises:
        SystemExit: matplotlib is missing.
    """
    if not line.get("samples"):
        return None
    goal = line["goal"]
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(f"The plots need matplotlib: {EXTRA}") from error
    names = list(line["samples"])
    figure = Figure(figsize=(8, 0.8 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(reversed(names)):
        values = line["samples"][name]
        ours = "ours" in name or "sent by" in name
        color = "tab:green" if ours else "tab:gray"
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.5)
        middle = sorted(values)[len(values) // 2]
        axes.plot([middle], [place], "|", color="black", markersize=16)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel(line["unit"])
    axes.set_xlim(left=0)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(f"{goal}: {GOALS[goal].says}", fontsize=10)
    name = f"{goal}.svg"
    # Without these, the file would change even if the figures did not.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": goal}):
        figure.savefig(page / name, metadata={"Date": None, "Creator": None})
    return name
