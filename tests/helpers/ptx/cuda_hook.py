"""nvcc's PTX for sm_90 in place of the emulated device's fibers: the same host code, the same launches."""

from __future__ import annotations

import functools
import re
import subprocess
from types import ModuleType
from typing import Any

import cubins
import torch
from cuda_emulation import emulation

from .execute import Launch
from .parse import Kernel, parse
from .programs import run, spans


def is_available() -> bool:
    return not cubins.available()


@functools.cache
def modules() -> list[str]:
    """The PTX of every file of csrc/cuda."""
    return list(cubins.compiled(90).ptx.values())


def without_file(name: str) -> str:
    """A mangled name without the part that each compiler gives to the namespace that has none."""
    found = re.search(r"(\d+)_GLOBAL__N_", name)
    return name if not found else name[: found.start()] + name[found.start() + len(found[1]) + int(found[1]) :]


@functools.cache
def kernel_of(name: str) -> Kernel:
    for text in modules():
        for entry in re.findall(r"\.entry\s+([\w$]+)", text):
            if without_file(entry) == without_file(name):
                return parse(text, only=entry)[entry]
    raise KeyError(f"nvcc compiled no kernel {name}")


def titles() -> set[str]:
    """The functions that are kernels, whatever the types that they were compiled for."""
    names = [name for text in modules() for name in re.findall(r"\.entry\s+([\w$]+)", text)]
    return {Kernel(name, {}, {}, {}).title for name in names}


@functools.cache
def symbols(path: str) -> dict[int, str]:
    lines = subprocess.check_output(["nm", path], text=True).splitlines()
    return {int(part[0], 16): part[2] for part in (line.split() for line in lines) if len(part) == 3}


def install() -> None:
    """Every launch on the emulated device from now on. A kernel may touch the tensors of its call and nothing else."""
    emulated = emulation.emulated_kernels()
    names = symbols(str(emulated.__file__))
    given: list[tuple[str, int, int]] = []

    def launch(address: int, grid: tuple[int, int], threads: int, cluster: int, shared: int, call: bytes) -> None:
        run("cuda", kernel_of(names[address]), call, given, Launch(grid, threads, cluster, shared))

    def with_its_tensors(function: Any) -> Any:
        @functools.wraps(function)
        def called(*arguments: Any, **fields: Any) -> Any:
            given[:] = spans((name, value) for name, value in fields.items() if isinstance(value, torch.Tensor))
            return function(*arguments, **fields)

        return called

    for name in launchers(emulated.cuda):
        setattr(emulated.cuda, name, with_its_tensors(getattr(emulated.cuda, name)))
    emulated.run_launches_with(launch)


def launchers(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]
