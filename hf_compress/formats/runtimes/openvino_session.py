"""OpenVINO models, ready to run."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov

from hf_compress.engines.processor import has_int8
from hf_compress.formats.runtimes.agreement import Arrays, Session
from hf_compress.model.precision import CAP

RUN_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32"}  # processors with bfloat16 would else not round inputs to integers
# Processors without VNNI add products of u8 x i8 in 16 bits, which overflow: there this option keeps float products.
WITHOUT_OVERFLOW = {**RUN_OPTIONS, "LP_TRANSFORMS_MODE": "NO"}


@cache
def core() -> ov.Core:
    """The one runtime of this process, which lives as long.

    Its CPU plugin gives the thread that makes it another stack for signals, and takes that back when it ends. Of two
    that end in the order in which they were made, the second restores the first one's stack, which is gone: the next
    signal with a handler (Ctrl-C, a worker of a DataLoader that ends) is a segmentation fault.
    """
    return ov.Core()


def open_folder(folder: Path, *, threads: int | None = None, exact: bool | None = None) -> Session:
    """What an export holds, ready to run.

    `exact` says that products of 8-bit integers must not be used; by default where they would overflow.
    """
    options = WITHOUT_OVERFLOW if (not has_int8() if exact is None else exact) else RUN_OPTIONS
    limit = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    return session(core().read_model(folder / "openvino_model.xml"), {**options, **limit})


def session(program: ov.Model, options: dict[str, str | int]) -> Session:
    if CAP in os.environ and not has_int8():  # hides VNNI from oneDNN, not from the plugin, which would ask it for that
        options = {**options, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = core().compile_model(program, "CPU", options)
    request = compiled.create_infer_request()
    shapes = {port.get_any_name(): port.get_partial_shape() for port in compiled.inputs}
    ports = [(port.get_any_name(), port, port.get_element_type()) for port in compiled.inputs]
    results = [(name, port) for port in compiled.outputs for name in port.get_names()]
    held: Arrays = {}  # what the request reads, a view of a tensor of its own for each input

    def run(fed: Arrays) -> Arrays:
        request.reset_state()
        # `infer(fed)` looks at each array anew and copies results twice: small models feel it (docs/LOG.md).
        for name, port, kind in ports:
            if name not in held or held[name].shape != fed[name].shape:
                tensor = ov.Tensor(kind, ov.Shape(fed[name].shape))
                request.set_tensor(port, tensor)
                held[name] = tensor.data
            np.copyto(held[name], fed[name], casting="unsafe")
        request.infer(share_outputs=True)
        return {name: request.get_tensor(port).data.copy() for name, port in results}

    return Session({n: tuple(None if d.is_dynamic else d.get_length() for d in s) for n, s in shapes.items()}, run)
