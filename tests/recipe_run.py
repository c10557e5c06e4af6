"""A tiny classifier with its tokenizer, and reviews that it can learn, for tests of recipes and commands."""

from pathlib import Path

from helpers import tiny_model
from transformers import AutoModel, AutoTokenizer, BertTokenizerFast

from hf_compress.model.pooling import Pooling, write_pooling

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "was", "not", *"abcdefghij"]
REVIEW_LABELS = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}


def tiny_folder(folder: Path, family: str = "bert", **changes) -> Path:
    """Saves a random model of the family, with a tokenizer of 64 tokens and the labels of `reviews`, into `folder`."""
    vocabulary = [*WORDS, *(f"word{i}" for i in range(64 - len(WORDS)))]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)
    tokenizer.save_pretrained(folder)
    names = {} if changes.keys() & {"num_labels", "id2label"} else REVIEW_LABELS
    tiny_model(family, **names, **changes).save_pretrained(folder)
    return folder


def embedder(folder: Path, family: str = "bert", pooling: Pooling | None = None, **changes) -> Path:
    """A folder of a random model without head; with `pooling`, as sentence-transformers has them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder(folder / "head", family, initializer_range=0.3, **changes))
    model = AutoModel.from_pretrained(folder / "head")
    model.save_pretrained(folder / "embedder")
    tokenizer.save_pretrained(folder / "embedder")
    if pooling is not None:
        write_pooling(folder / "embedder", pooling, model.config.hidden_size)
    return folder / "embedder"


def reviews(file: Path, number: int = 60) -> Path:
    """Every text is another: what is looked up by its text must not be found by chance."""
    rows = [f"the film was {'good' if i % 2 else 'bad'} {' '.join('abcdefghij'[int(d)] for d in f'{i:02d}')},"
            f"{'pos' if i % 2 else 'neg'}" for i in range(number)]  # fmt: skip
    file.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return file


TRAIN = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 1, "disable_tqdm": True,
         "bf16": False, "use_cpu": True}  # fmt: skip
QUICK = {"latency_rounds": 2, "throughput_rounds": 2, "sequence_length": 8, "isolate": False}
