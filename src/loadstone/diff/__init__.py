"""What is different between two checkpoints, whatever their dialects and containers."""

from .compare import Diff, Entry, diff
from .text import diff_lines

__all__ = ["Diff", "Entry", "diff", "diff_lines"]
