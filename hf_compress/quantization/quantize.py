"""One call that replaces linear layers and embeddings of a model by packed ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_compress.checkpoint.bits import packed_modules, settle_bits
from hf_compress.checkpoint.offloaded import bring_in, finish_offloaded
from hf_compress.checkpoint.packed_ties import untie_packed
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme
from hf_compress.model.calibration_data import calibration_batches
from hf_compress.model.classes import ModelT
from hf_compress.model.unfinished import check_finished, check_loaded
from hf_compress.quantization.block_by_block import BlockOptions, Walk
from hf_compress.quantization.codebooks import CODEBOOKS, input_importance, install_codebook, num_codebook_levels
from hf_compress.quantization.fake_quantize import activation_ranges
from hf_compress.quantization.gptq_model import GPTQ
from hf_compress.quantization.grids import RANGES, round_to_nearest
from hf_compress.quantization.modules import choose_modules, dense_blocks, install, matrix, scheme_for
from hf_compress.quantization.product import ROWS_PER_CENTROID, install_parts, parts_scheme
from hf_compress.quantization.signround import SignRound

WALKS: dict[str, type[Walk]] = {"gptq": GPTQ, "signround": SignRound}
METHODS = (*WALKS, "rtn")


@torch.no_grad()
def quantize(
    model: ModelT,
    bits: int | Mapping[str, int] = 4,
    *,
    method: str = "rtn",
    group_size: int | str = "auto",
    symmetric: bool = False,
    calibration: Iterable | None = None,
    embedding_bits: int | None = None,
    embedding_parts: int | None = None,
    embedding_stages: int = 1,
    activation_bits: int | None = None,
    static_activations: bool = False,
    skip_modules: Sequence[str] = (),
    grid: str = "uniform",
    bias_correction: bool = False,
    range_method: str = "mse",
    scale_dtype: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **method_options,
) -> ModelT:
    """Replace linear layers by layers of few bits, in place. Returns the model, ready to run, save and adapt.

    Args:
        bits (`int` or `dict`): 2, 3, 4 or 8 for every linear map inside the transformer layers, or {module name: bits}
            for exactly those modules, which may also be heads and embeddings.
        method (`str`): "rtn" rounds to nearest and needs no data; "gptq" (Frantar et al., 2023) and "signround" (Cheng
            et al., 2023) need `calibration`.
        group_size (`int` or `str`): consecutive weights along the columns that share a scale; -1 for the whole row;
            "auto" for the largest of 128, 64 and 32 that divides the columns, the whole row where none does.
        symmetric (`bool`): fix the zero point at mid-range instead of storing one for each group.
        calibration: for "gptq" and "signround", for `static_activations`, and for grid "kmeans", whose centroids then
            weigh by the Hessian's diagonal: rows with `input_ids` (pixels for image models), a data loader's batches,
            arrays, or texts, which need `tokenizer`. The same text gives the same model; 128 rows of 512 tokens will
            do.
        embedding_bits (`int`, *optional*): also pack the embedding tables, one scale a row, rounded to nearest.
        embedding_parts (`int`, *optional*): cut the rows of tables into so many parts, each an index of
            `embedding_bits` into centroids (product quantization, Gong et al., 2014). Tables of few rows, or of fewer
            columns than parts, are rounded as without.
        embedding_stages (`int`): each part is the sum of so many centroids (residual quantization).
        activation_bits (`int`, *optional*): 8 rounds the inputs of each packed linear layer to the token's own 8-bit
            grid as they come; with 8-bit symmetric weights and one scale a row, products are those of integers.
        static_activations (`bool`): instead, one grid for all inputs of a layer, over the range that they have in
            `calibration`, as the runtimes multiply them fastest. Training finds better ones: `prepare_qat`.
        skip_modules: names, or regular expressions that match whole names, of modules to leave alone.
        grid (`str`): "uniform", or for method "rtn" a codebook: "balanced", "kmeans", "power_of_two", "multibit", at 2
            bits "ternary", and at 1 bit "binary". Levels are stored for each group, so let groups be large (-1).
        bias_correction (`bool`): of a codebook: move the levels so that each group keeps its mean and spread.
        range_method (`str`): "mse", "minmax", "percentile", "kl", or "aciq", the best clip of a bell of that width.
        scale_dtype (`str`): "float16"; "float32"; or "auto": float32 for modules whose weights are too small or too
            large for float16, and float16 for all others.
        tokenizer: the model's own, where `calibration` holds texts.
        method_options: the fields of `GPTQOptions` or `SignRoundOptions`.

    Block-sparse maps keep their blocks: only those are saved, in few bits.
    Raises ValueError for a model that is quantized already or holds adapters, for unknown modules and bits, and for
    groups that do not divide.
    """
    check_loaded(model, "quantize")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    if method in WALKS and calibration is None:
        raise ValueError(f"method={method!r} needs `calibration`: a dataset of rows with `input_ids`.")
    if method == "rtn" and (
        method_options or (calibration is not None and grid != "kmeans" and not static_activations)
    ):
        raise ValueError(
            f"method='rtn' takes no options {sorted(method_options)}, and calibration only with grid='kmeans' or "
            f"static_activations; use one of {sorted(WALKS)} as method."
        )
    if range_method not in RANGES:
        raise ValueError(f"range_method must be one of {sorted(RANGES)}, got {range_method!r}.")
    options = _walk_options(method, method_options) if method in WALKS else None
    if static_activations:
        _check_static(activation_bits, calibration, options)
    if method == "rtn" and calibration is not None and any(p.is_meta for p in model.parameters()):
        raise ValueError("Calibration runs the whole model in memory, and some of this one is on disk.")
    check_grid(grid, method, symmetric=symmetric, activation_bits=activation_bits, bias_correction=bias_correction)
    check_finished(model, "quantize")
    if any(packed_modules(model)):
        raise ValueError("The model is quantized already. Call `model.dequantize()` first, or load the original.")
    stores_g_idx = options is not None and options.stores_g_idx
    with dense_blocks(model) as blocks:
        if blocks and (method != "rtn" or grid != "uniform"):
            raise ValueError(
                f"Blocks of zeros stay zeros on a uniform grid, and not with method={method!r} and grid={grid!r}. Use "
                "method='rtn' and grid='uniform', or quantize in place of `to_block_sparse`."
            )
        schemes = {}
        chosen = choose_modules(
            model, bits, embedding_bits=embedding_bits, skip_modules=skip_modules, one_bit=grid == "binary"
        )
        for name, width in chosen.items():
            module, num_levels = model.get_submodule(name), None
            if grid != "uniform" and not isinstance(module, nn.Embedding):
                num_levels = num_codebook_levels(grid, width, name)
            schemes[name] = scheme_for(module, name, width, group_size=group_size, symmetric=symmetric,
                                       desc_act=stores_g_idx, scale_dtype=scale_dtype, num_levels=num_levels,
                                       activation_bits=activation_bits)  # fmt: skip
        if embedding_parts is not None or embedding_stages != 1:
            schemes |= _in_parts(model, schemes, embedding_parts, embedding_stages)
        importance, batches = {}, ()
        if calibration is not None:
            size = {} if options is None else {"batch_size": options.batch_size}
            batches = calibration_batches(calibration, model, tokenizer=tokenizer, **size)
        linear = {n: s for n, s in schemes.items() if not isinstance(model.get_submodule(n), nn.Embedding)}
        if grid == "kmeans" and calibration is not None:
            importance = input_importance(model, [n for n, s in linear.items() if s.num_levels is not None], batches)
        if static_activations:
            ranges = activation_ranges(model, list(linear), batches)
            linear = {n: replace(s, activation_range=ranges[n]) for n, s in linear.items()}
            schemes |= linear
        if options is not None:
            WALKS[method](model, linear, batches, options, range_method=range_method).run()
        for name, scheme in schemes.items():
            module = model.get_submodule(name)
            if isinstance(module, PackedLinear):
                continue
            bring_in(module)
            if scheme.parts is not None:
                install_parts(model, name, scheme)
            elif scheme.num_levels is not None:
                install_codebook(model, name, scheme, grid, importance=importance.get(name),
                                 bias_correction=bias_correction)  # fmt: skip
            else:
                rounded = round_to_nearest(matrix(module), scheme, range_method=range_method, name=name)
                install(model, name, rounded, scheme)
    untie_packed(model)
    settle_bits(model)
    finish_offloaded(model)
    return model


def check_grid(grid: str, method: str, *, symmetric: bool, activation_bits: int | None, bias_correction: bool) -> None:
    """Raise ValueError for a grid that is not known, or that does not go with the rest of `quantize`."""
    if bias_correction and grid not in CODEBOOKS:
        raise ValueError(f"bias_correction moves the levels of a codebook: use one of {sorted(CODEBOOKS)} as grid.")
    if grid not in ("uniform", *CODEBOOKS) or (grid != "uniform" and (method != "rtn" or symmetric or activation_bits)):
        raise ValueError(
            f"grid must be 'uniform' or, with method='rtn' and without symmetric and activation_bits, one of "
            f"{sorted(CODEBOOKS)}; got {grid!r}."
        )


def _check_static(activation_bits: int | None, calibration: Iterable | None, options: BlockOptions | None) -> None:
    if activation_bits is None or calibration is None:
        raise ValueError(
            "static_activations finds the range of each layer's inputs: give activation_bits=8 and `calibration`, a "
            "dataset of rows with `input_ids`."
        )
    if options is not None and options.is_split:
        raise ValueError("static_activations needs all of the calibration in each process: leave out split_over_ranks.")


def _walk_options(method: str, given: Mapping[str, object]) -> BlockOptions:
    kind = WALKS[method].options_class
    known = sorted(field.name for field in fields(kind))
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"method={method!r} takes no options {unknown}: it has {', '.join(known)}.")
    return kind(**given)


def _in_parts(
    model: nn.Module, schemes: Mapping[str, WeightScheme], parts: int | None, stages: int
) -> dict[str, WeightScheme]:
    """The schemes of the tables that are stored in parts. Raises ValueError where there is none."""
    if parts is None:
        raise ValueError(f"embedding_stages={stages} comes with embedding_parts, 1 for whole rows, got none.")
    tables = {n: m for n in schemes if isinstance(m := model.get_submodule(n), nn.Embedding)}
    found = {
        name: parts_scheme(table, name, schemes[name], parts=parts, stages=stages) for name, table in tables.items()
    }
    found = {name: scheme for name, scheme in found.items() if scheme.parts is not None}
    if not found:
        raise ValueError(
            f"embedding_parts={parts} is for tables that `embedding_bits` or `bits` names, of more than "
            f"{ROWS_PER_CENTROID} * 2^bits rows and as many columns as parts; there is none among {sorted(tables)}."
        )
    return found
