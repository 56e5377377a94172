"""A second budget from the shell: what was solved for the first is read, not solved again."""

import pytest

from vitlr.decomposition import ranked_widths, ranks
from vitlr.decomposition.spectra_file import place


def test_a_second_budget_solves_nothing_again_and_gives_the_same_model(run, squeeze, tmp_path, monkeypatch):
    stats, out = tmp_path / "stats.safetensors", tmp_path / "small.safetensors"
    assert run(*squeeze(budget="params:60%")).status == 0
    expected = out.read_bytes()
    first = run(*squeeze(stats=stats))
    assert first.status == 0 and "solving: " in first.err and place(stats).exists()
    for module, name in ((ranks, "solve"), (ranked_widths, "Elimination")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("solved again"))
    assert run(*squeeze(stats=stats, data=None, budget="params:60%")).status == 0
    assert len(out.read_bytes()) == pytest.approx(len(expected), abs=200)  # the name of the data in its recipe


def test_the_place_of_spectra_is_no_place_for_results(refused, squeeze, tmp_path):
    stats = tmp_path / "stats.safetensors"
    message = refused(*squeeze(stats=stats, out=place(stats)))
    assert "--out and the spectra of --stats are both" in message and "name two files" in message


def test_damaged_spectra_are_refused_in_one_line(run, refused, squeeze, tmp_path):
    stats = tmp_path / "stats.safetensors"
    assert run(*squeeze("--plan-only", stats=stats)).status == 0
    content = bytearray(place(stats).read_bytes())
    content[len(content) // 2] ^= 4
    place(stats).write_bytes(content)
    assert "its digest does not match" in refused(*squeeze("--plan-only", stats=stats))
    place(stats).unlink()
    assert run(*squeeze("--plan-only", stats=stats)).status == 0


def test_too_much_memory_is_refused_with_what_would_fit(refused, squeeze):
    message = refused(*squeeze(max_memory="330kB"))
    assert "take 438 kB, more than --max-memory 330kB; --objective loss (220 kB)" in message
    assert "--method lowrank" in message and "; --sums-in keeps them in a file" in message
    assert "cannot write into '/nowhere': " in refused(*squeeze(sums_in="/nowhere"))
    assert "--max-memory 'much', expected bytes above 0" in refused(*squeeze(max_memory="much"))
