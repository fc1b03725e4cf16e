"""Errors that begin on this side, in the form in which the compiled client raises its own."""

from __future__ import annotations

from ._native import LunaBrokerError


def refusal(kind: type[LunaBrokerError], message: str, remedy: str) -> LunaBrokerError:
    """An error of `kind` that says what happened and what to do about it."""
    error = kind(f"{message} — {remedy}")
    vars(error).update(kind=kind.__name__, remedy=remedy)
    return error
