"""Build the extensions; everything else about the package is in pyproject.toml.

The kernels are plain C with run-time dispatch (csrc/), so the flags name no CPU. `-ffp-contract=off` keeps
the compiler from fusing multiply and add, which would change results on CPUs with FMA;
`-fno-math-errno` and `-fno-trapping-math` change no value and let square roots be vectorised.
"""

from glob import glob

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

CSRC = "hashemb/csrc/"
CTR_CSRC = "hashemb/ctr/csrc/"
DATA_CSRC = "hashemb/ctr/data/csrc/"
C_SOURCES = ["ahead.c", "commit.c", "control.c", "kernels.c", "locks.c", "lookup.c", "pages.c", "parallel.c",
             "save.c", "update.c"]
C_FLAGS = ["-O3", "-std=gnu11", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
           "-fno-trapping-math", "-fopenmp-simd", "-Wall", "-Wextra"]

core = Extension(
    "hashemb._core",
    sources=["hashemb/_core.pyx", *(CSRC + name for name in C_SOURCES)],
    depends=glob(CSRC + "*.h") + glob(CSRC + "*.inc") + glob("hashemb/*.pxi"),
    include_dirs=[CSRC, numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
    extra_compile_args=C_FLAGS,
    extra_link_args=["-pthread"],
)

maths = Extension(
    "hashemb.ctr._maths",
    sources=["hashemb/ctr/_maths.pyx", CTR_CSRC + "maths.c", CSRC + "parallel.c"],
    depends=glob(CTR_CSRC + "*") + glob(CSRC + "*.h"),
    include_dirs=[CTR_CSRC, CSRC, numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
    extra_compile_args=C_FLAGS,
    extra_link_args=["-pthread"],
)

tokens = Extension(
    "hashemb.ctr.data._tokens",
    sources=["hashemb/ctr/data/_tokens.pyx", DATA_CSRC + "tokens_criteo.c", DATA_CSRC + "tokens_examples.c"],
    depends=[*glob(DATA_CSRC + "*.h"), CSRC + "murmur.h"],
    include_dirs=[DATA_CSRC, CSRC, numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
    extra_compile_args=C_FLAGS,
)

setup(
    ext_modules=cythonize(
        [core, maths, tokens],
        compiler_directives={"language_level": 3, "boundscheck": False, "wraparound": False,
                             "cdivision": True, "initializedcheck": False, "embedsignature": True},
    )
)
