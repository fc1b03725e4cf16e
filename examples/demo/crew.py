"""The worker processes seen from the demo: start them, give all the same order, wait for all."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, final

REPLY_DEADLINE_S = 120.0
STOP_DEADLINE_S = 5.0

Reply = dict[str, Any]


class WorkerFailed(RuntimeError):
    """A worker answered with an error, ended, or did not answer in time."""


class _Member:
    def __init__(self, name: str) -> None:
        self.name = name
        script = Path(__file__).with_name("worker.py")
        # A session of its own: Ctrl-C reaches the demo, which then ends its workers in order.
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, order: Reply) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"{self.name} ended before it got its order") from None

    def receive(self) -> Reply:
        try:
            line = self._replies.get(timeout=REPLY_DEADLINE_S)
        except queue.Empty:
            message = f"{self.name} did not answer within {REPLY_DEADLINE_S:.0f} s"
            raise WorkerFailed(message) from None
        if not line:
            raise WorkerFailed(f"{self.name} ended with code {self.process.wait()}")
        reply: Reply = json.loads(line)
        if not reply["ok"]:
            raise WorkerFailed(f"{self.name}: {reply['error']}")
        return reply

    def ask_to_end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def end(self, deadline: float) -> None:
        """Waits until `deadline`, on the monotonic clock, and then ends the process by force."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._replies.put(line)
        self._replies.put("")


@final
class Crew:
    """Several workers that do the same thing at the same time."""

    def __init__(self, size: int) -> None:
        self._members: list[_Member] = []
        try:
            for number in range(1, size + 1):
                self._members.append(_Member(f"worker-{number}"))
        except BaseException:
            self.stop(patience_s=0)
            raise

    @property
    def names(self) -> list[str]:
        return [member.name for member in self._members]

    @property
    def pids(self) -> list[int]:
        return [member.process.pid for member in self._members]

    def wait_until_ready(self) -> None:
        """Returns once every worker has imported what it needs."""
        for member in self._members:
            member.receive()

    def order(self, do: str, each: Callable[[str], Reply]) -> list[Reply]:
        """Sends every worker `do` with `each(name)` as arguments, then collects the replies."""
        for member in self._members:
            member.send({"do": do, **each(member.name)})
        return [member.receive() for member in self._members]

    def stop(self, patience_s: float = STOP_DEADLINE_S) -> None:
        for member in self._members:
            member.ask_to_end()
        deadline = time.monotonic() + patience_s
        for member in self._members:
            member.end(deadline)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a failure or Ctrl-C a worker may be deep in work that nobody wants any more.
        self.stop(STOP_DEADLINE_S if error is None else 0)
