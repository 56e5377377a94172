"""One OpenVINO core for the whole process, which is never let go of.

OpenVINO's CPU plugin gives the thread that opens it a stack for signals (AMX needs a larger one than usual) and puts
back the one before when the core goes. Of two cores that do not go in the reverse order of their coming, the second
puts back a stack that the first one has unmapped, and the next signal, a child's end among them, is a segmentation
fault in the middle of whatever runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from vitlr.engines.installed import need


@cache
def openvino_core() -> Any:
    """The process's `openvino.Core`. Raises `InputError` where OpenVINO is missing."""
    return need("openvino", "running a model in OpenVINO").Core()
