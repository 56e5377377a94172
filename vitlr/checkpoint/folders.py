"""Folders of models under timm's names: `hf-hub:OWNER/NAME[@REVISION]` on the Hub, `local-dir:FOLDER` on a disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vitlr.errors import InputError
from vitlr.runtime.kinds import read_json
from vitlr.runtime.places import is_file
from vitlr.runtime.words import one_line

HUB, LOCAL = "hf-hub:", "local-dir:"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OURS = "vitlr"  # the key of a config that says that the weights are a file of `vitlr.save`
_LARGEST = 2**24  # bytes of a config; the names of 21,000 classes take two million


def is_folder_name(name: str | os.PathLike[str]) -> bool:
    """Whether a name begins as those of folders do."""
    return os.fspath(name).startswith((HUB, LOCAL))


def folder(name: str | os.PathLike[str], *files: str) -> Path:
    """The folder of a name with `files` in it, which are fetched from the Hub where they are newer than the cache's.

    Raises `InputError` where there is no such folder or file, and where the Hub cannot be reached, with what to do.
    """
    name = os.fspath(name)
    place = name.partition(":")[2]
    if name.startswith(HUB):
        return _fetched(place, files)
    found = Path(place)
    if not place or not found.is_dir():
        raise InputError(f"{name}: there is no such folder; expected local-dir:FOLDER with {CONFIG} and {WEIGHTS}")
    for file in files:
        if not is_file(found / file):
            raise InputError(f"{name} has no {file}; {_WANTED[file]}")
    return found


def config_of(name: str | os.PathLike[str]) -> dict[str, Any]:
    """What `config.json` says; `InputError` where it says nothing."""
    path = folder(name, CONFIG) / CONFIG
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        found = read_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no table")
    except (OSError, ValueError) as cause:
        raise InputError(f"{os.fspath(name)}: {CONFIG} cannot be read ({one_line(cause)}); write it again") from cause
    return found


def is_ours(name: str | os.PathLike[str]) -> bool:
    """Whether the folder of a name was written by `vitlr.save_pretrained`, so that its weights rebuild themselves."""
    return OURS in config_of(name)


def path_of(name: str | os.PathLike[str]) -> Path:
    """The file that a path or the name of a folder of ours stands for; `InputError` for folders of others."""
    if not is_folder_name(name):
        return Path(name)
    if not is_ours(name):
        raise InputError(
            f"{os.fspath(name)} was not written by vitlr; make its model with vitlr.create_model or "
            "vitlr.from_pretrained, which take the same name"
        )
    return folder(name, CONFIG, WEIGHTS) / WEIGHTS


_WANTED = {
    CONFIG: "expected a folder that timm or vitlr wrote",
    WEIGHTS: "other weights, such as pickled ones, are not read from there: name them as a checkpoint",
}


def _fetched(place: str, files: tuple[str, ...]) -> Path:
    """The cache's folder of a repository, all of its files of one commit."""
    from huggingface_hub import errors, hf_hub_download

    repository, _, wanted = place.partition("@")
    revision, found = wanted or None, Path()
    name = f"{HUB}{place}"
    for file in files:
        try:
            found = Path(hf_hub_download(repository, file, revision=revision, library_name="vitlr")).parent
        except errors.HFValidationError as cause:
            raise InputError(f"{name} names no repository; expected {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION") from (
                cause
            )
        except errors.GatedRepoError as cause:
            raise InputError(
                f"{name} is for those only who accept its terms: do so on its page, then run hf auth login"
            ) from cause
        except errors.RepositoryNotFoundError as cause:
            raise InputError(
                f"{name}: the Hub knows no such repository; check the name, or run hf auth login if it is private"
            ) from cause
        except errors.RevisionNotFoundError as cause:
            raise InputError(f"{name}: there is no revision {wanted!r}; name a branch, a tag or a commit") from cause
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as cause:
            raise InputError(
                f"{name}: {file} is not in the cache, and the Hub cannot be reached; run once where it can, or bring "
                f"the folder here (hf download {repository} --local-dir DIR) and name it {LOCAL}DIR"
            ) from cause
        except errors.EntryNotFoundError as cause:
            raise InputError(f"{name} has no {file}; {_WANTED[file]}") from cause
        except Exception as cause:  # of the network, of the disk, of versions of huggingface_hub to come
            raise InputError(f"{name}: {file} could not be fetched: {one_line(cause)}") from cause
        revision = found.name  # the commit, so that what follows is of the same one
    return found
