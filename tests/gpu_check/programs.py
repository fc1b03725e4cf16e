"""Starts programs with an end to their patience, and says how they ended."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RESULT = "RESULT "


class NotAvailable(Exception):
    """This machine or this build does not have what a step needs."""


class Deadline:
    """A moment, kept from a step to its programs."""

    def __init__(self, seconds: float, within: Deadline | None = None) -> None:
        self._at = time.monotonic() + seconds
        if within is not None:
            self._at = min(self._at, within._at)

    def left(self) -> float:
        return self._at - time.monotonic()

    def is_over(self) -> bool:
        return self.left() <= 0


@dataclass
class End:
    code: int | None  # None: it was stopped
    out: str
    errors: str
    seconds: float

    @property
    def outcome(self) -> str:
        return {None: "timed out", 0: "passed"}.get(self.code, "failed")

    def tail(self, characters: int = 1500) -> str:
        """The end of what it said, for whoever has to find out why it failed."""
        said = "\n".join(part.strip() for part in (self.out, self.errors) if part.strip())
        return said[-characters:]


def run(command: list[str | Path], deadline: Deadline, environment: dict[str, str] | None = None) -> End:
    """Runs a program and whatever it starts, to its end or the deadline."""
    began = time.monotonic()
    # Files: a process that the program left behind would hold a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(max(0.1, deadline.left()))
        except subprocess.TimeoutExpired:
            code = None
        stop(process)
        seconds = time.monotonic() - began
        return End(code, _read(out), _read(errors), round(seconds, 3))


def stop(process: subprocess.Popen) -> None:
    """The process and those it started, however it stands with them."""
    with contextlib.suppress(ProcessLookupError):  # all gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def torch_folder() -> Path | None:
    """Where this Python's torch is; looked up without importing it, which takes seconds."""
    found = importlib.util.find_spec("torch")
    places = found.submodule_search_locations if found else None
    return Path(places[0]) if places else None


def torch_version() -> str | None:
    folder = torch_folder()
    if folder is None:
        return None
    # The package's metadata leaves out which CUDA it was built for.
    found = re.search(r"^__version__ = '([^']+)'", (folder / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


def with_libtorch() -> dict[str, str]:
    """The environment in which our programs find this Python's libtorch: they were linked to another machine's."""
    folder = torch_folder()
    environment = dict(os.environ)
    if folder is None:
        return environment
    folders = [folder / "lib", *sorted((folder.parent / "nvidia").glob("*/lib"))]
    before = environment.get("LD_LIBRARY_PATH")
    environment["LD_LIBRARY_PATH"] = ":".join([*map(str, folders), *([before] if before else [])])
    return environment


class Broker:
    """A broker of the artefacts, serving until the block ends."""

    def __init__(self, program: str | Path, folder: Path, *arguments: str) -> None:
        self.program, self.socket = program, str(folder / "broker.sock")
        self._command = [str(program), "serve", "--bench-models", "--socket", self.socket, *arguments]
        self._log = folder / "broker.log"

    def __enter__(self) -> Broker:
        self.start()
        return self

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=with_libtorch()
            )
        limit = Deadline(60)
        while not self._log.exists() or "luna-broker is serving" not in self.said():
            if self.process.poll() is not None or limit.is_over():
                raise RuntimeError(f"the broker does not serve: {self.said()[-800:]}")
            time.sleep(0.02)

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def again(self) -> None:
        """Starts a killed one anew."""
        self._log.unlink()
        self.start()

    def __exit__(self, *_exception) -> None:
        self.kill()


def python() -> str:
    return sys.executable


def results(end: End) -> list[dict]:
    """What a program of ours said, line by line as it came to know it: also of one that was stopped half-way."""
    found = []
    for line in end.out.splitlines():
        # The last line of one that was stopped may be half a line.
        with contextlib.suppress(ValueError):
            if line.startswith(RESULT):
                found.append(json.loads(line.removeprefix(RESULT)))
    return found


def tell(**found: object) -> None:
    """The other end of `results`."""
    print(RESULT + json.dumps(found), flush=True)
