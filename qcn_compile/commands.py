"""What every command of the compiler does alike: one line for an expected failure, a hint for a missing package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from qcn_compile.errors import QcnError, UsageError

INSTALL = "the compiler needs its extra packages: pip install 'qcn-compile[compile]'"


def guarded(name: str, body: Callable[[], int]) -> int:
    """The exit code of `body`; expected failures become one message on standard error."""
    try:
        code = body()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read us has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except QcnError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("qcn_compile"):
            raise
        print(f"{name}: {error.name} is not installed; {INSTALL}", file=sys.stderr)
        return UsageError.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted; no build was written; the same command goes on after the weights that are done",
              file=sys.stderr)
        return 130


def opt(argv: list[str] | None = None) -> int:
    """Entry point of qcn-opt."""

    def body() -> int:
        from qcn_compile.opt import main

        return main(argv)

    return guarded("qcn-opt", body)
