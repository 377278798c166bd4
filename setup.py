"""Everything is in pyproject.toml but the guard: C, and left out where there is no compiler."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        # Not a Python module: `hoplite_mpi.transport.guard` loads it with ctypes. So it needs no Python headers either.
        Extension(
            "hoplite_mpi.transport._ucx_guard",
            ["hoplite_mpi/transport/_ucx_guard.c"],
            libraries=["dl"],
            optional=True,
        )
    ]
)
