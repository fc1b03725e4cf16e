"""The steps of the check, cheapest first. What each says it found was printed by the program it ran."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import machine
import suites
from manifest import Manifest
from programs import Deadline, NotAvailable, python, results, run, with_libtorch

HERE = Path(__file__).resolve().parent
# Two processes that share memory, from plain copies to the whole product.
SANITIZED = [
    ("conformance", "device_cuda::ipc::both_sides_see_what_either_writes"),
    ("conformance", "device_cuda::vmm::both_sides_see_what_either_writes"),
    ("gpu_sharing", "ladder::the_same_gpu_is_shared_by_its_handle_and_ordered_by_events"),
    ("gpu_sharing", "order::many_rounds_of_fresh_data_are_all_right_by_events"),
    ("model_cuda", "memory_of_the_gpu_gives_the_same_bits_as_memory_of_the_host"),
]


# What a step needs at least: nothing; a driver, where the substitute will do; torch, on the CPU if need be; a GPU.
NOTHING, DRIVER, TORCH, GPU = "nothing", "driver", "torch", "gpu"


class Unfinished(Exception):
    """A step came to results and not to its end, or to bad ones."""

    def __init__(self, why: str, result: dict) -> None:
        super().__init__(why)
        self.result = result


@dataclass
class Bench:
    """What the steps have to work with."""

    manifest: Manifest
    folder: Path  # temporary
    real: bool  # on the machine's own driver, not on the substitute
    jobs: int
    missing: str | None = None  # why there is no GPU
    tell: Callable[[dict], None] = lambda _: None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.environment = with_libtorch()
        for one in self.manifest.artifacts:
            path = self.manifest.folder / one.path
            # Not every way of carrying files to another machine keeps this.
            if one.kind in ("program", "test", "bench") and path.is_file() and not os.access(path, os.X_OK):
                path.chmod(0o755)
        if self.real:
            self.environment["LUNA_BROKER_REAL_CUDA"] = "1"

    def test(self, name: str, part: str, deadline: Deadline, jobs: int = 1, **settings: str) -> dict:
        """The tests of a program whose names contain `part`."""
        program, environment = self.manifest.path(name), self.environment | settings
        tests = suites.names(program, part, Deadline(60, deadline), environment)
        if not self.real:
            # They are all played elsewhere on the substitute; here it is shown that they can be from this place.
            tests = tests[:2]
        return self._checked(suites.play(program, tests, deadline, environment, jobs, self.tell))

    def _checked(self, result: dict) -> dict:
        if not suites.is_good(result):
            bad = {name: count for name, count in result["counts"].items() if count and name != "passed"}
            raise Unfinished(
                ", ".join(f"{count} {name}" for name, count in bad.items()) or "nothing was tested", result
            )
        return result

    def torch(self, program: str, deadline: Deadline, *arguments: str, **settings: str) -> dict:
        """A program of this folder, with the wheel's package where one was collected."""
        paths = [str(HERE), *([str(self.site())] if self.site() else [])]
        paths += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        environment = dict(os.environ) | settings | {"PYTHONPATH": ":".join(paths), "PYTHONUNBUFFERED": "1"}
        broker = self.manifest.path("luna-broker")
        end = run([python(), HERE / program, "--broker", broker, *arguments], deadline, environment)
        found = by_table(results(end))
        first = next((part for part in found["parts"] if part.get("part") == "first"), {})
        if "error" in first:
            raise NotAvailable(f"torch tensors of this place do not pass: {first['error']}")
        if end.code != 0:
            raise Unfinished(end.outcome, found | {"said": end.tail()})
        return found

    def site(self) -> Path | None:
        wheels = [one for one in self.manifest.artifacts if one.kind == "wheel"]
        site = self.folder / "site"
        if wheels and not site.exists():
            # A wheel of this kind only has to be unpacked; pip may be missing.
            zipfile.ZipFile(self.manifest.path(wheels[0].name)).extractall(site)
        return site if wheels else None


def by_table(told: list[dict]) -> dict:
    """Rows under the names of their tables, and what belongs to none."""
    found: dict = {}
    for one in told:
        if "table" in one:
            found.setdefault(one["table"], []).append({key: one[key] for key in one if key != "table"})
    return found | {"parts": [one for one in told if "table" not in one]}


@dataclass(frozen=True)
class Step:
    name: str
    title: str
    limit_s: float
    play: Callable[[Bench, Deadline], dict]
    needs: str = GPU


def _programs(bench: Bench, deadline: Deadline) -> dict:
    """That what was built elsewhere starts here at all."""
    found: dict = {"damaged": bench.manifest.damaged()}
    broker = bench.manifest.path("luna-broker")
    end = run([broker, "--version"], Deadline(30, deadline), bench.environment)
    found["broker"] = end.tail(300)
    site = [f"import sys; sys.path.insert(0, {str(bench.site())!r})"] if bench.site() else []
    words = "; ".join([*site, "import luna_broker; print(luna_broker.__version__, luna_broker.__file__)"])
    imported = run([python(), "-c", words], Deadline(30, deadline))
    found["package"] = imported.tail(300)
    # Whatever it ends with: what it says is what is wanted, not whether all is well.
    found["doctor"] = run([broker, "doctor"], Deadline(60, deadline), bench.environment).tail(3000).splitlines()
    if found["damaged"] or end.code != 0 or imported.code != 0:
        raise Unfinished("not everything that was built starts here", found)
    return found


def _rules(bench: Bench, deadline: Deadline) -> dict:
    program = bench.manifest.path("cuda_rules")
    end = run([program, "the_driver_keeps_every_rule", "--exact", "--nocapture"], deadline, bench.environment)
    found = suites.replayed(end)
    if end.code != 0:
        raise Unfinished(end.outcome, found)
    if found["disagrees"]:
        raise Unfinished("this driver keeps other rules than the table says", found)
    return found


def _facts(part: str) -> Callable[[Bench, Deadline], dict]:
    return lambda bench, deadline: bench.test("gpu_facts", part, deadline)


def _suite(name: str, part: str = "") -> Callable[[Bench, Deadline], dict]:
    return lambda bench, deadline: bench.test(name, part, deadline, bench.jobs)


def _torch_plane(allocator: str) -> Callable[[Bench, Deadline], dict]:
    def play(bench: Bench, deadline: Deadline) -> dict:
        place = [] if bench.real else ["--place", "cpu", "--rounds", "5"]
        settings = {"PYTORCH_CUDA_ALLOC_CONF": f"backend:{allocator}", "PYTORCH_ALLOC_CONF": f"backend:{allocator}"}
        found = bench.torch("torch_plane.py", deadline, *place, **settings)
        used = found["parts"][0]["allocator"]
        if bench.real and used != allocator:
            raise Unfinished(f"torch used the allocator {used}", found)
        return found

    return play


def _hand_off(bench: Bench, deadline: Deadline) -> dict:
    place = [] if bench.real else ["--place", "cpu", "--rounds", "5"]
    return bench.torch("hand_off.py", deadline, *place)


def _gpu_memory(bench: Bench, deadline: Deadline) -> dict:
    return bench.torch("gpu_memory.py", deadline)


def _attached(bench: Bench, deadline: Deadline) -> dict:
    place = [] if bench.real else ["--place", "cpu"]
    return bench.torch("attached.py", deadline, *place)


def _sdxl(program: str, *arguments: str, **settings: str) -> Callable[[Bench, Deadline], dict]:
    def play(bench: Bench, deadline: Deadline) -> dict:
        # The first of them makes the weights, for all of them.
        words = ["--folder", str(bench.folder), *arguments]
        words += [] if bench.real else ["--place", "cpu", "--rounds", "3"]
        return bench.torch(program, deadline, *words, **settings)

    return play


def _sdxl_compile(bench: Bench, deadline: Deadline) -> dict:
    cold = str(bench.folder / "compiled")
    # Without a compiler nothing but the way there can be tried.
    backend = "inductor" if bench.real else "eager"
    settings = {"TORCHINDUCTOR_CACHE_DIR": cold, "TRITON_CACHE_DIR": cold}
    try:
        found = _sdxl("sdxl_compile.py", "--backend", backend, **settings)(bench, deadline)
    except Unfinished as error:
        if str(error) != "timed out":
            raise
        found = error.result | {"left_out": "what was not compiled when the time of the step was over"}
    if "torch.compile" not in found:
        # What it said is of interest all the same.
        bench.tell(found)
        told = [part["left_out"] for part in found["parts"] if "left_out" in part]
        raise NotAvailable(f"nothing was compiled: {told[0] if told else 'the time of the step was over'}")
    return found


def _broker_stress(bench: Bench, deadline: Deadline) -> dict:
    rounds = "1000" if bench.real else "5"
    test = "order::many_rounds_of_fresh_data_are_all_right_by_events"
    found = bench.test("gpu_sharing", test, deadline, LUNA_BROKER_ORDER_ROUNDS=rounds)
    return found | {"rounds": int(rounds)}


def _numerics(bench: Bench, deadline: Deadline) -> dict:
    # One after the other: some of them fill the GPU's memory.
    found = bench.test("model_cuda", "", deadline)
    # They are left out where the GPU cannot be opened, which elsewhere is as it should be.
    unopened = [one["why"][0] for one in found.get("skipped", []) if one["why"][0].startswith("skipped: ")]
    if unopened:
        raise Unfinished(f"models did not run on the GPU ({unopened[0]})", found)
    return found


def _remote_call(bench: Bench, deadline: Deadline) -> dict:
    broker = str(bench.manifest.path("luna-broker"))
    command = [bench.manifest.path("remote_call"), "20", *(["cuda"] if bench.real else [])]
    end = run(command, deadline, bench.environment | {"LUNA_BROKER_BIN": broker})
    found = {"printed": end.out.splitlines()}
    if end.code != 0:
        raise Unfinished(end.outcome, found | {"said": end.tail()})
    return found


def _sanitizer(bench: Bench, deadline: Deadline) -> dict:
    sanitizer = machine.sanitizer()
    if sanitizer is None:
        raise NotAvailable("compute-sanitizer is not on this machine")
    # Errors of calls are what some tests provoke; wrong accesses are what is looked for.
    options = ["--tool", "memcheck", "--target-processes", "all", "--report-api-errors", "no", "--error-exitcode", "99"]
    runs = []
    for program, test in SANITIZED:
        command = [sanitizer, *options, bench.manifest.path(program), test, "--exact", "--nocapture"]
        end = run(command, Deadline(60, deadline), bench.environment | {"LUNA_BROKER_ORDER_ROUNDS": "60"})
        told = [line for line in (end.out + end.errors).splitlines() if line.startswith("=========")]
        summaries = [found[1] for line in told if (found := re.search(r"ERROR SUMMARY: (.*)", line))]
        one = {"test": f"{program} {test}", "outcome": end.outcome, "seconds": end.seconds, "summaries": summaries}
        if end.outcome != "passed":
            one["said"] = "\n".join(told)[-1500:] or end.tail()
        runs.append(one)
        bench.tell({"runs": runs})
        if deadline.is_over():
            break
    found = {"program": str(sanitizer), "runs": runs}
    if any(one["outcome"] != "passed" or not one["summaries"] for one in runs) or len(runs) < len(SANITIZED):
        raise Unfinished("not every run ended without errors", found)
    return found


STEPS = [
    Step("programs", "What was built elsewhere starts here", 90, _programs, NOTHING),
    Step("access", "Memory opened for reading only", 30, _facts("access::"), DRIVER),
    Step("torch", "Torch tensors through the broker", 60, _torch_plane("native"), TORCH),
    Step("order", "Order of two processes, and its cost", 60, _facts("order::"), DRIVER),
    Step("conformance", "Device suite on this driver", 60, _suite("conformance", "device_cuda::"), DRIVER),
    Step("death", "kill -9 of owner and importer", 90, _facts("death::"), DRIVER),
    Step("opening", "Opening by size, memory of a process", 90, _facts("opening::"), DRIVER),
    Step("hand_off", "Hand-off latency", 60, _hand_off, TORCH),
    Step("broker_stress", "Order through the broker", 60, _broker_stress, DRIVER),
    Step("gpu_memory", "GPU memory of 1, 2, 4, 8 workers", 90, _gpu_memory),
    Step("attached", "Weights of 1, 2, 4, 8 workers, and their forward", 150, _attached, TORCH),
    Step("torch_async", "Torch tensors under cudaMallocAsync", 60, _torch_plane("cudaMallocAsync")),
    Step("sharing", "Probe and ladder of real sessions", 90, _suite("gpu_sharing"), DRIVER),
    Step("rules", "Rules of the driver, replayed", 150, _rules, DRIVER),
    Step("device", "Regions, fences and streams on this driver", 120, _suite("cuda_device"), DRIVER),
    Step("remote_call", "A decode through the broker and in-process", 60, _remote_call),
    Step("numerics", "VAE numerics against float32 on the CPU", 150, _numerics),
    Step("sdxl", "SDXL at 1024 x 1024: a forward beside eager PyTorch", 90, _sdxl("sdxl_forward.py")),
    Step("sdxl_workers", "SDXL at 1024 x 1024: workers in 32 GB", 180, _sdxl("sdxl_workers.py")),
    Step("sdxl_memory", "SDXL at 1024 x 1024: GPU memory by part", 60, _sdxl("sdxl_memory.py")),
    Step("sdxl_lora", "SDXL at 1024 x 1024: adapters and block cache", 75, _sdxl("sdxl_lora.py")),
    Step("sdxl_batches", "SDXL at 512 and 1024: requests together", 75, _sdxl("sdxl_batches.py")),
    Step("sdxl_compile", "SDXL at 1024 x 1024: torch.compile", 120, _sdxl_compile),
    Step("sanitizer", "compute-sanitizer memcheck", 150, _sanitizer),
]
