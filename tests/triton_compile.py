"""Compile the Triton kernels for an H100, and older and newer cards, on a machine without one. Run by test_triton.py:
the interpreter checks no types, and a GPU is rarely at hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from veneer.kernels import triton_code

SHARED = 96 * 1024  # bytes a block may use on the smallest card that has bfloat16
ROUTING = {"order": "*i32", "offsets": "*i32", "block_slot": "*i32", "block_first": "*i32", "scales": "*fp32"}
ONES = ("x_k", "A_k", "h_r", "B_r", "y_n", "g_r", "w_k")  # strides that are 1


def compiled(kernel: Any, pointers: str, capability: int, dtype: str, **given: Any) -> Any:
    types = {**ROUTING, "gain": "fp32", "p": "fp32", "seed": "*i64", "A": "*fp32", "B": "*fp32", "w": "*fp32"}
    types |= dict.fromkeys(pointers.split(), f"*{dtype}")
    stages = given.pop("num_stages", 1)
    constants = {n: v for n, v in {**dict.fromkeys(ONES, 1), **given}.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "num_stages": stages})


def spilled(cubin: bytes) -> int:
    """Bytes of a thread's stack, which is where registers spill to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(said.stdout.partition("STACK:")[2].split()[0])


def main(capabilities: list[int]) -> None:
    code = triton_code
    plain = {**dict.fromkeys(ROUTING), "seed": None}
    for capability, dtype, options in itertools.product(capabilities, ("bf16", "fp32"), (plain, {})):
        wide, tall = (128, 64) if dtype == "bf16" else (64, 32)
        about = {**options, "PRECISION": "tf32" if dtype == "bf16" else "ieee", "BM": 64, "BR": 64, "ADD": True}
        made = [
            compiled(code.shrink_kernel, "x h", capability, dtype, **about, BK=64, num_stages=3),
            compiled(code.expand_kernel, "h y", capability, dtype, **about, BN=wide, num_stages=2),
            compiled(code.outer_kernel, "g x", capability, dtype, **{**about, "BM": tall}, BK=wide, num_stages=2),
            compiled(code.gate_kernel, "e g m", capability, dtype, GELU=not options, BLOCK=1024),
            compiled(code.gate_backward_kernel, "dm e g de dg m", capability, dtype, GELU=not options, BLOCK=1024),
        ]
        for kernel in made:
            stack = spilled(kernel.asm["cubin"])
            routed = "plain" if options else "routed, dropout"
            print(
                f"sm_{capability} {dtype} {routed}: {kernel.name}, {kernel.metadata.shared} B shared, {stack} B stack"
            )
            assert kernel.metadata.shared <= SHARED
            assert dtype == "fp32" or stack <= 64, "registers spill"  # without tensor cores some do


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]])
