"""What the demo prints. The one file of the package that needs rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from .compare import Pair, Timing

RECIPE = """\
import fusedrnn
report = fusedrnn.replace(model)  # nn.LSTM, nn.GRU and nn.RNN, in place
report.revert()                   # back again"""

UNSTEADY = 2.0  # how far apart the ends of a ratio's spread may be before the median says little

Check = tuple[str, bool]


def header() -> RenderableType:
    machine = f"torch {torch.__version__} on the CPU ({torch.backends.cpu.get_cpu_capability()})"
    return Text.assemble(
        ("fusedrnn", "bold"),
        ": two trained models, before and after fusedrnn.replace()\n",
        (f"{machine}, {torch.get_num_threads()} threads", "dim"),
    )


def section(
    title: str, source: str, pair: Pair, outputs: RenderableType, checks: Sequence[Check]
) -> RenderableType:
    """A model: its input, what was replaced in it, its outputs, and what was checked on them."""
    before, after = (network.get_submodule("lstm") for network in (pair.stock, pair.fused))
    swap = f"{_name(before)} -> {_name(after)}({after.extra_repr()})"
    return _panel(title, Text(f"{source}\n{swap}", style="dim"), "", outputs, "", *_marks(checks))


def loop_section(cell: nn.Module, checks: Sequence[Check]) -> RenderableType:
    """The loop over frames: what runs it before and after, and what was checked."""
    swap = f"{_name(cell)} -> fusedrnn.streaming({_name(cell)}({cell.extra_repr()})).step"
    source = "one step per frame of a synthetic voice; random weights"
    return _panel(
        "voice activity: an answer per frame", Text(f"{source}\n{swap}", style="dim"), "", *_marks(checks)
    )


def _panel(title: str, *content: RenderableType) -> RenderableType:
    return Panel(Group(*content), title=f"[bold]{title}", title_align="left", padding=(0, 1))


def _marks(checks: Sequence[Check]) -> list[RenderableType]:
    return [Text.assemble(_mark(holds), " ", text) for text, holds in checks]


def pinyin_table(
    sentences: Sequence[dict[str, Any]],
    examples: Sequence[tuple[int, int]],
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
) -> RenderableType:
    """examples: (sentence, place of the character to point at)."""
    lines = []
    for number, place in examples:
        sentence = Text(sentences[number]["chinese"])
        sentence.stylize("bold cyan", place, place + 1)
        lines.append(sentence.append("  " + sentences[number]["translation"]["en"], style="dim"))
        for title, side in (("  before  ", before), ("  after   ", after)):
            line = Text(title, style="dim")
            for at, syllable in enumerate(side[number]):
                line.append(f"{syllable} ", style="bold cyan" if at == place else "not dim")
            lines.append(line)
    return Group(*lines)


def voice_tables(voices: Sequence[str], before: Tensor, after: Tensor) -> RenderableType:
    """Similarities [V, V] of the first utterance of each voice to the second of each."""
    tables = []
    for title, matrix in (("before", before), ("after", after)):
        table = Table(title=title, title_style="dim", box=None, padding=(0, 1))
        table.add_column("")
        for voice in voices:
            table.add_column(voice, justify="right")
        for voice, row in zip(voices, matrix.tolist()):
            table.add_row(voice, *(Text(f"{cosine:.3f}", style=_shade(cosine)) for cosine in row))
        tables.append(table)
    return Columns(tables, padding=(0, 2))


def timing_table(rows: Sequence[tuple[str, str, Timing]]) -> RenderableType:
    """rows: (what, the backend that ran it, its times)."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="Time of the whole network, medians of interleaved runs",
        title_style="bold",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for heading in ("torch.nn", "fusedrnn", "speed-up", "p20-p80", "backend"):
        table.add_column(heading, justify="right", no_wrap=True)
    for what, backend, timing in rows:
        color = "green" if timing.low > 1 else "red" if timing.high < 1 else "yellow"
        table.add_row(
            what,
            _duration(timing.stock),
            _duration(timing.fused),
            Text(f"{timing.ratio:.2f} x", style=f"bold {color}"),
            Text(f"{timing.low:.1f}-{timing.high:.1f}", style="dim"),
            Text(backend, style="dim"),
        )
    return table


def advice(timings: Sequence[Timing]) -> RenderableType:
    ratios = [timing.ratio for timing in timings]
    lines = [Text(f"Equal outputs, {min(ratios):.1f} to {max(ratios):.1f} times as fast here.", style="bold")]
    if any(timing.high > UNSTEADY * timing.low for timing in timings):
        lines.append(Text("The times are unsteady: something else keeps this machine busy.", style="yellow"))
    code = Syntax(RECIPE, "python", background_color="default")
    return Group(*lines, Padding(code, (1, 2)))


def alarm() -> RenderableType:
    return Text("The outputs differ. Please report this, with the text above.", style="bold red")


def _name(module: nn.Module) -> str:
    package = type(module).__module__.split(".")[0]
    return f"{package}.{'nn.' if package == 'torch' else ''}{type(module).__name__}"


def _mark(holds: bool) -> Text:
    return Text("✓", style="bold green") if holds else Text("✗", style="bold red")


def _shade(cosine: float) -> str:
    strength = min(max(2 * cosine - 1, 0.0), 1.0)
    return f"white on rgb({int(20 + 10 * strength)},{int(30 + 80 * strength)},{int(50 + 90 * strength)})"


def _duration(seconds: float) -> str:
    if seconds >= 0.1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
