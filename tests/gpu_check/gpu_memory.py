"""GPU memory that workers take: with torch alone, and with a broker whose image each holds."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from hand_offs import MODEL, arguments, latent, said
from programs import Broker, python, tell

COUNTS = (1, 2, 4, 8)


def work(kind: str, socket: str) -> None:
    """A worker: says when it has what it wants, and stays until its input ends."""
    kept: list = [torch.zeros(1, device="cuda")]
    try:
        if kind == "luna":
            import luna_broker

            kept.append(luna_broker.connect(socket, timeout=30).vae(MODEL).decode(latent("cuda")))
        torch.cuda.synchronize()
        print("ready", flush=True)
    except Exception as error:
        print(said(error), flush=True)
    sys.stdin.read()


def start(kind: str, socket: str, broker: str) -> subprocess.Popen:
    command = [python(), __file__, "--broker", broker, "--worker", kind, "--socket", socket]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def free() -> int:
    return torch.cuda.mem_get_info()[0]


def grow(kind: str, socket: str, broker: str) -> bool:
    """More and more workers, all alive at once."""
    workers: list[subprocess.Popen] = []
    before = free()
    try:
        for count in COUNTS:
            new = [start(kind, socket, broker) for _ in range(count - len(workers))]
            workers += new
            words = {worker.stdout.readline().strip() for worker in new}
            if words != {"ready"}:
                tell(workers=kind, error=", ".join(sorted(words - {"ready"})))
                return False
            tell(workers=kind, count=count, bytes=before - free())
        return True
    finally:
        for worker in workers:
            worker.stdin.close()
        for worker in workers:
            worker.wait()


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--worker", choices=["bare", "luna"])
    parser.add_argument("--socket", default="")
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker, chosen.socket)
        return 0
    # This process's own context counts neither before nor after.
    torch.zeros(1, device="cuda")
    before = free()
    with tempfile.TemporaryDirectory() as folder, Broker(chosen.broker, Path(folder), "--device", "cuda") as broker:
        tell(of="the broker before its first client", bytes=before - free())
        good = grow("bare", broker.socket, chosen.broker)
        good &= grow("luna", broker.socket, chosen.broker)
        tell(of="the broker after its last client", bytes=before - free())
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
