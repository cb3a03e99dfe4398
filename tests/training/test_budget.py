"""What thirty steps take, held to committed counts: not seconds, but what decides them.

A change that costs more must say so here; that is the point of it. Memory is that of tensors. The process's own peak is
not held: libraries take hundreds of times as much as this run, how much depends on their builds, and other tests of the
process have taken some before, so that 5 % of it would be loud about others and deaf to the run. That more steps keep
no more than a few do is held by test_memory.py.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rookworld_trl.training import RookWorldGRPOTrainer

COMMITTED = {
    "native": {"tokens": 1384, "flops": 451_668_224, "passes": 222},
    "transformers": {"tokens": 1349, "flops": 540_760_064, "passes": 222},
}


class Counted(TorchDispatchMode):
    """Operations of matrix products, passes through the policy, and the most bytes of tensors that were there at once.

    A pass looks the policy's token embedding up once.
    """

    def __init__(self, embedding: torch.Tensor):
        super().__init__()
        self.embedding, self.flops, self.passes, self.bytes, self.most = embedding.data_ptr(), 0, 0, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        self.passes += packet is torch.ops.aten.embedding and args[0].data_ptr() == self.embedding
        for each in (each for each in tree_leaves(out) if isinstance(each, torch.Tensor)):
            storage = each.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.bytes -= count


def spent(trainer: RookWorldGRPOTrainer) -> dict[str, int]:
    """What a run takes; sampled tokens by its log."""
    with Counted(trainer.model.transformer.wte.weight) as counted:
        trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    tokens = round(sum(lengths) * trainer.args.generation_batch_size)
    return {"tokens": tokens, "flops": counted.flops, "passes": counted.passes, "bytes": counted.most}


@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_thirty_steps_take_what_they_took(make_trainer: Callable[..., RookWorldGRPOTrainer], backend: str) -> None:
    found = spent(make_trainer(max_steps=30, rollout_backend=backend, learning_rate=1e-4, kl_stop_threshold=0.0))
    assert found.pop("bytes") == pytest.approx(1.44e6, rel=0.05)
    assert found == COMMITTED[backend]
