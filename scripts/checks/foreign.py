"""Checkpoints in other tools' formats, and a plain reading of their bits that shares nothing with our loaders."""

import copy
from pathlib import Path

from torch import Tensor

import hf_compress as hfc
from scripts.checks.checkpoints import Checkpoint, bert, close, llama, words


class Gptq(Checkpoint):
    """Symmetric weights in format v1, whose zero points are one less than meant."""

    bits, offset = 4, 1
    options = dict(bits=4, group_size=16, symmetric=True)

    def __init__(self, name: str, folder: Path):
        self.name, self.dense = name, self.base()
        self.model = hfc.quantize(copy.deepcopy(self.dense), **self.options)
        self.export(folder)
        self._keep(folder)

    def base(self):
        return bert()

    def export(self, folder: Path) -> None:
        hfc.export(self.model, folder, format="gptq")

    def load(self, folder: Path):
        return hfc.load_gptq(folder)

    def weight(self, name: str, stored: dict[str, Tensor]) -> Tensor:
        groups, scales = stored[f"{name}.g_idx"].long(), stored[f"{name}.scales"].float()
        q = words(stored[f"{name}.qweight"].t(), self.bits, len(groups))
        zeros = (words(stored[f"{name}.qzeros"], self.bits, scales.shape[1]) + self.offset) % 2**self.bits
        return (q - zeros[groups].t()) * scales[groups].t()

    ending = ".qweight"

    def compare(self, model, folder: Path) -> None:
        stored, dense = self.stored(folder), copy.deepcopy(self.dense)
        names = [key.removesuffix(self.ending) for key in stored if key.endswith(self.ending)]
        parts = dense.state_dict()
        for name in names:
            parts[f"{name}.weight"].copy_(self.weight(name, stored))
        for key, tensor in stored.items():
            if key in parts and key.rpartition(".")[0] not in names or key.endswith(".bias"):
                parts[key].copy_(tensor)
        close(model, dense)


class GptqGroups(Gptq):
    """Asymmetric, format v2, of a causal language model."""

    bits, offset = 8, 0
    options = dict(bits=8, group_size=32)

    def base(self):
        return llama()


class CompressedTensors(Gptq):
    """pack-quantized, asymmetric, groups of 16."""

    ending = ".weight_packed"
    options = dict(bits=4, group_size=16)

    def export(self, folder: Path) -> None:
        hfc.export(self.model, folder, format="compressed-tensors")

    def load(self, folder: Path):
        return hfc.load_compressed_tensors(folder)

    def weight(self, name: str, stored: dict[str, Tensor]) -> Tensor:
        N, K = stored[f"{name}.weight_shape"].tolist()
        q, scales = words(stored[f"{name}.weight_packed"], self.bits, K), stored[f"{name}.weight_scale"].float()
        zeros = words(stored[f"{name}.weight_zero_point"].t(), self.bits, N).t()
        size = K // scales.shape[1]
        return (q - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)


FOREIGN = {"gptq": Gptq, "gptq groups": GptqGroups, "compressed-tensors": CompressedTensors}
