"""A BiLSTM learns from a fine-tuned encoder (Tang et al., 2019, https://arxiv.org/abs/1903.12136).

    python scripts/distil_bilstm.py --data movie_reviews/ --teacher folder/or/name --output_dir runs/bilstm

Soft targets need nothing of a student but logits for the teacher's tokens, so any model will do. This one is a
`PreTrainedModel`, twenty lines of it, and therefore saves and loads like every other.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_compress as hfc
from hf_compress.recipe.texts import load_texts, tokenize


class BiLSTMConfig(PretrainedConfig):
    model_type = "bilstm-classifier"

    def __init__(self, vocab_size: int = 30522, embedding_size: int = 300, hidden_size: int = 150, **kwargs):
        self.vocab_size, self.embedding_size, self.hidden_size = vocab_size, embedding_size, hidden_size
        super().__init__(**kwargs)


class BiLSTMClassifier(PreTrainedModel):
    config_class = BiLSTMConfig

    def __init__(self, config: BiLSTMConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True, bidirectional=True)
        self.classifier = nn.Sequential(
            nn.Linear(2 * config.hidden_size, 2 * config.hidden_size), nn.ReLU(),
            nn.Linear(2 * config.hidden_size, config.num_labels),
        )  # fmt: skip
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **kwargs):
        lengths = attention_mask.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(input_ids), lengths, True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        logits = self.classifier(torch.cat([last[0], last[1]], dim=-1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Texts and labels, as `hf_compress.recipe.texts.load_texts` takes them."})
    teacher: str = field(metadata={"help": "A fine-tuned classifier, folder or name."})
    hidden_size: int = field(default=150, metadata={"help": "Of the LSTM, in each direction."})
    max_length: int = field(default=64, metadata={"help": "Tokens a text."})


def main():
    own, config = HfArgumentParser((Arguments, hfc.DistillationConfig)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(own.teacher)
    teacher = AutoModelForSequenceClassification.from_pretrained(own.teacher)
    data = tokenize(load_texts(own.data), tokenizer, own.max_length)
    labels = {name: getattr(teacher.config, name) for name in ("id2label", "label2id")}
    table = teacher.get_input_embeddings().weight.detach()
    student = BiLSTMClassifier(BiLSTMConfig(table.shape[0], table.shape[1], own.hidden_size, **labels))
    student.embedding.weight.data.copy_(table)
    trainer = hfc.DistillationTrainer(
        student, config, teacher_model=teacher, train_dataset=data["train"], eval_dataset=data["test"],
        processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    loaded = BiLSTMClassifier.from_pretrained(Path(config.output_dir))
    print(f"{trainer.evaluate()['eval_accuracy']:.1%} with {loaded.num_parameters() / 1e6:.1f} million parameters")


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
