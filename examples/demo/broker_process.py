"""A broker of one's own: started on a given socket, awaited, and stopped whatever happens."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import final

import luna_broker

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 10.0
RETRY_PAUSE_S = 0.02
LOG_TAIL_LINES = 20


class BrokerFailed(RuntimeError):
    """The broker did not start, or ended by itself; the message carries the end of its log."""


@final
class BrokerProcess:
    """One `luna-broker serve` process. As a context manager it is stopped on leaving the block."""

    def __init__(self, binary: str | Path, socket: Path, options: Sequence[str] = ()) -> None:
        self.socket = socket
        self._command = [str(binary), "serve", "--socket", str(socket), *options]
        self._log = socket.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What `luna_broker.connect` takes."""
        return str(self.socket)

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> BrokerProcess:
        """Starts the process and returns once it accepts connections."""
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal must not end it before its clients.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_until_it_accepts()
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> int:
        """Ends the broker in order and returns its exit code."""
        process = self._running()
        process.terminate()
        # A stopped process handles no signal before it is continued.
        if hasattr(signal, "SIGCONT"):
            process.send_signal(signal.SIGCONT)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            message = f"the broker did not end within {STOP_DEADLINE_S:.0f} s of SIGTERM"
            raise BrokerFailed(f"{message}\n{self.log_tail()}") from None
        finally:
            self._process = None
        return process.returncode

    def kill(self) -> None:
        """Ends the broker without giving it a chance to clean up."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def log_tail(self) -> str:
        """The last lines the broker logged."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:]) or "(the broker logged nothing)"

    def __enter__(self) -> BrokerProcess:
        return self if self._process is not None else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise BrokerFailed("the broker is not running")
        return self._process

    def _wait_until_it_accepts(self) -> None:
        process = self._running()
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            if process.poll() is not None:
                message = f"the broker ended with code {process.returncode} instead of serving"
                raise BrokerFailed(f"{message}\n{self.log_tail()}")
            try:
                luna_broker.connect(self.address, timeout=1.0).close()
                return
            except luna_broker.LunaBrokerError as error:
                if time.monotonic() > deadline:
                    message = f"no connection to the broker within {START_DEADLINE_S:.0f} s: {error}"
                    raise BrokerFailed(f"{message}\n{self.log_tail()}") from error
            time.sleep(RETRY_PAUSE_S)
