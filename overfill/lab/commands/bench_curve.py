"""``overfill bench curve``: throughput against interactivity at an equal number of cores, beside vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click

from overfill.cli.options import Number
from overfill.lab.bench.curve.plan import OWN, SHAPES, SYSTEMS, plan_points
from overfill.lab.commands.bench_options import COUNTS, install_option, json_option, load_pair, peer_pythons
from overfill.lab.measurement import print_measurements


@click.command("curve", short_help="Throughput against interactivity at an equal number of cores, beside vLLM.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@click.option(
    "--shape",
    "shapes",
    type=click.Choice([*SHAPES]),
    multiple=True,
    default=[*SHAPES],
    help="a: 1,024 tokens in and 128 out. b: 128 in, 512 out. c: agents, 1,280 in, of which 1,000 shared, 128 out. "
    "Repeatable; by default all.",
)
@click.option(
    "--system",
    "systems",
    type=click.Choice(SYSTEMS),
    multiple=True,
    default=SYSTEMS,
    help="split: a worker per stage. colocated: one with both. identity: the full model alone in our engine. vllm: the "
    "full model in vLLM's server. Repeatable; by default all.",
)
@click.option("--concurrency", type=COUNTS, default="1,2,4,8,16", show_default=True, help="Requests at a time.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds of shape a.")
@click.option(
    "--seconds", type=Number(1), default=40.0, show_default=True, help="About how long a point's requests take."
)
@click.option("--pair", default="default", show_default=True, help="Pair of split and colocated.")
@install_option
@json_option
def curve_command(
    out: Path,
    shapes: Sequence[str],
    systems: Sequence[str],
    concurrency: Sequence[int],
    rounds: int,
    seconds: float,
    pair: str,
    install: bool,
    as_json: bool,
) -> int:
    """Measure tokens/s against tokens/s per user with guidellm, on all cores of this machine.

    Each system has the same cores, bfloat16 and the same limits. aiperf and our own generator measure colocated too,
    beside guidellm, with all cores but one: the last is the tool's. A run that was interrupted continues with the same
    --out, and another run can add shapes and systems to it.

    Writes curve.json and curve.png into the folder, and prints our figures beside the best other system's, losses
    first. Exits with 1 if a point or a request failed, if answers were too short, or if a tool differs from guidellm by
    more than 5 % and by more than guidellm's rounds differ.
    """
    from overfill.lab.bench.curve.report import checks, comparison, losses, save_plot
    from overfill.lab.bench.curve.run import Folder, conditions, measure_points
    from overfill.process.extras import require

    require("loadtest", "`overfill bench curve`", "aiohttp", "matplotlib")
    planned = plan_points(shapes, systems, concurrency, rounds)
    tools = {point.tool for point in planned} - {OWN}
    peers = sorted(tools | {"vllm"} & set(systems))
    pythons = peer_pythons(peers, install)
    loaded = {name: load_pair("identity" if name in ("identity", "vllm") else pair) for name in systems}

    say = partial(click.echo, err=True)
    folder = Folder(out, conditions(seconds, loaded, peers))
    with (out / "servers.log").open("a") as servers:

        def log(process: str, line: str) -> None:
            print(f"{process} | {line}", file=servers, flush=True)

        failed = measure_points(planned, folder, seconds, loaded, pythons, say, log)
    measured = folder.read()
    if not measured:
        return 1
    rows, checked = comparison(measured), checks(measured)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    document = folder.conditions | {
        "date": date,
        "points": [asdict(point) | asdict(figures) for point, figures in measured.items()],
        "comparison": [json.loads(row.to_json()) for row in rows],
        "checks": [json.loads(row.to_json()) for row in checked],
    }
    (out / "curve.json").write_text(json.dumps(document, indent=1) + "\n")
    machine = "{cores} cores of {processor}, {dtype}".format_map(folder.conditions)
    save_plot(out / "curve.png", measured, f"{machine}, {date[:10]}")
    say(f"{losses(rows)} of {len(rows)} figures are worse than the best other system's; they come first")
    code = print_measurements([*rows, *checked], as_json)
    say(f"Written: {out / 'curve.json'} and {out / 'curve.png'}")
    if failed:
        say(f"Points that failed: {len(failed)}. Run the same command again to try only those")
    return 1 if failed else code
