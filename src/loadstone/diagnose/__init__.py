"""Why do the logits differ? Traces, comparison, and diagnosis by repair; verdicts without a reference; self-test."""

from .compare import Parity, compare
from .reference import find_reference
from .search import Diagnosis, diagnose
from .trace import Trace, load_trace, save_trace

__all__ = ["Diagnosis", "Parity", "Trace", "compare", "diagnose", "find_reference", "load_trace", "save_trace"]
