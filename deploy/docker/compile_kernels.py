"""Compiles the native kernels into $OVERFILL_HOME, so that an image needs no compiler.

Workers check at start whether their CPU has the instructions that the kernels use.
"""

from overfill.kv.native import library as kv
from overfill.model.native import library as model
from overfill.process.compiled import compiled_library

for library in (kv, model):
    print(compiled_library(library.SOURCE, library.FLAGS))
