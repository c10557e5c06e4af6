"""Tries every operation on a tiny random model of every family, and writes docs/families.md.

    python scripts/checks/families.py

Each cell is tried against a property that holds only if the operation is right: a model without a head computes what it
does where that head's output is zero, a packed model computes with the weights that its layers stand for, and so on.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

import hf_compress as hfc
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.model.anatomy import matrix
from hf_compress.model.cuttable import cuttable

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.checks.family_models import CONFIGS, ENCODER_DECODERS, Trial  # noqa: E402

INTRODUCTION = """# Families

What works on which family, tried on a tiny random model of each; `scripts/checks/families.py` writes this page, and
fails where a cell is wrong. "refused" is an error before anything has changed, with the sentence of that number below.
Models of other names that are built like one of these work as it does (XLM-RoBERTa as RoBERTa, Mistral as Llama).

"""


def fewer_layers(trial: Trial) -> None:
    """Each tensor of the student is one of the teacher's, and there are as many layers as asked for."""
    teacher = trial.model()
    number = 1 if trial.family in ENCODER_DECODERS else 2
    student = hfc.make_student(teacher, num_hidden_layers=number)
    assert [len(stack.layers) for stack in hfc.anatomy(student).stacks] == [number] * len(hfc.anatomy(teacher).stacks)
    theirs = [tensor for tensor in teacher.state_dict().values()]
    for name, mine in student.state_dict().items():
        assert any(mine.shape == other.shape and torch.equal(mine, other) for other in theirs), f"{name} is not copied"
    assert trial.logits(student).isfinite().all()


def narrower(trial: Trial) -> None:
    """The student has the widths asked for, and nothing but numbers of the teacher."""
    teacher = trial.model()
    heads = {} if trial.family == "fnet" else {"num_attention_heads": 2}
    student = hfc.make_student(teacher, hidden_size=16, intermediate_size=24, **heads)
    parts = hfc.anatomy(student)
    assert parts.hidden_size == 16
    assert all(attention.num_heads == 2 for layer in parts.layers for attention in layer.attentions)
    assert {layer.feed_forward.num_neurons for layer in parts.layers} == {24}
    numbers = torch.cat([parameter.flatten() for parameter in teacher.parameters()])
    fixed = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    for name, parameter in student.named_parameters():
        assert name in fixed or torch.isin(parameter, numbers).all(), f"{name} holds other numbers than the teacher"
    assert trial.logits(student).isfinite().all()


def cut_heads(trial: Trial) -> None:
    """Without a head the model computes what it does where the head's output is zero."""
    model, twin = trial.model(), trial.model()
    number, attention = list(enumerate(cuttable(model).attentions))[:2][-1]  # ALBERT has one
    size = attention.num_heads // attention.num_key_value_heads  # those that share a key and value go together
    gone = list(range(size if size < attention.num_heads else 1))
    hfc.prune_heads(model, {number: gone})
    silence(cuttable(twin).attentions[number].output, range(len(gone) * attention.head_dim))
    close(trial.logits(model), trial.logits(twin))
    assert not torch.equal(trial.logits(model), trial.logits(trial.model()))


def cut_neurons(trial: Trial) -> None:
    """Without a neuron the model computes what it does where the neuron's output is zero."""
    model, twin = trial.model(), trial.model()
    number, layer = list(enumerate(cuttable(twin).layers))[:2][-1]
    hfc.prune_neurons(model, {number: [0, 5, 7]})
    silence(layer.feed_forward.output, [0, 5, 7])
    close(trial.logits(model), trial.logits(twin))
    assert not torch.equal(trial.logits(model), trial.logits(trial.model()))


def take_out_layers(trial: Trial) -> None:
    """Without a layer the model computes what it does where the layer hands its input on."""
    model, twin = trial.model(), trial.model()
    if trial.family == "albert":  # one layer runs again and again
        twin.config.num_hidden_layers -= 1
        hfc.prune_layers(model, range(twin.config.num_hidden_layers))
    else:
        layers = cuttable(twin).layers
        hfc.prune_layers(model, [i for i in range(len(layers)) if i != 1])
        skip(twin, layers[1].module)
    close(trial.logits(model), trial.logits(twin))


def skip(model: PreTrainedModel, block: nn.Module) -> None:
    def pass_on(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    if isinstance(block, nn.ModuleList):  # XLM: the parts of a layer are each in a list of their own
        for part in block:
            part.register_forward_hook(lambda m, args, y: (y[0] * 0,) if isinstance(y, tuple) else y * 0)
        for norms in (model.transformer.layer_norm1, model.transformer.layer_norm2):
            norms[1].register_forward_hook(pass_on, with_kwargs=True)
    else:
        block.register_forward_hook(pass_on, with_kwargs=True)


def cut_vocabulary(trial: Trial) -> None:
    """Texts of kept tokens have the same outputs."""
    words = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]", *(f"w{i}" for i in range(5, 64))]
    backend = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", cls_token="[CLS]", mask_token="[MASK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    model = trial.model()
    smaller = hfc.prune_vocabulary(model, tokenizer, keep=range(5, 62))
    assert model.get_input_embeddings().num_embeddings < 64
    kept = torch.tensor(tokenizer.convert_tokens_to_ids(smaller.convert_ids_to_tokens(range(len(smaller)))))
    new = torch.zeros(64, dtype=torch.long)
    new[kept] = torch.arange(len(kept))
    batch = trial.batch()
    renumbered = {name: new[batch[name]] for name in ("input_ids", "decoder_input_ids") if name in batch}
    before = trial.logits(trial.model())
    close(trial.logits(model, **renumbered), before[..., kept] if before.shape[-1] == 64 else before)


def round_to_nearest(trial: Trial) -> None:
    packed_as_dequantized(trial, hfc.quantize(trial.model(), 4))


def gptq(trial: Trial) -> None:
    """On what it was calibrated with, the last states are nearer to the model's than by rounding."""
    data = [trial.batch(seed=seed) for seed in range(8)]
    packed = hfc.quantize(trial.model(), 3, method="gptq", calibration=data, exact_products=True)
    rounded = hfc.quantize(trial.model(), 3, range_method="minmax")
    exact = trial.last_states(trial.model())
    assert (trial.last_states(packed) - exact).norm() < (trial.last_states(rounded) - exact).norm()
    packed_as_dequantized(trial, packed)


def train_and_pack(trial: Trial) -> None:
    """Packed, the model has the outputs that it was trained with."""
    model = hfc.prepare_qat(trial.model().train(), 4, embedding_bits=None)
    model(**trial.batch())  # ranges of activations
    trained = trial.logits(model.eval())
    close(trial.logits(hfc.pack_qat(model)), trained)


def save_and_load(trial: Trial) -> None:
    """Pruned and packed, the model comes back as it was."""
    model = trial.model()
    hfc.prune_neurons(model, {number: [0, 2][: number + 1] for number, _ in enumerate(cuttable(model).layers[:2])})
    hfc.quantize(model, 8)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        close(trial.logits(type(model).from_pretrained(folder).eval()), trial.logits(model))


def head_importance(trial: Trial) -> None:
    """A head whose output is zero matters to no loss; the others do."""
    model = trial.model()
    attentions = cuttable(model).attentions
    number, attention = list(enumerate(attentions))[:2][-1]
    silence(attention.output, range(attention.head_dim))
    scores = hfc.head_importance(model, [trial.batch(labels=True)])
    assert scores.shape == (len(attentions), attention.num_heads)
    assert scores[number, 0] == 0 and (scores[number, 1:] > 0).all() and (scores[:number] > 0).all()


OPERATIONS = {
    "student: fewer layers": fewer_layers,
    "student: narrower": narrower,
    "`prune_heads`": cut_heads,
    "`prune_neurons`": cut_neurons,
    "`prune_layers`": take_out_layers,
    "`prune_vocabulary`": cut_vocabulary,
    "`quantize`, to nearest": round_to_nearest,
    "`quantize`, GPTQ": gptq,
    "`prepare_qat`, `pack_qat`": train_and_pack,
    "saved and loaded": save_and_load,
    "`head_importance`": head_importance,
}


def packed_as_dequantized(trial: Trial, packed: PreTrainedModel) -> None:
    """A packed model computes with the weights that its layers stand for, and most of them are others than before."""
    outputs, before = trial.logits(packed), trial.logits(trial.model())
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    assert not torch.allclose(outputs, before)
    close(outputs, trial.logits(packed.dequantize()))


@torch.no_grad()
def silence(output: nn.Module, columns: Iterable[int]) -> None:
    matrix(output)[:, list(columns)] = 0


def close(mine: Tensor, theirs: Tensor) -> None:
    """Sums of at most 64 products in another order."""
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def attempt(family: str, operation: Callable[[Trial], None]) -> str:
    """ "works", the sentence of a refusal, or "wrong: ..."."""
    try:
        operation(Trial(family))
    except ValueError as refusal:
        return str(refusal)
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}".strip()
    return "works"


def table(results: dict[str, dict[str, str]]) -> str:
    """The page: a mark for each cell, and the sentences of the refusals below."""
    notes: dict[str, int] = {}
    lines = ["| family | " + " | ".join(OPERATIONS) + " |", "|---" * (len(OPERATIONS) + 1) + "|"]
    for family, row in results.items():
        cells = []
        for outcome in row.values():
            if outcome == "works" or outcome.startswith("wrong"):
                cells.append("works" if outcome == "works" else "**wrong**")
            else:
                cells.append(f"refused ({notes.setdefault(outcome, len(notes) + 1)})")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    refusals = [f"{number}. {' '.join(sentence.split())}" for sentence, number in notes.items()]
    return INTRODUCTION + "\n".join([*lines, "", "## Refusals", "", *refusals]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs" / "families.md")
    parser.add_argument("--families", nargs="*", default=list(CONFIGS), help="all by default")
    options = parser.parse_args()
    logging.disable_progress_bar()
    results = {}
    for family in options.families:
        results[family] = {name: attempt(family, operation) for name, operation in OPERATIONS.items()}
        for name, outcome in results[family].items():
            print(f"{family:12} {name:26} {outcome[:160]}", flush=True)
    options.output.write_text(table(results), encoding="utf-8")
    return any(outcome.startswith("wrong") for row in results.values() for outcome in row.values())


if __name__ == "__main__":
    raise SystemExit(main())
