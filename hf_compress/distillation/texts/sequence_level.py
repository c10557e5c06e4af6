"""Sequence-level distillation: the student learns what its teacher would have written.

Kim and Rush, 2016, https://arxiv.org/abs/1606.07947, section 3.2: the teacher's beam outputs take the place of the
labels, once; any trainer then trains on them. Section 3.3, sequence-level interpolation: of the beam the output that is
most like the reference takes its place.
"""

from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.distillation.teachers.cache_files import teacher_fingerprint
from hf_compress.distillation.teachers.shards import Shards, data_fingerprint
from hf_compress.distillation.texts.similarity import closest
from hf_compress.measuring.measure import evaluating
from hf_compress.model.reading import IGNORED
from hf_compress.training.progress import progress_bar

FEATURES = Features({n: List(Value("int64")) for n in ("input_ids", "attention_mask", "labels")})


def generate_targets(
    teacher: PreTrainedModel,
    dataset: Dataset,
    path: str | Path,
    *,
    num_beams: int = 5,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    shard_size: int = 256,
    interpolate: bool = False,
    **options,
) -> Dataset:
    """What `teacher` writes for each row of `dataset`, as a dataset of `input_ids`, `attention_mask` and `labels`.

    For an encoder-decoder the labels are the target; for a causal model the target follows the prompt in `input_ids`,
    and the prompt's labels are -100. Rows are as long as they are: pad them with `DataCollatorForSeq2Seq`. Called again
    with the same path, it goes on after a stop, and only reads what is finished.

    Args:
        dataset: with `input_ids`, the source or the prompt, and `attention_mask` where they are padded.
        num_beams: 5 as in the paper; 1 takes the most probable token each time.
        max_new_tokens: a target is cut after so many tokens.
        batch_size: rows generated together; rows of a similar length meet.
        shard_size: rows in a file; what a stopped run may lose.
        interpolate: of the whole beam take the text most like the row's `labels` (by sentence-level BLEU), not the most
            probable one; labels are the reference's tokens, -100 left out.
        options: further arguments of `teacher.generate`, as JSON holds them.

    Raises ValueError for a model that cannot generate, prompts that leave no room, and a folder made otherwise.
    """
    if not (hasattr(teacher, "can_generate") and teacher.can_generate()):
        raise ValueError(
            f"{type(teacher).__name__} cannot generate: expected a causal or sequence-to-sequence language model."
        )
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"The dataset needs a column input_ids, it has {dataset.column_names}. Tokenize it first.")
    options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": False, **options}
    if interpolate:
        if "labels" not in dataset.column_names or num_beams < 2:
            raise ValueError(
                f"interpolate=True compares the texts of a beam with the reference: it needs a column labels, got "
                f"{dataset.column_names}, and num_beams of 2 or more, got {num_beams}."
            )
        options = {"num_return_sequences": num_beams, **options}
    settings = {
        "teacher": teacher_fingerprint(teacher),
        "data": data_fingerprint(sources(rows) for rows in dataset.iter(shard_size)),
        "options": options,
    }
    if interpolate:
        settings["references"] = data_fingerprint(references(rows) for rows in dataset.iter(shard_size))
    _check_room(teacher, dataset, shard_size, max_new_tokens)
    shards = Shards(path, settings, num_rows=len(dataset), rows_per_shard=shard_size)
    missing = shards.missing
    progress = progress_bar(total=sum(len(shards.ranges[i]) for i in missing), desc="Generating", unit="row")
    with torch.no_grad(), evaluating([teacher]):
        for number in missing:
            rows = shards.ranges[number]
            part = dataset[rows.start : rows.stop]
            prompts, wanted = sources(part), references(part) if interpolate else None
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
            targets: dict[int, list[int]] = {}
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                written = generated(teacher, [prompts[i] for i in batch], options)
                if interpolate:
                    number_of = len(written) // len(batch)
                    beams = [written[k * number_of : (k + 1) * number_of] for k in range(len(batch))]
                    written = [closest(beam, wanted[i]) for beam, i in zip(beams, batch, strict=True)]
                targets.update(zip(batch, written, strict=True))
                progress.update(len(batch))
            examples = [_example(teacher, prompts[i], targets[i]) for i in range(len(prompts))]
            shards.write(number, Dataset.from_list(examples, features=FEATURES))
    progress.close()
    return shards.load()


def sources(rows: dict[str, list]) -> list[list[int]]:
    """The tokens of each row, without padding."""
    masks = rows.get("attention_mask", [[1] * len(ids) for ids in rows["input_ids"]])
    pairs = zip(rows["input_ids"], masks, strict=True)
    return [[token for token, real in zip(*pair, strict=True) if real] for pair in pairs]


def references(rows: dict[str, list]) -> list[list[int]]:
    """The tokens of each row's labels."""
    return [[token for token in labels if token != IGNORED] for labels in rows["labels"]]


def generated(teacher: PreTrainedModel, prompts: list[list[int]], options: dict) -> list[list[int]]:
    """What the teacher writes after each prompt, its end-of-sequence token included."""
    config = teacher.generation_config
    ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id or ())
    padding = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), padding)
    attention_mask = torch.zeros_like(input_ids)
    is_decoder = not teacher.config.is_encoder_decoder
    for row, prompt in enumerate(prompts):  # what a decoder goes on from has to stand at the right end
        place = slice(width - len(prompt), width) if is_decoder else slice(len(prompt))
        input_ids[row, place], attention_mask[row, place] = torch.tensor(prompt), 1
    inputs = {"input_ids": input_ids.to(teacher.device), "attention_mask": attention_mask.to(teacher.device)}
    written: Tensor = teacher.generate(**inputs, pad_token_id=padding, **options)
    targets = written[:, width if is_decoder else 1 :].tolist()  # an encoder-decoder begins with its start token
    return [_up_to_the_end(target, ends) for target in targets]


def _up_to_the_end(target: list[int], ends: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(target) if token in ends), len(target) - 1)
    return target[: end + 1]


def _example(teacher: PreTrainedModel, prompt: list[int], target: list[int]) -> dict[str, list[int]]:
    if teacher.config.is_encoder_decoder:
        return {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": target}
    whole = prompt + target
    return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": [IGNORED] * len(prompt) + target}


def _check_room(teacher: PreTrainedModel, dataset: Dataset, shard_size: int, max_new_tokens: int) -> None:
    lengths = [len(prompt) for rows in dataset.iter(shard_size) for prompt in sources(rows)]
    if not lengths or min(lengths) == 0:
        raise ValueError("The dataset is empty, or has rows without tokens: expected one token or more in each row.")
    limit = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    needed = max(lengths) + (0 if teacher.config.is_encoder_decoder else max_new_tokens)
    if limit is not None and needed > limit:
        raise ValueError(
            f"The teacher reads {limit} positions, but the longest row of {max(lengths)} tokens with "
            f"max_new_tokens={max_new_tokens} needs {needed}. Cut the rows, or lower max_new_tokens."
        )
