"""Numbers, tables and progress of the command line: rich on a terminal that has it, plain text elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

_STYLES = {"ok": "green", "available": "green", "RED": "bold red", "missing": "red"}


def _console() -> Any:
    """A rich console, or None: what is piped stays plain and does not depend on what is installed."""
    if sys.stdout is None or not sys.stdout.isatty():  # None: the process began with it closed
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


def size(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer greater than zero, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """An argument that is a time."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, not negative, got {text!r}")
    return value


def heading(text: str) -> None:
    console = _console()
    if console is None:
        print(f"\n{text}")
    else:
        console.print(f"\n[bold]{text}[/bold]")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under column heads; without heads (all empty) as a list of names and values."""
    console = _console()
    lines = [list(columns), *map(list, rows)] if any(columns) else [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    if console is None:
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if any(columns):  # a table that is wider than the screen is still better than folded words
        console.width = max(console.width, sum(widths) + 3 * len(widths))
    grid = Table(box=box.SIMPLE_HEAD if any(columns) else None, show_header=any(columns), pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell, style=_STYLES.get(cell.split(" ")[0], "")) for cell in row))
    console.print(grid)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal; yields ``step(description)``, to be called before each of ``total``."""
    console = _console()
    if console is None:
        yield lambda description: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task, done = bar.add_task("", total=total), count()
        yield lambda description: bar.update(task, description=description, completed=next(done))
