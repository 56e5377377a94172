"""What `import vitlr` offers, for editors and type checkers; tests/test_stub.py writes this file."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.calibration.options import Calibration
from vitlr.calibration.statistics import Statistics as Statistics
from vitlr.checkpoint.creation import create_model as create_model
from vitlr.checkpoint.files import load as load
from vitlr.checkpoint.files import save as save
from vitlr.compression import Measure
from vitlr.decomposition.spectra import Spectra as Spectra
from vitlr.engines.export import export as export
from vitlr.errors import InputError as InputError
from vitlr.errors import NumericalError as NumericalError
from vitlr.errors import RunError as RunError
from vitlr.errors import VitlrError as VitlrError
from vitlr.measuring.evaluation import Metrics
from vitlr.measuring.times import Times
from vitlr.nn import Int8Linear as Int8Linear
from vitlr.nn import LowRankGLU as LowRankGLU
from vitlr.nn import LowRankLinear as LowRankLinear
from vitlr.nn import LowRankMLP as LowRankMLP
from vitlr.nn import QuantizedLinear as QuantizedLinear
from vitlr.nn import ResidualLowRankLinear as ResidualLowRankLinear
from vitlr.nn import SelectedLinear as SelectedLinear
from vitlr.planning.budgets import Budget as Budget
from vitlr.planning.budgets import parse_budget as parse_budget
from vitlr.planning.options import Planning
from vitlr.planning.plans import Plan as Plan
from vitlr.pruning.options import Blending, Gating
from vitlr.refinement.recipe import Recipe
from vitlr.reporting.frontier import Frontier as Frontier
from vitlr.reporting.frontier import frontier as frontier
from vitlr.reporting.hub import from_pretrained as from_pretrained
from vitlr.reporting.hub import push_to_hub as push_to_hub
from vitlr.reporting.hub import save_pretrained as save_pretrained
from vitlr.reporting.report import report as report
from vitlr.runtime.progress import Progress, Watch
from vitlr.surgery.fusion import fuse as fuse
from vitlr.surgery.fusion import to_dense as to_dense
from vitlr.surgery.fusion import unfuse as unfuse
from vitlr.training.loop import TrainStep
from vitlr.training.recipe import TrainRecipe

__version__: str

def apply(
    model: nn.Module,
    plan: Plan,
    stats: Statistics | None = None,
    *,
    measure: Callable[[nn.Module], Statistics] | None = None,
    inplace: bool = False,
    progress: Progress | bool | None = None,
) -> nn.Module: ...
def calibrate(
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    options: Calibration | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    progress: Progress | bool | None = None,
    on_batch: Callable[[Statistics], None] | None = None,
    stats: Statistics | None = None,
    resume: str | os.PathLike[str] | None = None,
    objective: str | Sequence[str] = "fisher",
    samples: int = 1,
    seed: int = 0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    extras: Sequence[str] = (),
    hidden: bool | str | None = None,
    hidden_memory: float = 8000000000.0,
    max_memory: str | float | None = None,
    sums_in: str | None = None,
) -> Statistics: ...
def compress(
    model: nn.Module,
    loader: Iterable[Any] | None,
    budget: str | Budget | None = None,
    *,
    rounds: int = 1,
    trials: int = 0,
    rungs: str | Sequence[str] = "none",
    stats: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    calibration: Calibration | None = None,
    planning: Planning | None = None,
    recipe: Recipe | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    inplace: bool = False,
    plan_only: bool = False,
    measure: Measure | None = None,
    decided: Callable[[Plan], None] | None = None,
    progress: Progress | bool | None = None,
    watch: Watch | None = None,
    objective: str | None = None,
    centred: bool | None = None,
    damping: float | None = None,
    compensate: bool = True,
    ridge: float = 0.001,
    method: str | None = None,
    uniform: bool = False,
    ranks: Mapping[str, int] | None = None,
    rank_step: int = 16,
    min_rank: int = 1,
    rank_buckets: int | None = None,
    prune_rate: float | None = None,
    width_step: int = 16,
    width_scale: float = 1.0,
    corrections: Mapping[str, float] | None = None,
    attention: str | None = None,
    bits: str | Sequence[int] | int | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    samples: int = 1,
    seed: int = 0,
    extras: Sequence[str] = (),
    hidden: bool | str | None = None,
    hidden_memory: float = 8000000000.0,
    max_memory: str | float | None = None,
    sums_in: str | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    lr: float | None = None,
    warmup: int = 20,
    weight_decay: float = 0.0,
    features: float = 50.0,
    temperature: float = 1.0,
    crop: float = 0.08,
    color_jitter: float = 0.4,
    mixup: bool = True,
    ema: float = 0.99,
    clip: float = 1.0,
    every: int = 50,
    patience: int = 10,
    amp: bool | None = None,
    regrow_share: float = 0.125,
    regrow_steps: int = 200,
    parallel: bool = False,
    proxy_images: int = 64,
) -> nn.Module: ...
def decompose(
    model: nn.Module,
    stats: Statistics,
    objective: str | None = None,
    *,
    centred: bool = False,
    damping: float = 0.1,
    device: str | torch.device | None = None,
    progress: Progress | bool | None = None,
) -> Spectra: ...
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    reference: nn.Module | None = None,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    progress: Progress | bool | None = None,
) -> Metrics: ...
def hybrid(
    model: nn.Module,
    loader: Iterable[Any],
    rate: float | None = None,
    *,
    budget: str | Budget | None = None,
    options: Blending | None = None,
    stats: Statistics | None = None,
    calibration: Iterable[Any] | None = None,
    recipe: TrainRecipe | None = None,
    finetune: TrainRecipe | bool = True,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    reference: nn.Module | None = None,
    callbacks: Sequence[Callable[[TrainStep], None]] = (),
    validate: Callable[[nn.Module], float] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    thresholds: str = "global",
    kinds: str | Iterable[str] | None = ("fc1", "fc2"),
    l1: float = 0.0001,
    tile: int = 16,
    floor: int = 1,
    fold: bool = True,
    share: float = 0.5,
    uniform: bool = True,
    rank_step: int = 16,
    objective: str = "fisher",
) -> nn.Module: ...
def plan(
    model: nn.Module,
    stats: Statistics,
    budget: str | Budget | None = None,
    *,
    options: Planning | None = None,
    spectra: Spectra | None = None,
    times: Times | None = None,
    beside: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    objective: str | None = None,
    centred: bool | None = None,
    damping: float | None = None,
    compensate: bool = True,
    ridge: float = 0.001,
    method: str | None = None,
    uniform: bool = False,
    ranks: Mapping[str, int] | None = None,
    rank_step: int = 16,
    min_rank: int = 1,
    rank_buckets: int | None = None,
    prune_rate: float | None = None,
    width_step: int = 16,
    width_scale: float = 1.0,
    corrections: Mapping[str, float] | None = None,
    attention: str | None = None,
    bits: str | Sequence[int] | int | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Plan: ...
def prune(
    model: nn.Module,
    loader: Iterable[Any],
    rate: float | None = None,
    *,
    budget: str | Budget | None = None,
    options: Gating | None = None,
    recipe: TrainRecipe | None = None,
    finetune: TrainRecipe | bool = True,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    reference: nn.Module | None = None,
    callbacks: Sequence[Callable[[TrainStep], None]] = (),
    validate: Callable[[nn.Module], float] | None = None,
    resume: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    of: int | None = None,
    progress: Progress | bool | None = None,
    thresholds: str = "global",
    kinds: str | Iterable[str] | None = ("qkv", "proj", "fc1", "fc2"),
    l1: float = 0.0001,
    tile: int = 16,
    floor: int = 1,
    fold: bool = True,
) -> nn.Module: ...
def refine(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[Any],
    *,
    rungs: str | Sequence[str] = "distil",
    resume: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    output_fn: Callable[[Any], Tensor] | None = None,
    progress: Progress | bool | None = None,
    watch: Watch | None = None,
    recipe: Recipe | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    lr: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    warmup: int = 20,
    weight_decay: float = 0.0,
    features: float = 50.0,
    temperature: float = 1.0,
    crop: float = 0.08,
    color_jitter: float = 0.4,
    mixup: bool = True,
    ema: float = 0.99,
    clip: float = 1.0,
    every: int = 50,
    patience: int = 10,
    amp: bool | None = None,
    regrow_share: float = 0.125,
    regrow_steps: int = 200,
    parallel: bool = False,
    proxy_images: int = 64,
) -> nn.Module: ...
