"""Launches that pass by Triton's dispatch, which takes the host longer than a short kernel the GPU."""

from typing import Any

import torch
import triton.language as tl
from triton.compiler import CompiledKernel

__all__ = ["Launcher"]


class Launcher:
    """A kernel with its constants and options on one device: `launcher(grid, *arguments)`.

    At every launch Triton binds the arguments by name, asks each what the code depends on, and prints
    the answers into the key of its cache: 12 to 25 us of the host (eval/bench/results/launches.txt).
    Here it does so once for each key, and the kernel that it compiled is launched from then on.
    Beyond the constants the code of our kernels depends on three things of a pointer: whether there is
    one, its dtype, and whether it is a multiple of 16 bytes. Scalars have a type written beside them and
    are not specialised on. Triton's launch hooks still run; its settings, such as debug mode, stay what
    they were at the first launch.

    Arguments are pointers, which have no annotation, then scalars; constants follow them. Tensors have
    to lie on the device: after the first launch of a key nobody checks that. The kernel runs in the
    stream that is current there.
    """

    def __init__(self, kernel: Any, device: torch.device, **constants: Any) -> None:
        self.kernel, self.constants = kernel, constants
        self.compiled: dict[tuple[Any, ...], CompiledKernel] = {}
        annotations = kernel.fn.__annotations__
        self._index = device.index  # None on a CPU, where Triton interprets and compiles nothing
        self._pointers = len(kernel.arg_names) - len(annotations)
        # A compiled kernel takes every parameter in its order, and looks at no constant and at no
        # pointer that was None when it was compiled (Triton 3.6 to 3.9).
        self._unread = (None,) * list(annotations.values()).count(tl.constexpr)
        assert self._unread, "annotations must be types, not strings"

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch one program for each point of the grid, of one to three dimensions."""
        if self._index is None:
            self.kernel[grid](*arguments, **self.constants)
            return
        if self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):
                self(grid, *arguments)
            return
        addresses: list[int | None] = []
        key: list[Any] = []
        for pointer in arguments[: self._pointers]:
            if pointer is None:
                addresses.append(None)
                key.append(None)
            else:
                address = pointer.data_ptr()
                addresses.append(address)
                key.append(pointer.dtype)
                key.append(address % 16 == 0)
        compiled = self.compiled.get(tuple(key))
        if compiled is not None:
            # Addresses, since Triton asks the driver about every tensor whether the GPU can read it.
            scalars = arguments[self._pointers :]
            compiled[(*grid, 1, 1)](*addresses, *scalars, *self._unread)
            return
        compiled = self.kernel[grid](*arguments, **self.constants)
        # None from the interpreter or a hook that declines; a wrapper under asynchronous compilation.
        if isinstance(compiled, CompiledKernel):
            self.compiled[tuple(key)] = compiled
