"""Time `decompose` on all 48 matrices of ViT-B against the SVD-LLM chain and a plain loop of `torch.linalg.eigh`.

    python -m bench.micro.decompose [--depth 12] [--repeats 3] [--threads N] [--json FILE]

Weights and moments are drawn with decaying spectra: the time does not depend on the images. Before any timing, the
"output" objective is checked against the chain's own losses. One round runs every variant once, so slow drifts of the
machine meet all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.common import VIT_B, finish, parser, verdict
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition.baselines import svd_llm_factors
from vitlr.decomposition.solving import decompose
from vitlr.measuring.timing import compare
from vitlr.runtime.storage import fingerprint

IMAGES, TOKENS = 1, 4096


def spd(n: int, generator: torch.Generator) -> Tensor:
    """A full-rank second moment `[n, n]` whose eigenvalues decay over about three decades, as activations' do."""
    X = torch.randn(2 * n, n, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -1.5, n, dtype=torch.float64
    )
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    X = X @ mix
    return X.mT @ X


def problem(depth: int) -> tuple[nn.Module, Statistics, dict[str, Tensor]]:
    """The linears of ViT-B, statistics of the small sides, and the full input moments that the chain needs."""
    generator = torch.Generator().manual_seed(0)
    C = {k: spd(k, generator) for k in {k for _, k in VIT_B.values()}}
    model = nn.Module()
    layers, moments = {}, {}
    for block in range(depth):
        for kind, (n, k) in VIT_B.items():
            name = f"blocks_{block}_{kind.replace('.', '_')}"
            linear = nn.Linear(k, n, bias=False)
            model.add_module(name, linear)
            W = linear.weight.detach().double()
            layers[name] = LayerStatistics(
                name, k, n, name, TOKENS,
                moment=W @ C[k] @ W.mT if n <= k else C[k],
                gradient=spd(min(n, k), generator),
                input_sum=torch.zeros(k, dtype=torch.float64),
            )  # fmt: skip
            moments[name] = C[k]
    weights = {name: m.weight for name, m in model.named_children()}
    return model, Statistics(layers, fingerprint(weights), ("loss", "output"), images=IMAGES), moments


def check(model: nn.Module, stats: Statistics, moments: dict[str, Tensor]) -> float:
    """Largest relative difference of the loss at 40 % of the break-even rank between ours and the chain's factors."""
    spectra = decompose(model, stats, "output")
    worst = 0.0
    for name in list(stats.layers)[:4]:
        W, C = model.get_submodule(name).weight.detach().double(), moments[name]
        r = rank(*W.shape)
        A, B = svd_llm_factors(W, C, r)
        D = W - A @ B
        theirs = float(((D @ C) * D).sum())
        worst = max(worst, abs(float(spectra.layers[name].errors()[r]) - theirs) / theirs)
    return worst


def rank(n: int, k: int) -> int:
    """The rank that keeps 40 % of an `n x k` matrix."""
    return int(0.4 * n * k / (n + k))


def main() -> None:
    args = parser(__doc__ or "")
    args.add_argument("--depth", type=int, default=12, help="blocks; 12 is ViT-B")
    args.add_argument("--repeats", type=int, default=3, help="rounds")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    model, stats, moments = problem(given.depth)
    difference = check(model, stats, moments)
    if difference > 1e-6:
        raise SystemExit(f"the losses of decompose and of the chain differ by {difference:.1e}; nothing is timed")
    weights = {name: m.weight.detach().double() for name, m in model.named_children()}
    generator = torch.Generator().manual_seed(1)
    plain = [spd(768, generator) for _ in range(4)]

    def chain() -> None:
        for name, W in weights.items():
            svd_llm_factors(W, moments[name], rank(*W.shape))

    def eigh() -> None:
        for i in range(len(weights)):
            torch.linalg.eigh(plain[i % len(plain)])

    def with_factors() -> None:
        spectra = decompose(model, stats, "output")
        for name, W in weights.items():
            spectra.layers[name].factors(W, rank(*W.shape))

    times = compare(
        {
            "decompose output": lambda: decompose(model, stats, "output"),
            "decompose loss": lambda: decompose(model, stats, "loss"),
            "output and factors": with_factors,
            "SVD-LLM chain": chain,
            "eigh loop": eigh,
        },
        repeats=given.repeats,
        warmup=1,
    )
    for name, t in times.items():
        print(f"{name:<20} min {t.min:8.2f} s   median {t.median:8.2f} s   ({len(weights)} matrices)")
    results = {"matrices": len(weights), "check": difference, "seconds": {k: t.min for k, t in times.items()}}
    for objective in ("output", "loss"):
        ours = times[f"decompose {objective}"].min
        results[f"chain / {objective}"] = verdict(
            f"SVD-LLM chain / decompose {objective}", times["SVD-LLM chain"].min / ours, 2.0, at_least=True
        )
        results[f"{objective} / eigh"] = verdict(
            f"decompose {objective} / loop of eigh(768)", ours / times["eigh loop"].min, 2.5, at_least=False
        )
    both = times["SVD-LLM chain"].min / times["output and factors"].min
    print(f"with the balanced factors of one rank, which the chain gives too: {both:.2f}x")
    results["chain / output and factors"] = round(both, 4)
    finish("decompose", results, given.json)


if __name__ == "__main__":
    main()
