"""The program `firstlight`, from its first import to Python's own end: Ctrl-C leaves it with 130 and without a word.

What Ctrl-C means to a verb the verb says; here is what it means around them. An import can't be trusted with it:
torch's takes a second and swallows one interrupt in ten. There is nothing to take away yet, so it ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell had it ignored
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from firstlight.cli.main import main as firstlight  # here, because its imports are long enough to interrupt

        firstlight()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said: from here on it would only be a traceback


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if "importlib._bootstrap" in frame.f_code.co_filename:
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
