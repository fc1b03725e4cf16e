"""Builds what `make gpu-check` needs on a machine that has a GPU but no Rust and no network.

python tests/gpu_check/artifacts.py --out target/gpu-artifacts
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import elf
from manifest import NAME, Artifact, Manifest, digest

ROOT = Path(__file__).resolve().parents[2]
FEATURES = "torch,cli"
TESTS = ["conformance", "cuda_rules", "cuda_device", "gpu_sharing", "gpu_facts", "model_cuda"]
BENCHES = ["remote_call"]
BROKER = "luna-broker"
# So that the collected programs can be tried where there is no GPU.
SUBSTITUTE = "libluna_substitute_cuda.so"
# Together with the tracked files: what the machine with the GPU takes.
BAR_BYTES = 60_000_000


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument(
        "--in-place", action="store_true", help="only note where the builds are; copy and strip none"
    )
    chosen = arguments.parse_args()
    built = build([] if chosen.in_place else BENCHES)
    chosen.out.mkdir(parents=True, exist_ok=True)
    # What an earlier run put there and this one does not would travel too.
    for old in chosen.out.iterdir():
        old.unlink()
    copy = keep if chosen.in_place else strip
    # By our names: cargo's own end in a hash, which the manifest's readers have no use for.
    copied = [(name, kind, copy(path, chosen.out / name)) for name, kind, path in sorted(built.programs)]
    found = [describe(name, kind, path, chosen.out) for name, kind, path in copied]
    if not chosen.in_place:
        wheel = build_wheel(chosen.out)
        found.append(describe(wheel.name, "wheel", wheel, chosen.out))
    manifest = Manifest(
        commit=git("rev-parse", "HEAD"),
        changed=bool(git("status", "--porcelain")),
        versions=versions(),
        shim=built.shim,
        tracked_bytes=sum(path.stat().st_size for path in tracked()),
        artifacts=found,
        folder=chosen.out,
    )
    manifest.write()
    return show(manifest, is_collected=not chosen.in_place)


class Built:
    def __init__(self) -> None:
        self.programs: list[tuple[str, str, Path]] = []
        self.shim: dict = {"embedded_in": BROKER, "bytes": 0}


def build(benches: list[str]) -> Built:
    """Cargo's own account of what it made, so that no file of an earlier build is taken for it."""
    built = Built()
    wanted = [argument for test in TESTS for argument in ("--test", test)]
    for message in cargo("test", "--no-run", *wanted):
        note(built, message, dict.fromkeys(TESTS, "test"))
    for message in cargo("build", "--bin", BROKER):
        note(built, message, {BROKER: "program"})
    for bench in benches:
        for message in cargo("bench", "--no-run", "--bench", bench):
            note(built, message, {bench: "bench"})
    missing = {*TESTS, *benches, BROKER} - {name for name, _, _ in built.programs}
    if missing:
        sys.exit(f"cargo built no {', '.join(sorted(missing))}")
    tests = next(path.parent for name, _, path in built.programs if name == TESTS[0])
    built.programs.append((SUBSTITUTE, "library", tests / SUBSTITUTE))
    return built


def note(built: Built, message: dict, wanted: dict[str, str]) -> None:
    if message["reason"] == "build-script-executed" and f"{os.sep}luna-broker-" in message.get("out_dir", ""):
        shim = Path(message["out_dir"]) / "torch_shim.so"
        built.shim["bytes"] = shim.stat().st_size if shim.is_file() else 0
    if message["reason"] != "compiler-artifact" or not message.get("executable"):
        return
    name, kinds = message["target"]["name"], message["target"]["kind"]
    kind = {"bin": "program"}.get(kinds[0], kinds[0])
    # The binary's own unit tests go by its name too.
    if wanted.get(name) == kind and not (kind == "program" and message["profile"]["test"]):
        built.programs.append((name, kind, Path(message["executable"])))


def cargo(command: str, *arguments: str):
    profile = [] if command == "bench" else ["--release"]
    words = ["cargo", command, "--features", FEATURES, "--message-format", "json", *profile, *arguments]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)} failed")
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def strip(path: Path, target: Path) -> Path:
    subprocess.run(["strip", "-o", target, path], check=True)
    return target


def keep(path: Path, _target: Path) -> Path:
    return path


def build_wheel(out: Path) -> Path:
    command = ["maturin", "build", "--profile", "wheel", "--strip", "--out", str(out.resolve())]
    subprocess.run(command, cwd=ROOT / "python", check=True)
    (wheel,) = out.glob("luna_broker-*.whl")
    return wheel


def describe(name: str, kind: str, path: Path, out: Path) -> Artifact:
    needs = elf.needs(extension(path) if kind == "wheel" else path.read_bytes())
    shown = path.name if path.parent == out else str(path)
    return Artifact(name, kind, shown, path.stat().st_size, digest(path), **needs)


def extension(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".so")]
        return files.read(name)


def versions() -> dict[str, str]:
    rust = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "glibc_here": platform.libc_ver()[1],
        "rustc": rust,
    }


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def tracked() -> list[Path]:
    names = git("ls-files", "-z").split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def show(manifest: Manifest, is_collected: bool) -> int:
    for artifact in manifest.artifacts:
        print(f"{artifact.bytes / 1e6:8.2f} MB  {artifact.kind:8} {artifact.name}")
    shim = manifest.shim["bytes"]
    print(f"{shim / 1e6:8.2f} MB  shim for torch's CUDA half, inside each binary that needs it")
    collected = sum(artifact.bytes for artifact in manifest.artifacts)
    total = collected + manifest.tracked_bytes
    print(f"{collected / 1e6:8.2f} MB  artefacts, and {manifest.tracked_bytes / 1e6:.2f} MB of tracked files")
    print(f"{total / 1e6:8.2f} MB  in all; the bar is {BAR_BYTES / 1e6:.0f} MB")
    for name in ("glibc", "glibcxx"):
        wanted = [(getattr(one, name), one.name) for one in manifest.artifacts if getattr(one, name)]
        version, by = max(wanted, key=lambda pair: elf.order(pair[0]))
        print(f"newest symbol version needed: {name.upper()}_{version}, by {by}")
    print(f"{manifest.folder / NAME} is for commit {manifest.commit}{' and changed files' if manifest.changed else ''}")
    # Builds that are only noted where they are may be larger, and need no GPU.
    faults = [
        (total > BAR_BYTES, "it is too large"),
        (
            shim == 0,
            "the shim is empty, so that no model would run on a GPU: python/requirements/run.txt has the headers",
        ),
    ]
    found = [fault for is_so, fault in faults if is_so and is_collected]
    for fault in found:
        print(f"cannot be used: {fault}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
