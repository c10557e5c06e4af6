"""Which body of an operator runs: Triton on GPUs of CUDA and ROCm, elsewhere the PyTorch reference.

The reference is what an operator is defined by, so any other device (MPS, XPU, one that is yet to come) runs it.
"""

import importlib.util
import os
from typing import Optional

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton decides at import whether its kernels run in the interpreter, so this is read once as well.
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DEVICES = ("cuda", "cpu") if INTERPRET else ("cuda",)


def require_triton(op_name: str) -> None:
    if not HAS_TRITON:
        raise ImportError(
            f"{op_name} on a GPU needs Triton, which is not installed. Run `pip install triton` "
            "(or `pip install hf_compress[kernels]`), or move the tensors to the CPU."
        )


def on_device(tensor: Tensor) -> "torch.cuda.device_of":
    """Make the tensor's GPU the current one while open: Triton launches on the current device. Nothing on a CPU."""
    return torch.cuda.device_of(tensor)


def is_half(dtype: torch.dtype) -> bool:
    """Whether the low-bit kernels take activations of `dtype`; others run the reference, on every device."""
    return dtype in (torch.float16, torch.bfloat16)


def check_same_device(**tensors: Optional[Tensor]) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"All tensors must be on one device, got {places}.")


def float_accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that CPU bodies compute in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
