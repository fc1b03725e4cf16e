"""The nodes with a real ComfyUI are tested by a command of their own; this says so where that is not set up."""

from __future__ import annotations

import os

import pytest


def test_nodes_in_a_real_comfyui_are_tested_by_make_test_comfyui():
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip(
            "the nodes were not tried in ComfyUI itself: set COMFYUI_PATH to a checkout of ComfyUI 0.3.64, "
            "COMFYUI_PYTHON to a Python that has its requirements, and run `make test-comfyui`"
        )
