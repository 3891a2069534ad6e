"""``python -m benchmarks S9 --json``: one goal, one line; ``python -m benchmarks all``: all."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from benchmarks import result
from benchmarks.goals import GOALS
from benchmarks.result import printed
from benchmarks.stage import Stage

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks"


@click.command()
@click.argument("goal", type=click.Choice([*GOALS, "all"]))
@click.option(
    "--scale", default=1.0, show_default=True, help="Factor for the number of messages and rows."
)
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@click.option(
    "--page", type=Path, default=PAGE, help="The folder for the table and plots of `all`."
)
def main(goal: str, scale: float, as_json: bool, page: Path) -> None:
    """Measure one GOAL, or all."""
    lines = []
    # SystemExit on SIGTERM lets the stage stop its servers and delete their files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with Stage() as stage:
        for name in GOALS if goal == "all" else [goal]:
            lines.append(measured(stage, name, scale))
            click.echo(printed(lines[-1]))
            if not as_json and goal != "all":
                click.echo(summary(lines[-1]), err=True)
    if goal == "all":
        from benchmarks import report

        report.write(lines, page)


def measured(stage: Stage, goal: str, scale: float) -> dict[str, Any]:
    """The JSON line of one goal; it holds the error if the script failed."""
    machine = result.machine()
    try:
        return GOALS[goal].measure(stage, scale).line(machine)
    except Exception as error:
        click.echo(traceback.format_exc(), err=True)
        why = f"its script failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        bare = {"ratio": None, "target": None, "met": None, "why": why, "runs": 0}
        return {"goal": goal, **bare, **machine}


def summary(line: dict[str, Any]) -> str:
    """A line for a person."""
    said = [f"{line['goal']}: {GOALS[line['goal']].says}", f"  {line.get('why') or ''}"]
    for check in line.get("checks", []):
        sign = "≥" if check["at_least"] else "≤"
        verdict = {True: "met", False: "NOT met", None: "no verdict"}[check["met"]]
        said.append(f"  {check['ratio']} ({sign} {check['target']}) {verdict}: {check['what']}")
    for name, value in {**line.get("medians", {}), **line.get("cpu_us_per_message", {})}.items():
        said.append(f"    {value:>12} {name}")
    return "\n".join(said)


if __name__ == "__main__":
    main()
