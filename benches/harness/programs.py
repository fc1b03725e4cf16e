"""Programs the harness starts and ends: the C servers, the broker, the peers."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

BENCHES = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 120.0
LISTEN_SECONDS = 10.0


class ProgramFailed(RuntimeError):
    """A program of the run did not start, answer or end as it should."""


def build(source: str, into: Path, folder: str = "baseline", options: tuple[str, ...] = ()) -> Path:
    """Compiles one C program or library; not committed, so that it fits the machine it runs on."""
    program = into / Path(source).stem
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O2", "-pthread", *options, "-o", str(program), str(BENCHES / folder / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ProgramFailed(f"{' '.join(command)}: {done.stderr.strip()}")
    return program


def run_json(command: list[str], env: dict[str, str] | None = None) -> dict:
    """One run of a program that prints one JSON object."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            env=os.environ | (env or {}),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramFailed(str(error)) from error
    if done.returncode != 0:
        raise ProgramFailed(f"{command[0]} {command[1]}: exit {done.returncode}: {last_lines(done.stderr)}")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise ProgramFailed(f"{command[0]} {command[1]} printed no JSON: {done.stdout[:200]!r}") from error


def last_lines(text: str, count: int = 5) -> str:
    return " / ".join(text.strip().splitlines()[-count:])


def confine(pid: int, cores: set[int]) -> None:
    """Moves every thread of a process; threads it starts later inherit from their parent."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:
            continue


class Server:
    """A program that listens on a Unix socket until it is ended."""

    def __init__(self, command: list[str], socket_path: Path, log: Path, env: dict[str, str] | None = None) -> None:
        self.socket_path = socket_path
        self._log = log
        with log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | (env or {})
                )
            except OSError as error:
                raise ProgramFailed(f"{command[0]}: {error}") from error
        self.pid = self._process.pid

    def wait_for_socket(self) -> bool:
        until = time.monotonic() + LISTEN_SECONDS
        while not self.socket_path.exists():
            if self._process.poll() is not None:
                raise ProgramFailed(
                    f"the server ended with {self._process.returncode}: {last_lines(self._log.read_text())}"
                )
            if time.monotonic() > until:
                raise ProgramFailed(f"the server did not listen within {LISTEN_SECONDS:.0f} s")
            time.sleep(0.02)
        return True

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class PeerProcess:
    """A client in its own process, commanded over standard input; started once, so that rounds carry no start-up."""

    def __init__(self, module: str, arguments: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self._name = module
        self._log = log
        self._failed: str | None = None
        self.facts: dict = {}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                bufsize=1,
                cwd=BENCHES,
                env=os.environ | (env or {}),
            )
        self.pid = self._process.pid

    def tell(self, do: str, **arguments: object) -> None:
        if self._failed is not None:
            raise ProgramFailed(self._failed)
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        except OSError:
            raise self._failure(f"ended with {self._process.wait()}") from None

    def answer(self) -> dict:
        if self._failed is not None:
            raise ProgramFailed(self._failed)
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        if not ready:
            self._process.kill()
            raise self._failure(f"did not answer within {ANSWER_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure(f"ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ProgramFailed(f"{self._name}: {answer['error']}")
        return answer

    def ask(self, do: str, **arguments: object) -> dict:
        self.tell(do, **arguments)
        return self.answer()

    def close(self) -> None:
        # The end of its standard input is a peer's signal to finish, and to end its own server.
        # One that died leaves a command unread, which closing would try to deliver.
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _failure(self, what: str) -> ProgramFailed:
        self._failed = f"{self._name} {what}: {last_lines(self._log.read_text(errors='replace'), 2)}"
        return ProgramFailed(self._failed)
