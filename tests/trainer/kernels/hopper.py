"""Compiles every kernel for an H100 or H200, as the launches of the paper's sizes would; needs no GPU.

``python -m tests.trainer.kernels.hopper`` prints one JSON object per launch: what the machine code uses.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from trainer.kernels import triton_logits, triton_sparse

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
OPTIONS = ("num_warps", "num_stages")


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for a launch: specialise on the arguments as Triton does, compile and report."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        signature[parameter.name] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=HOPPER, options=options)
    report(kernel.__name__, compiled.asm["cubin"], compiled.metadata.shared)


def report(name: str, cubin: bytes, shared: int) -> None:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True)
    found = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    wide = len(re.findall(r"\bLDG\.E\.128", code.stdout))
    print(json.dumps({"kernel": name, **found, "shared": shared, "loads_of_16_bytes": wide}))


def launches() -> None:
    """Each kernel once at the sizes of the 1.38B student."""
    n, width, concepts, vocab, top_k = 4096, 2048, 32768, 50304, 32

    def bf16(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda")

    def fp32(*shape: int) -> Tensor:
        return torch.empty(*shape, device="cuda")

    def ids(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device="cuda")

    for logits in (bf16(n, concepts), fp32(n, concepts)):
        triton_logits.logit_pass_(logits, ids(n, 4), fp32(n, 4), fp32(n, 1), top_k)
    triton_logits.logit_pass_(bf16(n, vocab), ids(n, 1), fp32(n, 1), fp32(n, 1), 0)
    triton_logits.largest(fp32(1024, concepts), top_k)
    triton_logits.summarise(bf16(n, concepts // 2), ids(n, 4), fp32(n, 4), top_k)
    triton_logits.logit_gradient_(bf16(n, vocab // 2), fp32(n, 1), ids(n, 1), fp32(n, 1), fp32(n, 1))
    triton_sparse.sparse_sums(bf16(n, top_k), ids(n, top_k), bf16(concepts, width))
    triton_sparse.sparse_dots(bf16(n, width), ids(n, top_k), bf16(concepts, width))
    triton_sparse.sparse_dots(fp32(n, 768), ids(n, top_k), fp32(concepts, 768))
    triton_sparse.sparse_weight_grad(bf16(n, top_k), ids(n, top_k), bf16(n, width), concepts, True)


def main() -> int:
    JITFunction.run = compile_launch
    with FakeTensorMode():
        launches()
    return 0


if __name__ == "__main__":
    sys.exit(main())
