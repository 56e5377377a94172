"""What the benchmark scripts share: where the data are, which machine this is, how a result is printed and kept."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "bench" / "build"  # caches; ignored by git

# ViT-B/16: (out_features, in_features) of the four linears of a block, by timm's names
VIT_B = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}


def parser(text: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes: --threads and --json."""
    args = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    args.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    args.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return args


def data_folder(given: Path | None = None) -> Path:
    """The folder of the real inputs: `given`, VITLR_DATA, or ../shared/data beside the repository."""
    folder = given or Path(os.environ.get("VITLR_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "imagenet_validation_1300.tar").is_file():
        sys.exit(f"no imagenet_validation_1300.tar in {folder}: name the data folder with VITLR_DATA or --data")
    return folder


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, torch, threads, the day. No names of hosts or people."""
    from vitlr.runtime.machine import processor

    return {
        "processor": f"{processor()} ({os.cpu_count()} visible)",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def sources() -> str:
    """Twelve hex digits of the code that makes the figures: all of vitlr, its extension and this folder."""
    digest = hashlib.sha256()
    for pattern in ("vitlr/**/*.py", "vitlr/*.so", "bench/**/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Write JSON that differs only where the figures differ."""
    from vitlr.runtime.places import atomic_path

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(body, indent=1) + "\n")


def finish(name: str, results: Mapping[str, Any], path: Path | None) -> None:
    """Print the machine, and keep the figures where --json was given."""
    facts = machine()
    print(f"{name}: {facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}")
    if path is not None:
        write_json(path, {"benchmark": name, "machine": facts, "results": results})


def verdict(label: str, ratio: float, bound: float, *, at_least: bool) -> dict[str, Any]:
    """One ratio against its bound, printed and returned for the JSON."""
    met = ratio >= bound if at_least else ratio <= bound
    sign = ">=" if at_least else "<="
    print(f"{label:<58} {ratio:6.2f}x   wanted {sign} {bound:.2f}x   {'met' if met else 'NOT MET'}")
    return {"ratio": round(ratio, 4), "wanted": f"{sign} {bound}", "met": met}


def peak_bytes() -> int:
    """The most memory this process has held resident so far (Linux; 0 elsewhere).

    VmHWM and not `ru_maxrss`, which a child inherits from the process that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


CODE = sources()  # taken before a script imports vitlr, so that an edit in between is seen by a second look
