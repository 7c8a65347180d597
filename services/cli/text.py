"""Plain text for a terminal: aligned tables, and numbers an engineer reads at a glance."""

import os
import sys
from collections.abc import Sequence

MISSING = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines. A column whose head starts with a blank is aligned to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(len(cell.strip()) for cell in column) for column in columns]
    return [
        "  ".join(
            cell.strip().rjust(width) if title.startswith(" ") else cell.ljust(width)
            for title, cell, width in zip(head, row, widths, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]


def number(value: float | None, unit: str = "") -> str:
    """Three digits or so: 0, 0.41, 3.2, 41.0, 1234."""
    if value is None:
        return MISSING
    digits = 0 if abs(value) >= 100 or value == 0 else 1 if abs(value) >= 1 else 2
    return f"{value:.{digits}f}{unit}"


def seconds(value: float | None) -> str:
    """A time from milliseconds to days: 41 ms, 2.3 s, 5 min, 3.1 h, 12 d."""
    if value is None:
        return MISSING
    for limit, divisor, unit in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if value < limit:
            return f"{value / divisor:.{1 if unit == 's' else 0}f} {unit}"
    return f"{value / 3600:.1f} h" if value < 172_800 else f"{value / 86_400:.0f} d"


def size(value: float | None) -> str:
    """Bytes: 812 B, 12 kB, 38 MB."""
    if value is None:
        return MISSING
    for divisor, unit in ((1e6, "MB"), (1e3, "kB")):
        if value >= divisor:
            return f"{value / divisor:.{1 if value < 10 * divisor else 0}f} {unit}"
    return f"{value:.0f} B"


def yes(value: bool) -> str:
    return "yes" if value else "NO"


def red(line: str) -> str:
    """The line in red where standard output is a terminal that wants colours."""
    wanted = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\x1b[31m{line}\x1b[0m" if wanted else line
