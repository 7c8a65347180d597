"""The `vigil` command: looks at a running system and at what it would run."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from common.errors import VigilError

# name -> module with add_arguments(parser) and run(args) -> exit status, and what --help says
COMMANDS = {
    "check": ("services.cli.check", "is vigil.toml right, do its sources open, its models run?"),
    "status": ("services.cli.status", "one screen: what runs, how fast, how old, how valid"),
    "cameras": ("services.cli.cameras", "what is attached, with a ready block for vigil.toml"),
    "trigger": ("services.cli.trigger", "have a camera inspect one part now"),
    "models": ("services.cli.models", "the slots of each group: state, tries, why one is bad"),
    "install": (
        "services.cli.install",
        "offer a bundle: it is tested, and goes live if it is good",
    ),
    "update": ("services.cli.update", "signed updates: check now, progress, what became of them"),
    "rollback": ("services.cli.rollback", "go back to the model before, or end a test"),
    "engines": ("services.cli.engines", "runtimes and their devices here, and why one is missing"),
    "tap": ("services.cli.tap", "look inside: topics, messages, rates, the newest picture"),
    "view": ("services.cli.view", "a page to look through: every camera, live"),
    "run-model": ("services.cli.run_model", "one model on pictures, without any service"),
    "render": ("services.cli.render", "write the supervisord programs that vigil.toml asks for"),
}

USAGE = 64  # exit statuses, as in sysexits.h and the shell
INTERRUPTED = 130
BROKEN_PIPE = 141

_EXAMPLES = """\
examples:
  vigil check                       before starting: everything that is wrong, a line each
  vigil status --watch              while it runs
  vigil install parts-1.3.tar --wait   a new model, until it is good or bad
  vigil tap dump result | head -3   the newest decisions, as JSON
  vigil tap picture belt out.png    what the camera belt sees, with boxes
  vigil view                        the same in a browser, live

The system looked at is the one of VIGIL_ROOT and VIGIL_CONFIG, or of --root and --config.
exit status: 0 well; 1 it can't be done, one line says why; 2 done, but something is not well;
64 wrong usage
"""


class Parser(argparse.ArgumentParser):
    """Knows --root and --config at every level; imports a command's module only when it is named;
    says what is wrong in one line."""

    def __init__(self, *args: Any, module: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self._module = module
        for option, what in (("--root", "folder of the system"), ("--config", "its vigil.toml")):
            self.add_argument(option, metavar="PATH", default=argparse.SUPPRESS, help=what)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._module:
            module = importlib.import_module(self._module)
            self._module = ""
            self.description = self.description or module.__doc__
            self.set_defaults(run=module.run)
            module.add_arguments(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"vigil: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    top = Parser(prog="vigil", description=__doc__, epilog=_EXAMPLES)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, what) in COMMANDS.items():
        commands.add_parser(name, module=module, help=what)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """The one handler: what is wrong outside the code is one line; a fault in it is a traceback."""
    args = parser().parse_args(arguments)
    if root := getattr(args, "root", None):
        os.environ["VIGIL_ROOT"] = root
        os.environ.pop("VIGIL_RUN", None)  # that of another root
    if config := getattr(args, "config", None):
        os.environ["VIGIL_CONFIG"] = config
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except VigilError as error:
        print("vigil:", " ".join(str(error).split("\n")), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


if __name__ == "__main__":
    sys.exit(main())
