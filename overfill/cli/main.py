"""The ``overfill`` command: runs a subcommand and turns an error into one line and an exit code.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted. A subcommand's module is imported only when it runs,
so that client commands start fast and load no torch.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

import click

from overfill.errors import OverfillError, Overloaded, Unavailable, Unreachable
from overfill.process.extras import needs
from overfill.settings.environment import GRPC_ENVIRONMENT
from overfill.version import __version__

# Heading in `overfill --help` -> name -> package of the command's module, which has its name, and its line.
#
# This module names commands of the lab and imports them only when they run. It is the one exception to the rule that
# nothing outside the lab imports it.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Run a stack": {
        "demo": ("overfill.cli", "Start a stack, ask one question in each tier, show answers, speed and TTFT."),
        "up": ("overfill.cli", "Run a stack: routers and workers."),
    },
    "Ask": {
        "generate": ("overfill.cli", "Answer one prompt; the answer streams to stdout."),
        "chat": ("overfill.cli", "Chat with the model."),
    },
    "Operate": {
        "status": ("overfill.cli", "Show the workers of a running stack."),
        "top": ("overfill.cli", "Watch a running stack: pools, queue, parts of the time to first token, sessions."),
        "health": ("overfill.cli", "Ask one process of a stack whether it is ready."),
        "drain": ("overfill.cli", "Take WORKER out of a running stack without losing a request."),
        "adapter": ("overfill.cli", "Load, unload and list the adapters of a running stack."),
        "rollout": ("overfill.cli", "Move new conversations between the two revisions of a running stack."),
        "config": ("overfill.cli", "Show where settings come from, and check a settings file."),
        "keys": ("overfill.cli", "Make, list and revoke the API keys of a stack."),
        "certs": ("overfill.cli", "Make certificates for every role of a stack."),
    },
    "Make pairs": {
        "pair": ("overfill.cli", "Prepare, build, train and judge pairs of a full model and a decoder."),
    },
    "Measure and break": {
        "verify": ("overfill.cli", "Check a running stack's answers against plain transformers, token by token."),
        "bench": (
            "overfill.lab.commands",
            "Measure engines, the router, or whole servers on this machine.",
        ),
        "loadtest": ("overfill.lab.commands", "Load a stack or an OpenAI endpoint, and check objectives."),
        "simulate": (
            "overfill.lab.commands",
            "Play a trace on modelled workers: print latencies and goodput, or size the pools.",
        ),
        "chaos": ("overfill.lab.commands", "Break a stack under load and check every answer."),
    },
}
COMMANDS = {name: entry for commands in GROUPS.values() for name, entry in commands.items()}

# Name -> extras that install every module the command imports. Client commands need none and are not listed. A
# subcommand that is not listed needs its group's extras.
EXTRAS: dict[str, str] = {
    "up": "server",
    "verify": "server",
    "chaos": "server",
    "pair": "pairs",
    "pair adapter": "server",
    "pair list": "server",
    "pair path": "server",
    "pair show": "server",
    "bench": "server",
    "bench curve": "loadtest,server",
    "bench quality": "loadtest,server",
    "bench router": "loadtest,server",
    "loadtest": "loadtest",
    "simulate": "loadtest",
    "demo": "server",
}


def module_of(name: str) -> str:
    """Returns the module of a command, which is called ``NAME_command`` there, or ``NAME_group``."""
    return f"{COMMANDS[name][0]}.{name}"


_CANNOT_WRITE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class LazyGroup(click.Group):
    """A group that imports a command when it is called, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            from overfill.settings.config_file import nearest

            ctx.fail(f"no such command {name!r}; {nearest(name, COMMANDS, '`overfill --help` lists all commands')}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(module_of(cmd_name))
        command: click.Command = getattr(module, f"{cmd_name}_group", None) or getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for name in COMMANDS)
        for heading, commands in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), line) for name, (_, line) in commands.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="overfill")
def cli() -> None:
    """Two-stage LLM serving: a full model reads the prompt, a pruned decoder answers on its KV cache.

    Start with `overfill up`, then, in another terminal, `overfill generate "Why is the sky blue?"`.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``argv`` (None means ``sys.argv[1:]``) and returns the exit code."""
    os.environ.update(GRPC_ENVIRONMENT | os.environ)
    if sys.stdout is None:  # closed, as by `overfill status >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the life of the process
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    try:
        with needs(EXTRAS.get(" ".join(arguments[:2]), EXTRAS.get(name, "")), f"`overfill {name}`"):
            result = cli.main(args=arguments, prog_name="overfill", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except OverfillError as error:
        click.echo("\n".join([f"overfill: {_one_line(error)}", *getattr(error, "__notes__", ())]), err=True)
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        if error.errno != errno.EPIPE:  # the reader has closed the pipe, as in `overfill generate … | head -1`
            where = f" {error.filename}" if error.filename else ""
            click.echo(f"overfill: cannot write{where}: {error.strerror}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # avoids a second error at exit
        return 1
    return result if isinstance(result, int) else 0


def _one_line(error: OverfillError) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, Unreachable):
        return f"{message} (start a stack with `overfill up`, or give the address of one with --address)"
    if isinstance(error, Unavailable):
        return f"{message} (`overfill status` shows the workers)"
    if isinstance(error, Overloaded) and error.retry_after is not None:
        return f"{message} (try again in {error.retry_after:.0f} s)"
    return message


if __name__ == "__main__":
    sys.exit(main())
