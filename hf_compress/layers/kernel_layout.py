"""A packed layer on a GPU keeps its words once: in the order in which the kernels read them."""

from typing import Any

from torch import Tensor

from hf_compress.engines import gpu
from hf_compress.engines.ops import pack_gptq
from hf_compress.engines.packed_weight import PackedWeight, Stored
from hf_compress.engines.routes import PerCall, Run


class KernelLayout:
    """Mixin of `PackedLinear`: where a kernel runs, its layout takes the place of the buffer `qweight`, which is empty.

    What reads, saves, moves or copies the layer finds the words as they were, bit for bit. Others ask `qweight` for its
    device alone, as PEFT does.
    """

    layout: gpu.Layout | None = None  # holds the integers while `qweight` is empty

    @property
    def is_laid_out(self) -> bool:
        return self.layout is not None and not self.qweight.numel()

    def words(self) -> Tensor:
        """What `qweight` is, or would be."""
        return pack_gptq(self.layout.integers(), self.scheme.bits) if self.is_laid_out else self.qweight

    def hold_words(self) -> None:
        """Bring `qweight` back, and let the layout go."""
        if self.layout is not None:
            self.qweight, self.layout = self.words(), None

    def stored(self) -> Stored:
        return self._stored(self.words())

    def packed_weight(self) -> PackedWeight:
        if not self.is_laid_out:
            return super().packed_weight()
        return self._stored(None).weight_of(self.layout.integers())

    def prepare(self, *, decodes: bool | None = None) -> None:
        self.hold_words()
        super().prepare(decodes=decodes)
        if gpu.takes(self.scales.device):
            run = gpu.make_run(self.stored(), self.compute_dtype, int8=self.is_int8)
            if run is not None:
                self.route, self.run = self._lay_out, self._keep(run)
                self._note_buffers()

    def _lay_out(self, stored: Stored) -> Run:
        """The run anew, of tensors that were changed."""
        run = gpu.make_run(stored, self.compute_dtype, int8=self.is_int8)
        if run is not None:
            return self._keep(run)
        self.hold_words()
        return PerCall(stored, self.compute_dtype)

    def _keep(self, run: gpu.Layout) -> gpu.Layout:
        self.qweight, self.layout = self.qweight.new_empty(0), run
        return run

    def _apply(self, fn, recurse: bool = True):
        self.hold_words()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_laid_out:
            destination[f"{prefix}qweight"] = self.words()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.hold_words()
        super()._load_from_state_dict(state_dict, prefix, *args)
