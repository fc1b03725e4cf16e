"""A permit is a turn in the broker's lane: one process at a time, and nobody's for longer than its holder lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from conftest import DEADLINE_S, eventually

# One character written by the holder shows that it has the turn; the end of its input, that it may go.
HOLDER = """
import sys, luna_broker
client = luna_broker.connect(sys.argv[1])
with client.permit("vae", bytes=1000):
    print("held", flush=True)
    sys.stdin.read()
print("given back", flush=True)
sys.stdin.read()
"""

# Each adds one to a number in a file, reading and writing it in two steps, which only a turn makes one.
COUNTER = """
import sys, time, luna_broker
from pathlib import Path
client = luna_broker.connect(sys.argv[1])
count = Path(sys.argv[2])
for _ in range(50):
    with client.permit("vae"):
        value = int(count.read_text())
        time.sleep(0.001)
        count.write_text(str(value + 1))
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def lane(client: Any) -> dict[str, Any]:
    (vae,) = [lane for lane in client.status()["lanes"] if lane["service"] == "vae"]
    return vae


def test_a_permit_is_held_inside_its_block_alone(client: Any) -> None:
    permit = client.permit("vae", bytes=1000)
    assert lane(client)["permitted"] is None
    for _ in range(2):
        with permit as held:
            assert held is permit
            assert "held" in repr(permit)
            assert lane(client)["permitted"] is not None
        eventually(lambda: lane(client)["permitted"] is None, "the permit is given back")
    assert "not held" in repr(permit)


def test_a_permit_ends_with_an_exception(client: Any) -> None:
    with pytest.raises(ZeroDivisionError), client.permit("vae"):
        raise ZeroDivisionError
    with client.permit("vae", timeout=DEADLINE_S):
        pass


def test_processes_take_turns(broker: Any, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    workers = [start(COUNTER, broker.address, count) for _ in range(3)]
    for worker in workers:
        assert worker.wait(60) == 0
        worker.communicate()
    assert count.read_text() == "150"


def test_a_held_permit_keeps_others_waiting_and_decodes_too(start_broker: Any, constructed_vae: str) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client, start(HOLDER, broker.address) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(luna_broker.Timeout), client.permit("vae", timeout=0.3):
            pytest.fail("two have the turn")
        latent = torch.zeros(1, 4, 8, 8)
        with luna_broker.connect(broker.address, timeout=0.3) as hasty:
            vae = hasty.vae(constructed_vae)
            with pytest.raises(luna_broker.Timeout):
                vae.decode(latent)
        holder.stdin.close()
        with client.permit("vae", timeout=DEADLINE_S):
            pass
        client.vae(constructed_vae).decode(latent)
        holder.kill()


def test_a_permit_ends_with_its_process(start_broker: Any) -> None:
    broker = start_broker()
    with luna_broker.connect(broker.address) as client, start(HOLDER, broker.address) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        with client.permit("vae", timeout=DEADLINE_S):
            pass


def test_a_permit_ends_after_the_broker_s_patience(start_broker: Any) -> None:
    broker = start_broker("--permit-seconds", "1")
    with luna_broker.connect(broker.address) as client, start(HOLDER, broker.address) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with client.permit("vae", timeout=DEADLINE_S):
            pass
        holder.kill()


def test_a_permit_is_not_entered_twice(client: Any) -> None:
    permit = client.permit("vae")
    with permit, pytest.raises(luna_broker.InUse):
        permit.__enter__()


def test_permits_that_cannot_be_had_are_refused_at_once(client: Any) -> None:
    with pytest.raises(luna_broker.Unsupported, match="sampler"):
        client.permit("sampler")
    with pytest.raises(luna_broker.OutOfMemory), client.permit("vae", bytes=1 << 50):
        pytest.fail("more than one call may use")


def test_whose_weights_were_taken_gets_no_permit_before_taking_hold_anew(client: Any, constructed_vae: str) -> None:
    with client.attach(constructed_vae) as weights:
        client.unload(constructed_vae, force=True)
        with pytest.raises(luna_broker.Stale), client.permit("vae"):
            pytest.fail("the weights are no longer counted")
        weights.reattach()
        with client.permit("vae"):
            pass


def test_what_a_clients_check_raises_takes_a_waiting_call_back(broker: Any, client: Any) -> None:
    class Interrupted(Exception):
        pass

    stops = True

    def check() -> None:
        if stops and lane(client)["queued"]:
            raise Interrupted

    impatient = luna_broker.connect(broker.address, check=check)
    with client.permit("vae"):
        with pytest.raises(Interrupted), impatient.permit("vae", timeout=DEADLINE_S):
            pass
        stops = False
        eventually(lambda: lane(client)["queued"] == 0, "the request is taken back")
    # Nothing of it is left: the lane is free, and the client goes on.
    with impatient.permit("vae", timeout=DEADLINE_S):
        pass


def test_a_check_may_use_the_very_client_that_waits(broker: Any, client: Any) -> None:
    class Interrupted(Exception):
        pass

    waiting: list[Any] = []

    def check() -> None:
        if waiting and lane(waiting[0])["queued"]:
            raise Interrupted

    impatient = luna_broker.connect(broker.address, check=check)
    waiting.append(impatient)
    with client.permit("vae"), pytest.raises(Interrupted), impatient.permit("vae", timeout=DEADLINE_S):
        pass
