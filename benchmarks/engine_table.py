"""Print the README's table of what each engine was seen to do; tests/distributed/test_engines.py proves it.

python benchmarks/engine_table.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from recipe.distributed.engines import ENGINES, Mode  # noqa: E402


def table() -> str:
    """Return the table in Markdown."""
    lines = [f"| engine | {' | '.join(Mode)} |", "|---|---|---|---|"]
    for engine in ENGINES.values():
        cells = [f"refused: {engine.refuses[mode]}" if mode in engine.refuses else engine.verdict for mode in Mode]
        lines.append(f"| {engine.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
