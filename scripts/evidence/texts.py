"""The texts of a subject, written once: held out as they are, and nothing of them left in what is learnt from."""

import json
from pathlib import Path
from typing import Any

from checks.overlap import counted, overlaps

from hf_compress.files.whole import whole_folder
from hf_compress.recipe.data import RecipeData
from hf_compress.recipe.options import RecipeError

VALIDATION = 100  # validation texts that are kept: nothing is chosen by them, a training only reports on them
FACTS = "overlap.json"
HELD_OUT = ("validation", "test")


def write_texts(data: RecipeData, folder: Path) -> dict[str, Any]:
    """Train, validation and test files of a classification in `folder`, whole or not at all.

    Returns how many texts the train split had, how many were taken out of it because they are held out too, and of
    validation and test how many had the same there and how many nearly. Raises RecipeError where nothing is left.
    """
    splits = dict(data.texts)
    splits["validation"] = splits["validation"].select(range(min(VALIDATION, len(splits["validation"]))))
    texts = {name: [" ".join(data.kind.texts(row)) for row in split] for name, split in splits.items()}
    found = {name: overlaps(texts["train"], texts[name]) for name in HELD_OUT}
    gone = {match.train for matches in found.values() for match in matches}
    if len(gone) == len(texts["train"]):
        raise RecipeError(f"{data.name}: all train texts are held out too: nothing is left.")
    splits["train"] = splits["train"].select([i for i in range(len(texts["train"])) if i not in gone])
    facts = {"train": len(texts["train"]), "taken_out": len(gone)}
    for name, matches in found.items():
        same, nearly = counted(matches)
        facts[name] = {"texts": len(texts[name]), "same": same, "nearly": nearly}
    with whole_folder(folder) as new:
        for name, split in splits.items():
            rows = [{**row, "label": data.labels[row["label"]]} for row in split]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (new / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (new / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return facts
