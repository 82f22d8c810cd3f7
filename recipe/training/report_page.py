"""Write report.html, a run on one page, and pages that compare models or runs: no network, script or other file."""

import html
import json
import os
from typing import Any

from recipe.dataset import report
from recipe.training import curves

FILE = "report.html"
STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --back: light-dark(#fff, #181818);
  --text: light-dark(#222, #ddd); --code: light-dark(#f4f4f4, #262626); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--back); color: var(--text); }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0;
  text-align: left; vertical-align: top; white-space: pre-wrap }
pre { background: var(--code); padding: .6rem; overflow-x: auto; white-space: pre-wrap }
svg { width: 100%; height: auto; color: var(--text) }
"""


def write(
    facts: dict[str, Any],
    usage: dict[str, str],
    log_history: list[dict[str, Any]],
    datasets: dict[str, Any],
    folder: str,
) -> None:
    """Write the page into the output folder of a run.

    Args:
        facts: those of `RunRecord`.
        usage: what to do with the weights, from `model_card.usage`.
        log_history: entries of the Trainer's log.
        datasets: "training" and those to evaluate on, {name: SupervisedDataset}.
        folder: output folder.
    """
    training = datasets["training"]
    base = facts["base"]["name_or_path"]
    title = f"{_last(folder)}: {_last(base) if os.path.isdir(base) else base}"
    parts = [
        f"<h1>{_escaped(title)}</h1>",
        _table(_summary(facts)),
        "<h2>Curves</h2>",
        curves.panels(log_history, training.lengths, training.max_length),
        *_evaluations(facts["evaluations"]),
        "<h2>Data: what was read, kept and dropped</h2>",
        *(
            f"<h3>{_escaped(name)}</h3><pre>{_escaped(report.rows(dataset))}</pre>"
            for name, dataset in datasets.items()
        ),
        "<h2>Use</h2>",
        _table(usage),
        "<h2>Repeat</h2>",
        f"<pre>python finetune.py {_escaped(os.path.join(folder, 'run.yaml'))}</pre>",
        _table({"set by the user": ", ".join(f"--{name} {_value(facts, name)}" for name in facts["set_by_user"])}),
    ]
    _write_page(os.path.join(folder, FILE), title, parts)


def write_answers(path: str, figures: dict[str, dict[str, float]], rows: list[dict[str, str]]) -> None:
    """Write a page with the figures of models and their answers side by side.

    Args:
        path: file to write.
        figures: {model: {figure: value}}.
        rows: one for each prompt: {"prompt": ..., "wanted": ..., and each model: its answer}.
    """
    names = list(next(iter(figures.values())))
    measured = [[model, *(f"{values[name]:.4f}" for name in names)] for model, values in figures.items()]
    answers = [list(row.values()) for row in rows]
    parts = [_grid(["model", *names], measured), "<h2>Answers</h2>", _grid(list(rows[0]), answers)]
    _write_page(path, "Answers of " + ", ".join(figures), ["<h1>Answers</h1>", *parts])


def write_comparison(path: str, runs: dict[str, dict[str, Any]], logs: dict[str, list[dict[str, Any]]]) -> None:
    """Write a page with the facts of several runs and their curves in one picture.

    Args:
        path: file to write.
        runs: {folder: facts of `RunRecord`}.
        logs: {folder: entries of the Trainer's log}.
    """
    summaries = {folder: {**_changed(facts, runs), **_summary(facts)} for folder, facts in runs.items()}
    names = list(dict.fromkeys(name for summary in summaries.values() for name in summary))
    rows = [[name, *(summary.get(name, "") for summary in summaries.values())] for name in names]
    parts = ["<h1>Runs</h1>", _grid(["", *runs], rows), "<h2>Curves</h2>", curves.overlaid(logs)]
    _write_page(path, "Runs " + ", ".join(runs), parts)


def _changed(facts, runs):
    """The flags that are not the same in all runs."""
    of_all = [other["arguments"] for other in runs.values()]
    own = facts["arguments"]
    return {f"--{name}": own[name] for name in own if any(other.get(name) != own[name] for other in of_all)}


def _write_page(path, title, parts):
    head = f'<meta charset="utf-8"><title>{_escaped(title)}</title><style>{STYLE}</style>'
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def _grid(head, rows):
    body = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_escaped(cell)}</th>' for cell in head)}</tr>{body}</table>"


def _summary(facts):
    place, loss = facts["hardware"], (facts["first_loss"], facts["last_loss"])
    tokens, supervised = (facts.get(name, 0) for name in ("tokens", "supervised_tokens"))  # of a failed run
    return {
        "end": facts.get("exit_reason", "unknown"),
        "steps": f"{facts['steps']:,} in {facts.get('seconds', 0):,} seconds, {facts['epochs']:g} epochs",
        "tokens": f"{tokens:,}, {supervised:,} of them supervised",
        "loss": " to ".join("none" if value is None else f"{value:.4g}" for value in loss),
        "best step": facts["best_step"],
        "hardware": f"{place['device']}, {place['processes']} processes, peak memory {facts['peak_memory_gb']} GB",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "commit": facts["commit"],
    }


def _last(folder):
    return os.path.basename(os.path.normpath(folder))


def _evaluations(evaluations):
    if not evaluations:
        return []
    names = list(dict.fromkeys(name for entry in evaluations for name in entry))
    rows = (["" if entry.get(name) is None else f"{entry[name]:.5g}" for name in names] for entry in evaluations)
    return ["<h2>Evaluations</h2>", _grid(names, rows)]


def _value(facts, name):
    value = facts["arguments"].get(name)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _table(rows):
    cells = (f"<tr><th>{_escaped(name)}</th><td>{_escaped(text)}</td></tr>" for name, text in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _escaped(text: Any) -> str:
    return html.escape(str(text))
