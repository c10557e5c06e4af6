"""Teaches `from_pretrained` to read compressed checkpoints: one Transformers quantizer for all parts of the record.

Importing this module registers it. It stays light (no model code), because `import hf_compress` imports it; each part
of the record is handled by the module of its name in this folder, imported when a checkpoint has that part:

    validate(part: dict) -> None                    the record alone: types, closed lists, ranges; raises ValueError
    prepare(model, part: dict) -> None              give the model, on the meta device, its compressed modules
    check_tensors(model, part: dict, files) ->      optional: the record against the headers of the safetensors files
    finish(model, part: dict) -> None               optional: after the tensors are loaded
    sentinels(model, part: dict) -> list[str]       optional: tensor names that make a load without hf_compress fail

A sentinel is the name of a tensor that Transformers alone would look for, and finds empty. Without it a checkpoint
whose tensors all have other names would load as random weights, with only a warning.
"""

import logging
import re
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_compress.model.record import PARTS, QUANT_METHOD, VERSION, read_record, record_digest, write_part

logger = logging.getLogger(__name__)


@register_quantization_config(QUANT_METHOD)
class HfCompressConfig(QuantizationConfigMixin):
    """The record as Transformers wants it. Raises ValueError if it is not one that this version can read."""

    def __init__(self, version: int = VERSION, structure: dict | None = None, bits: dict | None = None,
                 sparsity: dict | None = None, digest: str | None = None, **unknown: Any):  # fmt: skip
        method = unknown.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD or unknown or version != VERSION:
            raise ValueError(
                f"This checkpoint's record has version {version!r} and the unknown entries {sorted(unknown)}; this "
                f"hf_compress reads version {VERSION} with {', '.join(PARTS)}. Install a newer hf_compress."
            )
        self.quant_method = QUANT_METHOD
        self.version, self.digest = version, digest  # checkpoints of earlier versions have no digest
        self.structure, self.bits, self.sparsity = structure or {}, bits or {}, sparsity or {}
        for part in PARTS:
            if not isinstance(getattr(self, part), dict):
                raise ValueError(f"The record's {part} must be a mapping, got {type(getattr(self, part)).__name__}.")

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key not in (*PARTS, "digest") or value}


@register_quantizer(QUANT_METHOD)
class HfCompressQuantizer(HfQuantizer):
    """Builds the compressed modules before the tensors arrive.

    A model with packed weights keeps its quantizer; one that is only pruned is an ordinary model once it is loaded:
    it can be cast, trained and pruned again.
    """

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "hf_compress reads compressed checkpoints through from_pretrained, it does not compress while loading. "
                "Load the model first, then call hf_compress.quantize or hf_compress.prune_heads on it."
            )
        for module, part in self._parts():
            module.validate(part)
        tensors = import_module("hf_compress.checkpoint.tensors")
        files = kwargs.get("checkpoint_files") or []
        self._stored = tensors.read_headers(files)
        self._pass_over_stale_record(model)
        for module, part in self._parts():
            module.prepare(model, part)
        self._loading_sentinels = self._sentinels(model)
        for module, part in self._parts():
            if hasattr(module, "check_tensors"):
                module.check_tensors(model, part, files)
        tensors.check_headers(model, self._stored, self._loading_sentinels)
        tensors.check_sentinels(model, self._stored, self._loading_sentinels)
        record = self.quantization_config
        if record.digest is not None and record.digest != record_digest(record.to_dict()):
            raise ValueError(
                "The record in config.json (quantization_config) was changed since it was written, so the weights may "
                "not mean what it says. Take config.json as it was saved beside them."
            )
        self._shapes = {n: p.shape for n, p in model.named_parameters() if n not in self._loading_sentinels}
        ignored = [re.escape(name) for name in self._loading_sentinels]
        if ignored:
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def _pass_over_stale_record(self, model) -> None:
        record = {part: getattr(self.quantization_config, part) for part in PARTS}
        if import_module("hf_compress.checkpoint.stale").is_stale(model, record, self._stored):
            logger.warning(
                "config.json tells of compressed weights, but the files hold ordinary ones, as `from_config` makes "
                "them of a compressed model's config. They are loaded as they are, without the record."
            )
            self.quantization_config = HfCompressConfig()

    def _process_model_after_weight_loading(self, model, **kwargs):
        tensors = import_module("hf_compress.checkpoint.tensors")
        tensors.check_loaded(model, self._stored, self._loading_sentinels)
        tensors.check_shapes(model, self._shapes)
        del self._stored, self._loading_sentinels, self._shapes
        for module, part in self._parts():
            if hasattr(module, "finish"):
                module.finish(model, part)
        # a plain dict, as in a config read from a file: writing, copying and loading again need no special case
        model.config.quantization_config = self.quantization_config.to_dict()
        if not self._parts():
            del model.config.quantization_config
        if not self.quantization_config.bits:
            del model.hf_quantizer, model.quantization_method
            model.is_quantized = False
            for module in model.modules():
                if hasattr(module, "config"):
                    module.config.__dict__.pop("_is_quantized", None)
        return model

    def get_state_dict_and_metadata(self, model) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What is saved: the stored tensors, and an empty one under each sentinel's name.

        No metadata of our own: safetensors writes several entries in an order of chance, and the same model would not
        be the same bytes.
        """
        state = model.state_dict()
        state.update({name: torch.empty(0) for name in self._sentinels(model)})
        return state, {}

    def dequantize(self, model, dtype: torch.dtype | str | None = None):
        """`model.dequantize()`: packed modules become ordinary ones, what pruning changed stays.

        dtype: of the whole model afterwards. By default each module keeps its own: `config.dtype`, which Transformers
        would take, is a string once the model was saved, and an old one once it was cast.
        """
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if self.quantization_config.bits:
            import_module("hf_compress.checkpoint.bits").unpack(model, dtype)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model) -> None:
        """What `dequantize` does last: of the record, only what is packed goes."""
        rest = read_record(model.config) | {"bits": {}}
        super().remove_quantization_config(model)
        for part in PARTS:
            write_part(model.config, part, rest.get(part) or {})
        if rest.get("sparsity"):  # blocks of packed modules went with their packing
            import_module("hf_compress.checkpoint.sparsity").settle_sparsity(model)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        """What Transformers asks of a tensor that does not fit: a sentinel does not have to."""
        return param_name in self._sentinels(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    trains_scales = False  # set by a trainer that changes what is packed: nothing else would learn in a packed model

    @property
    def is_qat_trainable(self) -> bool:
        return self.trains_scales

    @property
    def is_compileable(self) -> bool:
        return True

    def _parts(self) -> list[tuple[ModuleType, dict]]:
        """The modules that handle the parts this record has: the structure first, the others fill its shapes."""
        present = [part for part in PARTS if getattr(self.quantization_config, part)]
        return [(import_module(f"hf_compress.checkpoint.{part}"), getattr(self.quantization_config, part))
                for part in present]  # fmt: skip

    def _sentinels(self, model) -> list[str]:
        return [name for module, part in self._parts() if hasattr(module, "sentinels")
                for name in module.sentinels(model, part)]  # fmt: skip
