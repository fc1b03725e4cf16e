"""The Rust example `txt2img` as its users run it: once on the demo's small checkpoint, and once on none.

python tests/txt2img_program.py target/release/examples/txt2img
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "demo")]
from private_broker import broker_at  # noqa: E402
from small_checkpoint import write_checkpoint, write_lora  # noqa: E402

STEPS = 6
DEADLINE_S = 100


def main() -> None:
    program = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="luna-") as folder, broker_at(None, folder) as address:
        scratch = Path(folder)
        checkpoint = write_checkpoint(scratch / "small.safetensors")
        lora = write_lora(scratch / "ink.safetensors", 1)

        def paint(name: str, *more: str) -> subprocess.CompletedProcess[str]:
            command = [program, "--socket", address, "--prompt", "ink and glass", "--size", "96x64"]
            command += ["--steps", str(STEPS), "--out", scratch / name, *more]
            return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=DEADLINE_S)

        own = ["--checkpoint", str(checkpoint)]
        plain, plain_said = picture(scratch / "plain.png", paint("plain.png", *own))
        again, _ = picture(scratch / "again.png", paint("again.png", *own))
        more = ["--lora", f"{lora}:0.8", "--fb-cache", "1e9", "--sampler", "euler"]
        other, other_said = picture(scratch / "other.png", paint("other.png", *own, *more))
        assert plain_said.endswith(f"plain.png: {STEPS} steps, 0 left out"), plain_said
        assert other_said.endswith(f"other.png: {STEPS} steps, {STEPS - 1} left out"), other_said
        assert np.abs(plain - again).max() <= 1, "a seed makes one picture"
        assert np.abs(plain - other).mean() > 1, "adapters make another"
        failed = paint("none.png", "--checkpoint", str(scratch / "nothing.safetensors"))
        assert failed.returncode == 1 and "nothing.safetensors" in failed.stderr, failed
        assert not (scratch / "none.png").exists()
    print(f"{plain_said}; {other_said}")


def picture(path: Path, done: subprocess.CompletedProcess[str]) -> tuple[np.ndarray, str]:
    assert done.returncode == 0, done.stderr
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((96, 64), "RGB"), image
        pixels = np.asarray(image, dtype=np.int16)
    assert pixels.std() > 5, "it shows something"
    return pixels, done.stdout.strip()


if __name__ == "__main__":
    main()
