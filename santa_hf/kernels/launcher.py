"""Launches and workspaces that cost the host less than a short kernel the GPU.

Triton's dispatch takes longer than that, and so do PyTorch's allocations and views, of which a decode
step has several in every layer.
"""

import math
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

__all__ = ["Launcher", "Layout", "Part"]

ALIGNMENT = 128  # bytes


class Part:
    """A part of a workspace: what a launch asks of a tensor, which is made when `tensor` is called."""

    __slots__ = ("_address", "_memory", "_offset", "dtype", "shape")

    def __init__(
        self,
        memory: torch.Tensor,
        start: int,
        offset: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """The `offset`-th byte of `memory`, which starts at address `start`, and those that follow."""
        self.dtype, self.shape = dtype, shape
        self._address, self._memory, self._offset = start + offset, memory, offset

    def data_ptr(self) -> int:
        """The address, as of a tensor."""
        return self._address

    def tensor(self) -> torch.Tensor:
        """A view of the workspace, contiguous."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return self._memory[self._offset : self._offset + size].view(self.dtype).view(self.shape)


class Layout:
    """Where parts of these shapes and dtypes lie in a workspace: one allocation for all of them."""

    def __init__(self, *parts: tuple[tuple[int, ...], torch.dtype]) -> None:
        self.places: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self.size = 0  # bytes
        for shape, dtype in parts:
            self.places.append((self.size, shape, dtype))
            size = math.prod(shape) * dtype.itemsize
            self.size += -(-size // ALIGNMENT) * ALIGNMENT

    def allocate(self, device: torch.device) -> list[Part]:
        """Memory that nobody wrote."""
        memory = torch.empty(self.size, dtype=torch.uint8, device=device)
        start = memory.data_ptr()
        return [Part(memory, start, *place) for place in self.places]


class Launcher:
    """A kernel with its constants and options on one device: `launcher(grid, *arguments)`.

    At every launch Triton binds the arguments by name, asks each what the code depends on, and prints
    the answers into the key of its cache: 30 to 50 us of the host (eval/bench/results/launches.txt).
    Here it does so once for each key, and the kernel that it compiled is launched from then on.
    Beyond the constants the code of our kernels depends on three things of a pointer: whether there is
    one, its dtype, and whether it is a multiple of 16 bytes. Scalars have a type written beside them and
    are not specialised on. Triton's launch hooks still run; its settings, such as debug mode, stay what
    they were at the first launch.

    Arguments are pointers, which have no annotation, then scalars; constants follow them. Pointers are
    tensors or parts of a workspace, on the device: after the first launch of a key nobody checks that.
    The kernel runs in the stream that is current there.
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
            self._dispatch(grid, arguments)
            return
        if self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):
                self(grid, *arguments)
            return
        # Addresses, since Triton asks the driver about every tensor whether the GPU can read it.
        addresses: list[int | None] = []
        key: list[Any] = []
        bits = 0
        for pointer in arguments[: self._pointers]:
            if pointer is None:
                addresses.append(None)
                key.append(None)
            else:
                address = pointer.data_ptr()
                bits |= address
                addresses.append(address)
                key.append(pointer.dtype)
        if bits % 16:
            key += [address is not None and address % 16 == 0 for address in addresses]
        compiled = self.compiled.get(tuple(key))
        if compiled is None:
            compiled = self._dispatch(grid, arguments)
            # None if a hook declines; a wrapper under asynchronous compilation.
            if isinstance(compiled, CompiledKernel):
                self.compiled[tuple(key)] = compiled
            return
        values = (*addresses, *arguments[self._pointers :], *self._unread)
        if _calls(knobs.runtime.launch_enter_hook) or _calls(knobs.runtime.launch_exit_hook):
            compiled[(*grid, 1, 1)](*values)
            return
        # As Triton does it, but for what only hooks would see.
        stream = driver.active.get_current_stream(self._index)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values
        )

    def _dispatch(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Any:
        """Launch through Triton, which compiles what it has not compiled yet."""
        tensors = [x.tensor() if isinstance(x, Part) else x for x in arguments]
        return self.kernel[grid](*tensors, **self.constants)


def _calls(hook: Any) -> bool:
    """Whether a launch hook of Triton does anything."""
    return bool(hook.calls) if isinstance(hook, knobs.HookChain) else hook is not None
