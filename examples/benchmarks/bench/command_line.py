"""Command lines that say in one sentence what is wrong."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from peft_bituning.errors import BiTuningError, ConfigurationError


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the pages of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the error for `run_main` to print."""
        raise ConfigurationError(f"{message}; --help lists all arguments")


def run_main(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a program on the command line's arguments, and end the process with its exit code."""
    try:
        sys.exit(main(sys.argv[1:]))
    except BiTuningError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
