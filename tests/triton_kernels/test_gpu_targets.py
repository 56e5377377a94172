"""What an architecture offers, and what is refused where there is none."""

from __future__ import annotations

import pytest
import torch

from vitlr.errors import InputError
from vitlr.ops.backends import triton
from vitlr.triton_kernels import targets


class _Card:
    major, minor, name = 9, 0, "a card"
    shared_memory_per_block_optin, multi_processor_count = 1000, 7


@pytest.fixture
def card(monkeypatch):
    """A pretended GPU, outside the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Card)
    monkeypatch.setattr(targets, "_cards", {})
    return monkeypatch


def test_the_card_itself_says_how_much_it_has(card):
    found = targets.target_of(torch.device("cuda"))
    assert (found.name, found.arch, found.shared_memory, found.sms) == ("sm_90", 90, 1000, 7)
    assert found.hopper and not targets.TARGETS["sm_80"].hopper


def test_an_architecture_that_nobody_compiled_for_is_refused(card):
    card.setattr(_Card, "major", 7)
    with pytest.raises(targets.Unsupported, match="a card is sm_70, the kernels are made for sm_80"):
        targets.target_of(torch.device("cuda:0"))


def test_a_card_of_another_maker_is_refused_whatever_its_number(card):
    card.setattr(torch.version, "hip", "6.0")
    with pytest.raises(targets.Unsupported, match="a card is no NVIDIA GPU, the kernels are made for sm_80"):
        targets.target_of(torch.device("cuda:0"))


def test_the_interpreter_stands_for_any_device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert targets.target_of(torch.device("cpu")) is targets.INTERPRETER


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(targets.Unsupported, match="x is on cpu, Triton kernels run on a GPU"):
        targets.target_of(torch.device("cpu"))
    with pytest.raises(targets.Unsupported, match="torch sees no GPU"):
        targets.target_of(torch.device("cuda"))
    with pytest.raises(InputError, match="x is on cpu"):
        triton.config("targets", "target_of", torch.device("cpu"))


def test_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="triton is not installed"):
        triton.config("tables", "nearest", torch.device("cuda"))
