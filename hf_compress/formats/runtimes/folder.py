"""Folders that OpenVINO or ONNX Runtime run without torch, transformers or us: written whole, and checked."""

import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hf_compress.checkpoint.bits import packed_modules
from hf_compress.files.whole import check_free, whole_folder
from hf_compress.formats.runtimes.agreement import (
    BOUND,
    Session,
    check_batches,
    check_runs,
    first_difference,
    measure_agreement,
    reason,
)
from hf_compress.formats.runtimes.readme import is_embedder, readme, write_readme
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.packed_blocks import PackedBlocksLinear
from hf_compress.model.pooling import pooling_of, write_pooling
from hf_compress.model.record import read_record
from hf_compress.version import __version__

logger = logging.getLogger(__name__)
RECORD = "hf_compress.json"  # what is inside, and how far it agreed with the model it was written from


class Exported(Protocol):
    """A model in a runtime's own terms."""

    format: str
    tested: dict[str, str]  # packages and the versions that the tests ran with
    folded: list[str]  # packed modules whose outputs became constants

    def __init__(self, model: PreTrainedModel, inputs: list[str] | None): ...

    def save(self, folder: Path) -> None: ...

    def session(self, *, watch: bool = False) -> Session:
        """What the file says; with `watch` also each packed module's product, under the module's name."""

    def fast_session(self) -> Session | None:
        """As the README runs it here, where that may round more than the file says."""


def write_folder(model: PreTrainedModel, folder: Path, kind: type[Exported],
                 tokenizer: PreTrainedTokenizerBase | None, calibration: Iterable | None,
                 bound: float | None = None) -> None:  # fmt: skip
    """Write `model` as a `kind`, run it there beside `model`, and only then keep the folder.

    `bound` is what outputs may differ by, relative to their size; by default that of the numbers that are stored.
    Raises ValueError for what the format cannot say and ImportError for a runtime that is not there, both before
    anything is written, and RuntimeError, naming the first layer that differs, where the runtime says something else.
    """
    check_free(folder)
    warn_of_other_versions(kind.tested)
    tokenizer = tokenizer or tokenizer_beside(model)
    if tokenizer is not None and not tokenizer.is_fast:
        raise ValueError("A folder for a runtime holds a tokenizer.json: this tokenizer has none. Pass a fast one.")
    lines, batches = readme(model, kind.format, tokenizer), check_batches(model, calibration, tokenizer)
    if tokenizer is not None:
        check_pair(tokenizer, model.get_input_embeddings().num_embeddings)
    with quiet(), in_eval(model):
        check_runs(model, batches[-1])
        exported = kind(model, None if tokenizer is None else tokenizer.model_input_names)
        agreement = measure_agreement(model, loaded(model, exported.session), batches)
        check(model, exported, agreement["outputs"], batches, bound)
        if (fast := loaded(model, exported.fast_session)) is not None:
            agreement["on_this_processor"] = measure_agreement(model, fast, batches)["outputs"]
            check(model, exported, agreement["on_this_processor"], batches, bound)
        with whole_folder(folder) as beside:
            exported.save(beside)
            complete_config(beside / "config.json", model)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
            if is_embedder(model):  # sentence-transformers opens the folder by these, and comparisons pool by them
                write_pooling(beside, pooling_of(model), model.config.get_text_config().hidden_size)
            write_readme(beside, lines)
            contents = describe(model, exported, agreement)
            (beside / RECORD).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    logger.info("%s agrees with the model: %s", folder, agreement["outputs"])


def loaded(model: PreTrainedModel, session: Callable[[], Session | None]) -> Session | None:
    """What `session` gives. Raises RuntimeError, with the runtime's own reason, where it does not load the graph."""
    try:
        return session()
    except Exception as error:  # each runtime has its own
        raise RuntimeError(
            f"The graph of {type(model).__name__} does not load: {reason(error)} Nothing was kept. Export as 'plain'."
        ) from error


def check(model: PreTrainedModel, exported: Exported, outputs: dict[str, dict], batches: list[dict],
          bound: float | None = None) -> None:  # fmt: skip
    """Raise RuntimeError where an output differs by more than the bound, naming the first layer that does."""
    if bound is None:
        is_exact = model.dtype == torch.float32 and not any(True for _ in packed_modules(model))
        bound = BOUND["float" if is_exact else "rounded"]
    differences = {name: output["relative_difference"] for name, output in outputs.items()}
    if all(difference <= bound for difference in differences.values()):  # NaN is not
        return
    layer = first_difference(model, exported.session(watch=True), batches[0], bound)
    raise RuntimeError(
        f"What was written differs from the model by {differences} of its outputs, more than {bound:g}; the first "
        f"layer that differs is {layer or 'none of the packed ones'}. Nothing was kept. Export as 'plain'."
    )


def complete_config(config: Path, model: PreTrainedModel) -> None:
    """Changes the file: it says of which class the model is, and its labels also where they are Transformers' own."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values["architectures"] = [type(model).__name__]
    values["id2label"] = {str(i): label for i, label in model.config.id2label.items()}
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def describe(model: PreTrainedModel, exported: Exported, agreement: dict) -> dict:
    """What hf_compress.json says: what is inside, with which versions it was written, and the agreement."""
    kinds = BlockSparseLinear, PackedBlocksLinear
    sparse = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if sparse:
        logger.warning("%s has no block-sparse product: %s leave with their zeros.", exported.format, sparse)
    if exported.folded:
        logger.warning("%s became constants: their inputs are always the same.", exported.folded)
    weights = Counter()
    for _, module in packed_modules(model):
        weights[f"{module.scheme.bits} bit"] += module.weight.numel()
    return {
        "hf_compress": __version__,
        "format": exported.format,
        "model": type(model).__name__,
        "packages": {name: version(name) for name in (*exported.tested, "torch")},
        "packed_weights": dict(weights),
        "left_dense": sparse,
        "made_constants": exported.folded,
        "record": read_record(model.config),
        "agreement": agreement,
    }


def tokenizer_beside(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the folder that `model` came from, if it came from one."""
    folder = Path(model.name_or_path or "")
    if not model.name_or_path or not (folder / "tokenizer_config.json").is_file():
        logger.warning("No tokenizer was given: the folder will have none. Pass `tokenizer` to make it complete.")
        return None
    return AutoTokenizer.from_pretrained(folder)


def check_pair(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise ValueError unless a table of so many `rows` has one for each token: runtimes read beyond its end."""
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        raise ValueError(f"The tokenizer has a token {last}, the model {rows} rows: they are not a pair.")


def warn_of_other_versions(tested: dict[str, str]) -> None:
    others = {name: version(name) for name, known in tested.items() if version(name) != known}
    if others:
        logger.warning("Exports were tested with %s; installed are %s.", tested, others)


@contextmanager
def in_eval(model: PreTrainedModel) -> Iterator[None]:
    """`model` in eval mode while open; each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters say of versions, dynamic axes and each of their steps: ours were tested together."""
    level = transformers_logging.get_verbosity()
    # some of transformers' loggers are named by their file, which its verbosity does not reach
    names = [name for name in {*logging.root.manager.loggerDict, "torch.onnx"} if is_exporters(name)]
    loggers = [logging.getLogger(name) for name in names]
    levels = [exporter.level for exporter in loggers]
    transformers_logging.set_verbosity_error()
    for exporter in loggers:
        exporter.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        for exporter, before in zip(loggers, levels, strict=True):
            exporter.setLevel(before)


def is_exporters(name: str) -> bool:
    return name.startswith("torch.onnx") or ("transformers" in name and "exporters" in name)
