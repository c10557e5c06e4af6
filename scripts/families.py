"""Tries every operation on a tiny random model of every family, and writes docs/families.md.

    python scripts/families.py

Each cell is tried against a property that holds only if the operation is right: a model without a head computes what it
does where that head's output is zero, a packed model computes with the weights that its layers stand for, and so on.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import hf_compress as hfc
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.model.anatomy import is_readable, matrix

INTRODUCTION = """# Families

What works on which family, tried on a tiny random model of each; `scripts/families.py` writes this page, and fails
where a cell is wrong. "refused" is an error before anything has changed, with the sentence of that number below.
Models of other names that are built like one of these work as it does (XLM-RoBERTa as RoBERTa, Mistral as Llama).

"""

BERT_LIKE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, vocab_size=64,
                 max_position_embeddings=64)  # fmt: skip
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA_LIKE = dict(BERT_LIKE, **SPECIAL, num_key_value_heads=2, head_dim=8)
T5_LIKE = dict(d_model=32, num_layers=2, num_decoder_layers=2, num_heads=4, d_kv=8, d_ff=48, vocab_size=64,
               pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)  # fmt: skip
XLM_LIKE = dict(emb_dim=32, n_layers=4, n_heads=4, n_words=64, vocab_size=64, max_position_embeddings=64, pad_index=0)

CONFIGS = {  # model_type -> config: encoders, decoders, encoder-decoders, pictures
    "bert": BERT_LIKE,
    "roberta": dict(BERT_LIKE, **SPECIAL),
    "electra": dict(BERT_LIKE, embedding_size=32),
    "distilbert": dict(dim=32, n_layers=4, n_heads=4, hidden_dim=48, vocab_size=64, max_position_embeddings=64),
    "deberta-v2": dict(BERT_LIKE, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "modernbert": dict(BERT_LIKE, pad_token_id=0, cls_token_id=1, sep_token_id=2, local_attention=8,
                       global_attn_every_n_layers=2),
    "albert": dict(BERT_LIKE, embedding_size=16),
    "convbert": dict(BERT_LIKE, embedding_size=32, head_ratio=2, conv_kernel_size=3),
    "deberta": dict(BERT_LIKE, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8),
    "flaubert": XLM_LIKE,
    "fnet": dict(hidden_size=32, num_hidden_layers=4, intermediate_size=48, vocab_size=64, max_position_embeddings=64),
    "longformer": dict(BERT_LIKE, attention_window=[4, 4, 8, 8], pad_token_id=0, sep_token_id=2),
    "mobilebert": dict(BERT_LIKE, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2),
    "mpnet": dict(BERT_LIKE, pad_token_id=1),
    "squeezebert": dict(BERT_LIKE, embedding_size=32),
    "xlm": XLM_LIKE,
    "gpt2": dict(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=64, **SPECIAL),
    "llama": LLAMA_LIKE,
    "qwen2": dict(LLAMA_LIKE, use_sliding_window=False),
    "qwen3": LLAMA_LIKE,
    "gemma3_text": dict(LLAMA_LIKE, query_pre_attn_scalar=8, sliding_window=16),
    "bloom": dict(hidden_size=32, n_layer=4, n_head=4, vocab_size=64, **SPECIAL),
    "falcon": dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_hidden_size=48, vocab_size=64,
                   multi_query=True, new_decoder_architecture=False, **SPECIAL),
    "gpt_neo": dict(hidden_size=32, num_layers=4, num_heads=4, intermediate_size=48, vocab_size=64, window_size=8,
                    max_position_embeddings=64, attention_types=[[["global", "local"], 2]], **SPECIAL),
    "gpt_neox": dict(BERT_LIKE, **SPECIAL),
    "opt": dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=48, vocab_size=64,
                max_position_embeddings=64, word_embed_proj_dim=32, **SPECIAL),
    "phi3": dict(BERT_LIKE, **SPECIAL, num_key_value_heads=2),
    "bart": dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                 encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_position_embeddings=64, **SPECIAL,
                 decoder_start_token_id=2, forced_eos_token_id=2),
    "mt5": T5_LIKE,
    "t5": T5_LIKE,
    "vit": dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=16,
                patch_size=4),
}  # fmt: skip
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "gemma3_text", "bloom", "falcon", "gpt_neo", "gpt_neox", "opt", "phi3")
ENCODER_DECODERS = ("bart", "mt5", "t5")


@dataclass(frozen=True)
class Trial:
    """A tiny random model of a family, and what it is fed."""

    family: str

    def model(self) -> PreTrainedModel:
        config = AutoConfig.for_model(self.family, **CONFIGS[self.family])
        kind = AutoModelForSequenceClassification
        if self.family in DECODERS:
            kind = AutoModelForCausalLM
        if self.family in ENCODER_DECODERS:
            kind = AutoModelForSeq2SeqLM
        if self.family == "vit":
            kind = AutoModelForImageClassification
        torch.manual_seed(0)
        return kind.from_config(config).eval()

    def batch(self, *, seed: int = 0, rows: int = 4, labels: bool = False) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.family == "vit":
            batch = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
        else:
            ids = torch.randint(6, 60, (rows, 16), generator=generator)
            mask = torch.ones_like(ids)
            if self.family != "fnet":  # it takes no mask, and mixes padding in
                mask[1, 10:] = 0
            batch = {"input_ids": ids * mask, "attention_mask": mask}
            if self.family in ENCODER_DECODERS:
                batch["decoder_input_ids"] = ids[:, :9]
            if self.family == "fnet":
                del batch["attention_mask"]
        if labels:
            is_text = self.family in (*DECODERS, *ENCODER_DECODERS)
            text = batch.pop("decoder_input_ids", batch.get("input_ids"))
            batch["labels"] = text.contiguous() if is_text else torch.arange(rows) % 2
        return batch

    @torch.no_grad()
    def logits(self, model: PreTrainedModel, **changes: Tensor) -> Tensor:
        return model(**{**self.batch(), **changes}).logits

    @torch.no_grad()
    def last_states(self, model: PreTrainedModel) -> Tensor:
        outputs = model(**self.batch(), output_hidden_states=True)
        return (outputs.decoder_hidden_states if "decoder_hidden_states" in outputs else outputs.hidden_states)[-1]


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
    attention = hfc.anatomy(model).attentions[1]
    gone = list(range(attention.num_heads // attention.num_key_value_heads))  # with the key and value they share
    hfc.prune_heads(model, {1: gone})
    silence(hfc.anatomy(twin).attentions[1].output, range(len(gone) * attention.head_dim))
    close(trial.logits(model), trial.logits(twin))
    assert not torch.allclose(trial.logits(model), trial.logits(trial.model()))


def cut_neurons(trial: Trial) -> None:
    """Without a neuron the model computes what it does where the neuron's output is zero."""
    model, twin = trial.model(), trial.model()
    hfc.prune_neurons(model, {1: [0, 5, 7]})
    silence(hfc.anatomy(twin).layers[1].feed_forward.output, [0, 5, 7])
    close(trial.logits(model), trial.logits(twin))
    assert not torch.allclose(trial.logits(model), trial.logits(trial.model()))


def take_out_layers(trial: Trial) -> None:
    """Without a layer the model computes what it does where the layer hands its input on."""
    model, twin = trial.model(), trial.model()
    layers = hfc.anatomy(twin).layers
    hfc.prune_layers(model, [i for i in range(len(layers)) if i != 1])

    def pass_on(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layers[1].module.register_forward_hook(pass_on, with_kwargs=True)
    close(trial.logits(model), trial.logits(twin))


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
    """Pruned where that is possible, and packed, the model comes back as it was."""
    model = trial.model()
    if is_readable(model):
        hfc.prune_neurons(model, {0: [1, 2], 1: [0]})
    hfc.quantize(model, 8)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        close(trial.logits(type(model).from_pretrained(folder).eval()), trial.logits(model))


def head_importance(trial: Trial) -> None:
    """A head whose output is zero matters to no loss; the others do."""
    model = trial.model()
    attention = hfc.anatomy(model).attentions[1]
    silence(attention.output, range(attention.head_dim))
    scores = hfc.head_importance(model, [trial.batch(labels=True)])
    assert scores.shape == (len(hfc.anatomy(model).attentions), attention.num_heads)
    assert scores[1, 0] == 0 and (scores[1, 1:] > 0).all() and (scores[0] > 0).all()


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
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "families.md")
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
