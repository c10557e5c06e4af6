"""The public verbs for the test of their sequences: each draws what it asks, and says what a slow reference answers.

A verb takes the walk and a source of chance, changes the walk, and returns the logits that the reference expects.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from silence import silenced
from surgery.test_layers import skip_layers
from surgery.test_vocabulary import TEXTS, model_for, trained
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_compress as hfc
from hf_compress.checkpoint.bits import packed_modules
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.low_rank import LowRankLinear
from hf_compress.model.anatomy import Attention, anatomy, matrix
from hf_compress.quantization.codebooks import CODEBOOKS
from hf_compress.surgery.tokenizer import needed_tokens


def as_linear(module: nn.Linear, weight: Tensor) -> nn.Linear:
    """An ordinary map in the place of one that is stored otherwise."""
    made = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    made.weight, made.bias = nn.Parameter(weight), module.bias
    return made


@dataclass
class Walk:
    """A model in float64 on its way through verbs, and a folder that each may use."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    done: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, family: str, folder: Path) -> "Walk":
        tokenizer = trained("wordpiece")
        return cls(model_for(tokenizer, family).double(), tokenizer, folder)

    def logits(self, model: nn.Module | None = None) -> Tensor:
        batch = self.tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            model = (self.model if model is None else model).eval()
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def new_folder(self) -> Path:
        return self.folder / str(len(self.done))

    def opened(self, folder: Path) -> PreTrainedModel:
        return type(self.model).from_pretrained(folder, dtype=torch.float64)

    def plain(self) -> PreTrainedModel:
        """A copy in which packed maps are ordinary ones that do not round what comes in."""
        twin = copy.deepcopy(self.model)
        for name, module in packed_modules(twin):
            if isinstance(module, nn.Linear):
                twin.set_submodule(name, as_linear(module, module.dequantize(torch.float64)))
        return twin

    @property
    def is_packed(self) -> bool:
        return any(packed_modules(self.model))


def heads(walk: Walk, draw: Random) -> Tensor:
    attentions = anatomy(walk.model).attentions
    number = draw.randrange(len(attentions))
    gone = _some_heads(attentions[number], draw)
    with silenced(walk.model, heads={number: gone}):
        expected = walk.logits()
    hfc.prune_heads(walk.model, {number: gone})
    return expected


def _some_heads(attention: Attention, draw: Random) -> list[int]:
    """Those of whole groups that share a key and value, but for one group."""
    groups = attention.num_key_value_heads
    size = attention.num_heads // max(groups, 1)
    gone = draw.sample(range(groups), draw.randint(0, max(groups - 1, 0)))
    return [group * size + i for group in gone for i in range(size)]


def neurons(walk: Walk, draw: Random) -> Tensor:
    numbers = [layer.feed_forward.num_neurons for layer in anatomy(walk.model).layers]
    gone = {i: draw.sample(range(number), draw.randint(0, number // 2)) for i, number in enumerate(numbers)}
    with silenced(walk.model, neurons=gone):
        expected = walk.logits()
    hfc.prune_neurons(walk.model, gone)
    return expected


def layers(walk: Walk, draw: Random) -> Tensor:
    keep, first = [], 0
    for stack in anatomy(walk.model).stacks:
        own = range(first, first + len(stack.layers))
        keep += sorted(draw.sample(own, draw.randint(1, len(own))))
        first += len(own)
    expected = _without_layers(walk, [i for i in range(first) if i not in keep])
    hfc.prune_layers(walk.model, keep)
    return expected


def _without_layers(walk: Walk, gone: list[int]) -> Tensor:
    twin = walk.plain()
    skip_layers(twin, gone)
    return walk.logits(twin)


def vocabulary(walk: Walk, draw: Random) -> Tensor:
    used = hfc.used_tokens(walk.tokenizer, TEXTS)
    others = sorted(set(walk.tokenizer.get_vocab().values()) - set(used))
    keep = {*used, *draw.sample(others, draw.randint(0, len(others)))}
    expected = walk.logits()
    if walk.model.get_output_embeddings() is not None:
        expected = expected[..., needed_tokens(walk.tokenizer, keep)]
    walk.tokenizer = hfc.prune_vocabulary(walk.model, walk.tokenizer, keep=keep)
    return expected


def factorise(walk: Walk, draw: Random) -> Tensor:
    """The nearest product of two thin matrices, by the singular values."""
    rank, twin = draw.randint(1, 31), copy.deepcopy(walk.model)
    table = twin.get_input_embeddings().weight
    expected = None
    if isinstance(table, nn.Parameter):
        U, S, V = torch.linalg.svd(table.detach(), full_matrices=False)
        table.data.copy_(U[:, :rank] * S[:rank] @ V[:rank])  # heads that are tied have the same parameter
        expected = walk.logits(twin)
    hfc.factorise_embeddings(walk.model, rank)
    return expected


def low_rank(walk: Walk, draw: Random) -> Tensor:
    """Maps one above the other, each alone or those that share an input, on their largest right singular vectors."""
    twin = copy.deepcopy(walk.model)
    hfc.factorise(walk.model, rank=draw.randint(1, 16), shared=draw.random() < 0.5)
    groups: dict[int, list[str]] = {}
    for name, module in walk.model.named_modules():
        if isinstance(module, LowRankLinear) and isinstance(twin.get_submodule(name).weight, nn.Parameter):
            groups.setdefault(id(module.projection), []).append(name)
    for names in groups.values():
        maps = [twin.get_submodule(name) for name in names]
        V = torch.linalg.svd(torch.cat([m.weight.detach() for m in maps]), full_matrices=False)[2]
        V = V[: walk.model.get_submodule(names[0]).rank]
        for module in maps:
            module.weight.data = module.weight.data @ V.T @ V
    return walk.logits(twin)


def quantize(walk: Walk, draw: Random) -> Tensor:
    """Each weight is the one that its layer stands for, and lies within half a step of what it was."""
    twin, bits, group_size = copy.deepcopy(walk.model), draw.choice([2, 3, 4, 8]), draw.choice([-1, 8, "auto"])
    asked = {"group_size": group_size, "symmetric": draw.random() < 0.5, "scale_dtype": "float32"}
    asked["embedding_bits"] = draw.choice([None, 8])
    hfc.quantize(walk.model, bits, range_method="minmax", **asked)
    for name, module in packed_modules(walk.model):
        before = matrix(twin.get_submodule(name)).detach()
        step = 2 * before.abs().amax(dim=1, keepdim=True) / (2**module.scheme.bits - 1)  # no range of a part is wider
        assert ((module.dequantize(torch.float64) - before).abs() <= 0.51 * step).all(), name
    return walk.logits(_as_packed(twin, walk.model))


def codebooks(walk: Walk, draw: Random) -> Tensor:
    """Each row of weights has few values, and tables, in parts or not, are what they stand for."""
    twin, grid = copy.deepcopy(walk.model), draw.choice(sorted(CODEBOOKS))
    tables = draw.choice(
        [{}, {"embedding_bits": 8}, {"embedding_bits": 2, "embedding_parts": 8, "embedding_stages": 2}]
    )
    bits = {"binary": 1, "ternary": 2}.get(grid) or draw.choice([2, 3, 4])
    hfc.quantize(walk.model, bits, grid=grid, group_size=-1, **tables)
    for name, module in packed_modules(walk.model):
        if isinstance(module, CodebookLinear):
            assert all(len(row.unique()) <= 2**bits for row in module.dequantize(torch.float64)), name
    return walk.logits(_as_packed(twin, walk.model))


def _as_packed(twin: nn.Module, model: nn.Module) -> nn.Module:
    """Changes `twin`: it has the weights that the packed layers of `model` stand for."""
    for name, module in packed_modules(model):
        weight, ordinary = module.dequantize(torch.float64), twin.get_submodule(name)
        if isinstance(ordinary, nn.Embedding):
            ordinary.weight.data = weight  # what is tied to a table has the same parameter
        else:
            twin.set_submodule(name, as_linear(ordinary, weight))
    return twin


def dequantize(walk: Walk, draw: Random) -> Tensor:
    expected = walk.logits(walk.plain())
    walk.model = walk.model.dequantize()
    assert not walk.is_packed
    return expected


def block_sparse(walk: Walk, draw: Random) -> Tensor:
    """With one block of a weight at zero."""
    for layer in anatomy(walk.model).layers[:1]:
        weight = getattr(layer.feed_forward.inputs[0], "weight", None)
        if isinstance(weight, nn.Parameter):
            weight.data[:8, :8] = 0
    expected = walk.logits()
    hfc.to_block_sparse(walk.model, 8)
    return expected


def save_and_load(walk: Walk, draw: Random) -> Tensor:
    expected = walk.logits()
    walk.model.save_pretrained(walk.new_folder())
    walk.model = walk.opened(walk.new_folder())
    return expected


def export_plain(walk: Walk, draw: Random) -> Tensor:
    expected, before = walk.logits(walk.plain()), walk.logits()
    hfc.export(walk.model, walk.new_folder(), format="plain")
    assert torch.equal(walk.logits(), before)
    walk.model = walk.opened(walk.new_folder())
    assert not walk.is_packed
    return expected


def student(walk: Walk, draw: Random) -> Tensor:
    """One that takes the first or the last layers of each encoder and decoder, as they are."""
    depths = [len(stack.layers) for stack in anatomy(walk.model).stacks]
    number, which = draw.randint(1, min(depths)), draw.choice(["first", "last"])
    gone, first = [], 0
    for depth in depths:
        left = range(depth - number) if which == "last" else range(number, depth)
        gone += [first + i for i in left]
        first += depth
    expected = _without_layers(walk, gone)
    walk.model = hfc.make_student(walk.model, num_hidden_layers=number, layers=which)
    return expected


def measure(walk: Walk, draw: Random) -> Tensor:
    expected = walk.logits()
    assert hfc.measure(walk.model, sequence_length=6, latency_rounds=1, throughput_rounds=1).stored_bytes > 0
    return expected


def finish(walk: Walk, draw: Random) -> Tensor:
    expected = walk.logits()
    assert hfc.finish(walk.model) is walk.model
    return expected


def train_with_grids(walk: Walk, draw: Random) -> Tensor:
    """One pass for the ranges, then packed."""
    if draw.random() < 0.3:
        hfc.prepare_qat(walk.model, 2, grid="ternary", activation_bits=None, embedding_bits=None)
    else:
        dynamic, learned = draw.random() < 0.5, draw.random() < 0.5
        hfc.prepare_qat(walk.model, draw.choice([2, 4, 8]), embedding_bits=None, dynamic_activations=dynamic,
                        learned_steps=learned, range_method="minmax")  # fmt: skip
    batch = walk.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        walk.model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = walk.logits()
    hfc.finish(walk.model)
    assert walk.is_packed
    return expected


VERBS = {
    verb.__name__: verb
    for verb in (heads, neurons, layers, vocabulary, factorise, low_rank, quantize, codebooks, dequantize, block_sparse,
                 save_and_load, export_plain, student, measure, finish, train_with_grids)
}  # fmt: skip
