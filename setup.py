"""Build the extensions; everything else about the package is in pyproject.toml.

The kernels are plain C with run-time dispatch (csrc/), so the flags name no CPU. `-ffp-contract=off` keeps
the compiler from fusing multiply and add, which would change results on CPUs with FMA;
`-fno-math-errno` and `-fno-trapping-math` change no value and let square roots be vectorised.

Each C file is compiled into exactly one extension, so what it keeps exists once in a process.
"""

from glob import glob

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

CSRC = "hashemb/csrc/"
CTR_CSRC = "hashemb/ctr/csrc/"
DATA_CSRC = "hashemb/ctr/data/csrc/"
C_FLAGS = ["-O3", "-std=gnu11", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
           "-fno-trapping-math", "-fopenmp-simd", "-Wall", "-Wextra"]


def extension(name: str, sources: list[str], folders: list[str]) -> Extension:
    """Return the extension of one .pyx file with these C files, which may include the headers of these folders."""
    return Extension(
        name,
        sources=[name.replace(".", "/") + ".pyx", *sources],
        depends=[*glob("hashemb/*.pxd"), *(header for folder in folders for header in glob(folder + "*.h"))],
        include_dirs=[*folders, numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        extra_compile_args=C_FLAGS,
        extra_link_args=["-pthread"],
    )


extensions = [
    extension("hashemb._runtime", [CSRC + "parallel.c", CSRC + "runtime.c"], [CSRC]),
    extension("hashemb._open_file", [], []),
    extension("hashemb._hashing", [], [CSRC]),
    extension("hashemb._sharing", [CSRC + name for name in ("locks.c", "save.c", "sharing.c")], [CSRC]),
    extension(
        "hashemb._core",
        [CSRC + name for name in ("ahead.c", "commit.c", "control.c", "kernels.c", "kernels_avx2.c", "kernels_avx512.c",
                                  "kernels_baseline.c", "lookup.c", "pages.c", "update.c")],
        [CSRC],
    ),
    extension(
        "hashemb.ctr._maths",
        [CTR_CSRC + name for name in ("maths.c", "maths_avx2.c", "maths_avx512.c", "maths_baseline.c")],
        [CTR_CSRC, CSRC],
    ),
    extension("hashemb.ctr.data._tokens", [DATA_CSRC + "tokens_criteo.c", DATA_CSRC + "tokens_examples.c"],
              [DATA_CSRC, CSRC]),
]

setup(
    ext_modules=cythonize(
        extensions,
        compiler_directives={"language_level": 3, "boundscheck": False, "wraparound": False,
                             "cdivision": True, "initializedcheck": False, "embedsignature": True},
    )
)
