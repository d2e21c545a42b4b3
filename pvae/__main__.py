"""Lets ``python -m pvae`` stand for the command ``pvae``."""

from pvae.experiments.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
