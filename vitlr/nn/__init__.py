"""Modules that stand where dense ones stood."""

from vitlr.nn.folded_scale import FoldedScale
from vitlr.nn.fp8_block import Fp8Block, Fp8MLP
from vitlr.nn.fp8_linear import Fp8Linear
from vitlr.nn.fused_attention import FusedAttention
from vitlr.nn.fused_biased import FusedBiasedAttention
from vitlr.nn.fused_patches import FusedPatches
from vitlr.nn.fused_projections import FusedProjections
from vitlr.nn.fused_rotary import FusedRotaryAttention
from vitlr.nn.int8_block import Int8Block
from vitlr.nn.int8_blocks import Int8Blocks
from vitlr.nn.int8_linear import Int8Linear
from vitlr.nn.int8_mlp import Int8MLP
from vitlr.nn.lowrank_glu import LowRankGLU
from vitlr.nn.lowrank_linear import LowRankLinear
from vitlr.nn.lowrank_mlp import LowRankMLP
from vitlr.nn.multihead_linears import MultiheadLinears
from vitlr.nn.named_lowrank_mlp import NamedLowRankMLP
from vitlr.nn.pointwise_conv import PointwiseConv
from vitlr.nn.quantized_linear import QuantizedLinear
from vitlr.nn.residual_lowrank_linear import ResidualLowRankLinear
from vitlr.nn.selected_linear import SelectedLinear
from vitlr.nn.token_int8_linear import TokenInt8Linear
from vitlr.nn.window_linears import WindowLinears

__all__ = [
    "FoldedScale",
    "Fp8Block",
    "Fp8Linear",
    "Fp8MLP",
    "FusedAttention",
    "FusedBiasedAttention",
    "FusedPatches",
    "FusedProjections",
    "FusedRotaryAttention",
    "Int8Block",
    "Int8Blocks",
    "Int8Linear",
    "Int8MLP",
    "LowRankGLU",
    "LowRankLinear",
    "LowRankMLP",
    "MultiheadLinears",
    "NamedLowRankMLP",
    "PointwiseConv",
    "QuantizedLinear",
    "ResidualLowRankLinear",
    "SelectedLinear",
    "TokenInt8Linear",
    "WindowLinears",
]
