"""Fixtures for every test: fixed seeds, a ViT that runs in milliseconds, images that are made on the spot."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers share the cores, also with the commands that they start: pools of threads that spin slow everyone down.
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vitlr.checkpoint.creation import create_model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., torch.nn.Module]:
    """A function that makes a timm ViT with 32x32 inputs, two blocks of width 32 and 5 classes (arguments override)."""

    def make(name: str = "vit_tiny_patch16_224", *, seed: int = 0, **args) -> torch.nn.Module:
        tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = create_model(name, **{**tiny, **args})
            # timm starts with zero biases and tiny weights; a trained model's logits depend on the image.
            for p in model.parameters():
                p.data += torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        return model

    return make


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three ragged batches (images, labels) for `tiny_vit`: a plain list is a loader."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 32, 32, generator=generator), torch.randint(0, 5, (n,), generator=generator))
        for n in (4, 4, 3)
    ]


@pytest.fixture
def images() -> torch.Tensor:
    """Six images for `tiny_vit` in one tensor."""
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def _jpeg(seed: int, size: tuple[int, int] = (40, 36)) -> bytes:
    from PIL import Image

    noise = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).resize(size).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def jpeg() -> Callable[..., bytes]:
    """A function (seed, size) that makes a small JPEG file, the same one for the same seed."""
    return _jpeg


def _files(classes: Sequence[str], images: int) -> dict[str, bytes]:
    return {f"{c}/{i}.jpg": _jpeg(100 * k + i) for k, c in enumerate(classes) for i in range(images)}


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a folder with `images` JPEGs for each class, laid out as `<class>/<i>.jpg`."""

    def make(classes: Sequence[str] = ("a", "b", "c", "d", "e"), images: int = 2, name: str = "folder") -> Path:
        root = tmp_path / name
        root.mkdir()
        for path, content in _files(classes, images).items():
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_bytes(content)
        return root

    return make


@pytest.fixture
def image_tar(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a .tar of the same layout; `extra` adds files by path."""

    def make(
        classes: Sequence[str] = ("a", "b", "c", "d", "e"),
        images: int = 2,
        name: str = "images.tar",
        extra: dict[str, bytes] | None = None,
    ) -> Path:
        with tarfile.open(tmp_path / name, "w") as tar:
            for path, content in {**_files(classes, images), **(extra or {})}.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A function that finds a real input in VITLR_DATA or ../shared/data, and skips the test where it is missing."""
    root = Path(os.environ.get("VITLR_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

    def find(name: str) -> Path:
        path = root / name
        if not path.is_file():
            pytest.skip(f"{name} is not in VITLR_DATA or ../shared/data")
        return path

    return find
