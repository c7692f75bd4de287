"""The entry of the command ``segqc``: a signal ends it quietly from here on, also during the slow imports."""

from __future__ import annotations

from segqc.processes import exit_by_signals


def main() -> None:
    """Run the command."""
    exit_by_signals()
    from segqc.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
