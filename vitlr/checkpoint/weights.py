"""Weights put into a model: those of a file that fit it, under whatever keys and prefixes a training script wrote."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vitlr.anatomy.linears import classifier_names
from vitlr.checkpoint.weight_files import state_dicts
from vitlr.errors import InputError
from vitlr.runtime.words import some

_logger = logging.getLogger(__name__)
_AVERAGES = ("state_dict_ema", "model_ema")  # timm's scripts judge by these, and timm reads them first
_TRAINED = ("state_dict", "model", "model_state_dict")  # what stands beside an average there
_CHUNK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")  # as DINOv2 trains: blocks.CHUNK.BLOCK
_COMPRESSED = (".down.weight", ".linear.weight", ".outputs", ".inputs", ".codes")  # of layers of vitlr.nn
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "base_model.", "student.")

Weights = Mapping[str, Tensor]


def load_weights(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    *,
    name: str | None = None,
    new_head: bool = False,
    key: str | None = None,
) -> None:
    """Copy the weights of a checkpoint file into `model`, all of them or none; `InputError` where they do not fit.

    Of a file with several state dicts the one is read that fits. Where several do, `key` says which (a key, a prefix
    of names, or several joined by dots); without it that is refused, but for an average of timm's scripts beside what
    it is of. With `new_head` the model is for another task, as timm does it: a classifier that the file lacks or has in
    another shape is left as it was made, with random weights, and positions of another image size are resampled, both
    with a warning. A model of timm that was made without a classifier (`num_classes=0`) takes none.
    """
    path, own = Path(checkpoint), model.state_dict()
    there = {
        where: _with_heads(model, own, weights, new_head)
        for keys, found in state_dicts(path).items()
        for where, weights in _under_prefixes(own, keys, found)
    }
    if key is not None:
        asked = {where: weights for where, weights in there.items() if f".{key}." in f".{where}."}
        if not asked:
            raise InputError(f"checkpoint {path} has no {key!r}; it holds {_listed(there)}")
        there = asked
    fitting = {
        where: fits for where, weights in there.items() if (fits := _fitting(model, weights, new_head)) is not None
    }
    if not fitting:
        raise InputError(_why_none(own, there, path, name or type(model).__name__))
    _check_plain(fitting, path)
    where = _only(_distinct(fitting), path)
    chosen, read = fitting[where], there[where]
    if random := sorted(name for name, tensor in chosen.items() if tensor is own.get(name)):
        _logger.warning("%s is new: %s has none of that shape", some(random), path)
    if others := [name for name, tensor in chosen.items() if name in read and read[name].shape != tensor.shape]:
        _logger.warning("%s is resampled: %s has it for another image size", some(others), path)
    model.load_state_dict(dict(chosen), strict=True)


def _only(fitting: Sequence[str], path: Path) -> str:
    """Which of the state dicts that fit is read; `InputError` where that is for the user to say."""
    averages = [where for where in fitting if where.partition(".")[0] in _AVERAGES]
    of_timm = all(where.partition(".")[0] in (*_AVERAGES, *_TRAINED) for where in fitting)
    if len(fitting) > 1 and not (of_timm and len(averages) == 1):
        raise InputError(
            f"checkpoint {path} holds {len(fitting)} state dicts that fit: {_listed(fitting)}; say which with "
            "checkpoint_key="
        )
    if len(fitting) > 1:
        others = _listed([where for where in fitting if where not in averages])
        _logger.warning("%s is read of %s, as timm does; checkpoint_key= names another: %s", averages[0], path, others)
        return averages[0]
    return fitting[0]


def _check_plain(fitting: Mapping[str, Weights], path: Path) -> None:
    """`InputError` for weights that a quantiser or a sharding made tensors of its own of."""
    for weights in fitting.values():
        for name, tensor in weights.items():
            if type(tensor) not in (Tensor, nn.Parameter):
                raise InputError(
                    f"checkpoint {path}: {name} is a {type(tensor).__name__}, no plain tensor; write the weights "
                    "before they are quantised or sharded, and do that again behind vitlr"
                )


def _listed(places: Iterable[str]) -> str:
    return some([where or "(the file itself)" for where in places], shown=8)


def _distinct(fitting: Mapping[str, Weights]) -> list[str]:
    """Where they are, but for those that hold what an earlier one holds."""
    kept: list[str] = []
    for where, weights in fitting.items():
        if not any(all(torch.equal(weights[name], t) for name, t in fitting[other].items()) for other in kept):
            kept.append(where)
    return kept


def _under_prefixes(expected: Iterable[str], keys: str, weights: Weights) -> Iterator[tuple[str, Weights]]:
    """What of `weights` stands under each prefix beneath which the model's names are, with the keys that lead there.

    Losses and metrics beside the model are left out; a flat `{"student.x": ..., "teacher.x": ...}` has two.
    """
    expected = set(expected)
    counts = Counter(
        name[: len(name) - len(rest)]
        for name in weights
        for rest in (name.split(".", cut)[-1] for cut in range(name.count(".") + 1))
        if rest in expected
    )
    least = min(len(expected), len(weights)) / 2
    prefixes = [prefix for prefix, count in counts.items() if count >= least]
    if not prefixes or "" in prefixes:
        yield keys, _without_prefixes(expected, weights)
        return
    for prefix in prefixes:
        under = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        yield ".".join(filter(None, (keys, prefix.removesuffix(".")))), under


def _without_prefixes(expected: set[str], weights: Weights) -> Weights:
    """`weights` of names that the model lacks, as its authors called them, without prefixes of training scripts."""
    while not any(name in expected for name in weights):
        prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    return weights


def _with_heads(model: nn.Module, own: Weights, weights: Weights, new_head: bool) -> Weights:
    """`weights` without the classifier that a model of timm was made without, and with `own` new one if wanted."""
    names = getattr(model, "pretrained_cfg", None) or {}
    lost = names.get("classifier") or () if getattr(model, "num_classes", None) == 0 else ()
    heads = tuple(f"{head}." for head in ((lost,) if isinstance(lost, str) else lost))
    weights = {name: t for name, t in weights.items() if name in own or not name.startswith(heads)}
    if new_head and (heads := tuple(f"{head}." for head in classifier_names(model))):
        of_heads = [name for name in own if name.startswith(heads)]
        others = [name for name in of_heads if name not in weights or own[name].shape != weights[name].shape]
        weights |= {name: own[name] for name in others if len(of_heads) < len(own)}
    return weights


def _why_none(own: Weights, there: Mapping[str, Weights], path: Path, model: str) -> str:
    """Why nothing in the file fits, by what comes nearest."""

    def shared(where: str) -> int:
        return sum(name in own and own[name].shape == t.shape for name, t in there[where].items())

    where = max(there, key=shared)
    of = f" ({where} of {_listed(there)})" if len(there) > 1 else ""
    if any(".lora_" in name for name in there[where]):
        return (
            f"checkpoint {path} holds adapters of LoRA beside or without the layers that they change: put them on with "
            "peft and write model.merge_and_unload().state_dict()"
        )
    remedy = "name the model that the file was made for, with its arguments (num_classes=, img_size=, ...)"
    if any("embeddings." in name for name in there[where]):
        remedy = "its names are those of transformers: make the model there, and give vitlr the model itself"
    if any(name.endswith(_COMPRESSED) for name in there[where]):
        remedy = "its layers were compressed: write such a model with vitlr.save, and read it with vitlr.load"
    return f"checkpoint {path} does not fit {model}: {_mismatch(own, there[where])}{of}; {remedy}"


def _mismatch(own: Weights, weights: Weights) -> str:
    """What keeps `weights` from filling a model whose state is `own`, in words; empty where they fit."""
    shapes = [
        f"{name} {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names)


def _fitting(model: nn.Module, weights: Weights, resample: bool) -> Weights | None:
    """`weights`, or those under the names of timm, if they fit; `resample` puts positions at its image size."""
    own = model.state_dict()
    if not _mismatch(own, weights):
        return weights
    in_a_row = {_CHUNK.sub("blocks.", name): tensor for name, tensor in weights.items()}
    for named in (weights, in_a_row):
        form = _original_names(model, named, resample)
        if form is not None and not _mismatch(own, form):
            return form
    return None


def _original_names(model: nn.Module, weights: Weights, resample: bool) -> dict[str, Tensor] | None:
    """`weights` under timm's names, by the model file's own filter; None where that cannot make them fit.

    Published files keep their authors' names or buffers timm no longer stores. Filters also resample position tables
    of another image size without a word, so a file that disagrees in a shape is given to them by `resample` only.
    """
    own = model.state_dict()
    if not resample and any(name in weights and weights[name].shape != tensor.shape for name, tensor in own.items()):
        return None
    rename = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if rename is None:
        return None
    try:
        return {name: t for name, t in rename(dict(weights), model).items() if isinstance(t, Tensor)}
    except Exception:  # the filter knows some layouts only; the caller reports what is wrong with this one
        return None
