# rookworld-trl with a GPU. Every step is a target of the Makefile, as in continuous integration.
#
#   docker build -t rookworld-trl .
#   docker run --gpus all -v "$PWD/runs:/rookworld/runs" rookworld-trl demo
#   docker run --gpus all -v "$PWD/runs:/rookworld/runs" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#       --entrypoint .venv/bin/accelerate rookworld-trl launch \
#       --config_file accelerate_configs/rtx4090.yaml \
#       recipes/grpo.py --config recipes/rookworld-lm-124m/grpo/config_mixed.yaml
#
# PyTorch's wheels bring their own CUDA libraries: the base image is there for the driver's interface alone.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# gcc, g++ (for a CPU's kernels) and Python's headers are for torch.compile; Stockfish for making data and playing. Not pinned: Ubuntu serves the
# latest fix of a release only, and what decides the numbers is in constraints.txt.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc git make python3 python3-dev python3-venv stockfish \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /rookworld

# What decides the environment first: a change of the code alone does not install anything again.
COPY Makefile pyproject.toml constraints.txt LICENSE README.md ./
COPY rookworld_trl/__init__.py rookworld_trl/
RUN make setup

COPY . .

ENTRYPOINT ["make"]
CMD ["help"]
