"""What ptxas says of the kernels for Hopper: no spill, and products that stay asynchronous."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nvcc(monkeypatch):
    """csrc/nvcc.py, which is no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    return importlib.import_module("nvcc")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kernels"),
    [
        ("lowrank_mlp_bf16_sm90", 7),
        ("lowrank_mlp_fp16_sm90", 7),
        ("lowrank_linear_cluster_sm90", 8),
        ("fp8_first_sm90", 4),
        ("fp8_linear_sm90", 5),
        ("fp8_mlp_sm90", 3),
    ],
)
def test_nothing_spills_and_products_are_not_serialised(source, kernels, nvcc):
    """Takes a minute each where the objects of the install are not kept."""
    try:
        archs = nvcc.architectures()
        (built,) = nvcc.compile_all([f"csrc/cuda/{source}.cu"], archs)
    except nvcc.BuildError as cause:
        pytest.skip(str(cause))
    found = nvcc.resources(built.log)
    assert len(found) == kernels and {resources.target for resources in found} == {"sm_90a"}
    for resources in found:
        assert resources.spilled == 0 and resources.stack == 0, resources
        assert resources.registers <= 255, resources
    # C7510 to C7514: "wgmma.mma_async instructions are serialized due to ..."; C7508: setmaxnreg is ignored.
    assert "Potential Performance Loss" not in built.log and "C7508" not in built.log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kernels"), [("lowrank_mlp_bf16_sm90", 7), ("fp8_first_sm90", 4), ("fp8_linear_sm90", 5)]
)
def test_the_debug_build_gives_up_in_place_of_waiting_for_ever(source, kernels, nvcc):
    """It traps; and ptxas leaves setmaxnreg in it, so that it is the kernel that hangs."""
    try:
        archs = nvcc.architectures("9.0a")
        (built,) = nvcc.compile_all([f"csrc/cuda/{source}.cu"], archs, bounded=True)
    except nvcc.BuildError as cause:
        pytest.skip(str(cause))
    assert len(nvcc.resources(built.log)) == kernels
    assert "setmaxnreg" not in built.log and "Potential Performance Loss" not in built.log
    assert b"somebody_hangs" in built.object.read_bytes()
