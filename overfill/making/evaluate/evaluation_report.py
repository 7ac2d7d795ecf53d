"""Present evaluations: tables for a terminal, a report folder with plots, and figures in ``pair.json``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overfill.making.evaluate.compare import FREE_RUNNING, NOTE, TradeoffPoint
from overfill.making.evaluate.costs import DecodeCost
from overfill.making.evaluate.evaluation import TITLES, Evaluation
from overfill.making.evaluate.examples import RULE, choose_examples
from overfill.making.evaluate.free_running import Comparison
from overfill.making.evaluate.token_metrics import Estimate, Metric
from overfill.making.overlap import DECODER_TEXT, describe_overlap
from overfill.making.seal import update_checksum
from overfill.model.manifest import MANIFEST, Pair
from overfill.pair.checksums import checksums_match

_QUESTION = 400
"""Characters of a question that are shown, from its end."""

TableRows = list[list[str]]
"""A header row and data rows, all of the same length."""


def forced_rows(evaluation: Evaluation) -> TableRows:
    """Returns one row per variant with the figures on given answers; NLL and KL in nats per token."""
    rows = [["given answers", "NLL", "KL", "top-1 agreement"]]
    for name, forced in evaluation.teacher_forced.items():
        figures = _figure(forced.nll.overall), _figure(forced.kl.overall), _share(forced.agreement.overall)
        rows.append([TITLES[name], *figures])
    return rows


def free_rows(evaluation: Evaluation) -> TableRows:
    """Returns one row per variant with the figures of the answers that it wrote, beside the full model's."""
    rows = [["own answers", "perplexity", "÷ full's", "new text: ÷", "repeated", "tokens", "finished"]]
    for name, written in evaluation.free_running.items():
        rows.append([TITLES[name], *_free(written.beside(evaluation.free_running["full"]))])
    return rows


def kind_rows(evaluation: Evaluation) -> TableRows:
    """Returns one row per kind of conversation with the pair's figures."""
    rows = [["two-stage, by kind", "answers", "agreement"]]
    written = evaluation.free_running
    if written:
        rows[0] += ["perplexity ÷", "new text: ÷", "repeated", "tokens"]
    for kind, count in evaluation.kinds.items():
        row = [kind, str(count), _share(evaluation.teacher_forced["two_stage"].agreement.of_kind(kind))]
        if written:
            free = written["two_stage"].beside(written["full"], kind)
            row += _free(free)[1:5]
        rows.append(row)
    return rows


def examples(evaluation: Evaluation, count: int) -> list[tuple[str, str, str, str]]:
    """Returns (title, question, the full model's answer, the pair's) of up to ``count`` answers, chosen by ``RULE``."""
    full, pair = (evaluation.free_running[name].answers for name in ("full", "two_stage"))
    shown = []
    for example in choose_examples(pair, count):
        transcript, own = evaluation.transcripts[example.index], pair[example.index]
        likely = "empty" if math.isnan(own.nll) else f"perplexity {math.exp(own.nll):.1f}"
        title = f"{example.why}: {likely}, {100 * own.repeated:.0f} % repeated 4-grams"
        kind = f", {transcript.kind}" if transcript.kind else ""
        question = transcript.question
        question = question if len(question) <= _QUESTION else f"… {question[-_QUESTION:]}"
        shown.append((title + kind, question, full[example.index].text, own.text))
    return shown


def position_rows(metrics: Mapping[str, Metric], percent: bool) -> TableRows:
    """Returns one row per bucket of positions, with one column per variant."""
    rows = [["position", *metrics]]
    columns = [{(b.first, b.last): b.estimate for b in metric.by_position} for metric in metrics.values()]
    for first, last in sorted({bucket for column in columns for bucket in column}):
        estimates = [column.get((first, last)) for column in columns]
        shown = ["" if e is None else _share(e) if percent else _figure(e) for e in estimates]
        rows.append([str(first) if first == last else f"{first}-{last}", *shown])
    return rows


def point_rows(points: Sequence[TradeoffPoint]) -> TableRows:
    """Returns one row per decoder and precision."""
    rows = [["decoder", "precision", "MB/token", "MFLOP/token", "top-1 agreement", "NLL"]]
    written = any(point.free for point in points)
    if written:
        rows[0] += ["perplexity ÷ full's", "new text: ÷", "repeated 4-grams", "tokens"]
    for point in points:
        cost = [f"{point.cost.bytes / 1e6:.1f}", f"{point.cost.flops / 1e6:.1f}"]
        rows.append([point.name, point.precision, *cost, _share(point.agreement), _figure(point.nll)])
        if written:
            rows[-1] += ["-"] * 4 if point.free is None else _free(point.free)[1:5]
    return rows


def cost_line(full: DecodeCost, decoder: DecodeCost) -> str:
    """Describes what a decode step reads and computes, beside the full model's."""
    return (
        f"A decode step reads {decoder.weights / 1e6:.1f} M weights, {decoder.bytes / 1e6:.1f} MB, for "
        f"{decoder.flops / 1e6:.1f} MFLOP; the full model in bf16 reads {full.weights / 1e6:.1f} M, "
        f"{full.bytes / 1e6:.1f} MB, for {full.flops / 1e6:.1f} MFLOP "
        f"(weights {100 * decoder.weights / full.weights:.1f} %, bytes {100 * decoder.bytes / full.bytes:.1f} %)."
    )


def overlap_line(evaluation: Evaluation) -> str:
    """Says how many judged conversations overlap with text that the decoder was made from."""
    return f"Overlap: {describe_overlap(evaluation.overlap, len(evaluation.transcripts), DECODER_TEXT)}."


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Writes ``report.md``, its plots and ``evaluation.json`` into ``folder``; creates the folder if needed."""
    from overfill.making.evaluate.plots import save_drift

    folder.mkdir(parents=True, exist_ok=True)
    forced = {TITLES[name]: figures for name, figures in evaluation.teacher_forced.items()}
    written = {TITLES[name]: figures for name, figures in evaluation.free_running.items()}
    kinds = [_markdown(kind_rows(evaluation))] if evaluation.kinds else []
    agreement = {name: figures.agreement for name, figures in forced.items()}
    nll = {name: figures.nll for name, figures in forced.items()}
    panels = {"top-1 agreement with the full model": agreement, "NLL (nats per token)": nll}
    save_drift(folder / "drift.png", f"{evaluation.pair}: given answers", panels)
    parts = [
        f"# Evaluation of the pair {evaluation.pair}",
        f"{len(evaluation.transcripts)} conversations ({evaluation.data}), {evaluation.dtype} on {evaluation.device}. "
        "NLL, KL and agreement are over answer tokens after the first, which is always the full model's. ± is one "
        "standard error over answers.",
        cost_line(evaluation.full, evaluation.decoder),
        overlap_line(evaluation),
        _markdown(forced_rows(evaluation)),
        *([_markdown(free_rows(evaluation))] if written else []),
        *kinds,
        "## Given answers, by position",
        "![agreement and NLL by position](drift.png)",
        "Top-1 agreement with the full model:",
        _markdown(position_rows(agreement, percent=True)),
        "NLL:",
        _markdown(position_rows(nll, percent=False)),
    ]
    if written:
        teacher = {name: figures.nll for name, figures in written.items()}
        repeated = {name: figures.repeated for name, figures in written.items()}
        panels = {"NLL under the full model (nats per token)": teacher, "share of repeated 4-grams": repeated}
        save_drift(folder / "free_running.png", f"{evaluation.pair}: answers of its own, greedy", panels)
        parts += [
            "## Answers of its own, by position",
            f"Each variant wrote greedy answers of up to {evaluation.max_tokens} tokens, which the full model scored. "
            "New text: the tokens that do not end a repeated 4-gram.",
            "![NLL under the full model by position](free_running.png)",
            "NLL under the full model:",
            _markdown(position_rows(teacher, percent=False)),
            "Share of 4-grams that occurred earlier in the answer:",
            _markdown(position_rows(repeated, percent=True)),
            "## Examples",
            RULE,
        ]
        for title, question, *answers in examples(evaluation, 10):
            texts = zip(("Question", "Full model", "Pair"), (question, *answers), strict=True)
            parts += [f"### {title}", *(f"**{who}**\n\n{_quoted(text)}" for who, text in texts)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps(evaluation.to_json(), indent=1) + "\n", encoding="utf-8")


def write_comparison(folder: Path, points: Sequence[TradeoffPoint]) -> None:
    """Writes ``report.md``, its plot and ``points.jsonl`` into ``folder``; creates the folder if needed."""
    from overfill.making.evaluate.plots import save_tradeoff

    folder.mkdir(parents=True, exist_ok=True)
    save_tradeoff(folder / "tradeoff.png", points)
    parts = [
        "# Pruning beside plain quantisation",
        "Decoders answer on the unquantised full model's KV of the prompt. int8 has one scale per output channel, int4 "
        "a scale and an offset for every 32 weights; int4+int8 head keeps the output head at 8 bits, as 4-bit formats "
        "usually do. ± is one standard error over answers. The last four columns are of greedy answers that the "
        f"decoder wrote, for {', '.join(FREE_RUNNING)}: their perplexity by the full model ÷ that of its own answers, "
        "the same without the tokens that end a repeated 4-gram, repeated 4-grams with the difference in points, and "
        "length ÷ the full model's.",
        NOTE,
        _markdown(point_rows(points)),
        "![agreement and free-running perplexity against bytes](tradeoff.png)",
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(point.to_json()) + "\n" for point in points)
    (folder / "points.jsonl").write_text(lines, encoding="utf-8")


def save_summary(pair_folder: Path, evaluation: Evaluation) -> None:
    """Writes the evaluation's summary into ``pair.json`` atomically; valid checksums stay valid.

    Raises:
        InvalidPair: the folder holds no pair.
    """
    folder = Pair.load(pair_folder).folder
    valid = checksums_match(folder)
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    manifest["eval"] = evaluation.summary()
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(temporary, folder / MANIFEST)
    if valid:
        update_checksum(folder, MANIFEST)


def _figure(estimate: Estimate) -> str:
    return "-" if math.isnan(estimate.mean) else f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"


def _share(estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return "-"
    return f"{100 * estimate.mean:.1f} ± {100 * estimate.standard_error:.1f} %"


def _free(free: Comparison) -> list[str]:
    """Returns perplexity, its ratio, that of new text, repeated 4-grams, length and share of finished answers.

    A hyphen replaces figures that empty or very short answers do not have.
    """
    return [
        "-" if math.isnan(free.perplexity) else f"{free.perplexity:.2f}",
        "-" if math.isnan(free.ratio) else f"{free.ratio:.2f} ± {free.ratio_error:.2f}",
        "-" if math.isnan(free.new_ratio) else f"{free.new_ratio:.2f} ± {free.new_ratio_error:.2f}",
        "-" if math.isnan(free.points) else f"{100 * free.repeated:.1f} % ({free.points:+.1f})",
        f"{free.tokens:.0f}" + ("" if math.isnan(free.length) else f" ({free.length:.2f}×)"),
        f"{100 * free.finished:.0f} %",
    ]


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines()) or "> *(empty)*"


def _markdown(rows: TableRows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
