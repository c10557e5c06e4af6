"""How much the loss bends along each weight matrix: Hessian eigenvalues and traces, one module at a time.

Q-BERT (Shen et al., 2020, https://arxiv.org/abs/1909.05840): Omega = |mean(lambda)| + std(lambda), lambda the top
eigenvalue of the module's Hessian on each of several parts of the data.
HAWQ-V2 (Dong et al., 2020, https://arxiv.org/abs/1911.03852): the Hessian's trace by Hutchinson's estimate, over the
number of weights.
Fisher information (SqueezeLLM, Kim et al., 2024, https://arxiv.org/abs/2306.07629): the mean square of the gradients of
single examples, which is the Hessian's mean diagonal where the model fits its data. Never negative, and of little
variance: in a large model the trace's estimate needs many probes to be either.
Divergence: nothing is estimated; a weight alone is rounded to two bits, and how far the model's predictions then are
from its own is measured. That sees what no second derivative does: how much of a large error reaches the outputs.

Products with the Hessian come from gradients at two shifted points, H v ~ (g(w + e v) - g(w - e v)) / 2e. That needs no
second derivative of the attention and runs under any implementation of it; a double backward costs about three times
as much. For the trace all modules are probed at once: the cross terms between them cancel on average. The eigenvalue
needs exact blocks, so there the modules take turns.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.model.anatomy import layer_maps
from hf_compress.model.calibration import text_mask, token_rows
from hf_compress.model.calibration_data import first_batches
from hf_compress.model.tasks import Task, auto_class_name, problem_of
from hf_compress.model.unfinished import check_loaded
from hf_compress.model.weights import check_no_adapters
from hf_compress.quantization.grids import round_to_nearest
from hf_compress.quantization.modules import check_quantizable, is_linear, matrix, scheme_for, set_matrix
from hf_compress.training.progress import progress_bar

logger = logging.getLogger(__name__)

METHODS = ("eigenvalue", "trace", "fisher", "divergence")
RELATIVE_STEP = 1e-3  # shift of the weights, as a share of their norm, for the difference of two gradients
ROUGH_BITS = 2  # of the weight that is rounded for its divergence
LARGEST_BASIS = 8  # vectors kept in the search for an eigenvalue
MIN_ITERATIONS, MAX_ITERATIONS = 5, 100  # a start that is near another eigenvector must not end the search


def hessian_sensitivity(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, Tensor]],
    *,
    method: str = "eigenvalue",
    modules: Sequence[str] | None = None,
    parts: int = 10,
    probes: int = 4,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> dict[str, float]:
    """How sensitive the loss is to each module's weight: {module name: value}, for `allocate_bits`.

    Args:
        dataloader: batches with labels, as the model takes them; all of them are used, a fixed subsample is enough. Of
            a stream 256 examples are read.
        method: "eigenvalue", |mean| + standard deviation of the top eigenvalue over the parts of the data (Q-BERT);
            "trace", the mean diagonal of the Hessian (HAWQ-V2), which costs much less; "fisher", the mean square of
            gradients, which costs least and suits large models; or "divergence", the distance of the predictions once
            the weight is rounded to 2 bits, over that error, which costs a forward pass a module and needs no labels.
        modules: names; by default all linear maps inside the layers.
        parts: data parts for the eigenvalue, at most one a batch.
        probes: random directions for the trace.
        tolerance: the search stops when the eigenvalue changes by less than this share of itself, and its residual is
            below the square root of it.

    The model runs in eval mode and keeps its weights. Raises ValueError for data without labels, and naming the module
    where a gradient or a divergence is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    check_loaded(model, "hessian_sensitivity")
    check_no_adapters(model)
    batches = list(first_batches(dataloader))
    if not batches:
        raise ValueError("dataloader is empty: sensitivities need batches, all but divergences with labels.")
    weights = {name: check_quantizable(model, name).weight for name in modules or _linear_names(model)}
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.eval().requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        if method == "fisher":
            return _fishers(model, weights, batches)
        if method == "divergence":
            return _divergences(model, list(weights), batches)
        if method == "trace":
            return _traces(model, weights, batches, probes, generator)
        return _omegas(model, weights, batches, parts, tolerance, generator)
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def _linear_names(model: PreTrainedModel) -> list[str]:
    return [name for name, module in layer_maps(model).items() if is_linear(module)]


def _fishers(model: PreTrainedModel, weights: Mapping[str, Tensor], batches: list) -> dict[str, float]:
    examples = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(next(iter(batch.values()))))
    ]
    squares = dict.fromkeys(weights, 0.0)
    for example in progress_bar(examples, desc="Gradients", unit="example"):
        for name, gradient in _gradients_of(model, weights, example):
            squares[name] += float(gradient.square().mean()) / len(examples)
    return squares


@torch.no_grad()
def _divergences(model: PreTrainedModel, names: Sequence[str], batches: list) -> dict[str, float]:
    """How far the predictions are from the model's own with one weight rounded, over the squared error of rounding."""
    modules = {name: model.get_submodule(name) for name in names}
    schemes = {name: scheme_for(m, name, ROUGH_BITS, group_size="auto") for name, m in modules.items()}
    rough = {name: round_to_nearest(matrix(m), schemes[name], name=name) for name, m in modules.items()}
    moved, items = dict.fromkeys(names, 0.0), 0
    progress = progress_bar(total=len(batches) * len(names), desc="Divergences", unit="run")
    with progress:
        for batch in batches:
            batch = {k: v.to(model.device) for k, v in batch.items()}
            exact = _predictions(model, batch)
            items += len(exact)
            for name, module in modules.items():
                before = module.weight.detach().clone()
                try:
                    set_matrix(module, rough[name].dequantize(before.dtype))
                    moved[name] += float(_distance(model, _predictions(model, batch), exact))
                finally:
                    module.weight.copy_(before)
                progress.update()
    if not items:
        raise ValueError("No prediction counts in these batches: every label is -100, or every token is padding.")
    if broken := [name for name, value in moved.items() if not math.isfinite(value)]:
        raise ValueError(f"The divergence of {broken[0]} is not finite; check the model and the data.")
    errors = {name: (rough[name].dequantize() - matrix(m)).square().sum() for name, m in modules.items()}
    return {name: value / items / max(float(errors[name]), 1e-30) for name, value in moved.items()}


def _predictions(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(items, C): the logits that count, or the vectors of real tokens of a model without a head."""
    outputs, task = model(**batch), Task.of(model)
    if task.kind == "spans" or "logits" in outputs:
        found = task.logits(outputs, batch)
    else:
        found = token_rows(outputs["last_hidden_state"], text_mask(batch))
    return found if found.dtype == torch.float64 else found.float()


def _distance(model: PreTrainedModel, found: Tensor, exact: Tensor) -> Tensor:
    """Between predictions (items, C), summed over the items: KL divergence of probabilities, else squares."""
    problem = problem_of(model)
    if problem == "several_labels":
        binary = F.binary_cross_entropy_with_logits
        p = exact.sigmoid()
        return (binary(found, p, reduction="sum") - binary(exact, p, reduction="sum")) / exact.shape[1]
    if problem == "regression" or exact.shape[1] == 1 or auto_class_name(model) == "AutoModel":
        return (found - exact).square().mean(1).sum()
    return F.kl_div(found.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="sum")


def _omegas(model: PreTrainedModel, weights: Mapping[str, Tensor], batches: list, parts: int, tolerance: float,
            generator: torch.Generator) -> dict[str, float]:  # fmt: skip
    count = min(parts, len(batches))
    subsets = [list(islice(batches, i, None, count)) for i in range(count)]
    progress = progress_bar(total=len(weights), desc="Hessian eigenvalues", unit="module")
    omegas = {}
    with progress:
        for name, weight in weights.items():
            for other in weights.values():
                other.requires_grad_(other is weight)
            start = torch.randn(weight.shape, generator=generator).to(weight)
            values = []
            for subset in subsets:
                product = _product(model, {name: weight}, subset)
                value, start = top_eigenvalue(lambda v, p=product, n=name: p({n: v})[n], start, tolerance=tolerance)
                values.append(value)
            values = torch.tensor(values, dtype=torch.float64)
            omegas[name] = float(values.mean().abs() + values.std(correction=0))
            progress.update()
    return omegas


def top_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float = 1e-2
) -> tuple[float, Tensor]:
    """The eigenvalue of largest magnitude of a symmetric operator, with its eigenvector, by Lanczos' method.

    Of all vectors in the span of those multiplied so far (at most 8, then it starts anew from the best one). A power
    iteration would stand still between eigenvalues of opposite sign and like size.
    """
    basis, images = (start / start.norm()).flatten()[None], start.new_empty(0, start.numel())  # (m, n)
    value = math.nan
    for iteration in range(MAX_ITERATIONS):
        images = torch.cat([images, product(basis[-1].view_as(start)).flatten()[None]])
        inside = (basis @ images.T).double()
        values, vectors = torch.linalg.eigh((inside + inside.T) / 2)
        best = values.abs().argmax()
        change, value = abs(float(values[best]) - value), float(values[best])
        y, image = (vectors[:, best].to(basis) @ part for part in (basis, images))
        residual = image - value * y
        # the value's error is of the order of the residual squared
        is_near = residual.norm() <= math.sqrt(tolerance) * abs(value) and change <= tolerance * abs(value)
        if is_near and iteration >= MIN_ITERATIONS:
            return value, y.view_as(start)
        if len(basis) == LARGEST_BASIS:
            basis, images = y[None], image[None]
        for _ in range(2):  # twice, since what is left may be small
            residual = residual - basis.T @ (basis @ residual)
        if residual.norm() <= torch.finfo(residual.dtype).eps * abs(value):
            return value, y.view_as(start)
        basis = torch.cat([basis, residual[None] / residual.norm()])
    logger.info("The search for an eigenvalue stopped after %d rounds, short of its tolerance.", MAX_ITERATIONS)
    return value, y.view_as(start)


def _traces(model: PreTrainedModel, weights: Mapping[str, Tensor], batches: list, probes: int,
            generator: torch.Generator) -> dict[str, float]:  # fmt: skip
    traces = dict.fromkeys(weights, 0.0)
    product = _product(model, weights, batches)
    for _ in progress_bar(range(probes), desc="Hessian traces", unit="probe"):
        signs = {name: torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for name, w in weights.items()}
        for name, image in product(signs).items():
            traces[name] += float((signs[name] * image).sum()) / probes
    return {name: trace / weights[name].numel() for name, trace in traces.items()}


def _product(model: PreTrainedModel, weights: Mapping[str, Tensor], batches: list) -> Callable[[dict], dict]:
    """v to H v for the mean loss over `batches`, by central differences of its gradient."""

    def product(directions: dict[str, Tensor]) -> dict[str, Tensor]:
        size = math.sqrt(sum(float(v.square().sum()) for v in directions.values()))
        norm = math.sqrt(sum(float(w.detach().square().sum()) for w in weights.values()))
        step = RELATIVE_STEP * max(norm, 1e-8) / size
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        gradients = []
        try:
            for sign in (1, -1):
                for name, weight in weights.items():
                    weight.data.copy_(before[name] + sign * step * directions[name])
                gradients.append(_gradients(model, weights, batches))
        finally:
            for name, weight in weights.items():
                weight.data.copy_(before[name])
        plus, minus = gradients
        return {name: (plus[name] - minus[name]) / (2 * step) for name in weights}

    return product


def _gradients(model: PreTrainedModel, weights: Mapping[str, Tensor], batches: list) -> dict[str, Tensor]:
    """Of the mean loss over all that is labelled, however it is spread over the batches."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    counts = [_labelled(model, batch) for batch in batches]
    for batch, count in zip(batches, counts, strict=True):
        for name, gradient in _gradients_of(model, weights, batch):
            total[name] += gradient * (count / sum(counts))
    return total


def _labelled(model: PreTrainedModel, batch: Mapping) -> int:
    """What the loss of a batch is the mean of: tokens with a label, or examples."""
    labels = batch.get("labels")
    if labels is None or labels.dim() < 2 or labels.is_floating_point():
        return len(next(iter(batch.values())))
    is_causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))  # the first token is not predicted
    return int((labels[:, 1:] if is_causal else labels).ne(-100).sum())


def _gradients_of(
    model: PreTrainedModel, weights: Mapping[str, Tensor], batch: Mapping
) -> Iterator[tuple[str, Tensor]]:
    """Name and gradient of each weight that the loss depends on."""
    loss = model(**{k: v.to(model.device) for k, v in batch.items()}).loss
    if loss is None:
        raise ValueError("The model gave no loss: the batches need `labels`.")
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, found, strict=True):
        if gradient is None:
            continue
        if not gradient.isfinite().all():
            raise ValueError(f"The gradient of {name} is not finite; check the model and the data.")
        yield name, gradient
