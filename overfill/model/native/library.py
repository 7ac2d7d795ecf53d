"""Declares the native library's functions and structures for ctypes, and says whether this machine can run them.

The structures mirror those of ``model.h`` and ``sampling.h``. This module does not interpret their pointers.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from overfill.process.compiled import CannotBuild, compiled_library

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "overfill.cpp"
FLAGS = (
    *("-mfma", "-mf16c", "-mbmi2"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16"),
)
_NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni", "avx512_bf16")

Hook = ctypes.CFUNCTYPE(c_int, c_int64, c_int64)
"""Called with (layer, 0) before a layer and (layer, 1) once its keys and values are in the cache.

A result other than 0 aborts the step.
"""

NO_HOOK = Hook()


class Shape(Structure):
    """The struct ``OvfShape``."""

    _fields_ = [
        *((name, c_int64) for name in ("vocab", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("max_positions", "head_tokens", "tail_rank", "quantised", "amx")),
        ("norm_eps", c_double),
    ]


class Batch(Structure):
    """The struct ``OvfBatch``."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "sequences", "tables", "table_width", "num_logits", "block_size")),
        *((name, c_int64) for name in ("slots_in_cache", "threads")),
        *((name, c_void_p) for name in ("token_ids", "positions", "slots", "query_lens", "context_lens")),
        *((name, c_void_p) for name in ("block_tables", "table_rows", "logits_indices", "adapters")),
        *((name, c_void_p) for name in ("k_cache", "v_cache", "k_scales", "v_scales", "logits", "best")),
    ]


class Draws(Structure):
    """The struct ``OvfDraws``."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "vocab", "threads")),
        *((name, c_void_p) for name in ("logits", "temperatures", "top_p", "min_p", "top_k", "seeds")),
        *((name, c_void_p) for name in ("positions", "sample_indices", "chosen")),
    ]


@functools.cache
def load() -> ctypes.CDLL | None:
    """Loads the library, and compiles it first if necessary. Returns None, and logs the reason, if it cannot run."""
    reason = unavailable_reason()
    if reason is not None:
        log.warning("native kernels are not used, and steps on this CPU are slower: %s", reason)
        return None
    return _library()


@functools.cache
def unavailable_reason() -> str | None:
    """The reason why the library cannot run here; None if it can. Compiles the library if necessary."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    lacking = [name for name in _NEEDED if not capabilities.get(name)]
    if lacking:
        return f"the CPU lacks {', '.join(lacking)}"
    try:
        _library()
    except CannotBuild as error:
        return str(error)
    except OSError as error:
        return f"the compiled library does not load: {error}"
    return None


def has_amx() -> bool:
    """True if the kernels can use AMX tiles: the CPU has them and the system permits their use."""
    return unavailable_reason() is None and bool(_library().ovf_has_amx())


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compiled_library(SOURCE, FLAGS)))
    library.ovf_has_amx.restype = c_int
    library.ovf_has_amx.argtypes = []
    library.ovf_create.restype = c_void_p
    library.ovf_create.argtypes = [POINTER(Shape), c_void_p, c_void_p, c_void_p, c_void_p]
    library.ovf_destroy.restype = None
    library.ovf_destroy.argtypes = [c_void_p]
    library.ovf_set_matrix.restype = None
    library.ovf_set_matrix.argtypes = [c_void_p, c_int64, c_int, c_void_p, c_void_p]
    library.ovf_set_vector.restype = None
    library.ovf_set_vector.argtypes = [c_void_p, c_int64, c_int, c_void_p, c_int64]
    library.ovf_allocate_adapters.restype = c_int
    library.ovf_allocate_adapters.argtypes = [c_void_p, c_int64, c_int64]
    library.ovf_clear_adapter.restype = None
    library.ovf_clear_adapter.argtypes = [c_void_p, c_int64, c_int64]
    library.ovf_set_low_rank.restype = None
    library.ovf_set_low_rank.argtypes = [c_void_p, *[c_int64] * 5, c_void_p, c_void_p]
    library.ovf_forward.restype = c_char_p
    library.ovf_forward.argtypes = [c_void_p, POINTER(Batch), Hook]
    library.ovf_draw.restype = None
    library.ovf_draw.argtypes = [POINTER(Draws)]
    return library
