"""Bounds on what files of others may cost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """ValueError if the Python code inside takes longer: in the main thread, where alarms arrive; elsewhere there is no bound."""
    def ring(number: int, frame: FrameType | None) -> None:
        raise ValueError(f"{what} takes longer than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)      # again and again: where it is raised in a destructor, Python drops it
    try:
        yield
    finally:
        while signal.getsignal(signal.SIGALRM) is ring:
            with contextlib.suppress(ValueError):               # of a last ring, between here and there
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
