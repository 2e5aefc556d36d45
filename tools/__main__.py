"""``python -m tools NAME``: the program NAME of this folder, which a signal may end from the start.

Most of the first moments go to imports; so these come when signals are handled already.
"""

import sys

SIGINT = 2


def main(name: str) -> int:
    """Run the program; return its exit status, or a signal's as a shell tells it."""
    try:
        from importlib import import_module

        from tools.signals import end_on_signals

        end_on_signals()
        status: int = import_module(f"tools.{name}").main()
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else SIGINT  # Python's own has none
        return 128 + int(number)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
