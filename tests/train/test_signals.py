"""Signals as requests: who gets them back afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from loadstone.train.signals import polite_signals

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    before = [signal.getsignal(number) for number in NUMBERS]
    yield before
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("insist", [True, False])
def test_a_request_is_collected_and_the_handlers_come_back(insist: bool, handlers: list[Any]) -> None:
    with polite_signals(insist=insist) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert ([signal.getsignal(number) for number in NUMBERS] == handlers) == insist  # a second one is not polite
    assert asked == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in NUMBERS] == handlers


@pytest.mark.parametrize("insist", [True, False])
def test_under_torchrun_an_error_can_be_told_before_a_signal_ends_the_process(
    insist: bool, handlers: list[Any]
) -> None:
    with pytest.raises(RuntimeError, match="lost"), polite_signals(insist=insist) as asked:
        raise RuntimeError("lost")
    assert ([signal.getsignal(number) for number in NUMBERS] == handlers) == insist
    if not insist:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [signal.SIGTERM]
