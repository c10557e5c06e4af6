"""A teacher read from a cache: its outputs for every example, without the teacher."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hf_compress.distillation.teachers.cache_files import (
    check_settings,
    find_faults,
    joined,
    read_manifest,
    tokenizer_fingerprint,
)
from hf_compress.distillation.teachers.draws import shares
from hf_compress.distillation.teachers.example_keys import MASKS, Side, example_keys, real_tokens
from hf_compress.distillation.teachers.far_shards import FarShards
from hf_compress.distillation.teachers.manifest import check_shard
from hf_compress.files.store import is_remote
from hf_compress.training.progress import progress_bar

RESTS = ("kept", "renormalised")
NO_MASS = -1e30  # a logit whose probability is zero, and whose share of a divergence is 0 * 1e30 and no NaN


class CachedTeacher(nn.Module):
    """The outputs that `hfc.cache_teacher` wrote to `path`; any trainer takes it as its `teacher_model`.

    The shards stay on disk and are mapped into memory, so a large cache costs the pages that a batch touches. Those at
    an address of fsspec are fetched as they are read, see `far_shards.py`. The module holds the teacher's architecture
    without weights, so that layers and widths can be checked.

    Args:
        path: a folder, or an address such as `s3://bucket/cache`.
        rest: of a cache that holds the `top_k` largest logits, what becomes of the mass of the others: `kept`, as that
            of one class beside the k; or `renormalised`, given to the k in proportion, as though there were no others.

    Raises ValueError for a cache that is not there, not finished, cut short or altered, and for another word as `rest`.
    """

    def __init__(self, path: str | Path, *, rest: str = "kept"):
        super().__init__()
        if rest not in RESTS:
            raise ValueError(f"rest must be one of {', '.join(RESTS)}, got {rest!r}.")
        self.path, self.rest = path if is_remote(path) else Path(path), rest
        self.manifest = read_manifest(self.path)
        if not self.manifest["is_complete"]:
            raise ValueError(
                f"The cache in {self.path} was not finished. Call hfc.cache_teacher again with the same arguments: it "
                "goes on where it stopped."
            )
        if faults := find_faults(self.path, self.manifest["shards"]):
            name, fault = next(iter(faults.items()))
            raise ValueError(
                f"{len(faults)} of {len(self.manifest['shards'])} shards of the cache in {self.path} are damaged: "
                f"{name} {fault}. Call hfc.cache_teacher again with the same arguments: it writes them anew."
            )
        self.architecture = _architecture(self.manifest["teacher"])
        if is_remote(path):
            self._shards = FarShards(path, self.manifest["shards"], self.manifest["stored"])
            self._index([self._shards.index_of(number) for number in range(len(self._shards))])
        else:
            self._shards = [self._open(name) for name in self.manifest["shards"]]
            self._index(self._shards)

    def _open(self, name: str) -> dict[str, Tensor]:
        try:
            shard = load_file(self.path / name)
        except SafetensorError as error:
            raise ValueError(f"{self.path / name} is no whole safetensors file: {error}.") from error
        check_shard(self.path / name, shard, self.manifest["stored"])
        return shard

    def _index(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        keys = torch.cat([shard["keys"] for shard in shards])
        self._keys, order = keys.sort()
        counts = torch.tensor([len(shard["keys"]) for shard in shards])
        shard_of = torch.arange(len(counts)).repeat_interleave(counts)
        row_of = torch.cat([torch.arange(count) for count in counts])
        self._shard_of, self._row_of = shard_of[order], row_of[order]
        self._ends = {  # the end of each example's tokens, or draws, in its shard
            side: [shard[f"{side}_lengths"].cumsum(0).tolist() for shard in shards]
            for side in ("input", "decoder", "draw")
            if f"{side}_lengths" in shards[0]
        }
        self._in_memory = {  # small: one row of classes for each example
            name: joined([shard[name] for shard in shards])[order]
            for name, side in self.manifest["stored"].items()
            if side == "example" and name in shards[0] and shards[0][name].dim() == 2
        }

    def __len__(self) -> int:
        return len(self._keys)

    def get_base_model(self) -> nn.Module:
        """The teacher's architecture, without weights; this module itself for a class that is not Transformers' own."""
        return self if self.architecture is None else self.architecture

    def _apply(self, fn: Callable, recurse: bool = True) -> "CachedTeacher":
        return self  # there are no weights to move

    def forward(self, **inputs):
        raise TypeError("A cached teacher has no weights to run: trainers read its outputs with `look_up`.")

    @property
    def columns(self) -> list[str]:
        """The inputs that a batch needs, so that its examples can be found."""
        return [*self.manifest["inputs"], *MASKS]

    @property
    def whose(self) -> str:
        """What tells this cache from another."""
        return f"{len(self)} examples by the teacher {self.manifest['teacher']['fingerprint'][:16]}"

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for a real token of the text (for an example, where the text has no tokens)."""
        ends = next((self._ends[side] for side in ("decoder", "input") if side in self._ends), None)
        tokens = len(self) if ends is None else sum(of_shard[-1] for of_shard in ends)
        return sum(entry["size_bytes"] for entry in self.manifest["shards"].values()) / tokens

    @property
    def hidden_states(self) -> list[int]:
        return sorted(int(name.split(".")[1]) for name in self.manifest["stored"] if name.startswith("hidden_states."))

    def check_signals(self, signals: Mapping[str, Iterable[int]], who: str) -> None:
        """Raise ValueError when `who` needs of the teacher what the cache does not hold."""
        if list(signals.get("attention", ())):
            raise ValueError(
                f"{who} compares attention, for which the teacher has to run: a cache holds logits and hidden states "
                "only. Pass the teacher itself as teacher_model, or set the weight of the attention loss to 0."
            )
        wanted = sorted({self._number(n) for n in signals.get("hidden_states", ())})
        if missing := [n for n in wanted if n not in self.hidden_states]:
            raise ValueError(
                f"{who} needs the teacher's hidden states {wanted}, but the cache in {self.path} holds "
                f"{self.hidden_states}, not {missing}. Write one with hfc.cache_teacher(..., hidden_states={wanted}), "
                "or pass the teacher itself as teacher_model."
            )

    def _number(self, state: int) -> int:
        return state if state >= 0 else state + self.manifest["num_hidden_states"]

    def check_tokenizer(self, tokenizer) -> None:
        """Raise ValueError for a tokenizer whose numbers mean other tokens than those the teacher read."""
        mine, theirs = tokenizer_fingerprint(tokenizer), self.manifest["tokenizer"]
        if mine is not None and theirs is not None:
            check_settings(self.path, {"tokenizer": theirs[:16]}, {"tokenizer": mine[:16]}, ["tokenizer"])

    def check_examples(self, batches: DataLoader, prepare: Callable[[dict], dict], *, what: str, quiet: bool) -> None:
        """Raise ValueError when an example of `batches` is not in the cache. `prepare` is what a trainer does to them.

        Reads the data once, without any model.
        """
        missing = seen = 0
        for batch in progress_bar(batches, desc=f"Looking up the {what}", disable=quiet or len(batches) < 100):
            found = self._find(prepare(batch))[1]
            missing, seen = missing + int((~found).sum()), seen + len(found)
        if missing:
            raise ValueError(
                f"{missing} of {seen} examples of the {what} are not among the {len(self)} in the cache in "
                f"{self.path}: it was written from other data, another tokenizer or another length, or the collator "
                f"changes inputs at random. hfc.cache_teacher(teacher, dataset, {str(self.path)!r}) adds examples."
            )

    def _find(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Where the examples of a batch stand, (B,), and whether they are there, (B,)."""
        if lacking := [name for name in self.manifest["inputs"] if name not in inputs]:
            raise ValueError(
                f"The cache in {self.path} was written from {self.manifest['inputs']}, but the batch has no "
                f"{lacking}: its columns are {sorted(inputs)}. Give the data the same columns."
            )
        keys = example_keys(inputs, self.manifest["inputs"]).cpu()
        places = torch.searchsorted(self._keys, keys).clamp(max=len(self) - 1)
        return places, self._keys[places] == keys

    def look_up(
        self, inputs: Mapping[str, Tensor], hidden_states: Iterable[int] = ()
    ) -> tuple[ModelOutput, dict[int, Tensor]]:
        """The teacher's outputs for a batch, as the teacher would give them (zeros at padding), and `hidden_states`.

        Where the cache holds the largest `top_k` logits only, there are `top_logits`, `top_indices` and `rest` instead
        of `logits`: see `complete`. Where it holds draws, there are the `drawn_classes` and `drawn_shares` of each
        token, and its `entropy`.
        """
        places, found = self._find(inputs)
        if not found.all():
            raise ValueError(
                f"{int((~found).sum())} of {len(found)} examples of a batch are not among the {len(self)} in the cache "
                f"in {self.path}. Add them with hfc.cache_teacher(teacher, dataset, {str(self.path)!r})."
            )
        states = {n: self._gather(f"hidden_states.{self._number(n)}", places, inputs) for n in hidden_states}
        names = [name for name in self.manifest["stored"] if not name.startswith(("hidden_states.", "drawn"))]
        outputs = ModelOutput({name: self._gather(name, places, inputs) for name in names})
        if self.manifest["draws"]:
            outputs |= self._drawn(places, inputs)
        if "rest" in outputs and self.rest == "renormalised":
            outputs["rest"] = torch.full_like(outputs["rest"], -torch.inf)
        return outputs, states

    def _gather(self, name: str, places: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        device, side = inputs[self.manifest["inputs"][0]].device, self.manifest["stored"][name]
        if name in self._in_memory:
            return _exact(self._in_memory[name][places].to(device))
        if side == "example":
            pairs = zip(self._shard_of[places].tolist(), self._row_of[places].tolist(), strict=True)
            return _exact(torch.stack([self._shards[shard][name][row] for shard, row in pairs]).to(device))
        return _spread(self._rows(name, places).to(device), inputs, side)

    def _rows(self, name: str, places: Tensor) -> Tensor:
        """What is stored of the tokens of some examples, one after the other, (real tokens, ...)."""
        parts = []
        for shard, row in zip(self._shard_of[places].tolist(), self._row_of[places].tolist(), strict=True):
            ends = self._ends[self.manifest["stored"][name]][shard]
            parts.append(self._shards[shard][name][ends[row - 1] if row else 0 : ends[row]])
        return joined(parts)

    def _drawn(self, places: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device, side = inputs[self.manifest["inputs"][0]].device, self.manifest["stored"]["drawn_sizes"]
        codes, sizes = (self._rows(name, places).to(device) for name in ("drawn", "drawn_sizes"))
        classes, found = shares(codes, sizes, self.manifest["draws"])
        if classes.numel() and int(classes.max()) >= self.manifest["classes"]:
            raise ValueError(f"The cache in {self.path} is damaged: draws of more classes than the teacher has.")
        return {"drawn_classes": _spread(classes, inputs, side), "drawn_shares": _spread(found, inputs, side)}


def _spread(tokens: Tensor, inputs: Mapping[str, Tensor], side: Side) -> Tensor:
    """Rows of real tokens at their places in the batch, (B, T, ...); zeros at padding."""
    mask = real_tokens(inputs, side).to(tokens.device)
    tokens = _exact(tokens)
    values = tokens.new_zeros(*mask.shape, *tokens.shape[1:])
    values[mask] = tokens
    return values


def complete(top_logits: Tensor, top_indices: Tensor, rest: Tensor, student_logits: Tensor, *, classes: int) -> Tensor:
    """All of a teacher's logits (items, classes), of which the largest k are known, and the mass of the others.

    top_logits, top_indices  (items, k)
    rest                     (items, 1)  log of the sum of exp over the other logits; -inf where there are none
    student_logits           (items, C)  C may differ from `classes` by padding of the vocabulary

    The others get the student's own logits, shifted to their mass. At temperature 1 the KL divergence to such a teacher
    and its gradient are those of k classes and one for all the others; a student that equals the teacher has loss 0 at
    every temperature.
    """
    logits = F.pad(
        student_logits[..., :classes].float(), (0, max(0, classes - student_logits.shape[-1])), value=-torch.inf
    )
    logits, indices = logits.clone(), top_indices.long()  # in place from here on: a pass over a vocabulary is not cheap
    own = logits.scatter_(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    logits.add_(rest.float() - own).clamp_(min=NO_MASS)
    return logits.scatter_(-1, indices, top_logits.float())


def _architecture(teacher: dict) -> nn.Module | None:
    kind = getattr(transformers, teacher["class"], None)
    is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    if not is_model or teacher["config"] is None or teacher["config"].get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        config = CONFIG_MAPPING[teacher["config"]["model_type"]].from_dict(teacher["config"])
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # of many kinds, for fields that no teacher had
        raise ValueError(f"The cache's config of a {teacher['class']} makes none: {error}. It is damaged.") from error


def _exact(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() and values.element_size() < 4 else values
