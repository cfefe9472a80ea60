"""Models side by side: size, training, loss, samples, speed, and where they differ, measured under one protocol.

*Others* compare a model with a pretrained one by hand: a loss on one text against a figure out of a paper for another.
"""

from __future__ import annotations

from .comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
