"""The broker of an example: the one that is named, else one that lives as long as the example does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("demo")))
from broker_process import BrokerProcess  # noqa: E402

BUILT = Path(__file__).resolve().parents[1] / "target" / "release" / "luna-broker"


@contextmanager
def broker_at(socket: str | None, scratch: str) -> Iterator[str]:
    """The address of a broker: `socket`, or that of `$LUNA_BROKER_BIN`, else of the one that was built here."""
    if socket:
        yield socket
        return
    with BrokerProcess(os.environ.get("LUNA_BROKER_BIN", BUILT), Path(scratch) / "example.sock") as broker:
        yield broker.address
