"""Ctrl-C and SIGTERM as a request, so that the step under way is finished and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def polite_signals(*, insist: bool = True) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM.

    Args:
        insist: a second one is not polite. Not where torchrun passes them on: it may do so twice, and gives the
            processes 30 seconds whatever happens. There an error goes on collecting: torchrun ends the others of a
            process that is gone, and the one that lost it has to say so first.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for each, handler in before.items() if insist else ():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, remember)
    try:
        yield asked
    except BaseException:
        if not insist:
            before = {}
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
