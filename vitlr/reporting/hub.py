"""A model as a folder that others can open, on this machine or on the Hub: weights, timm's config, a model card."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitlr
from vitlr.checkpoint import files, folders, origins
from vitlr.checkpoint.creation import create_model
from vitlr.errors import InputError
from vitlr.planning.plans import Plan
from vitlr.reporting import figures
from vitlr.reporting.card import Card, licence_of
from vitlr.reporting.drawing import can_draw
from vitlr.reporting.sections import LINES
from vitlr.runtime.places import atomic_path
from vitlr.runtime.storage import load_header
from vitlr.runtime.words import one_line

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    plan: Plan | Mapping[str, Any] | None = None,
    metrics: Any = None,
    model_args: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    name: str | None = None,
) -> Path:
    """Write `model.safetensors`, `config.json` as timm writes it, and a model card, `README.md`; the folder's path.

    The weights are a file of `vitlr.save`, which `vitlr.load("local-dir:FOLDER")` opens; of a model of timm's shapes,
    as `vitlr.to_dense(model, full_width=True)` makes it, timm opens them too: `timm.create_model("local-dir:FOLDER",
    pretrained=True)`. The card has what the plan kept, `metrics` (of `vitlr.evaluate`), the repository of the
    `base_model` and the `license`, known by themselves where timm brought the weights. Raises `InputError` as `save`.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(f"cannot make the folder {place}: {cause.strerror or cause}; choose another one") from cause
    files.save(model, place / folders.WEIGHTS, model_args=model_args, plan=plan, metrics=metrics)
    header = load_header(place / folders.WEIGHTS, kind="model", schema=files.SCHEMA)
    config = _config(header)
    size = (place / folders.WEIGHTS).stat().st_size
    card = Card.of(model, header, config, size, name or place.resolve().name)
    if base_model is not None:
        card.base, card.license = base_model, licence_of(base_model)
    card.license = license or card.license
    if "pretrained_cfg" in config:  # timm's table has a licence for weights of that name, which these need not be
        config["pretrained_cfg"] |= {"license": card.license}
    _write(place / folders.CONFIG, json.dumps(config, indent=2) + "\n")
    if card.plan is not None and can_draw():
        figures.draw_kept(card.plan, place / "kept.png")
        figures.draw_losses(card.plan, place / "losses.png")
        card.figures = {"kept.png": LINES["kept"], "losses.png": LINES["losses"]}
    _write(place / folders.CARD, str(card))
    return place


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Add model",
    **how: Any,
) -> str:
    """Put what `save_pretrained(model, folder, **how)` writes into `OWNER/NAME` on the Hub; the address of that.

    A repository that is not there is made. `token` is the one of `hf auth login` by default. Raises `InputError` where
    the Hub does not take it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    repository = repository.removeprefix(folders.HUB)
    if not _REPOSITORY.fullmatch(repository) or "@" in repository:
        raise InputError(f"{repository!r} is no repository's name; expected OWNER/NAME")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, name=repository, **how)
        try:
            api = HfApi(token=token, library_name="vitlr", library_version=vitlr.__version__)
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=message)
        except Exception as cause:  # of the network, of rights, of versions of huggingface_hub to come
            raise InputError(
                f"could not push to {folders.HUB}{repository}: {one_line(cause)}; check the name and hf auth whoami, "
                "or write the folder with vitlr.save_pretrained and upload it where there is a network"
            ) from cause
    return str(address)


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The model of `OWNER/NAME[@REVISION]` on the Hub, or of a folder, that vitlr or timm wrote, in eval mode.

    `hf-hub:` and `local-dir:` before it say which is meant; a folder of that name comes first. `model` is a dense one
    of the same architecture, where the file names no origin. Raises `InputError` where it is not there or is none.
    """
    called = os.fspath(name)
    if not folders.is_folder_name(called):
        if not Path(called).is_dir() and not _REPOSITORY.fullmatch(called):
            raise InputError(f"{called!r} is no folder and no repository; expected a folder or OWNER/NAME[@REVISION]")
        called = f"{folders.LOCAL if Path(called).is_dir() else folders.HUB}{called}"
    if folders.is_ours(called):
        return files.load(called, model=model, device=device)
    return create_model(called).to(device)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _config(header: Mapping[str, Any]) -> dict[str, Any]:
    """What timm reads, of the dense model of that name, and that the weights are ours; the latter alone for others."""
    ours = {folders.OURS: vitlr.__version__}
    if (header["origin"] or {}).get("library") != "timm":
        return ours
    from timm.models import _hub

    origin = origins.check_origin(header["origin"])
    twin = origins.build(origin, "meta")  # what happened to the model since it was made does not count
    twin.pretrained_cfg.update(header["data"])  # type: ignore[union-attr,operator]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / folders.CONFIG
        _hub.save_config_for_hf(twin, str(path), model_args=origin["args"])
        return {**json.loads(path.read_text(encoding="utf-8")), **ours}
