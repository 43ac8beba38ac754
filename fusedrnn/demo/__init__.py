"""`python -m fusedrnn demo`: two trained models of other people, before and after `replace()`, and a loop
over the frames of a microphone, before and after `streaming()`.

Weights and sentences come inside installed packages; nothing is downloaded. The sentences are
those of hsk-sentences-audio (CC-BY-SA-4.0, https://github.com/no7z/hsk-sentences-audio).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .. import terminal
from . import activity
from .compare import MissingPackage, Pair, interleave, largest_difference, require
from .pinyin import BATCH, PinyinTagger, PinyinTask, agreement, heteronyms
from .voice import VoiceEncoder, VoiceTask, similarity

LIMIT = 1e-5  # of voice prints, whose entries are below 1, and of logits as a share of the largest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when outputs are equal before and after, 1 when not, 2 without its packages."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn demo", description="Two trained models before and after replace()."
    )
    parser.add_argument(
        "--seconds", type=terminal.seconds, default=3.0, help="length of each timing (default: 3)"
    )
    arguments = parser.parse_args(argv)
    try:
        require("rich", "rich")
        sentences = require("hsk_sentences_audio", "hsk-sentences-audio").load_sentences()
        return _run(sentences, arguments.seconds)
    except MissingPackage as missing:
        print(f"error: {missing}", file=sys.stderr)
        return 2


def _run(sentences: Sequence[dict[str, Any]], seconds: float) -> int:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from . import report

    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, transient=True) as progress:
        show = progress.console.print
        bar = progress.add_task("", total=11)

        def step(description: str) -> None:
            progress.update(bar, description=description, advance=1)

        show(report.header())

        step("g2pM: loading")
        tagger = Pair(PinyinTagger())
        texts = PinyinTask(sentence["chinese"] for sentence in sentences)
        step(f"g2pM: reading {len(sentences):,} sentences before and after")
        before, after = tagger.outputs(texts.batches)
        old, new = texts.pinyin(before), texts.pinyin(after)
        enabled = texts.pinyin(tagger.enabled_outputs(texts.batches))
        step("g2pM: reading them with its own numpy network")
        own = texts.assemble(texts.numpy_network)
        error, largest = largest_difference(before, after), max(float(x.abs().max()) for x in before)
        pinyin_checks = [
            (f"{len(new):,} sentences: the same pinyin before and after", new == old),
            ("the same pinyin as from g2pM's own numpy network", new == own),
            ("the same pinyin under fusedrnn.enable(), with nothing replaced", enabled == old),
            (f"largest difference of logits {error:.1e}; they reach {largest:.0f}", error <= LIMIT * largest),
        ]
        examples = report.pinyin_table(sentences, heteronyms(sentences, old), old, new)
        right = agreement(sentences, new)
        source = f"sentences: hsk-sentences-audio (CC-BY-SA-4.0), {right:.1%} of syllables right"
        show(report.section("g2pM: one character, two readings", source, tagger, examples, pinyin_checks))

        step("Resemblyzer: loading")
        encoder = Pair(VoiceEncoder())
        speech = VoiceTask()
        step("Resemblyzer: listening before and after")
        before, after = encoder.outputs(speech.windows)
        error = largest_difference(before, after)
        voice_checks = [(f"largest difference of embeddings {error:.1e}, limit {LIMIT:.0e}", error <= LIMIT)]
        matrices = [similarity(speech.prints(side)) for side in (before, after)]
        tables = report.voice_tables(speech.voices, *matrices)
        source = "two utterances each of four synthetic voices (harmonics under formants)"
        show(report.section("Resemblyzer: whose voice is it?", source, encoder, tables, voice_checks))

        step("voice activity: one frame at a time, before and after")
        loop, frames = activity.ActivityLoop(), activity.frames()
        error = largest_difference([loop.stock(frames)], [loop.fused(frames)])
        loop_checks = [(f"largest difference over {len(frames)} frames {error:.1e}", error <= LIMIT)]
        show(report.loop_section(loop.cell, loop_checks))

        holds = all(check for _, check in pinyin_checks + voice_checks + loop_checks)
        if holds:
            # A time is worth reading only where the outputs are equal.
            every, first = torch.cat(speech.windows), speech.windows[0]
            rows = []
            for what, pair, inputs in (
                ("g2pM, one sentence", tagger, texts.singles[:32]),
                (f"g2pM, {BATCH} sentences", tagger, texts.batches[:4]),
                (f"Resemblyzer, {len(first)} windows", encoder, [first]),
                (f"Resemblyzer, {len(every)} windows", encoder, [every]),
            ):
                step(f"timing {what}")
                rows.append((what, pair.backend(inputs[0]), interleave(pair, inputs, seconds)))
            step("timing voice activity")
            timing = interleave(loop, [frames], seconds).per(len(frames))
            rows.append(("voice activity, a frame", "stepper", timing))
            show(report.timing_table(rows))
            show(report.advice([timing for _, _, timing in rows]))
        else:
            show(report.alarm())
    return 0 if holds else 1
