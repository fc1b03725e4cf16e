"""What a broker does, in the few facts that people look at: for the sidebar and for the node Broker Status.

Reads what `Client.status` gives; knows neither ComfyUI nor brokers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Status = Mapping[str, Any]

REASONS = {
    "same_process": "client and broker share a process",
    "sealed_memory_probed": "sealed memory passed the probe",
    "named_segment_probed": "a named segment passed the probe",
    "forced": "forced by the client",
    "probe_failed": "shared memory failed the probe",
    "no_shared_memory": "the connection carries no shared memory",
    "gpu_memory_probed": "GPU memory passed the probe",
    "no_shared_gpu": "no GPU memory is shared",
    "failed": "better rungs failed",
}

UNITS = ("B", "KB", "MB", "GB", "TB")


def overview(status: Status, own: str = "") -> dict[str, Any]:
    """The facts about one broker, fit for JSON. `own`: name of this process's session, if it has one."""
    models = [_model(model) for model in status["models"] if model["loaded"] or model["registered_by"] is not None]
    weights = [_weights(weights) for weights in status["weights"]]
    return {
        "version": status["version"],
        "address": status["address"],
        "pid": status["pid"],
        "uptime_s": status["uptime_s"],
        "requests": status["requests"],
        "faults": status["faults"],
        "sessions_lost": status["sessions_lost"],
        "bytes": sum(held["bytes"] for held in models + weights if held["is_the_brokers"]),
        "saved_bytes": sum(held["saved_bytes"] for held in models + weights),
        "models": models,
        "weights": weights,
        "lanes": [_lane(lane, status["sessions"]) for lane in status["lanes"]],
        "sessions": [_session(session, own) for session in status["sessions"]],
    }


def as_text(brokers: Sequence[Mapping[str, Any]]) -> str:
    """Overviews as lines for people."""
    return "\n\n".join("\n".join(_lines(broker)) for broker in brokers)


def summary(brokers: Sequence[Mapping[str, Any]]) -> str:
    """Overviews as a line for each broker."""
    lines = []
    for broker in brokers:
        waiting = sum(lane["queued"] for lane in broker["lanes"])
        lines.append(f"{size(broker['bytes'])} held once, {size(broker['saved_bytes'])} saved, {waiting} waiting")
    return "\n".join(lines)


def size(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def reason(told: str | Mapping[str, Any]) -> str:
    """Why a rung is in use, as a sentence: a name, or one with the particulars behind it."""
    if isinstance(told, str):
        return REASONS.get(told, told)
    (name, particulars), *_ = told.items()
    if isinstance(particulars, str):
        details = particulars
    else:
        details = ", ".join(f"{failure['rung']} ({failure['code']}: {failure['detail']})" for failure in particulars)
    return f"{REASONS.get(name, name)}: {details}"


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    is_the_brokers = model["registered_by"] is None
    return {
        "name": model["name"],
        "service": model["service"],
        "family": model["family"],
        "bytes": model["bytes"],
        # What the sessions behind the first would take with a copy each.
        "saved_bytes": model["bytes"] * max(model["users"] - 1, 0) if is_the_brokers else 0,
        "device": model["device"],
        "users": model["users"],
        "is_the_brokers": is_the_brokers,
    }


def _weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": next(iter(weights["names"]), weights["path"]),
        "bytes": weights["bytes"],
        "saved_bytes": weights["saved_bytes"],
        "device": weights["device"],
        "types": [name for name, _ in weights["dtypes"]],
        "state": weights["state"],
        "holders": [holder["name"] for holder in weights["holders"]],
        "diverged_bytes": sum(holder["diverged_bytes"] or 0 for holder in weights["holders"]),
        "is_the_brokers": True,
    }


def _lane(lane: Mapping[str, Any], sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    holder = next((session["name"] for session in sessions if session["id"] == lane["permitted"]), None)
    facts = ("service", "device", "queued", "capacity", "busy", "completed", "batches")
    return {**{fact: lane[fact] for fact in facts}, "permitted": holder}


def _session(session: Mapping[str, Any], own: str) -> dict[str, Any]:
    return {
        "name": session["name"],
        "pid": session["pid"],
        "is_own": session["name"] == own,
        "leased_bytes": session["leased_bytes"],
        "requests": session["requests"],
        "rungs": [
            {"device": rung["device"], "rung": rung["rung"], "reason": reason(rung["reason"])}
            for rung in session["rungs"]
        ],
    }


def _lines(broker: Mapping[str, Any]) -> list[str]:
    lines = [
        f"luna-broker {broker['version']} at {broker['address']}, up {broker['uptime_s']:.0f} s",
        f"memory: {size(broker['bytes'])} held once, {size(broker['saved_bytes'])} saved",
        f"requests: {broker['requests']}, {broker['faults']} of them failed; {broker['sessions_lost']} sessions lost",
    ]
    for lane in broker["lanes"]:
        running = f"held by {lane['permitted']}" if lane["permitted"] else "running" if lane["busy"] else "idle"
        lines.append(
            f"{lane['service']} on {lane['device']}: {running}, {lane['queued']} of {lane['capacity']} waiting,"
            f" {lane['completed']} done"
        )
    for model in broker["models"]:
        whose = f"used by {model['users']}" if model["is_the_brokers"] else "a worker's own"
        lines.append(f"model {model['name']}: {size(model['bytes'])} on {model['device']}, {whose}")
    for weights in broker["weights"]:
        by = ", ".join(weights["holders"]) or "nobody"
        lines.append(f"weights {weights['name']}: {size(weights['bytes'])} on {weights['device']}, attached by {by}")
    for session in broker["sessions"]:
        ways = "; ".join(f"{rung['device']} by {rung['rung']}, {rung['reason']}" for rung in session["rungs"])
        mark = " (this ComfyUI)" if session["is_own"] else ""
        lines.append(f"session {session['name']}{mark}: {ways}")
    return lines
