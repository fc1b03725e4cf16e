"""Nothing that a forward does writes to attached weights: with their pages made read only, a writer dies of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import text_encoder, unet
from safetensors.torch import save_file

PROGRAM = """
import ctypes, mmap, sys
import torch, luna_broker
from luna_broker.torch import load_attached, skeleton
sys.path.insert(0, {here!r})
from modules import run_text_encoder, run_unet, text_encoder, unet

build, run = {{"unet": (unet, run_unet), "text": (text_encoder, run_text_encoder)}}[{model!r}]
client = luna_broker.connect({socket!r})
with skeleton():
    module = build()
weights = load_attached(module, client.attach({path!r}))
start, end = weights._attached.span
end = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
refused = libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.PROT_READ)
assert not refused, ctypes.get_errno()
print("read only", flush=True)
run(module)
if {writes!r}:
    next(module.parameters()).data.mul_(2)
print("done", flush=True)
"""


@pytest.fixture(params=["unet", "text"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def saved(model: str, tmp_path: Path) -> Path:
    torch.manual_seed(5)
    module = {"unet": unet, "text": text_encoder}[model]()
    path = tmp_path / "model.safetensors"
    save_file(module.state_dict(), path)
    return path


@pytest.mark.parametrize("writes", [False, True])
def test_a_forward_writes_to_no_attached_weight(broker: Any, saved: Path, model: str, writes: bool) -> None:
    here = str(Path(__file__).parent)
    program = PROGRAM.format(here=here, model=model, socket=str(broker.socket), path=str(saved), writes=writes)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    said = ended.stdout.split("\n")
    assert said[0] == "read only", ended.stderr
    # Where a write is provoked it is found: the pages are what this test says they are.
    assert ended.returncode == (-signal.SIGSEGV if writes else 0), ended.stderr
