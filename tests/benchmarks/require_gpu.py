"""Ends with a sentence and code 1 where there is no CUDA GPU, so that `make gpu` cannot pass without one."""

import sys

import torch

if not torch.cuda.is_available():
    sys.exit("make gpu: no CUDA GPU is visible to torch here, so nothing was tested; run it on a machine that has one")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
