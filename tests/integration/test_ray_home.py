"""Tests that Ray starts where the home folder cannot be written, as in many containers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from overfill.stack.ray.connection import RayConnection, RayUnavailable

CODE = """
from overfill.stack.ray.connection import RayConnection
RayConnection.start_local(1, show_logs=False).close()
"""


def test_ray_starts_without_a_home_folder_that_can_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(file / "home")
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


def test_an_error_of_the_system_says_what_to_do(monkeypatch):
    def full(**arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("overfill.stack.ray.connection._init", full)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "restored after the test")
    with pytest.raises(RayUnavailable, match=r"No space left on device; .*--no-ray"):
        RayConnection.start_local(1, show_logs=False)
