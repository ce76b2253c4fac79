#!/bin/sh
# Prepares a machine with an NVIDIA GPU for `atspeed bench gpu`. Run it in the repository, and then the command that it prints.
#
# Needs a driver for CUDA 13 (580 or newer), Python 3.11 or newer and a package index. CUDA and cuDNN come as wheels with the extra
# `gpu`: nothing of CUDA has to be installed, and onnxruntime finds them by `preload_dlls()`, which the services call.
# tests/deploy/test_gpu_setup.py asks pip's resolver for the same packages.
# torch's wheel for CUDA is needed for Hugging Face generate on the GPU and for the probe of the memory's speed.
# Memory: 7b takes 14 GB of the device in float16, 60 GB of the machine while it is exported, and 30 GB of disk.
set -eu

environment=${1:-.venv-gpu}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

python3 -m venv "$environment"
# torch first: without a version suffix an index may offer the wheel without CUDA. Then everything else keeps it.
"$environment/bin/python" -m pip install --quiet --constraint constraints.txt torch
"$environment/bin/python" -m pip install --quiet --constraint constraints.txt --constraint deploy/constraints-gpu.txt \
    --editable ./atspeed_client --editable '.[gpu,train,local]'

# A session on the device and passes through it, in a process without torch, as the services are. A list of providers would
# prove nothing: onnxruntime offers CUDA without any driver.
"$environment/bin/atspeed" bundle verify bundles/movielens-100k --provider cuda
"$environment/bin/python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'

echo "ready: $environment/bin/atspeed bench gpu --minutes 4"
