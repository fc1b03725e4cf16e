"""What a Python process is told about its way to a broker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import luna_broker
from conftest import DEADLINE_S

FIELDS = {"check", "verdict", "found", "remedy"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "luna_broker", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)


def named(findings: list[dict[str, str]], check: str) -> dict[str, str]:
    found = [finding for finding in findings if finding["check"] == check]
    assert len(found) == 1, f"{check!r} is not exactly one of {findings}"
    return found[0]


def test_a_broker_that_answers_is_told_with_how_tensors_cross(start_broker: Any) -> None:
    broker = start_broker()
    findings = luna_broker.doctor(broker.address)
    assert all(set(finding) == FIELDS for finding in findings)
    assert all(finding["verdict"] in {"ok", "note", "fail"} for finding in findings)
    assert broker.address in named(findings, "broker")["found"]
    assert named(findings, "this process -> cpu")["found"].startswith("shm: ")
    assert named(findings, "build")["verdict"] == "ok"


def test_a_broker_that_is_not_there_is_told_with_a_remedy(scratch: Path) -> None:
    broker = named(luna_broker.doctor(scratch / "none.sock"), "broker")
    assert broker["verdict"] == "fail"
    assert "luna-broker serve" in broker["remedy"]


def test_the_address_comes_from_the_environment_if_none_is_given(start_broker: Any, monkeypatch: Any) -> None:
    broker = start_broker()
    monkeypatch.setenv("LUNA_BROKER", broker.address)
    assert named(luna_broker.doctor(), "broker")["verdict"] == "ok"


def test_the_command_ends_with_0_and_prints_the_same_for_people_and_programs(start_broker: Any) -> None:
    broker = start_broker()
    text = run("--socket", broker.address)
    assert text.returncode == 0, text.stderr
    listed = run("--socket", broker.address, "--json")
    for finding in json.loads(listed.stdout):
        assert finding["check"] in text.stdout
        assert finding["remedy"] in text.stdout


def test_the_command_ends_with_3_where_no_broker_answers(scratch: Path) -> None:
    nobody = run("--socket", str(scratch / "none.sock"))
    assert nobody.returncode == 3
    assert "there is no socket at" in nobody.stdout
