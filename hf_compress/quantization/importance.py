"""How much an error in each column of a weight counts: the diagonal of the Hessian of its outputs' squared error."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.measuring.measure import evaluating
from hf_compress.model.anatomy import anatomy
from hf_compress.model.calibration import StackInputs, capture_stack_inputs, input_hooks


@torch.no_grad()
def input_importance(model: PreTrainedModel, names: Sequence[str], batches: Sequence[Mapping]) -> dict[str, Tensor]:
    """{name of a linear map: (K,)}, h_k = E[x_k^2] over the real tokens of `batches`; the factor 2 does not matter.

    Raises ValueError for maps outside the layers, and for those that no input reaches.
    """
    modules = {name: model.get_submodule(name) for name in names}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str, rows: Tensor) -> None:
        sums[name] = sums.get(name, 0) + rows.double().square().sum(0)
        counts[name] += len(rows)

    with evaluating([model]):
        for stack in anatomy(model).stacks:
            _run(capture_stack_inputs(model, stack, batches), modules, add)
    if missing := sorted(name for name, count in counts.items() if not count):
        raise ValueError(f"No calibration input reached {missing}: only maps within the layers are weighed.")
    return {name: sums[name] / counts[name] for name in names}


def _run(inputs: StackInputs, modules: Mapping[str, nn.Module], add: Callable[[str, Tensor], None]) -> None:
    """Run all layers of a stack, and hand on the tokens (rows, K) that reach each of `modules`."""
    for number, layer in enumerate(inputs.stack.layers):
        inputs.index, inside = number, set(layer.module.modules())
        mine = {name: module for name, module in modules.items() if module in inside}
        for batch in range(inputs.num_batches):

            def see(name: str, x: Tensor, batch: int = batch) -> None:
                add(name, inputs.tokens(modules[name], x, batch))

            with input_hooks(mine, see):
                inputs.hidden[batch] = inputs.run(batch)
