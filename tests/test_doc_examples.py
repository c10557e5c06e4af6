"""Every example in Python of docs/*.md runs: the blocks of a page one after another, as a reader would try them.

Those that begin with `# runs in the tests` stand for themselves, in tests/test_docs.py; the tutorial has its own test.
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from distillation.data import rows
from helpers import tiny_model
from recipe_run import REVIEW_LABELS, tiny_folder
from torch.utils.data import DataLoader
from transformers import AutoModel, BertTokenizerFast, default_data_collator

import hf_compress as hfc
from hf_compress.engines.ops import pack_gptq, pack_zeros

DOCS = Path(__file__).parent.parent / "docs"
MARK = "# runs in the tests"
SIZES = dict(hidden_size=96, num_attention_heads=12, num_hidden_layers=6, intermediate_size=1536,
             max_position_embeddings=512)  # as pages count on  # fmt: skip
NOT_RUN = {  # what stands in a block that is left out -> why, and what runs it instead
    "compiled_decoding()": "compiles for twenty seconds: tests/model/test_decoding.py",
    "push_to_hub(model": "sends to the Hub: tests/publishing/test_hub.py, to a server that plays it",
    '"half-openvino/"': "needs four exported folders: tests/report/test_exports.py",
    "hf://datasets/": "a stream of the Hub: tests/training/test_stream.py",
    "s3://bucket/teacher": "a store and its workers: tests/distillation/test_apart.py",
    "max_steps=700": "scales of a language model: tests/distillation/test_scales.py",
    "speedup=10": "a speed that a tiny model has not: the README's example of shrink runs",
}


def blocks(page):
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)
    return [code for code in found if not code.startswith(MARK)]


PAGES = sorted(page.name for page in DOCS.glob("*.md") if blocks(page.name) and page.name != "tutorial.md")


def bert(**changes):
    return tiny_model("bert", **{**SIZES, **REVIEW_LABELS, **changes})


def tools(folder):
    """What pages speak of without making it."""
    tokenizer = BertTokenizerFast.from_pretrained(tiny_folder(folder / "words"))
    data = rows(8)
    loader = DataLoader(data.with_format("torch"), 4, collate_fn=default_data_collator)
    words = [f"the film was {word}" for word in ("good", "bad", "not a", "the b")]
    named = {"model": bert(), "teacher": bert(seed=1), "student": hfc.make_student(bert(seed=1), num_hidden_layers=3),
             "other": bert(num_hidden_layers=3, seed=2), "tokenizer": tokenizer, "train_set": data, "test_set": data,
             "validation_set": rows(4, seed=1), "dataset": data, "dataloader": loader,
             "texts": rows(8).remove_columns("labels"), "config": hfc.TinyBertConfig(str(folder / "run"))}  # fmt: skip
    return {"hfc": hfc, "torch": torch, **{n: getattr(transformers, n) for n in CLASSES}, **named, "words": words}


CLASSES = ("AutoModelForSequenceClassification", "AutoModelForCausalLM", "DataCollatorForLanguageModeling")


def folders(**models):
    for name, model in models.items():
        model.save_pretrained(name)


def masked(depth, **changes):
    return tiny_model("bert", "mlm", **{**SIZES, "num_hidden_layers": depth, **changes})


def prepare(page, code, at):
    """What a block of a page needs beyond `tools`: other models under the usual names, or folders."""
    if page == "augmentation.md":
        at |= {"train_texts": Dataset.from_dict({"text": at["words"]}), "masked_lm": masked(2)}
    if page == "cpu.md":
        folders(**{"my-packed-model": hfc.quantize(bert(), bits=8)})
    if "my-finetuned-bert" in code:
        folders(**{"my-finetuned-bert": bert()})
    if "my-embedder" in code:
        folders(**{"my-embedder": AutoModel.from_config(bert().config)})
    if "my-reranker" in code:
        folders(**{"my-reranker": bert(num_labels=1, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0})})
    if "terms=" in code or "phases" in code or "PKD" in code or "callbacks=[pruning]" in code:
        at |= {"teacher": bert(seed=1), "student": hfc.make_student(bert(seed=1), num_hidden_layers=3)}
    if "MiniLMConfig" in code:
        at |= {"bert_large": masked(24), "small_masked_lm": masked(2, seed=1), "teacher": bert(seed=1)}
    if "DistilBertConfig" in code:
        at["teacher"] = masked(6)
    if "BertEmd" in code:
        at |= {"teacher": bert(seed=1), "student": hfc.make_student(bert(seed=1), num_hidden_layers=3)}
    if page == "kernels.md":
        at |= kernel_tensors()
    if page.startswith("pruning"):
        known = " ".join(at["tokenizer"].get_vocab())
        at |= {"model": bert(), "train_set": rows(64), "texts": [known] * 2}
    if page == "quantization.md":
        at["model"] = tiny_model("llama", hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=16)
        at |= {"dataset": rows(16, kind="clm"), "fine_tuned_model": bert(), "train": rows(8), "test": rows(4)}
        at["dataloader"] = DataLoader(rows(8, kind="clm").with_format("torch"), 4, collate_fn=default_data_collator)
    if page == "reporting.md":
        at |= {"models": {"teacher": bert(), "student": at["student"]}, "tokenized_test_set": rows(8)}
        tokenizer = at["tokenizer"]
        for name in ("teacher", "student", "student-seed-1", "student-seed-2", "student-seed-3"):
            bert(num_hidden_layers=2).save_pretrained(name)
            tokenizer.save_pretrained(name)
    if page == "teachers.md":
        at |= {"teacher": bert(seed=1), "student": hfc.make_student(bert(seed=1), num_hidden_layers=3)}
        hfc.cache_teacher(bert(seed=2), at["train_set"], "other-teacher-outputs", processing_class=at["tokenizer"])
        pytest.importorskip("peft")
        from peft import LoraConfig, get_peft_model

        at |= {"LoraConfig": LoraConfig, "get_peft_model": get_peft_model, "base": bert()}
        get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=8)).save_pretrained("teacher-adapter")
    if "distil_through_assistants" in code:
        sizes = dict(num_hidden_layers=12, hidden_size=396, intermediate_size=64)
        at["teacher"] = bert(seed=1, **sizes)
    if page == "word-level.md":
        at |= {"teacher": tiny_model("llama", max_position_embeddings=256), "train_set": rows(8, kind="clm")}
        at |= {"student": tiny_model("llama", seed=1, num_hidden_layers=2), "prompts": rows(2).remove_columns("labels")}


def kernel_tensors():
    """A GPTQ layer (K, N) = (64, 32), a dense weight and its mask, and logits."""
    q = torch.randint(16, (32, 64), dtype=torch.uint8)
    zeros = torch.full((2, 32), 7, dtype=torch.uint8)
    half = {"x": torch.randn(3, 64), "bias": torch.zeros(32), "dense": torch.randn(32, 64)}
    return {"qweight": pack_gptq(q, 4), "qzeros": pack_zeros(zeros, 4), "scales": torch.full((2, 32), 0.1),
            "g_idx": torch.arange(64, dtype=torch.int32) // 32, "block_mask": torch.tensor([[True, False]]),
            "mask": torch.ones(4).bool(), "student_logits": torch.randn(4, 8), "teacher_logits": torch.randn(4, 8),
            **{name: value.half() for name, value in half.items()}}  # fmt: skip


LONG = (
    "pruning.md",
    "quantization.md",
    "reporting.md",
    "runtimes.md",
    "teachers.md",
)  # pages that time models, export, or train chains
CASES = [pytest.param(page, marks=[pytest.mark.long] * (page in LONG), id=page) for page in PAGES]


@pytest.mark.parametrize("page", CASES)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if 'format="openvino"' in "".join(blocks(page)):
        pytest.importorskip("openvino")
    at = tools(tmp_path)
    for code in blocks(page):
        if any(part in code for part in NOT_RUN):
            continue
        prepare(page, code, at)
        exec(compile(code, page, "exec"), at)


def test_what_is_left_out_is_there_and_few():
    every = [code for page in PAGES for code in blocks(page)]
    assert all(any(part in code for code in every) for part in NOT_RUN)
    assert len(every) > 30 and sum(any(part in code for part in NOT_RUN) for code in every) <= len(NOT_RUN) + 1
