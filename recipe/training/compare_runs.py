"""Compare runs by what they recorded: a table, and with --report a page with their curves in one picture.

python -m recipe.training.compare_runs output-a output-b --report compared.html
"""

import argparse
import json
import os
from typing import Any

from recipe import console
from recipe.console import UserError

COLUMNS = {  # head of a column: entry of run.json
    "steps": "steps", "seconds": "seconds", "tokens": "tokens", "peak GB": "peak_memory_gb", "first loss": "first_loss",
    "last loss": "last_loss", "best step": "best_step", "end": "exit_reason",
}  # fmt: skip


def read(folder: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what a run recorded in its output folder: its facts and the entries of its log.

    Raises:
        UserError: the folder holds no record.
    """
    found = []
    for name, entry in (("run.json", "evaluations"), ("trainer_state.json", "log_history")):
        path = os.path.join(folder, name)
        try:
            with open(path, encoding="utf-8") as file:
                found.append(json.load(file))
            reason = "" if isinstance(found[-1], dict) and entry in found[-1] else f"it has no {entry}"
        except (OSError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error)
        if reason:
            raise UserError(f"{path}: cannot be read ({reason}); name output folders of finished runs.")
    return found[0], found[1]["log_history"]


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of runs, {folder: facts of run.json}."""
    lines = [f"| run | best held-out loss | {' | '.join(COLUMNS)} |", f"|---|---:|{'---:|' * len(COLUMNS)}"]
    for folder, facts in runs.items():
        losses = [entry["eval_loss"] for entry in facts["evaluations"] if entry.get("eval_loss") is not None]
        cells = [min(losses, default=None), *(facts.get(entry) for entry in COLUMNS.values())]
        shown = (f"{cell:.5g}" if isinstance(cell, float) else "-" if cell is None else str(cell) for cell in cells)
        lines.append(f"| {folder} | {' | '.join(shown)} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Print the table, and write the page.

    Raises:
        UserError: a folder holds no record of a run, or the page cannot be written.
    """
    from recipe.training import report_page

    found = {folder: read(folder) for folder in dict.fromkeys(args.runs)}
    runs = {folder: facts for folder, (facts, _) in found.items()}
    print(table(runs))
    if args.report:
        try:
            report_page.write_comparison(args.report, runs, {folder: log for folder, (_, log) in found.items()})
        except OSError as error:
            raise UserError(f"--report {args.report}: cannot be written ({error.strerror}).") from None


def main() -> None:
    """Run the command line; a user's mistake is one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="Output folders of finetune.py.")
    parser.add_argument("--report", help="HTML file to write.")
    args = parser.parse_args()
    console.run(lambda: run(args))


if __name__ == "__main__":
    main()
