"""What a training process is asked from outside: by signals, and by the file `request` in the run's folder."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Literal

Request = Literal["stop", "pause", "resume"]
REQUESTS = ("stop", "pause", "resume")
# A training loop looks for requests this often.
POLL_SECONDS = 0.25


class Control:
    """Collects what is asked while it is entered. A second signal interrupts at once.

    interrupted: whether SIGINT or SIGTERM came. Signals reach only the main thread; elsewhere requests remain.
    """

    def __init__(self, file: Path) -> None:
        self.interrupted = False
        self._file = file
        self._looked = time.monotonic()
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> Control:
        self._file.unlink(missing_ok=True)  # what was asked of an earlier process
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)

    def due(self) -> bool:
        """Whether it is time to look again; so that steps of microseconds do not ask the disk each time."""
        if self.interrupted or time.monotonic() - self._looked >= POLL_SECONDS:
            self._looked = time.monotonic()
            return True
        return False

    def request(self) -> Request | None:
        """What is asked now."""
        if self.interrupted:
            return "stop"
        try:
            text = self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return text if text in REQUESTS else None

    def wait(self) -> Request | None:
        """Sleep while a pause is asked; returns what is asked then."""
        while (request := self.request()) == "pause":
            time.sleep(POLL_SECONDS)
        return request

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
