"""recipes/grpo.py sharded by FSDP over CPU processes, as `accelerate launch` starts it; for a test.

accelerate shards on accelerators only. All that stands against CPUs is where it asks which they are.
"""

import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import training_args

from recipes import grpo
from rookworld_trl.training import placement


def _backend(state: PartialState, *_: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def _device(state: PartialState) -> None:
    state.device = torch.device("cpu")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = _backend
    PartialState.set_device = _device
    placement.missing_gpu = lambda: None
    training_args.is_torch_bf16_gpu_available = lambda: True
    grpo.main(sys.argv[1:])
