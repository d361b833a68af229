"""What Triton's compiler makes of the kernels for Hopper and Ampere; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
# Runs in a process of its own, since this one may have Triton in interpreter mode.
SCRIPT = """
import json, os, re, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from flashns_dist.orthogonalize.deflation import BASIS_ROW, SHRINK_ROW
from flashns_dist.orthogonalize.kernels import small_triton, triton_configs as configs
from flashns_dist.orthogonalize.kernels.gluon_launch import gluon_kernels
from flashns_dist.orthogonalize.kernels.triton_normalize import (
    inverse_norms_kernel, scale_transpose_kernel)
from flashns_dist.orthogonalize.kernels.triton_sketch import scale_sketch_kernel, sketch_kernel
from flashns_dist.orthogonalize.kernels.triton_product import (
    combine_kernel, mirror_kernel, product_kernel, scale_columns_kernel)
from flashns_dist.orthogonalize.kernels.triton_symmetric import symmetric_kernel

TOOL = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")

def build(kernel, types, constants, config, arch):
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        aligned = name in ("n", "m", "k") or name.startswith("stride")
        aligned = aligned or types.get(name, "").startswith("*")
        if name not in constants and aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if types.get("a", "").endswith(")>") else ASTSource
    source = source(kernel, signature, constants, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True)
    registers, stack = (int(re.search(p + r":(\\d+)", usage.stdout)[1]) for p in ("REG", "STACK"))
    ptx = built.asm["ptx"]
    return {"config": config.label(), "shared": built.metadata.shared, "stack": stack,
            "registers": registers, "warps": config.warps, "wgmma": "wgmma" in ptx,
            "mma": "mma.sync" in ptx, "tma_load": "cp.async.bulk.tensor" in ptx,
            "tma_store": bool(re.search(r"bulk\\.tensor\\..d\\.global\\.shared", ptx)),
            "dependent": "griddepcontrol.wait" in ptx, "matrix_store": "stmatrix" in ptx,
            "specialized": "setmaxnreg" in ptx,
            "stages_read": [
                "fence.proxy.async" in part for part in re.split(r"mbarrier\\.arrive\\.", ptx)[:-1]
                if "ldmatrix" in re.split(r"mbarrier\\.try_wait|[$]L__BB", part)[-1]]}

def symmetric(config, tma, arch):
    size, depth = config.rows, config.depth
    names = {"alpha": "fp32", "beta": "fp32", "gamma": "fp32"}
    names |= {name + "_factor": "fp32" for name in names}
    boxes = {"a": (size, depth), "b": (config.cols, depth), "c": (size, size), "out": (size, size)}
    for name, (rows, cols) in boxes.items():
        names[name] = f"tensordesc<fp16[1, {rows}, {cols}]>" if tma else "*fp16"
    constants = dict(HAS_C=True, ALPHA_EACH=False, BETA_EACH=False, GAMMA_EACH=False,
        A_SWAPPED=False, B_SWAPPED=False, BLOCK=size, BLOCK_K=depth, WIDE=config.cols > size,
        GROUP=config.group, TMA=tma, DTYPE=tl.float16, PRECISION="ieee",
        stride_ac=1, stride_bc=1, stride_cc=1, stride_oc=1)
    return build(symmetric_kernel, names, constants, config, arch)

def gluon(each, a_swapped, b_swapped, has_c, same=False):
    config = configs.SPECIALIZED
    size, depth = config.rows, config.depth
    names = {"num_matrices": "i32"}
    for name in ("alpha", "beta", "gamma"):
        names |= {name: "*fp32" if each else "fp32", name + "_factor": "fp32"}
    half = size // 2
    boxes = {"a": [depth, half] if a_swapped else [half, depth], "c": [half, half],
             "b": [depth, size] if b_swapped else [size, depth], "out": [half, half]}
    for name, box in boxes.items():
        layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if each else gl.float16)
        names[name] = f"tensordesc<{'bf16' if each else 'fp16'}{box},{layout!r}>"
    constants = dict(HAS_C=has_c, ALPHA_EACH=each, BETA_EACH=each, GAMMA_EACH=each,
        SAME=same, A_SWAPPED=a_swapped, B_SWAPPED=b_swapped, BLOCK=size, BLOCK_K=depth,
        STAGES=config.stages, GROUP=config.group)
    return build(gluon_kernels()[0], names, constants, config, 90)

def gluon_product(each, a_swapped, b_swapped, has_c, shifted, transpose):
    config = configs.SPECIALIZED
    size, depth = config.rows, config.depth
    names = {"num_matrices": "i32", "shift": "fp32"}
    for name in ("alpha", "beta"):
        names |= {name: "*fp32" if each else "fp32", name + "_factor": "fp32"}
    half = size // 2
    boxes = {"a": [depth, half] if a_swapped else [half, depth], "c": [half, half],
             "b": [depth, size] if b_swapped else [size, depth], "d": [half, half],
             "out": [half, half]}
    for name, box in boxes.items():
        dtype = "bf16" if transpose and name == "out" else "fp16"
        element = gl.bfloat16 if dtype == "bf16" else gl.float16
        layout = gl.NVMMASharedLayout.get_default_for(box, element)
        names[name] = f"tensordesc<{dtype}{box},{layout!r}>"
    constants = dict(HAS_C=has_c, SHIFTED=shifted, ALPHA_EACH=each, BETA_EACH=each,
        A_SWAPPED=a_swapped, B_SWAPPED=b_swapped, TRANSPOSE=transpose, BLOCK=size, BLOCK_K=depth,
        STAGES=config.stages, GROUP=config.group)
    return build(gluon_kernels()[1], names, constants, config, 90)

def product(config, tma, arch, shifted):
    # With a shift, or with the bfloat16 addend that deflation reads.
    rows, cols, depth = config.rows, config.cols, config.depth
    names = {"alpha": "fp32", "beta": "fp32" if shifted else "*fp32", "shift": "fp32",
             "alpha_factor": "fp32", "beta_factor": "fp32"}
    boxes = {"a": (rows, depth), "x": (depth, cols), "c": (rows, cols), "d": (rows, cols),
             "out": (cols, rows)}
    for name, (r, c) in boxes.items():
        dtype = "bf16" if name == "c" and not shifted else "fp16"
        names[name] = f"tensordesc<{dtype}[1, {r}, {c}]>" if tma else f"*{dtype}"
    constants = dict(HAS_C=True, SHIFTED=shifted, ALPHA_EACH=False, BETA_EACH=not shifted,
        A_SWAPPED=False, X_SWAPPED=False, C_SWAPPED=False, TRANSPOSE=True,
        BACKWARDS=config.backwards, BLOCK_N=rows, BLOCK_M=cols, BLOCK_K=depth, GROUP=config.group,
        TMA=tma, DTYPE=tl.float16, PRECISION="ieee", stride_ac=1, stride_xc=1, stride_cc=1,
        stride_oc=1)
    return build(product_kernel, names, constants, config, arch)

def small(kernel, arch, constants, warps=4, stages=3, **types):
    config = configs.TileConfig(0, 0, 0, warps, stages)
    return build(kernel, types, constants, config, arch) | {"name": kernel.__name__}

def smalls(arch):
    fp32 = "*fp32"
    yield small(small_triton.squares_kernel, arch, {"TILE": 64}, matrix="*fp16", sums=fp32)
    yield small(small_triton.inverse_norm_kernel, arch, {"BLOCK": 64}, sums=fp32, inverse=fp32)
    for weight in (fp32, "fp32"):
        constants = {"WEIGHT_EACH": weight == fp32, "BLOCK": 64}
        yield small(small_triton.bound_scalars_kernel, arch, constants, sums=fp32, scale=fp32,
            root=fp32, rest=fp32, weight=weight)
    sketch = {"X_SWAPPED": False, "ROWS": 64, "BLOCK": 128, "BLOCK_K": 64, "TMA": False}
    sums = {"raw": "*bf16", "sums": fp32, "levels": "*i32"}
    yield small(sketch_kernel, arch, sketch | {"stride_xc": 1}, signs="*bf16", x="*bf16", **sums)
    yield small(scale_sketch_kernel, arch, {"BLOCK": 4096, "CHUNKS": 16}, out="*bf16", inverse=fp32,
        scale="fp32", **sums)
    yield small(inverse_norms_kernel, arch, {"CHUNKS": 256}, sums=fp32, levels="*i32", out=fp32,
        scale="fp32")
    # Triton makes a constant of a size that is one.
    one = {"SCALE_EACH": False, "BLOCK": 64, "STEPS": 4, "CHUNKS": 4, "rows": 1}
    yield small(scale_transpose_kernel, arch, one, x="*fp16", sums=fp32, levels="*i32", out="*fp16",
        norms=fp32, scale="fp32")
    for each in (False, True):
        pieces = {name: "*fp16" for name in ("a", "b", "out")}
        for name in ("alpha", "beta", "gamma"):
            pieces |= {name: fp32 if each else "fp32", name + "_factor": "fp32"}
        constants = {name + "_EACH": each for name in ("ALPHA", "BETA", "GAMMA")} | {"BLOCK": 64}
        yield small(combine_kernel, arch, constants, **pieces)
    yield small(scale_columns_kernel, arch, {"BLOCK_N": 32, "BLOCK_M": 128, "stride_ac": 1},
        a="*fp16", scale=fp32, out="*fp16")
    yield small(mirror_kernel, arch, {"SQUARE": 256, "BLOCK": 64}, matrix="*fp16")
    shape = {"K": 64, "BLOCK": 64, "PRECISION": "bf16x3"}
    rows = {"BASIS_ROW": BASIS_ROW, "SHRINK_ROW": SHRINK_ROW, "WEIGHT": 1.0}
    yield small(small_triton.shrink_kernel, arch, shape | rows, 4, 4, image="*bf16", signs="*bf16",
        a="*bf16", weights="*fp16", size="fp32", margin="fp32")

hopper = [symmetric(c, True, 90) for c in configs.SYMMETRIC_TMA]
hopper += [product(c, True, 90, True) for c in configs.PRODUCT_TMA]
few = (*configs.PRODUCT_FLAT, *configs.PRODUCT_NARROW, *configs.PRODUCT_SHALLOW)
hopper += [product(c, True, 90, False) for c in few]
ampere = [symmetric(c, False, 80) for c in configs.SYMMETRIC_POINTER]
ampere += [product(c, False, 80, s) for c in configs.PRODUCT_POINTER for s in (True, False)]
if gluon_kernels() is not None:
    hopper += [gluon(False, False, False, False), gluon(True, True, False, True),
               gluon(False, False, True, True), gluon(True, False, False, True),
               gluon(False, False, False, True, True), gluon(True, True, True, False, True),
               gluon_product(False, False, True, True, True, False),
               gluon_product(True, False, True, True, False, True),
               gluon_product(False, True, False, False, False, False)]
small_kernels = [*smalls(90), *smalls(80)]
print(json.dumps({"hopper": hopper, "ampere": ampere, "small": small_kernels}))
"""


def run(*command, **variables):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=environment | variables, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def built():
    result = run("-c", SCRIPT)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_hopper_kernels_use_wgmma_and_tma_and_spill_next_to_nothing(built):
    for kernel in built["hopper"]:
        assert kernel["wgmma"], kernel
        assert kernel["tma_load"], kernel
        assert kernel["tma_store"], kernel
        assert kernel["stack"] <= 24 * kernel["specialized"], kernel
        assert kernel["shared"] <= 227 * 1024, kernel
        if kernel["config"].endswith("gluon"):
            assert kernel["specialized"], kernel
            assert kernel["matrix_store"], kernel
            assert kernel["dependent"], kernel
            # Before a stage is given back, the reads of it into registers are waited for.
            assert all(kernel["stages_read"]), kernel
    known = triton.__version__.startswith("3.6.")
    assert sum(kernel["specialized"] for kernel in built["hopper"]) == (9 if known else 0)
    # Two stages of an addend, or three where there are squares, in each of two warpgroups.
    reads = [len(each["stages_read"]) for each in built["hopper"] if each["specialized"]]
    assert reads == ([0, 6, 6, 6, 6, 0, 8, 4, 0] if known else [])


@pytest.mark.slow
def test_two_programs_of_the_first_symmetric_tile_share_an_sm(built):
    first = built["hopper"][0]
    # An H100 SM has 228 KB of shared memory, of which a program takes 1 KB more than it asks for,
    # and 65536 registers.
    assert 2 * (first["shared"] + 1024) <= 228 * 1024
    assert 2 * first["registers"] * 32 * first["warps"] <= 65536


@pytest.mark.slow
def test_small_kernels_fit_and_only_those_of_deflation_multiply(built):
    for kernel in built["small"]:
        assert kernel["shared"] <= 99 * 1024, kernel
        multiplies = kernel["name"].startswith(("shrink", "sketch"))
        assert (kernel["mma"] or kernel["wgmma"]) == multiplies, kernel


@pytest.mark.slow
def test_ampere_kernels_use_tensor_cores_and_fit(built):
    for kernel in built["ampere"]:
        assert kernel["mma"], kernel
        assert kernel["shared"] <= 99 * 1024, kernel  # the limit of consumer Ampere and Ada


@pytest.mark.slow
def test_the_interpreter_tests_run_in_a_process_of_their_own_if_they_must():
    from triton.language import cdiv
    from triton.runtime.interpreter import InterpretedFunction

    if torch.cuda.is_available() or isinstance(cdiv, InterpretedFunction):
        pytest.skip("they ran in this process")
    files = [str(HERE / name) for name in ("test_triton_backend.py", "test_small_triton.py")]
    result = run("-m", "pytest", "-q", "-x", *files, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-5000:]
