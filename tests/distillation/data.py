"""Small datasets for the trainers' tests: rows end in padding, labels follow from the tokens."""

import torch
from datasets import Dataset


def rows(
    number: int = 24, *, length: int = 12, labels: int = 2, kind: str = "classification", seed: int = 0
) -> Dataset:
    """`kind` as in `helpers.TASKS`, and `multi`, `regression` for sequence classification of those kinds."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(number):
        real = int(torch.randint(4, length + 1, (1,), generator=generator))
        ids = torch.randint(5, 60, (real,), generator=generator).tolist()
        padding = [0] * (length - real)
        example = {"input_ids": ids + padding, "attention_mask": [1] * real + padding}
        ignored = [-100] * len(padding)
        if kind == "classification":
            example["labels"] = ids[0] % labels
        elif kind == "multi":
            example["labels"] = [float(x % 2) for x in ids[:labels]]
        elif kind == "regression":
            example["labels"] = ids[0] / 60
        elif kind == "tokens":
            example["labels"] = [x % labels for x in ids] + ignored
        elif kind == "answers":
            example |= {"start_positions": real // 2, "end_positions": real - 1}
        elif kind == "mlm":
            example["labels"] = [x if i % 3 == 0 else -100 for i, x in enumerate(ids)] + ignored
        elif kind in ("clm", "seq2seq"):
            example["labels"] = ids + ignored
        if kind == "image":
            bright = len(examples) % 2
            example = {"pixel_values": torch.randn(3, 16, 16, generator=generator) + 2 * bright, "labels": bright}
        examples.append(example)
    return Dataset.from_list(examples)
