"""The check's own parts, on output as programs print it: what it says of a GPU must be what was printed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import elf
import main
import pytest
import report
import suites
from manifest import Artifact, Manifest, digest
from programs import Deadline, End, NotAvailable, results, run
from record import Record
from steps import Bench, Step, Unfinished

PASSED = "\nrunning 1 test\ntest part::rule ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored\n\n"


def soon() -> Deadline:
    return Deadline(20)


def test_versions_are_ordered_by_their_numbers():
    assert elf.newest("GLIBC", ["GLIBC_2.9", "GLIBC_2.34", "GLIBCXX_3.4.30", "GLIBC_PRIVATE"]) == "2.34"
    assert elf.newest("GLIBCXX", ["GLIBC_2.9"]) is None


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_needs_are_those_that_readelf_prints():
    program = Path(sys.executable).resolve()
    printed = subprocess.run(["readelf", "-VdW", program], capture_output=True, text=True, check=True).stdout
    needs = elf.needs(program.read_bytes())
    assert needs["libraries"] == re.findall(r"\(NEEDED\).*\[(.*)\]", printed)
    wanted = re.findall(r"Name: (GLIBC_[0-9.]+)", printed)
    assert wanted and needs["glibc"] == elf.newest("GLIBC", wanted)


def test_other_files_are_no_programs():
    with pytest.raises(ValueError, match="no 64-bit"):
        elf.needs(Path(__file__).read_bytes())


def test_a_program_that_takes_too_long_is_stopped_with_all_it_started(tmp_path: Path):
    script = f"echo begun; (sleep 2; touch {tmp_path}/late) & sleep 60"
    end = run(["bash", "-c", script], Deadline(0.5))
    assert (end.outcome, end.out) == ("timed out", "begun\n")
    assert end.seconds < 2
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_results_of_a_program_that_was_stopped_are_kept():
    end = End(None, 'noise\nRESULT {"part": "first", "wrong": 0}\nRESULT {"part', "", 1.0)
    assert results(end) == [{"part": "first", "wrong": 0}]


def test_facts_and_printed_lines_are_taken_and_the_harness_is_not():
    out = PASSED.replace("... ok", "... f16: 1.2e-03\nbf16: 3.0e-02\nok")
    said = suites.verdict("part::rule", End(0, out, 'FACT {"fact": "x", "found": {"us": 1.5}}\n', 0.1))
    assert said["outcome"] == "passed"
    assert said["facts"] == [{"fact": "x", "found": {"us": 1.5}}]
    assert said["printed"] == ["f16: 1.2e-03", "bf16: 3.0e-02"]


def test_what_was_skipped_is_not_counted_as_passed():
    done = [
        suites.verdict("a", End(0, PASSED, "skipped on a real driver: a fault is needed\n", 0.1)),
        suites.verdict("b", End(0, PASSED, "", 0.1)),
        suites.verdict("c", End(101, "running 1 test\n", "thread 'c' panicked: cuInit answers 999\n", 0.1)),
        suites.verdict("d", End(None, "", "", 60.0)),
        suites.verdict("e", End(0, "test result: ok. 0 passed; 0 failed\n", "", 0.1)),
    ]
    found = suites.total(done)
    assert found["counts"] == {"passed": 1, "failed": 2, "timed out": 1, "skipped": 1, "not run": 0}
    assert [one["test"] for one in found["not_passed"]] == ["c", "d", "e"]
    assert "cuInit answers 999" in found["not_passed"][0]["said"]
    assert found["skipped"] == [{"test": "a", "why": ["skipped on a real driver: a fault is needed"]}]
    assert not suites.is_good(found)
    assert suites.is_good(suites.total(done[:2]))
    assert not suites.is_good(suites.total(done[:1])), "nothing was shown"


def test_every_disagreement_is_kept_also_of_a_run_that_was_stopped():
    out = "test the_driver_keeps_every_rule ... AGREES a\nDISAGREES b: expected 1 X, got 2 Y\nAGREES c\n"
    found = suites.replayed(End(None, out, "", 150.0))
    assert (found["agrees"], found["disagrees"], found["ended"]) == (2, 1, "timed out")
    assert found["disagreements"] == ["b: expected 1 X, got 2 Y"]


def manifest(folder: Path) -> Manifest:
    return Manifest("c0ffee", False, {"torch": "2.11.0"}, {"bytes": 1}, 1, [], folder)


def test_a_manifest_is_read_as_it_was_written_and_knows_damage(tmp_path: Path):
    (tmp_path / "program").write_bytes(b"program")
    written = manifest(tmp_path)
    sha256 = digest(tmp_path / "program")
    written.artifacts.append(Artifact("program", "program", "program", 7, sha256, ["libc.so.6"], "2.34", None))
    written.write()
    read = Manifest.read(tmp_path)
    assert read.artifacts == written.artifacts
    assert read.path("program").read_bytes() == b"program"
    assert read.damaged() == []
    (tmp_path / "program").write_bytes(b"another")
    assert read.damaged() == ["program"]
    with pytest.raises(FileNotFoundError):
        read.path("other")


def played(tmp_path: Path, *plays, missing: str | None = None, limit: float = 20) -> list[dict]:
    record = Record(tmp_path, "test", {"commit": "c0ffee"})
    bench = Bench(manifest(tmp_path), tmp_path, True, 1, missing)
    deadline = Deadline(limit)
    for at, play in enumerate(plays):
        main.play(Step(f"s{at}", f"Step {at}", 5, play, "driver"), bench, record, deadline)
    return json.loads(record.files[0].read_text())["steps"]


def broken(_bench: Bench, _deadline: Deadline) -> dict:
    raise RuntimeError("the step itself is broken")


def unfinished(bench: Bench, _deadline: Deadline) -> dict:
    bench.tell({"so far": 1})
    raise Unfinished("timed out", {"so far": 2})


def unavailable(_bench: Bench, _deadline: Deadline) -> dict:
    raise NotAvailable("not on this machine")


def good(_bench: Bench, _deadline: Deadline) -> dict:
    return {"figure": 7}


def test_a_step_that_fails_does_not_keep_the_next_from_being_played(tmp_path: Path):
    steps = played(tmp_path, broken, unfinished, unavailable, good)
    assert [step["outcome"] for step in steps] == ["failed", "failed", "not available", "passed"]
    assert "the step itself is broken" in steps[0]["why"]
    assert steps[1]["result"] == {"so far": 2}
    assert steps[3]["result"] == {"figure": 7}


def test_results_are_on_disk_while_a_step_is_under_way(tmp_path: Path):
    def looks(bench: Bench, _deadline: Deadline) -> dict:
        bench.tell({"figure": 1})
        (step,) = json.loads((tmp_path / "gpu-test.json").read_text())["steps"]
        assert (step["outcome"], step["result"]) == ("begun", {"figure": 1})
        assert "figure: 1" in (tmp_path / "gpu-test.md").read_text()
        return {"figure": 2}

    assert played(tmp_path, looks)[0]["outcome"] == "passed"


def test_without_a_driver_steps_say_so_and_claim_nothing(tmp_path: Path):
    (step,) = played(tmp_path, good, missing="there is no libcuda")
    assert (step["outcome"], step["why"]) == ("not available", "no driver: there is no libcuda")
    assert "result" not in step


def test_steps_beyond_the_time_are_not_run(tmp_path: Path):
    (step,) = played(tmp_path, good, limit=0)
    assert step["outcome"] == "not run"


def test_facts_of_one_kind_stand_together():
    tests = [{"test": name, "outcome": "passed", "facts": [{"fact": "x", "found": {"by": name}}]} for name in "ba"]
    assert suites.total(tests)["facts"] == {"x": [{"by": "a"}, {"by": "b"}]}


def test_processes_that_share_a_context_are_tested_one_at_a_time():
    apart = {"mps": {"running": False}, "nvidia_smi": [{"compute_mode": "Default"}]}
    assert main.jobs(4, apart) == 4
    assert main.jobs(4, apart | {"mps": {"running": True}}) == 1
    assert main.jobs(4, apart | {"nvidia_smi": [{"compute_mode": "Exclusive_Process"}]}) == 1


def test_the_page_shows_tables_of_like_things_and_escapes_their_cells():
    facts = {"opening": [{"by": "a|b", "median": {"us": 1.5}}, {"by": "c", "median": {"us": 2}}]}
    found = {"counts": {"passed": 2, "failed": 0}, "facts": facts}
    steps = [{"name": "s", "title": "A step", "outcome": "passed", "seconds": 1.0, "result": found}]
    page = report.page({"name": "x", "commit": "c0ffee", "steps": steps})
    assert "- 2 passed\n" in page
    assert "facts, opening:" in page
    assert "| by | median, us |" in page
    assert "| a\\|b | 1.5 |" in page
    assert "| A step | passed | 1.0 |" in page
