"""Tests which records services log."""

import io
import logging

import pytest

from overfill.telemetry import logs


@pytest.fixture
def stream():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = []
    stream = io.StringIO()
    logs.configure("info", "text", logging.StreamHandler(stream))
    yield stream
    root.handlers[:], root.level = before


def test_a_client_that_leaves_while_its_status_is_sent_leaves_no_traceback(stream):
    grpcs = logging.getLogger("grpc._cython.cygrpc")
    grpcs.error("ExecuteBatchError raised in core by servicer method [/overfill.v1.Decode/Run]")
    grpcs.error("Unexpected [ValueError] raised by servicer method [/overfill.v1.Decode/Run]")
    assert "ExecuteBatchError" not in stream.getvalue()
    assert "Unexpected [ValueError]" in stream.getvalue()
