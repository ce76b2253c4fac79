#!/bin/sh
# Prepares a machine with an NVIDIA GPU for `atspeed bench gpu`; run it in the repository, then the command that it prints.
#
# Needs a driver for CUDA 13 (580 or newer), Python 3.11 or newer and a package index. CUDA and cuDNN come as wheels with the extra
# `gpu`: nothing of CUDA has to be installed, and onnxruntime finds them by `preload_dlls()`, which the services call.
# torch's wheel for CUDA is needed for Hugging Face generate on the GPU and for the probe of the memory's speed.
# Memory: 7b takes 14 GB of the device in float16, 60 GB of the machine while it is exported, and 30 GB of disk.
set -eu

environment=${1:-.venv-gpu}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

python3 -m venv "$environment"
# torch first: without a version suffix an index may offer the wheel without CUDA. Then everything else keeps it.
"$environment/bin/python" -m pip install --quiet --constraint constraints.txt torch
"$environment/bin/python" -m pip install --quiet --constraint constraints.txt --constraint deploy/constraints-gpu.txt \
    --editable ./atspeed_client --editable '.[gpu,train,local,bench]'
# onnxruntime-genai, of the extra `bench`, brings the wheel of onnxruntime for the CPU, which hides the one for the GPU.
"$environment/bin/python" -m pip uninstall --quiet --yes onnxruntime onnxruntime-genai onnxruntime-gpu
"$environment/bin/python" -m pip install --quiet --no-deps --constraint deploy/constraints-gpu.txt onnxruntime-gpu

"$environment/bin/python" - <<'CHECK'
import onnxruntime
import torch

onnxruntime.preload_dlls()
assert "CUDAExecutionProvider" in onnxruntime.get_available_providers(), onnxruntime.get_available_providers()
assert torch.cuda.is_available(), "torch has no CUDA"
print(onnxruntime.__version__, torch.__version__, torch.cuda.get_device_name())
CHECK

echo "ready: $environment/bin/atspeed bench gpu --bundle var/runs/beauty-small/bundle --histories DIR/train.txt --work var/inflated"
