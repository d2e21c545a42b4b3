"""One page that shows runs and what was found of them, complete in itself."""

from .page import render, write_report

__all__ = ["render", "write_report"]
