"""Four worker processes, one broker: a picture through one VAE, four painted by one UNet, and what that saves.

    python examples/demo/main.py --broker target/release/luna-broker

Ends with 0 only if all four workers got the same picture, bit for bit, it looks like the picture
that went in, and what they painted with adapters of their own differs.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import constructed
import footprint
import numpy as np
import paintings
import pictures
from broker_process import BrokerFailed, BrokerProcess
from crew import Crew, WorkerFailed
from full_size_vae import write_full_size_vae

WORKERS = 4
REPETITIONS = 3
LEAST_PSNR_DB = 18.0
# As large as the contact sheet shows it; keeps the run short on two cores.
LONGEST_SIDE_PX = 256
# The constructed model keeps one colour per 8 x 8 pixels: of a larger picture that is more.
LONGEST_SIDE_CONSTRUCTED_PX = 320
TABLE_COLUMNS = 100

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

Reply = dict[str, Any]
STARTED = time.monotonic()


def main() -> int:
    arguments = _arguments()
    # A terminated demo takes the same way out as an interrupted one: through the clean-up.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="luna-") as scratch:
            return _run(arguments, Path(scratch))
    except KeyboardInterrupt:
        print("interrupted; broker and workers are stopped", file=sys.stderr)
        return 130
    except (BrokerFailed, WorkerFailed, OSError, ValueError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", required=True, help="the luna-broker binary")
    parser.add_argument("--vae", help="a VAE checkpoint (safetensors)")
    parser.add_argument("--image", help="a picture (PNG or JPEG)")
    parser.add_argument("--out", default="demo-out", help="where the contact sheet goes")
    return parser.parse_args()


def _run(arguments: argparse.Namespace, scratch: Path) -> int:
    vae = _vae_at_hand(arguments.vae)
    side_px = LONGEST_SIDE_PX if vae else LONGEST_SIDE_CONSTRUCTED_PX
    if vae is None:
        _say("VAE: no checkpoint at hand; constructing one that averages blocks of 8 x 8 pixels")
        vae = constructed.write_checkpoint(scratch / "constructed.safetensors")
    picture = _picture(arguments.image, side_px)
    outputs = _same_picture_everywhere(arguments.broker, vae, picture, scratch)
    verdicts = _verdicts(picture, outputs)
    painted = paintings.paint(arguments.broker, scratch, _say)
    print(f"\n{paintings.table(painted)}\n")
    verdicts.extend(painted.verdicts())
    sheet = Path(arguments.out) / "contact-sheet.png"
    pictures.write_contact_sheet(sheet, [_decoded_tiles(picture, outputs), painted.tiles])
    _say(f"wrote {sheet}")
    _compare_memory(arguments.broker, scratch)
    print()
    for holds, sentence in verdicts:
        print(f"{'ok    ' if holds else 'FAILED'} {sentence}")
    return 0 if all(holds for holds, _ in verdicts) else 1


def _vae_at_hand(named: str | None) -> Path | None:
    if named:
        path = Path(named).resolve()
        if not path.is_file():
            raise ValueError(f"--vae: {path} is not a file")
        _say(f"VAE: {path}")
        return path
    trained = SHARED_DATA / "taef2.safetensors"
    if trained.is_file():
        _say(f"VAE: {trained.name}, trained")
        return trained
    return None


def _picture(named: str | None, side_px: int) -> np.ndarray:
    path = Path(named) if named else SHARED_DATA / "photo.png"
    if named or path.is_file():
        image = pictures.read(path, side_px)
        _say(f"picture: {path.name}, {image.shape[1]} x {image.shape[0]} after scaling")
        return image
    _say(f"picture: no file at hand; drawing one, {side_px} x {side_px}")
    return constructed.picture(side_px)


def _same_picture_everywhere(binary: str, vae: Path, picture: np.ndarray, scratch: Path) -> dict[str, np.ndarray]:
    """Runs the round trips in all workers at once; the decoded picture of each worker."""
    image_file = scratch / "picture.npy"
    np.save(image_file, picture)
    with contextlib.ExitStack() as cleanup:
        _say("starting a broker")
        options = ["--device", "cpu", "--vae", str(vae)]
        broker = cleanup.enter_context(BrokerProcess(binary, scratch / "demo.sock", options))
        _say(f"starting {WORKERS} worker processes")
        crew = cleanup.enter_context(Crew(WORKERS))
        crew.wait_until_ready()
        sessions = crew.order("connect", lambda name: {"address": broker.address, "name": name})
        _say(f"all connected; each encodes and decodes the picture {REPETITIONS} times")
        results = crew.order(
            "round_trips",
            lambda name: {
                "vae": str(vae),
                "image": str(image_file),
                "output": str(scratch / f"{name}.npy"),
                "repetitions": REPETITIONS,
            },
        )
        names = crew.names
    _print_calls(names, sessions, results)
    return {name: np.load(scratch / f"{name}.npy") for name in names}


def _print_calls(names: Sequence[str], sessions: list[Reply], results: list[Reply]) -> None:
    print()
    print(
        f"{'worker':<10}{'rung':<10}"
        f"{'encode p50':>12}{'(waiting)':>12}{'decode p50':>12}{'(waiting)':>12}"
        f"{'copied in':>14}{'copied out':>14}"
    )
    for name, session, result in zip(names, sessions, results, strict=True):
        encode, decode = result["calls"]["encode"], result["calls"]["decode"]
        copied_in = sum(call["copied_in"] for call in encode + decode)
        copied_out = sum(call["copied_out"] for call in encode + decode)
        print(
            f"{name:<10}{session['rung']:<10}"
            f"{_p50_ms(encode, 'took_s'):>12}{_p50_ms(encode, 'queued_s'):>12}"
            f"{_p50_ms(decode, 'took_s'):>12}{_p50_ms(decode, 'queued_s'):>12}"
            f"{copied_in:>12,} B{copied_out:>12,} B"
        )
    for rung, reason in sorted({(session["rung"], session["reason"]) for session in sessions}):
        print(textwrap.fill(f"why {rung}: {reason}", TABLE_COLUMNS, subsequent_indent="    "))
    print(
        textwrap.fill(
            "waiting: for the other workers' calls, which the broker runs one at a time. "
            "copied: bytes that a worker copied to get tensors across, over all its calls.",
            TABLE_COLUMNS,
        )
    )
    print()


def _p50_ms(calls: list[Reply], key: str) -> str:
    return f"{statistics.median(call[key] for call in calls) * 1000:.1f} ms"


def _verdicts(picture: np.ndarray, outputs: dict[str, np.ndarray]) -> list[tuple[bool, str]]:
    decoded = list(outputs.values())
    equal = all(other.tobytes() == decoded[0].tobytes() for other in decoded[1:])
    similar = pictures.psnr_db(decoded[0], picture)
    relation = "equal, bit for bit" if equal else "NOT equal to each other"
    return [
        (equal, f"the pictures of all {len(decoded)} workers are {relation}"),
        (
            similar >= LEAST_PSNR_DB,
            f"PSNR against the input is {similar:.1f} dB; at least {LEAST_PSNR_DB:.0f} dB is asked",
        ),
    ]


def _decoded_tiles(picture: np.ndarray, outputs: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    tiles = [("input", picture)]
    for name, image in outputs.items():
        tiles.append((f"{name}: {pictures.psnr_db(image, picture):.1f} dB", image))
    return tiles


def _compare_memory(binary: str, scratch: Path) -> None:
    if not footprint.can_measure():
        _say("memory table skipped: this system has no /proc/PID/smaps_rollup (Linux has)")
        return
    with contextlib.ExitStack() as cleanup:
        alone = cleanup.enter_context(Crew(WORKERS))
        _say("writing a VAE of SDXL's size with random weights")
        vae = scratch / "full-size.safetensors"
        weight_bytes = write_full_size_vae(vae)
        _say(f"{WORKERS} workers load its {weight_bytes / footprint.MEGABYTE:.0f} MB themselves")
        alone.wait_until_ready()
        by_themselves = footprint.measure_alone(alone, vae)
    with contextlib.ExitStack() as cleanup:
        _say(f"{WORKERS} workers share one copy in a fresh broker")
        options = ["--device", "cpu"]
        broker = cleanup.enter_context(BrokerProcess(binary, scratch / "memory.sock", options))
        sharing = cleanup.enter_context(Crew(WORKERS))
        sharing.wait_until_ready()
        together = footprint.measure_shared(sharing, broker, vae)
    print()
    print(f"memory of {WORKERS} workers with this VAE (sum of PSS over all processes)")
    print(footprint.table([by_themselves, together], weight_bytes))


def _say(sentence: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.1f} s] {sentence}", flush=True)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
