"""The ``trtkit`` command, also as ``python -m trtkit.cli``."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while its modules load ends it like Ctrl-C later, without a traceback."""
    try:
        from trtkit.cli.app import main as command
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
