"""A barrier among the programs of one cooperative launch: a counter in memory that only grows."""

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr):
    """What this program stored is there for those that see its arrival."""
    # Triton 3.6 puts no barrier of its own between the stores of a program's threads and a release
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, arrivals):
    """Until so many programs have arrived, ever."""
    while tl.load(counter_ptr, volatile=True) < arrivals:
        pass
    tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
