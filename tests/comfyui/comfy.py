"""A real, headless ComfyUI of the test's own: started on a free port, given workflows over HTTP, stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, final

import websocket
from result import Message, Result

START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 10.0
# Of one workflow, on two busy cores.
PROMPT_DEADLINE_S = 240.0
RETRY_PAUSE_S = 0.05
LOG_TAIL_LINES = 40


class ComfyUIFailed(RuntimeError):
    """ComfyUI did not start, ended by itself or did not answer in time; the message carries the end of its log."""


class PromptRefused(RuntimeError):
    """ComfyUI refused a workflow before running it; the message is its answer."""


@final
class ComfyUI:
    """One ComfyUI process. As a context manager it is stopped on leaving the block."""

    def __init__(
        self,
        checkout: Path,
        python: str,
        base: Path,
        models: Path,
        packs: Mapping[str, Path],
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`base`: a folder of its own; `models`: what its folder of models is; `packs`: custom nodes by name."""
        self.base = base
        self._log = base / "comfyui.log"
        self._port = _free_port()
        self._client = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: websocket.WebSocket | None = None
        self._heard: dict[str, Result] = {}
        self._environment = {**os.environ, **(environment or {})}
        for folder in ("custom_nodes", "input", "output", "user"):
            (base / folder).mkdir(parents=True)
        (base / "models").symlink_to(models)
        for name, pack in packs.items():
            (base / "custom_nodes" / name).symlink_to(pack)
        self._command = [python, str(checkout / "main.py"), "--cpu", "--listen", "127.0.0.1"]
        self._command += ["--port", str(self._port), "--base-directory", str(base), "--disable-auto-launch"]
        self._command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes", *options]
        self._checkout = checkout

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> ComfyUI:
        """Starts the process and returns once it accepts workflows."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._checkout,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._listen()
        except BaseException:
            self.kill()
            raise
        return self

    def run(self, graph: Mapping[str, Any]) -> Result:
        """Runs a workflow in API format to its end, whatever that is."""
        return self.wait(self.queue(graph))

    def queue(self, graph: Mapping[str, Any]) -> str:
        """Puts a workflow into the queue and returns its id. Raises `PromptRefused`."""
        try:
            answer = self._post("/prompt", {"prompt": graph, "client_id": self._client})
        except urllib.error.HTTPError as refusal:
            raise PromptRefused(refusal.read().decode()) from None
        prompt = str(answer["prompt_id"])
        self._heard[prompt] = Result(folder=self.base / "output")
        return prompt

    def wait(self, prompt: str) -> Result:
        """Listens until ComfyUI is done with a workflow."""
        result = self._heard.pop(prompt)
        self._listen_until(prompt, result, _over)
        result.outputs = self._get(f"/history/{prompt}")[prompt]["outputs"]
        return result

    def wait_for(self, prompt: str, holds: Callable[[Message], bool]) -> Message:
        """Listens until a message of a running workflow for which `holds` is true, and returns it."""
        result = self._heard[prompt]

        def wanted_or_over(message: Message) -> bool:
            return holds(message) or _over(message)

        last = self._listen_until(prompt, result, wanted_or_over)
        if not holds(last):
            result.ok()
            raise AssertionError(f"the workflow was over before what was waited for: {result.messages}")
        return last

    def interrupt(self) -> None:
        self._post("/interrupt", {})

    def nodes(self) -> dict[str, Any]:
        """The nodes it has, with their inputs."""
        return dict(self._get("/object_info"))

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        process = self._running()
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._forget()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._forget()

    def __enter__(self) -> ComfyUI:
        return self if self._process is not None else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self.stop()

    def _listen(self) -> None:
        process = self._running()
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            if process.poll() is not None:
                raise ComfyUIFailed(f"ComfyUI ended with code {process.returncode} instead of serving\n{self._tail()}")
            try:
                address = f"ws://127.0.0.1:{self._port}/ws?clientId={self._client}"
                self._socket = websocket.create_connection(address, timeout=PROMPT_DEADLINE_S)
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    message = f"ComfyUI did not serve within {START_DEADLINE_S:.0f} s: {error}"
                    raise ComfyUIFailed(f"{message}\n{self._tail()}") from error
            time.sleep(RETRY_PAUSE_S)

    def _listen_until(self, prompt: str, result: Result, ends: Callable[[Message], bool]) -> Message:
        assert self._socket is not None, "ComfyUI is not running"
        while True:
            try:
                received = self._socket.recv()
            except (OSError, websocket.WebSocketException) as error:
                raise ComfyUIFailed(f"ComfyUI said no more: {error!r}\n{self._tail()}") from error
            if isinstance(received, bytes):
                result.take_up(received)
                continue
            message = json.loads(received)
            if message.get("data", {}).get("prompt_id") != prompt:
                continue
            result.messages.append(message)
            if ends(message):
                return dict(message)

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url(path), timeout=PROMPT_DEADLINE_S) as answer:
            return json.load(answer)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url(path), json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PROMPT_DEADLINE_S) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ComfyUIFailed("ComfyUI is not running")
        return self._process

    def _forget(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._process = None

    def _tail(self) -> str:
        return "\n".join(self.log().splitlines()[-LOG_TAIL_LINES:])


def _over(message: Message) -> bool:
    """Whether ComfyUI is done with the workflow: it has written down what came of it."""
    return message["type"] == "executing" and message["data"]["node"] is None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
