"""A server run as a child process that never outlives the process that asked for it."""

import http.client
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

START_SECONDS = 90
STOP_SECONDS = 15


class ChildFailed(RuntimeError):
    """The server did not come up in time, or ended by itself."""


def attend(
    command: Sequence[str], *, env: Mapping[str, str], address: str, port: int, ready: Callable[[], None]
) -> None:
    """Run the HTTP server `command` until it ends or we are told to stop; call `ready` when it answers.

    The child leads a session of its own: a Ctrl-C reaches only this process, which then ends the whole
    session, the child's own children included. Returns after a stop that was asked for (SIGINT, SIGTERM,
    SIGHUP); raises `ChildFailed` otherwise.
    """
    with _signals_interrupt():
        child = subprocess.Popen(
            command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            _await_answer(child, address, port)
            ready()
            child.wait()
        except KeyboardInterrupt:
            return
        finally:
            _stop(child)
    raise ChildFailed(f"ended by itself with exit code {child.returncode}")


def end_with_parent() -> None:
    """Send this process SIGTERM as soon as its parent is gone, however that ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does, even where a shell ignores SIGINT."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _await_answer(child: subprocess.Popen, address: str, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise ChildFailed(f"ended with exit code {child.returncode} before it answered")
        connection = http.client.HTTPConnection(address, port, timeout=START_SECONDS)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/")
            connection.getresponse()
            return
        connection.close()
        time.sleep(0.1)
    raise ChildFailed(f"did not answer on {address}:{port} within {START_SECONDS} s")


def _stop(child: subprocess.Popen) -> None:
    """End the child's session: politely at first, then by force."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        deadline = time.monotonic() + seconds
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
            while time.monotonic() < deadline:
                child.poll()
                os.killpg(child.pid, 0)
                time.sleep(0.05)
