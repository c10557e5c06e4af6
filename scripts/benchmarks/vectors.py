"""How far an embedder's vectors move when its weights are rounded: to nearest, by GPTQ, by SignRound, by centroids.

    python scripts/benchmarks/vectors.py --model all-MiniLM-L6-v2/ --texts sentences.txt --bits 2

The first lines of the texts calibrate, the last ones are measured: the mean over them of 1 - cosine between the pooled
vectors of the float model and of the quantized one. A table, as Markdown.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

import hf_compress as hfc

BATCH = 32


@torch.no_grad()
def vectors(model, tokenizer, texts: list[str], length: int) -> torch.Tensor:
    found = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], padding=True, truncation=True, max_length=length,
                          return_tensors="pt")  # fmt: skip
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(found), dim=-1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--texts", type=Path, required=True, help="One text a line.")
    options.add_argument("--bits", type=int, default=2)
    options.add_argument("--group_size", type=int, default=32)
    options.add_argument("--steps", type=int, default=200, help="Of SignRound, for each layer.")
    options.add_argument("--calibration", type=int, default=64, help="Texts that calibrate.")
    options.add_argument("--measured", type=int, default=256, help="Texts that are measured.")
    options.add_argument("--parts", type=int, help="Parts of a table's row, for centroids; none: tables stay.")
    options.add_argument("--part_bits", type=int, default=8, help="Bits of the index of a part's centroid.")
    args = options.parse_args()

    tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model).float().eval()
    texts = args.texts.read_text(encoding="utf-8").splitlines()
    if len(texts) < args.calibration + args.measured:
        raise SystemExit(f"{args.texts} has {len(texts)} lines, fewer than {args.calibration} + {args.measured}.")
    rows = [{"input_ids": tokenizer(text, truncation=True, max_length=128)["input_ids"]}
            for text in texts[: args.calibration]]  # fmt: skip
    exact = vectors(model, tokenizer, held_out := texts[-args.measured :], 128)
    layers = {"group_size": args.group_size}
    runs = {
        "to nearest": {},
        "GPTQ": {"method": "gptq", "calibration": rows},
        "SignRound": {"method": "signround", "calibration": rows, "steps": args.steps},
    }
    runs = {name: (args.bits, {**layers, **run}) for name, run in runs.items()}
    if args.parts:
        table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        runs |= {f"the table of tokens alone, {bits} bits": ({table: bits}, {}) for bits in (4, 8)}
        runs["the table of tokens alone, centroids"] = ({table: args.part_bits}, {"embedding_parts": args.parts})
    print("| | 1 - cosine | seconds |\n|---|---|---|")
    for name, (bits, run) in runs.items():
        start = time.perf_counter()
        packed = hfc.quantize(copy.deepcopy(model), bits, **run)
        seconds = time.perf_counter() - start
        distance = float((1 - (vectors(packed, tokenizer, held_out, 128) * exact).sum(-1)).mean())
        print(f"| {name} | {distance:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
