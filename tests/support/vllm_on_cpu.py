"""recipes/grpo.py with a vLLM of the CPU build; for the tests of tests/serving.

Two things stand against CPUs. In this process, vLLM packs the weights of linear layers into a layout of the CPU's own,
and new weights have nowhere to go; here they stay as they are, as on a GPU. And weights travel to a server by NCCL,
between GPUs only; here they stay at home, so the server has the right ones until the first update.
"""

import sys

import torch
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from vllm.model_executor.layers import utils

from recipes import grpo

_sync_weights = VLLMGeneration.sync_weights


def _keep_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def _sync_in_this_process(self: VLLMGeneration) -> None:
    if self.mode == "colocate":
        _sync_weights(self)


if __name__ == "__main__":
    utils.dispatch_cpu_unquantized_gemm = _keep_weight
    VLLMClient.init_communicator = lambda self, device=0: None
    VLLMGeneration.sync_weights = _sync_in_this_process
    grpo.main(sys.argv[1:])
