"""A step that runs again and again on the same tensors, recorded once as a CUDA graph.

Decoding one token of a small model is some hundred small kernels, and starting them takes longer than running them. A
graph starts them all at once.
"""

from collections.abc import Callable

import torch

# One memory for all records of a device until `release`: a record that is dropped leaves its memory to the next one.
# With a pool each, dropped pools would pile up, since nothing frees them while another record is made.
POOLS: dict[torch.device, tuple[torch.cuda.MemPool, torch.cuda.Stream]] = {}


def release(device: torch.device) -> None:
    """Give the memory of dropped records back, so that training has it; nothing else may use a pool's memory."""
    if POOLS.pop(device, None) is not None:
        torch.cuda.empty_cache()


class Repeated:
    """Calls `step`: plainly the first time, then, on a GPU, by recording it and replaying the record.

    The plain call sets up what a recording must not (handles of libraries, cached casts). On other devices all calls
    are plain ones.

    Args:
        step: changes tensors in place and returns nothing. Its shapes, addresses and Python values must not change from
            call to call, and nothing in it may wait for the device.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._device = step, device
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is None and self._warm and self._device.type == "cuda":
            self._graph = self.record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()
            self._warm = True

    def record(self) -> torch.cuda.CUDAGraph:
        """Run the step once while its kernels are recorded instead of started."""
        # Not `with torch.cuda.graph(...)`: that also empties the allocator's cache, which is dear at every recording.
        if self._device not in POOLS:
            POOLS[self._device] = torch.cuda.MemPool(), torch.cuda.Stream(self._device)
        graph, (pool, stream) = torch.cuda.CUDAGraph(), POOLS[self._device]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=torch.cuda._POOL_HANDLE(pool.id), capture_error_mode="thread_local")
            try:
                self._step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return graph
