"""The README of a folder for another runtime: the lines that run it without torch, transformers or us."""

from pathlib import Path

from transformers import PreTrainedModel

from hf_compress.model.pooling import pooling_of
from hf_compress.model.reading import num_positions

WITHOUT_VNNI = (
    "# 8-bit products overflow without VNNI (before Ice Lake, Zen 4): exact ones there, and where no system tells\n"
    'if not (os.path.exists("/proc/cpuinfo") and "vnni" in open("/proc/cpuinfo").read()):\n'
)
OPEN = {
    "openvino": f"""options = {{"INFERENCE_PRECISION_HINT": "f32"}}
{WITHOUT_VNNI}    options["LP_TRANSFORMS_MODE"] = "NO"
model = ov.Core().compile_model("openvino_model.xml", "CPU", options)
names = [name for port in model.inputs for name in port.get_names()]
""",
    "onnx": f"""options = ort.SessionOptions()
{WITHOUT_VNNI}    options.add_session_config_entry("session.x64quantprecision", "1")
model = ort.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
names = [port.name for port in model.get_inputs()]
""",
}
IMPORT = {"openvino": "import os\nimport openvino as ov", "onnx": "import onnxruntime as ort\nimport os"}
RUN = {
    "openvino": "outputs = {port.get_any_name(): value for port, value in model(inputs).items()}\n",
    "onnx": "outputs = dict(zip((port.name for port in model.get_outputs()), model.run(None, inputs)))\n",
}
WITH_TOKENIZER = """tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_padding(pad_id={pad_id}, pad_token={pad_token!r})
tokenizer.enable_truncation({longest})
texts = tokenizer.encode_batch({texts})
inputs = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
inputs = {{k: np.array([getattr(t, v) for t in texts]) for k, v in inputs.items() if k in names}}
"""
WITHOUT = """ids = np.array([[5, 6, 7, 8]])  # of the model's tokenizer, which was not given to the export
inputs = {name: np.zeros_like(ids) if name == "token_type_ids" else np.ones_like(ids) for name in names}
inputs["input_ids"] = ids
"""
TEXTS = '["A fine film.", "Two hours that I shall never get back."]'
PROMPT = '["A fine film."]'
CHOICES = (
    "inputs = {name: value[None] for name, value in inputs.items()}  # one question, whose choices are the texts\n"
)
START = 'inputs["decoder_input_ids"] = np.full((len(inputs["input_ids"]), 1), {start})\n'
WRITE = """for _ in range(20):  # no cache: the decoder reads again what it has written
    {run}
    new = outputs["logits"][:, -1:].argmax(-1)
    inputs["decoder_input_ids"] = np.concatenate([inputs["decoder_input_ids"], new], 1)
print({shown})
"""
LABELS = 'labels = json.load(open("config.json", encoding="utf-8"))["id2label"]\n'
ENDINGS = {  # by the end of the class's name
    "ForSequenceClassification": LABELS + 'print([labels[str(i)] for i in outputs["logits"].argmax(-1)])\n',
    "ForTokenClassification": LABELS
    + 'print([[labels[str(i)] for i in row] for row in outputs["logits"].argmax(-1)])\n',
    "ForMultipleChoice": 'print(outputs["logits"].argmax(-1))  # the likeliest choice\n',
    "ForMaskedLM": 'print(outputs["logits"].argmax(-1))  # the likeliest token at each place\n',
    "ForQuestionAnswering": 'print(outputs["start_logits"].argmax(-1), outputs["end_logits"].argmax(-1))  # first and '
    "last token\n",
}
POOLED = {  # by the mode of a Pooling; the tokenizer above pads at the end
    "mean": "vectors = (states * mask).sum(1) / mask.sum(1)  # mean over real tokens",
    "cls": "vectors = states[:, 0]  # of the first token",
    "lasttoken": "vectors = states[np.arange(len(states)), mask.sum(1)[:, 0] - 1]  # of the last token",
    "max": "vectors = np.where(mask > 0, states, -np.inf).max(1)  # the largest of real tokens",
}
EMBED = """states, mask = outputs["last_hidden_state"], inputs["attention_mask"][..., None]
{pooled}
"""
NORMALIZED = "vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)\n"
SEVERAL_LABELS = LABELS + 'print([[labels[str(i)] for i in np.flatnonzero(row > 0)] for row in outputs["logits"]])\n'
DECODE = {
    "openvino": """request, tokens = model.create_infer_request(), list(inputs["input_ids"][0])
for start in range(len(tokens), len(tokens) + 20):
    new = tokens if start == len(inputs["input_ids"][0]) else tokens[-1:]
    step = {"input_ids": [new], "attention_mask": [[1] * len(tokens)], "beam_idx": [0],
            "position_ids": [list(range(len(tokens) - len(new), len(tokens)))]}
    logits = request.infer({k: np.array(v) for k, v in step.items() if k in names})["logits"]
    tokens.append(int(logits[0, -1].argmax()))
""",
    "onnx": """tokens, cache = list(inputs["input_ids"][0]), {}
for port in model.get_inputs():
    if port.name.startswith("input.past"):  # empty at first
        cache[port.name] = np.zeros([1] + [d if isinstance(d, int) else 0 for d in port.shape[1:]], np.float32)
for start in range(len(tokens), len(tokens) + 20):
    new = tokens if start == len(inputs["input_ids"][0]) else tokens[-1:]
    step = {"input_ids": [new], "attention_mask": [[1] * len(tokens)],
            "position_ids": [list(range(len(tokens) - len(new), len(tokens)))]}
    outputs = model.run(None, cache | {k: np.array(v) for k, v in step.items() if k in names})
    outputs = dict(zip((port.name for port in model.get_outputs()), outputs))
    cache = {name: outputs[name.replace("input", "output", 1)] for name in cache}
    tokens.append(int(outputs["logits"][0, -1].argmax()))
""",
}


def readme(model: PreTrainedModel, format: str, tokenizer: object | None) -> str:
    """Text of README.md. `tokenizer` is None where the export had none."""
    name = type(model).__name__
    lines = ["import json", "import numpy as np", IMPORT[format], "from tokenizers import Tokenizer", "", OPEN[format]]
    if tokenizer is None:
        lines.append(WITHOUT)
    else:
        longest = min(tokenizer.model_max_length, num_positions(model) or 512)
        pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        texts, pad_token = PROMPT if decodes(model) else TEXTS, tokenizer.pad_token or ""
        lines.append(WITH_TOKENIZER.format(pad_id=pad_id, pad_token=pad_token, longest=longest, texts=texts))
    lines += [DECODE[format]] if decodes(model) else prepared(model)
    if writes_from_encoder(model):
        ids = 'inputs["decoder_input_ids"].tolist()'
        shown = ids if tokenizer is None else f"tokenizer.decode_batch({ids})"
        lines.append(WRITE.format(run=RUN[format].rstrip("\n"), shown=shown))
    elif decodes(model):
        lines.append("print(tokens)" if tokenizer is None else "print(tokenizer.decode(tokens))")
    else:
        lines += [RUN[format], ending(model)]
    code = "\n".join(line.rstrip("\n") for line in lines)
    what = "OpenVINO" if format == "openvino" else "ONNX Runtime"
    packages = "openvino tokenizers" if format == "openvino" else "onnxruntime tokenizers"
    return (
        f"# {name} for {what}\n\nIt runs without PyTorch and Transformers, from inside this folder:\n\n"
        f"```bash\npip install {packages}\n```\n\n```python\n{code}\n```\n\n"
        "`hf_compress.json` says what is inside, and how far it agreed with the model that it was written from. "
        "Transformers opens the folder with `ExportedModel.from_pretrained`.\n"
    )


def prepared(model: PreTrainedModel) -> list[str]:
    """What becomes of the inputs first, as the model takes them."""
    config = model.config
    if takes_decoder_ids(model):
        known = [getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad")]
        return [START.format(start=next((token for token in known if token is not None), 0))]
    return [CHOICES] if type(model).__name__.endswith("ForMultipleChoice") else []


def ending(model: PreTrainedModel) -> str:
    """What becomes of the outputs, as the task has it."""
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        if model.config.problem_type == "multi_label_classification":
            return SEVERAL_LABELS
        if model.config.num_labels == 1:
            return 'print(outputs["logits"][:, 0])\n'
    if is_embedder(model):
        pooling = pooling_of(model)
        return EMBED.format(pooled=POOLED[pooling.mode]) + NORMALIZED * pooling.normalize + "print(vectors)\n"
    known = next((text for end, text in ENDINGS.items() if name.endswith(end)), None)
    return known or "print({name: value.shape for name, value in outputs.items()})\n"


def is_embedder(model: PreTrainedModel) -> bool:
    """Whether the states of a text are what comes out, to be pooled; of a GPT2LMHeadModel it is logits."""
    is_headless = type(model).__name__.endswith("Model") and model.get_output_embeddings() is None
    return is_headless and not model.config.is_encoder_decoder


def writes_from_encoder(model: PreTrainedModel) -> bool:
    """Whether it is an encoder-decoder that writes texts: its graph has no cache."""
    return model.can_generate() and model.config.is_encoder_decoder


def takes_decoder_ids(model: PreTrainedModel) -> bool:
    """Whether its graph reads tokens for the decoder: classifiers make them of the text themselves."""
    return model.config.is_encoder_decoder and (model.can_generate() or type(model).__name__.endswith("Model"))


def decodes(model: PreTrainedModel) -> bool:
    """Whether it writes texts with nothing but a decoder: its graph has a cache."""
    return model.can_generate() and not model.config.is_encoder_decoder


def write_readme(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text, encoding="utf-8")
