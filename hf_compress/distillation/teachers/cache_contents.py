"""What goes into a teacher cache: the examples as the teacher reads them, and what is kept of its outputs."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers.utils import find_labels

from hf_compress.distillation.layer_map import num_hidden_states
from hf_compress.distillation.prompts import without_prompt
from hf_compress.distillation.runs import named
from hf_compress.distillation.teachers.cache_files import joined
from hf_compress.distillation.teachers.draws import MOST_DRAWS, draw, starts
from hf_compress.distillation.teachers.example_keys import MASKS, Side, example_keys, real_tokens
from hf_compress.model.anatomy import anatomy
from hf_compress.model.capture import capture
from hf_compress.model.inputs import forward_names
from hf_compress.model.tasks import Task, plain_model

LABELS = ("label", "label_ids", "labels")


class Rows:
    """The examples of a dataset as batches of what the teacher reads, labels included, as a trainer makes them."""

    def __init__(self, dataset: Sequence | IterableDataset, teacher: nn.Module, collate: Callable[[list], dict]):
        model = plain_model(teacher)
        self.wanted = {*inspect.signature(model.forward).parameters, *LABELS, *find_labels(type(model))}
        if getattr(dataset, "column_names", None) is not None:
            dataset = dataset.select_columns([name for name in dataset.column_names if name in self.wanted])
        self.dataset, self.teacher, self.collate = dataset, model, collate
        self.is_stream = isinstance(dataset, IterableDataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def first(self, number: int) -> list:
        rows = islice(self.dataset, number) if self.is_stream else self.read(range(min(number, len(self))))
        return self._chosen(rows)

    def parts(self, size: int, begin: int = 0) -> Iterator[tuple[int, Callable[[], list]]]:
        """The text cut into parts of `size` rows: their numbers, and what reads one, from part `begin` all around.

        A stream is read once, in its order, whatever `begin` is.
        """
        if self.is_stream:
            rows, number = iter(self.dataset), 0
            while part := list(islice(rows, size)):
                yield number, partial(self._chosen, part)
                number += 1
            return
        count = -(-len(self) // size)
        for number in (*range(begin, count), *range(begin)):
            yield number, partial(self.read, range(number * size, min((number + 1) * size, len(self))))

    def read(self, numbers: Iterable[int]) -> list:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(list(numbers))
        return self._chosen(self.dataset[i] for i in numbers)

    def _chosen(self, rows: Iterable) -> list:
        return [{k: v for k, v in r.items() if k in self.wanted} if isinstance(r, dict) else r for r in rows]

    def batch(self, rows: list) -> dict[str, Tensor]:
        batch = dict(self.collate(rows))
        if "decoder_input_ids" not in batch and "labels" in batch and self.teacher_has_decoder:
            batch["decoder_input_ids"] = self.teacher.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch

    @property
    def teacher_has_decoder(self) -> bool:
        return getattr(getattr(self.teacher, "config", None), "is_encoder_decoder", False)


class Outputs:
    """What is kept of the teacher's outputs: tensors with one row an example, or one row a real token."""

    def __init__(
        self,
        teacher: nn.Module,
        top_k: int | None,
        draws: int | None,
        hidden_states: Iterable[int],
        dtype: torch.dtype,
    ):
        self.teacher, self.top_k, self.draws, self.dtype = teacher, top_k, draws, dtype
        self.task = Task.of(teacher)
        self._check_draws()
        self.hidden_states = sorted({_numbered(n, teacher) for n in hidden_states})
        self.stored: dict[str, Side] = {}

    def _check_draws(self) -> None:
        if self.draws is None:
            return
        if self.top_k is not None:
            raise ValueError(f"top_k={self.top_k} keeps the largest logits and draws={self.draws} a sample: give one.")
        if self.task.kind != "tokens" or not 1 <= self.draws <= MOST_DRAWS:
            what = f"{type(plain_model(self.teacher)).__name__}, which predicts {self.task.kind}"
            raise ValueError(
                f"draws must lie between 1 and {MOST_DRAWS}, for a teacher that predicts a class for each token: got "
                f"draws={self.draws} for {what}. Leave draws out to keep all logits."
            )

    def look_at(self, batch: dict[str, Tensor], again: dict[str, Tensor]) -> None:
        """Learn from a batch, collated twice, which inputs tell examples apart and what there is to store."""
        labels = {*LABELS, *find_labels(type(plain_model(self.teacher)))}
        names = forward_names(plain_model(self.teacher)) - labels - set(MASKS)
        self.columns = sorted(name for name, value in batch.items() if name in names and isinstance(value, Tensor))
        if not self.columns:
            raise ValueError(
                f"The teacher reads {sorted(names)}, but the batches have {sorted(batch)}. Tokenize the dataset first."
            )
        if not torch.equal(example_keys(batch, self.columns), example_keys(again, self.columns)):
            raise ValueError(
                "The data_collator gives the same examples other inputs each time (does it mask at random?), so none "
                "would be found again. Change the inputs once, in the dataset, or use a live teacher."
            )
        if self.hidden_states and "input_ids" in self.columns and batch["input_ids"].ndim == 3:
            raise ValueError(
                "Hidden states of multiple choice are not cached: an example has as many texts as choices. Leave "
                "hidden_states out, or use a live teacher."
            )
        outputs, states = self._run(batch)
        per_token: Side = "decoder" if "decoder_input_ids" in batch else "input"
        names = ["start_logits", "end_logits"] if self.task.kind == "spans" else ["logits"]
        self.classes = outputs[names[0]].shape[-1]
        if self.top_k is not None and (self.task.kind == "spans" or not 1 <= self.top_k <= self.classes):
            what = "spans, whose logits are positions" if self.task.kind == "spans" else f"{self.classes} classes"
            raise ValueError(
                f"top_k must lie between 1 and the number of classes: got top_k={self.top_k} for {what}. Leave top_k "
                "out to keep all logits."
            )
        names = ["top_logits", "top_indices", "rest"] if self.top_k else names
        names = ["drawn_sizes", "entropy"] if self.draws else names
        self.stored = {name: "example" if self.task.kind == "sequence" else per_token for name in names}
        if self.draws:
            self.stored["drawn"] = "draw"
        first_decoder_state = _num_encoder_states(self.teacher) if self.hidden_states else 0
        for number in states:
            side: Side = "decoder" if number >= first_decoder_state else "input"
            self.stored[f"hidden_states.{number}"] = side if real_tokens(batch, side) is not None else "example"

    @torch.no_grad()
    def _run(self, batch: dict[str, Tensor]) -> tuple[Mapping, dict[int, Tensor]]:
        device = next((p.device for p in self.teacher.parameters()), torch.device("cpu"))
        inputs = {name: batch[name].to(device) for name in [*self.columns, *(m for m in MASKS if m in batch)]}
        inputs = {
            k: v for k, v in inputs.items() if k in inspect.signature(plain_model(self.teacher).forward).parameters
        }
        if getattr(getattr(plain_model(self.teacher), "config", None), "use_cache", False):
            inputs["use_cache"] = False
        with capture(self.teacher, hidden_states=self.hidden_states) as signals:
            outputs = without_prompt(self.teacher, self.task, named(self.teacher(**inputs), self.teacher), signals)
        return outputs, signals.hidden_states

    def of(self, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        """The tensors of a shard for one batch."""
        outputs, states = self._run(batch)
        values = {f"hidden_states.{n}": states[n] for n in self.hidden_states}
        if self.top_k:
            logits = outputs["logits"].float()
            top, indices = logits.topk(self.top_k, dim=-1)
            rest = logits.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
            values |= {"top_logits": top, "top_indices": indices.int(), "rest": rest}
        elif not self.draws:
            values |= {name: outputs[name] for name in self.stored if name not in values}
        tensors = {"keys": keys.cpu()}
        if self.draws:
            mask = real_tokens(batch, self.stored["drawn_sizes"])
            start = starts(keys[:, None].expand(mask.shape)[mask], mask.cumsum(dim=1)[mask])
            logits = outputs["logits"]
            drawn = draw(logits[mask.to(logits.device)], start.to(logits.device), self.draws)
            tensors |= {"drawn": drawn.codes, "drawn_sizes": drawn.sizes, "entropy": drawn.entropy}
            sizes = torch.zeros(mask.shape, dtype=torch.long).masked_scatter_(mask.cpu(), drawn.sizes.long())
            tensors["draw_lengths"] = sizes.sum(dim=1)
        for side in ("input", "decoder"):
            if side in self.stored.values():
                tensors[f"{side}_lengths"] = real_tokens(batch, side).sum(dim=1).cpu()
        for name, side in self.stored.items():
            if name in tensors:
                continue
            value = (
                values[name] if side == "example" else values[name][real_tokens(batch, side).to(values[name].device)]
            )
            tensors[name] = value.cpu() if name in ("top_indices", "rest") else self._rounded(name, value.cpu())
        return tensors

    def batches(self, rows: Rows, examples: list, known: set[int], batch_size: int) -> Iterator[dict[str, Tensor]]:
        """The tensors of those of `examples` that are not `known` yet, batch by batch; they are then."""
        examples = sorted(examples, key=_length)  # little padding
        for first in range(0, len(examples), batch_size):
            batch = rows.batch(examples[first : first + batch_size])
            keys = example_keys(batch, self.columns)
            new = [i for i, key in enumerate(keys.tolist()) if not (key in known or known.add(key))]
            if new:
                batch = {k: v[new] for k, v in batch.items() if isinstance(v, Tensor) and len(v) == len(keys)}
                yield self.of(batch, keys[new])

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        rounded = value.to(self.dtype)
        if not torch.equal(rounded.isfinite(), value.isfinite()):
            largest = value[value.isfinite()].abs().max().item()
            raise ValueError(
                f"dtype={self.dtype} cannot hold the teacher's {name}: it goes up to {largest:.3g}, and that type to "
                f"{torch.finfo(self.dtype).max:.3g}. Use dtype=torch.float32 or torch.bfloat16."
            )
        return rounded


def together(held: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: joined([tensors[name] for tensors in held]) for name in held[0]}


def _length(row) -> int:
    """The longest text of a row: a choice has several."""
    tokens = row.get("input_ids") if isinstance(row, dict) else None
    if tokens is None or not len(tokens):
        return 0
    if isinstance(tokens, Tensor):
        return tokens.shape[-1]
    return max(map(len, tokens)) if isinstance(tokens[0], list) else len(tokens)


def _numbered(state: int, teacher: nn.Module) -> int:
    count = num_hidden_states(teacher)
    if not -count <= state < count:
        raise ValueError(f"hidden_states are 0 (the embedding) to {count - 1} in this teacher, got {state}.")
    return state % count


def _num_encoder_states(teacher: nn.Module) -> int:
    """The number of the decoder's first hidden state, where there is an encoder before it; else beyond the last."""
    stacks = anatomy(teacher).stacks
    return len(stacks[0].layers) + 1 if len(stacks) > 1 else num_hidden_states(teacher)
