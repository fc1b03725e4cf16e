"""Weights that lie in the broker's memory once for everybody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ._native import Attached, Stale
from .errors import refusal


class Weights(dict[str, Any]):
    """The tensors of a file, or of a published set, by key: views on memory that exists once on this machine.

    Obtained from `Client.attach` and `Client.publish`. The tensors are torch's where torch is loaded, else numpy's (a
    `DeviceTensor` for element types that numpy lacks). Each has a storage of its own, so that `safetensors.save_file`
    and `copy.deepcopy` do with it what they do with any other tensor. A copy of the dictionary is a plain one.

    In host memory a write to a tensor gives this process a page of its own: no other process sees it, `diverged_bytes`
    and the broker's `status` count it, and `reattach` gives it up. The memory stays mapped while a tensor of it lives,
    whatever becomes of the broker.
    """

    name: str
    """What they were asked for by."""
    digest: str
    """What the tensors contain: the same digits for the same keys, types, shapes and bytes."""
    size_bytes: int
    """Bytes of shared memory that they lie in."""
    device: str
    """`"cpu"` or `"cuda:N"`."""

    def __init__(self, attached: Attached) -> None:
        super().__init__(attached.tensors())
        self._attached: Attached | None = attached
        self.name, self.digest = attached.name, attached.digest
        self.size_bytes, self.device = attached.size_bytes, attached.device

    def check(self) -> None:
        """Returns if the broker still counts them as held: what to ask before computing with them; microseconds.

        Raises `ConnectionLost` where the broker is gone or was restarted, `Stale` where they were unloaded by force.
        The tensors stay readable in either case; `reattach` makes it good again.
        """
        self._held().check()

    def reattach(self, progress: Callable[[int, int], object] | Literal[False] | None = None) -> None:
        """Takes hold of the same weights anew, and puts the broker's memory behind the addresses of the old.

        Tensors, and modules made of them, go on as they are; what was written to them is given up. No other thread may
        write to them meanwhile. `progress` as for `Client.attach`, for a broker that has to load them first.

        Raises `Stale` where the file or the published set contains something else by now; the old memory is kept then.
        `Unsupported` for weights in plain memory of a GPU. On a GPU this waits for the work enqueued so far, and
        nothing that uses the weights may be enqueued meanwhile. Else as `Client.attach`.
        """
        self._held().reattach(progress)

    @property
    def diverged_bytes(self) -> int | None:
        """Bytes of pages that this process has to itself because it wrote to them; `None` where nobody can tell."""
        return self._held().diverged_bytes

    def close(self) -> None:
        """Drops the tensors. The broker counts the weights as held until those that were taken out are gone too."""
        self.clear()
        self._attached = None

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[dict[str, Any]]]:
        # What is copied deeply, or goes to another process, is tensors and no hold on the broker's memory.
        return dict, (dict(self),)

    def __repr__(self) -> str:
        return f"<Weights {self.name}: {len(self)} tensors, {self.size_bytes} bytes on {self.device}>"

    def _held(self) -> Attached:
        if self._attached is None:
            raise refusal(Stale, f"{self.name} was closed by this process", "attach it again")
        return self._attached
