"""Namespace of the operators. Hub builds replace this file by one with a namespace of their own."""

import torch

ops = torch.ops.hf_compress_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    return f"hf_compress_kernels::{op_name}"
