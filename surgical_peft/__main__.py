"""The command `surgical-peft`, also as `python -m surgical_peft`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line, with one line and exit code 130 also for a Ctrl-C before and after the command."""
    try:
        from .cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: what is left is how Python ends


if __name__ == "__main__":
    main()
