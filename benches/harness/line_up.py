"""Every process of a run, started together and ended together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from .programs import PeerProcess, ProgramFailed, Server, build

T = TypeVar("T")

REFERENCE, RAW, PIPE, PICKLE, LUNA, INLINE = "reference", "raw", "pipe", "pickle", "luna", "inline"
RUNG_VARIABLE = "LUNA_BROKER_TRANSPORT"


class LineUp:
    """What could not be started is absent, with its reason in `failures`; the rest of the run goes on."""

    def __init__(self, folder: Path, broker_program: str | None) -> None:
        self.broker_program = broker_program
        self.failures: dict[str, str] = {}
        self.floor: Path | None = None
        self.c_server: Server | None = None
        self.broker: Server | None = None
        self.peers: dict[str, PeerProcess] = {}
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> LineUp:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def server_of(self, peer: str) -> Server | None:
        """The server a peer was pointed at; None for peers that start their own."""
        return {
            REFERENCE: self.c_server,
            RAW: self.c_server,
            LUNA: self.broker,
            INLINE: self.broker,
        }.get(peer)

    def _start(self) -> None:
        self.floor = self._attempt("floor", lambda: build("floor.c", self._folder))
        self.c_server = self._attempt("C server", self._start_c_server)
        if self.broker_program is not None:
            self.broker = self._attempt("broker", lambda: self._start_broker(self.broker_program))
        if self.c_server is not None:
            self._start_peer(REFERENCE, "baseline.shared_client", self.c_server)
            self._start_peer(RAW, "baseline.raw_client", self.c_server)
        self._start_peer(PIPE, "baseline.pipe_client")
        self._start_peer(PICKLE, "baseline.pickle_client")
        if self.broker is not None:
            self._start_peer(LUNA, "harness.luna_client", self.broker)
            self._start_peer(INLINE, "harness.luna_client", self.broker, rung="inline")
        # All are importing by now; asking one after the other costs no more than the slowest of them.
        for name, peer in list(self.peers.items()):
            facts = self._attempt(name, lambda peer=peer: peer.ask("open"))
            if facts is None:
                del self.peers[name]
            else:
                peer.facts = facts
        if self.broker is not None and not self._attempt("broker", self.broker.wait_for_socket):
            self.broker = None

    def _attempt(self, name: str, start: Callable[[], T]) -> T | None:
        try:
            return start()
        except ProgramFailed as failure:
            self.failures[name] = str(failure)
            return None

    def _start_c_server(self) -> Server:
        server = self._serve([str(build("hand_off.c", self._folder))], "c.socket")
        server.wait_for_socket()
        return server

    def _start_broker(self, program: str) -> Server:
        return self._serve([program, "serve", "--bench-models", "--socket"], "luna.socket")

    def _serve(self, command: list[str], socket_name: str) -> Server:
        socket_path = self._folder / socket_name
        server = Server([*command, str(socket_path)], socket_path, self._folder / f"{socket_name}.log")
        self._stack.callback(server.close)
        return server

    def _start_peer(self, name: str, module: str, server: Server | None = None, rung: str | None = None) -> None:
        arguments = [] if server is None else [str(server.socket_path)]
        env = {} if rung is None else {RUNG_VARIABLE: rung}
        peer = PeerProcess(module, arguments, self._folder / f"{name}.log", env)
        self._stack.callback(peer.close)
        self.peers[name] = peer
