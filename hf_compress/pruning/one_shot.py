"""Prunes single weights of a model without training, from sample batches: Wanda, optimal brain damage and surgery.

Layer after layer: only one layer's inputs are in memory, and each layer sees what the pruned ones before it make.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_compress.measuring.measure import evaluating
from hf_compress.model.anatomy import anatomy, is_projection
from hf_compress.model.calibration import (
    InputMoments,
    StackInputs,
    capture_stack_inputs,
    input_hooks,
)
from hf_compress.model.calibration_data import calibration_batches
from hf_compress.model.classes import ModelT
from hf_compress.pruning.masks import Blocks, check_prunable, layer_projections
from hf_compress.pruning.methods.weights import check_bank
from hf_compress.pruning.saliency import damage_saliency, surgery
from hf_compress.pruning.selection import keep_largest
from hf_compress.training.progress import progress_bar

METHODS = ("magnitude", "wanda", "obd", "obs")


@torch.no_grad()
def prune_weights(
    model: ModelT,
    sparsity: float,
    *,
    method: str = "wanda",
    calibration: Iterable | None = None,
    bank_size: int | None = None,
) -> ModelT:
    """Set a share of the weights of all linear maps within the layers to zero. Changes `model` and returns it.

    method       magnitude: |w|, the lowest of the whole model; wanda: |w| times the norm of its input, the lowest of
                 each row (https://arxiv.org/abs/2306.11695); obd: h_ii w^2 / 2, the lowest of each matrix; obs: by
                 w^2 / (2 [H^-1]_ii), and the weights left make up for those that went (SparseGPT,
                 https://arxiv.org/abs/2301.00774)
    calibration  tokenized rows or batches, as for `hfc.quantize`; all methods but magnitude need them
    bank_size    decide within banks of so many weights of a row: sparsity 0.5 in banks of 4 is 2:4

    Raises ValueError for unknown methods, for shares outside [0, 1), for data that is missing or empty, and for packed
    weights.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share that goes: it must be at least 0 and below 1, got {sparsity}.")
    check_prunable(model, "prune_weights")
    matrices = layer_projections(model, anatomy(model))
    check_bank("row" if bank_size is None else "bank", bank_size, matrices)
    if method == "magnitude":
        scope = "class-blind" if bank_size is None else "bank"
        masks = keep_largest([m.weight.abs() for m in matrices], sparsity, scope=scope, bank_size=bank_size)
        for matrix, mask in zip(matrices, masks, strict=True):
            matrix.scale_(mask)
        return model
    if calibration is None:
        raise ValueError(f"method={method!r} needs calibration data; only 'magnitude' does without.")
    batches = calibration_batches(calibration, model)
    with evaluating([model]):
        for stack in anatomy(model).stacks:
            inputs = capture_stack_inputs(model, stack, batches)
            for layer in progress_bar(stack.layers, desc="Scoring weights", unit="layer"):
                mine = [m for m in matrices if m.module in set(layer.module.modules()) and is_projection(m.module)]
                for matrix, moments in zip(mine, _moments(inputs, mine), strict=True):
                    matrix.weight.copy_(pruned_weight(matrix.weight, moments, sparsity, method, bank_size))
                inputs.advance()
    return model


def _moments(inputs: StackInputs, matrices: list[Blocks]) -> list[InputMoments]:
    """Moments of the inputs of each matrix of the running layer."""
    moments = {matrix.name: InputMoments() for matrix in matrices}
    modules = {matrix.name: matrix.module for matrix in matrices}
    for batch in range(inputs.num_batches):

        def see(name: str, x: Tensor, batch: int = batch) -> None:
            moments[name].add(inputs.tokens(modules[name], x, batch))

        with input_hooks(modules, see):
            inputs.run(batch)
    if missing := [name for name, moment in moments.items() if moment.sum is None]:
        raise ValueError(f"No calibration input reached {missing}: pass data that uses them.")
    return list(moments.values())


def pruned_weight(
    weight: Tensor, moments: InputMoments, sparsity: float, method: str, bank_size: int | None = None
) -> Tensor:
    """One weight (N, K) after pruning with the moments of its inputs."""
    H = moments.hessian()  # (K, K) float32, 2 X X^T / n
    if method == "obs":
        return surgery(weight, H, sparsity, bank_size=bank_size)
    if method == "wanda":
        scores, scope = weight.float().abs() * H.diagonal().sqrt(), "row"
    else:
        scores, scope = damage_saliency(weight.float(), H), "class-uniform"
    (mask,) = keep_largest([scores], sparsity, scope=scope if bank_size is None else "bank", bank_size=bank_size)
    return weight * mask
