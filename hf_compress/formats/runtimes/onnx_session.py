"""ONNX files, ready to run."""

from pathlib import Path

import onnxruntime as ort

from hf_compress.engines.processor import has_int8
from hf_compress.formats.runtimes.agreement import Arrays, Session

# Products of u8 x i8 overflow on x86 without VNNI: this makes them u8 x u8, which take twice the time.
WITHOUT_OVERFLOW = ("session.x64quantprecision", "1")


def open_folder(folder: Path, *, threads: int | None = None) -> Session:
    """What an export holds, ready to run."""
    return session(str(folder / "model.onnx"), threads=threads)


def session(model: bytes | str, *, threads: int | None = None) -> Session:
    options = ort.SessionOptions()
    if not has_int8():
        options.add_session_config_entry(*WITHOUT_OVERFLOW)
    if threads is not None:
        options.intra_op_num_threads = threads
    loaded = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    shapes = {port.name: port.shape for port in loaded.get_inputs()}
    outputs = [port.name for port in loaded.get_outputs()]

    def run(fed: Arrays) -> Arrays:
        return dict(zip(outputs, loaded.run(None, fed), strict=True))

    return Session({n: tuple(d if isinstance(d, int) else None for d in s) for n, s in shapes.items()}, run)
