"""Models by their timm name, with weights from a file: made once, remembered so that they can be made again."""

from __future__ import annotations

import difflib
import os
from typing import Any

from torch import nn

from vitlr.checkpoint import folders, other_libraries
from vitlr.checkpoint.weights import load_weights
from vitlr.errors import InputError
from vitlr.runtime.words import one_line

_NOT_ARCHITECTURE = {"cache_dir", "device", "dtype"}  # where and in what, not which model


def create_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_key: str | None = None,
    pretrained: bool = False,
    new_head: bool = False,
    **args: Any,
) -> nn.Module:
    """Make the timm model `name` in eval mode, with weights from `checkpoint` where one is given.

    `name` may also be `hf-hub:OWNER/NAME` or `local-dir:FOLDER`, which bring their weights, from the Hub safetensors
    only. `args` go to `timm.create_model` (num_classes, img_size, depth, ...); name and args are kept in
    `model.vitlr_origin`, the repository that pretrained weights are of in `model.vitlr_base`. A checkpoint is a
    safetensors file or one of `torch.save`, of which no pickled code ever runs. What fits of the state dicts that
    training scripts write into one is read; `checkpoint_key` (such as `"teacher"`) says which where several do. Raises
    `InputError` for an unknown name (with close matches), a folder that is not there, arguments the model does not
    take, and a file that does not fit (naming what is missing, unexpected or of another shape). `new_head=True` takes
    it for another task all the same: the classifier may be new, and positions are resampled to the image size.
    """
    import timm

    elsewhere, called = folders.is_folder_name(name), name
    if elsewhere:
        bare = checkpoint is not None or name.startswith(folders.LOCAL)  # whose weights may be of any plain kind
        files = (folders.CONFIG,) if bare else (folders.CONFIG, folders.WEIGHTS)
        name = f"{folders.LOCAL}{folders.folder(name, *files)}"
        if "architecture" not in (told := folders.config_of(called)):
            whose = "transformers" if "model_type" in told else "no library that vitlr makes models of"
            raise InputError(f"{called} holds a model of {whose}: make it there, and give vitlr the model itself")
    else:
        _check_name(name)
    if "checkpoint_path" in args:
        raise InputError("checkpoint_path= is timm's name for it; pass checkpoint= instead")
    args = {key: value for key, value in args.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained=pretrained or (elsewhere and checkpoint is None), **args)
    except Exception as cause:  # timm's constructors and downloads raise whatever they like
        what = "download the weights of" if pretrained and not elsewhere else "make"
        hint = "; use checkpoint= to read weights from a file" if pretrained else ""
        if elsewhere and folders.is_ours(called):
            hint = "; it was written by vitlr: open it with vitlr.load"
        given = f" with {', '.join(f'{k}={v!r}' for k, v in args.items())}" if args else ""
        raise InputError(f"could not {what} {called}{given}: {one_line(cause)}{hint}") from cause
    if checkpoint is not None:
        load_weights(model, checkpoint, name=name, new_head=new_head, key=checkpoint_key)
    elif checkpoint_key is not None:
        raise InputError(f"checkpoint_key={checkpoint_key!r} goes with checkpoint=")
    kept = {key: value for key, value in args.items() if key not in _NOT_ARCHITECTURE}
    if elsewhere:  # a file names timm's architecture, with what its config says on top
        name, config = _config_in(name.removeprefix(folders.LOCAL))
        kept = {"num_classes": model.num_classes, **config, **kept}
    if checkpoint is None:
        model.vitlr_base = _repository(model, called, pretrained)  # type: ignore[assignment]
    model.vitlr_origin = {"library": "timm", "name": name, "args": kept}  # type: ignore[assignment]
    return model.eval()


def _config_in(folder: str) -> tuple[str, dict[str, Any]]:
    """The architecture that a folder is of, and its arguments there."""
    from timm.models import _hub

    _, architecture, args = _hub.load_model_config_from_path(folder)
    return architecture, dict(args or {})


def _repository(model: nn.Module, name: str, pretrained: bool) -> str | None:
    """The repository on the Hub that the weights are of; None where they are of none, or nobody knows."""
    if folders.is_folder_name(name):
        return name.removeprefix(folders.HUB).partition("@")[0] if name.startswith(folders.HUB) else None
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    found, tag = config.get("hf_hub_id"), config.get("tag")
    if not pretrained or not isinstance(found, str):
        return None
    return found + config["architecture"] + (f".{tag}" if tag else "") if found.endswith("/") else found


def origin(model: nn.Module) -> dict[str, Any] | None:
    """What made the model, as {library, name, args}: `create_model`, or the file it came from; None for others."""
    found = getattr(model, "vitlr_origin", None)
    return found if isinstance(found, dict) else None


def remade(model: nn.Module) -> nn.Module | None:
    """The dense model that it came from, with random weights; None where that is not known."""
    found = origin(model)
    if found is None:
        return None
    if found["library"] != "timm":
        return other_libraries.build(other_libraries.check(found)).eval()
    return create_model(found["name"], **found["args"])


def _check_name(name: str) -> None:
    import timm

    if "/" in name or "\\" in name or ":" in name:
        raise InputError(
            f"unknown model {name!r}: expected a timm name such as vit_tiny_patch16_224, hf-hub:OWNER/NAME or "
            "local-dir:FOLDER; pass files apart"
        )
    if timm.is_model(name):
        return
    base = name.split(".", 1)[0]
    close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
    raise InputError(f"unknown model {name!r}; {hint}")
