"""Hooks on one linear layer that add up its moments while images flow through the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.calibration.kept import kept
from vitlr.calibration.sums import SUMS, LayerStatistics
from vitlr.errors import InputError
from vitlr.measuring.losses import draws
from vitlr.ops.linalg.gram import exact_products, gram_update_
from vitlr.runtime.mapped import Mapped, put_away
from vitlr.runtime.modules import read_freely

COLUMNS = 32  # of a sketch: twice as many or half as many choose plans as good (docs/measured.md)


Scale = float | Tensor  # a power of two
_SMALL, _LARGE = 2.0**-50, 2.0**50  # beyond, products of two entries near float32's own ends


class Tap:
    """Adds up the sums of one layer: moments in the forward pass, gradient moments in the backward pass.

    Calibration says which pass comes, by `forward` and `backward`, and asks for `gradient_seen`; a forward pass that
    activation checkpointing repeats inside the backward pass is counted once.
    """

    images: int
    in_backward: bool
    sketch: Tensor | None

    def __init__(
        self,
        stats: LayerStatistics,
        linear: nn.Linear,
        collect: Collection[str],
        leading: Collection[int],
        queries: tuple[int, int] | None = None,
        bias: Tensor | None = None,
        file: Mapped | None = None,
    ) -> None:
        self.strided = False  # rows of one image are `images` apart, not neighbours
        self.asleep = False  # a run that is not counted
        self.stats, self.linear = stats, linear
        self.leading = leading  # first dimension of the input for one image
        self.queries = queries  # (heads, d) of the queries that its first rows make, if these are wanted
        self.bias = bias  # [heads d], what is added to them behind it
        self.gradient_seen = False
        self.kept: Callable[[], Tensor] | None = None  # the input, from a forward pass's begin to its end
        self.forward(0)
        self.wanted = stats.keys(collect, queries is not None)
        self.by_image = "image_moment" in self.wanted
        for key in self.wanted:
            stats.begin(key, stats.shape(key, *(queries or ())), linear.weight.device, file)
        self._handles = [linear.register_forward_pre_hook(self._enter), linear.register_forward_hook(self._leave)]

    @property
    def of_images(self) -> bool:
        """Whether rows are split by image."""
        return self.by_image or bool(self.wanted & {"normalized", "row_gradient"})

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def forward(self, images: int) -> None:
        """A forward pass of so many images follows."""
        self.images, self.in_backward, self.sketch = images, False, None

    def backward(self, sketch: Tensor | None) -> None:
        """A backward pass follows; `sketch` [images, at least size, COLUMNS], standard normal, is for "fisher"."""
        self.in_backward, self.sketch = True, sketch

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.asleep or not (self.wanted & {"gradient", "row_gradient"} and torch.is_grad_enabled()):
            return None
        x = args[0]
        self.kept = kept(x)
        # A private view (or leaf, where nothing before it asks for gradients): its gradient is what this layer
        # alone sends back, whoever else reads the same input.
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        if self.stats.side == "input":
            self._follow(x, self.kept)
        return (x, *args[1:])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.asleep:
            return
        x, made = args[0].detach(), output.detach()
        looks = self.stats.side == "output" or "normalized" in self.wanted
        y = made - self.linear.bias if looks and self.linear.bias is not None else made
        if output.requires_grad:
            again, self.kept = self.kept or (lambda: x), None
            if self.stats.side == "output":
                seen = made.clone() if self.by_image and y is made else y  # what follows may write into the output
                self._follow(output, lambda: seen)
            if "image_input_moment" in self.wanted:
                output.register_hook(lambda g: self._add_hidden(again(), g))
            if "output_gradient" in self.wanted:
                output.register_hook(self._add_output_gradient)
            if "output_square" in self.wanted:
                output.register_hook(lambda g: self._add_squares("output_square", g))
            if "score_moment" in self.wanted:
                q = made[..., : math.prod(self.queries or ())]
                q = q if self.bias is None else q + self.bias.detach()
                output.register_hook(lambda g: self._add_scores(q, g))
            if "row_gradient" in self.wanted:
                output.register_hook(lambda g: self._add_row_gradient(g, again()))
        if not self.in_backward:
            with torch.no_grad():
                self._add_moments(x, y)

    def _follow(self, t: Tensor, seen: Callable[[], Tensor]) -> None:
        """Wait for the gradient by `t`, of the smaller side, on which the layer saw `seen()`."""
        if "gradient" in self.wanted:
            t.register_hook(self._add_gradient)
        if self.by_image:
            t.register_hook(lambda g: self._add_products(seen(), g))

    def _add_moments(self, x: Tensor, y: Tensor) -> None:
        """Of the input, and of the output y before its bias."""
        s, wanted = self.stats, self.wanted
        rows = x.reshape(-1, s.in_features)
        s.tokens += rows.shape[0]
        s.sum("input_sum").add_(rows.sum(0, dtype=torch.float32 if rows.dtype.itemsize <= 4 else None))
        y = y.reshape(-1, s.out_features)
        small = y if s.side == "output" else rows
        if "moment" in wanted:
            self._add_gram("moment", small)
        if "normalized" in wanted:
            gram_update_(s.held["normalized"], small, self._image_weights(y, len(x)))
            put_away(s.held["normalized"])
        if "input_moment" in wanted:
            self._add_gram("input_moment", rows)
        for key, extreme in (("input_low", rows.amin), ("input_high", rows.amax)):
            if key in wanted and len(rows):
                s.sum(key).copy_(SUMS[key].join(s.sum(key), extreme(0).double()))
        if "input_square" in wanted:
            self._add_squares("input_square", rows)
        if "input_abs" in wanted:
            s.sum("input_abs").add_(rows.abs().sum(0, dtype=torch.float32))

    def _add_gram(self, key: str, X: Tensor, size: Scale = 1.0) -> None:
        """`C += size² Xᵀ X`, also where the squares are none that float32 has."""
        C = self.stats.held[key]
        X, own = unit(X)
        size = own * size
        if not isinstance(size, Tensor) and size == 1.0:
            gram_update_(C, X)
        else:
            part = torch.zeros_like(C)
            gram_update_(part, X)
            _add(C, part, size**2)
        put_away(C)

    def _add_squares(self, key: str, t: Tensor) -> None:
        rows = t.detach().reshape(-1, t.shape[-1]).to(torch.promote_types(t.dtype, torch.float32))
        self.stats.sum(key).add_(rows.square().sum(0))

    def _per_image(self, rows: Tensor, leading: int) -> Tensor:
        """Split rows by image, `[images, tokens of one, ...]`; `leading` is the first dimension they came with."""
        if leading not in {self.images * one for one in self.leading} and not self._tokens_first(leading):
            raise InputError(
                f"layer {self.stats.name} sees inputs of leading size {leading} for {self.images} images and "
                f"{sorted(self.leading)} for one: they cannot be told apart by image; leave it out with exclude=, or "
                "use objective='loss' or 'output' without row_gradient"
            )
        if not self.strided:
            return rows.reshape(self.images, -1, rows.shape[-1])
        views = self._views(leading)
        return (
            rows.reshape(views, self.images, -1, rows.shape[-1])
            .transpose(0, 1)
            .reshape(self.images, -1, rows.shape[-1])
        )

    def _tokens_first(self, leading: int) -> bool:
        """Whether inputs are `[tokens, images, ...]`: as long as for one image, and the rows of one lie apart."""
        return self.strided and leading in self.leading

    def _views(self, leading: int) -> int:
        """How often rows of all images come one after the other, where those of one lie apart."""
        stacked = leading in {self.images * one for one in self.leading}
        return leading // self.images if stacked else leading

    def _image_weights(self, y: Tensor, leading: int) -> Tensor:
        """`1 / ‖W x_i‖²_F` for every row of image i; an image whose output vanishes weighs nothing."""
        norms = torch.linalg.vector_norm(self._per_image(y, leading), dim=(1, 2), dtype=torch.float64)
        weight = torch.where(norms > 0, norms.square().reciprocal(), 0.0)
        views = self._views(leading) if self.strided else 1
        return weight.repeat_interleave(y.shape[0] // self.images // views).repeat(views).to(torch.float32)

    def _add_gradient(self, g: Tensor) -> None:
        self.gradient_seen = True
        self._add_gram("gradient", g.detach().reshape(-1, self.stats.size))

    def _add_output_gradient(self, g: Tensor) -> None:
        self._add_gram("output_gradient", g.detach().reshape(-1, self.stats.out_features))

    def _add_products(self, y: Tensor, g: Tensor) -> None:
        """`P Pᵀ` and `Pᵀ P` of every image's `P = Yᵀ G`."""
        self.gradient_seen = True
        (y, size_y), (g, size_g) = unit(self._by_image(y)), unit(self._by_image(g))
        with exact_products(y.device):
            of_y, of_g = self._roots(g) @ y, self._roots(y) @ g
        self._add_gram("image_moment", of_y.flatten(0, 1), size_y * size_g)
        self._add_gram("image_gradient", of_g.flatten(0, 1), size_y * size_g)

    def _add_hidden(self, h: Tensor, g: Tensor) -> None:
        """`P Pᵀ` of every image's `P = Hᵀ G`, `P ḡ` and `‖ḡ‖²`, all by the same R: they must fit together."""
        s = self.stats
        (h, size_h), (g, size_g) = unit(self._by_image(h)), unit(self._by_image(g))
        with exact_products(h.device):
            R = self._roots(g)
            rows, total = R @ h, R.sum(2)
            _add(s.sum("image_input_sum"), (total.unsqueeze(1) @ rows).sum((0, 1)), size_h * size_g**2)
        _add(s.sum("image_output_gradient"), total.double().square().sum(), size_g**2)
        self._add_gram("image_input_moment", rows.flatten(0, 1), size_h * size_g)

    def _add_scores(self, y: Tensor, g: Tensor) -> None:
        """Moments of q and of its gradient by head, and of every image's `P = Σ_tokens q gᵀ`."""
        assert self.queries is not None
        s, (heads, d) = self.stats, self.queries
        g = g[..., : heads * d]
        if self.by_image:
            y, g = self._by_image(y), self._by_image(g)
        else:
            y, g = (t.reshape(1, -1, heads * d).to(torch.promote_types(t.dtype, torch.float32)) for t in (y, g))
        y, g = (
            t.unflatten(-1, self.queries).transpose(1, 2).contiguous() for t in (y, g)
        )  # [images, heads, tokens, d]
        (y, size_y), (g, size_g) = unit(y), unit(g)
        with exact_products(y.device):
            _add(s.sum("score_moment"), (y.mT @ y).sum(0), size_y**2)
            _add(s.sum("score_gradient"), (g.mT @ g).sum(0), size_g**2)
            if self.by_image:
                P, size = y.mT @ g, (size_y * size_g) ** 2
                _add(s.sum("image_score_moment"), (P @ P.mT).sum(0), size)
                _add(s.sum("image_score_gradient"), (P.mT @ P).sum(0), size)

    def _by_image(self, t: Tensor) -> Tensor:
        t = self._per_image(t.detach().reshape(-1, t.shape[-1]), len(t))
        return t.to(torch.promote_types(t.dtype, torch.float32))

    def _roots(self, g: Tensor) -> Tensor:
        """`R [images, k, tokens]` with `RᵀR = G Gᵀ` where features or tokens are few, else on average: `R = (G Ω)ᵀ`.

        Ω is an image's own Gaussian sketch of COLUMNS columns: `P Pᵀ = Hᵀ G Gᵀ H` then costs as many rows an image.
        """
        tokens, features = g.shape[1:]
        if features <= COLUMNS:
            return g.mT
        if tokens <= COLUMNS:
            return torch.linalg.qr(g.mT, mode="r").R
        assert self.sketch is not None
        return (g @ self.sketch[:, :features].to(g)).mT / COLUMNS**0.5

    def _add_row_gradient(self, g: Tensor, x: Tensor) -> None:
        """Row k of one image's `∂L/∂W = gᵀ x` has the squared norm `Σ_t g_tk (x xᵀ g)_tk`; take the cheaper form."""
        self.gradient_seen = True
        tokens = x.numel() // x.shape[-1] // max(self.images, 1)
        g, x = (self._per_image(t.detach().reshape(-1, t.shape[-1]), len(t)).float() for t in (g, x))
        (g, size_g), (x, size_x) = unit(g), unit(x)
        wide = tokens * sum(self.linear.weight.shape) > self.linear.weight.numel()
        squares = (g.mT @ x).square().sum((0, 2)) if wide else ((x @ x.mT) @ g).mul_(g).sum((0, 1))
        _add(self.stats.sum("row_gradient"), squares, (size_g * size_x) ** 2)


def unit(t: Tensor) -> tuple[Tensor, Scale]:
    """A tensor and 1; where products of its entries would leave float32, `t / s` with entries up to 1, and s.

    s is a power of two, so nothing is rounded. On the CPU the largest entry is looked at, and what is of common size
    stays as it is; elsewhere looking would wait for the device, so s stays there and `t / s` is always a product.
    """
    if not t.numel() or t.dtype in (torch.float64, torch.float16):
        return t, 1.0
    low, high = torch.aminmax(t)  # a tenth of a norm's time
    if not read_freely(t):
        return _unit_unread(t, torch.maximum(-low, high).double())
    largest = max(-float(low), float(high))
    if largest == 0.0 or _SMALL < largest < _LARGE or not math.isfinite(largest):
        return t, 1.0
    power = max(math.frexp(largest)[1], -126)
    return t.float() * 2.0**-power, 2.0**power


def _unit_unread(t: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """`unit` where the largest entry, in float64, is on a device that is not waited for."""
    common = (largest > _SMALL) & (largest < _LARGE) | (largest == 0) | ~largest.isfinite()
    power = torch.where(common, 0, torch.frexp(largest).exponent.clamp(min=-126))
    one = torch.ones_like(largest)
    return t * torch.ldexp(one, -power).to(t.dtype), torch.ldexp(one, power)


def _add(total: Tensor, part: Tensor, size: Scale) -> None:
    """`total += size · part`, in float64 where the size is on a device."""
    if isinstance(size, Tensor):
        total.add_(part.double() * size)
    else:
        total.add_(part, alpha=size)


def sketches(seeds: Sequence[int], samples: int, taps: Sequence[Tap]) -> Sequence[Tensor | None]:
    """What `_roots` needs for each loss of a batch, `[images, largest size, COLUMNS]` from the images' seeds."""
    size = max((tap.stats.size for tap in taps if tap.by_image), default=0)
    if size <= COLUMNS:
        return [None] * samples
    device = taps[0].linear.weight.device
    return list(draws([s ^ 1 for s in seeds], samples, (size, COLUMNS), torch.randn).to(device))  # not the losses'
