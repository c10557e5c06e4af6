"""The tests of the kernels run on the CPU, and once more, under the mark `gpu`, on the device that is there."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU of CUDA or ROCm: torch.cuda.is_available() is False")
    return torch.device("cuda")
