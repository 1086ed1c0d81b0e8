"""Memory that is used again: a fresh page costs a fault, and in a virtual machine that is dearer than copying into it.

Measured on two cores: reading 1.2 GB from the page cache takes 0.53 CPU seconds into fresh buffers, 0.18 into reused ones.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
import threading
import weakref

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class Buffers:
    """Gives out byte buffers; one comes back by itself when its last view (memoryview, tensor) is gone.

    Holds no more than was in use at once: free buffers that are too small are dropped before a larger one is made."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lock = threading.RLock()  # a buffer may come back while one is taken: the garbage collector runs anywhere

    def take(self, size: int) -> memoryview:
        """A writable buffer of `size` bytes with whatever is in it."""
        if size == 0:
            return memoryview(bytearray())
        with self._lock:
            fitting = [m for m in self._free if len(m) >= size]
            if fitting:
                memory = min(fitting, key=len)
                self._free.remove(memory)
            else:
                self._free.clear()
                memory = mmap.mmap(-1, size)
        block = _block(size).from_buffer(memory)
        weakref.finalize(block, self._give_back, memory).atexit = False
        return memoryview(block).cast("B")

    def _give_back(self, memory: mmap.mmap) -> None:
        with self._lock:
            self._free.append(memory)


_blocks: dict[int, type[ctypes.Array[ctypes.c_char]]] = {}


def _block(size: int) -> type[ctypes.Array[ctypes.c_char]]:
    """An array type that can be referred to weakly; one for each size."""
    if size not in _blocks:
        _blocks[size] = type("Block", (ctypes.c_char * size,), {})
    return _blocks[size]


def keep_freed_memory() -> None:
    """Tells glibc's allocator not to give memory back after every tensor. Elsewhere: nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 128 << 20)


def give_back_freed_memory() -> None:
    """What earlier tensors left between those that live goes back to the system, wherever it lies in the heap; it would grow otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_bytes(device: str = "cpu") -> int:
    """The most that this process has had resident so far; on "cuda" the most that its tensors have taken there."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
