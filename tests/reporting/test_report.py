"""The page: it needs nothing else, what files say in it is text, and it shows what was measured."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import vitlr
from vitlr.data import open_data
from vitlr.errors import InputError
from vitlr.reporting import disagreement, page
from vitlr.reporting.judging import Judge
from vitlr.reporting.layers import by_kind, place
from vitlr.reporting.report import report as report_in

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
EVIL = "<script>alert('1')</script>\"><img src=http://evil.example/x onerror=alert(1)>$x_1$"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def report(*given, **more):
    """The page, its models timed in nothing but what is here anyway."""
    return report_in(*given, **{"engines": ("torch",), **more})


class Seen(HTMLParser):
    """Tags and attributes of a page, and its text; a tag that is not closed in order is an error."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words, self.open = "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def check_alone(text: str) -> Seen:
    """The parsed page, which holds no script and refers to nothing outside itself."""
    seen = Seen(text)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "a"} & set(seen.tags)
    for tag, key, value in seen.attributes:
        assert not key.startswith("on"), (tag, key)
        assert key not in ("href", "srcset", "action") and (key != "src" or value.startswith("data:image/")), value
    assert "@import" not in text and not re.search(r"url\s*\(", text)
    assert any("default-src 'none'" in value for tag, _, value in seen.attributes if tag == "meta")
    return seen


@pytest.fixture
def made(tiny_vit, batches, tmp_path):
    """A dense model, and files of it of two budgets."""
    model = tiny_vit(embed_dim=64)
    stats = vitlr.calibrate(model, batches, objective=("fisher", "loss"), extras=("rounding",))
    paths = []
    for name, budget, objective in (("ranks", "params:60%", "fisher"), ("bits", "bytes:20%", "loss")):
        plan = vitlr.plan(model, stats, budget, objective=objective, rank_step=4)
        paths.append(tmp_path / f"{name}.safetensors")
        vitlr.save(vitlr.apply(model, plan), paths[-1], plan=plan, recipe={"images": 11})
    return model, stats, paths


def test_the_page_needs_nothing_else_and_says_what_was_measured(made, batches, tmp_path):
    model, stats, paths = made
    path = report(paths, tmp_path / "out", validation=batches, reference=model, stats=stats, pictures=3)
    text = path.read_text()
    seen = check_alone(text)
    assert path.name == "report.html" and len(text) < page.MOST
    for file in paths:
        small = vitlr.load(file)
        found = vitlr.evaluate(small, batches, model)
        assert file.name in seen.words and f"{found.top1:.1f} ({found.top1_low:.1f} to " in seen.words
        assert f"{found.kl:.4f}" in seen.words and f"{file.stat().st_size / 1e6:.2f}" in seen.words
    assert "rank " in seen.words and " bits" in seen.words and "from 11 images" in seen.words
    assert seen.words.count("Where it disagrees with dense most") == 2 and seen.words.count("KL ") >= 6
    figures = {f"{file.stem}_{kind}.svg" for file in paths for kind in ("kept", "losses", "spectra")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "accuracy.svg", *figures}
    inside = [base64.b64decode(v.partition(",")[2]).decode() for _, k, v in seen.attributes if "svg+xml" in v]
    assert len(inside) == 7 and all("<svg" in svg and "attn.qkv" in svg for svg in inside[1:])


def test_one_file_makes_no_figure_of_one_dot_and_words_are_explained(made, batches, tmp_path):
    path = report(made[2][0], tmp_path / "out", validation=batches, reference=made[0])
    seen = check_alone(path.read_text())
    assert not (tmp_path / "out" / "accuracy.svg").exists() and "top-1, %" in seen.words
    assert all(word in seen.words for word in ("What these words mean", "predicted error", "MACs", "agreement"))


def test_without_images_the_dense_model_is_that_of_the_file(made, tmp_path):
    seen = check_alone(report(made[2][0], tmp_path / "out").read_text())
    assert "dense" in seen.words and "No images were given" in seen.words and "top-1" not in seen.words
    assert "plain torch" in seen.words and "vitlr's kernels, fused" in seen.words and "OpenVINO" not in seen.words


def test_blocks_are_counted_and_a_small_model_is_told_in_millions_of_macs(made, tmp_path):
    seen = check_alone(report(made[2][0], tmp_path / "out").read_text())
    assert "MACs, M" in seen.words and "MACs 0.00" not in seen.words
    drawn = (tmp_path / "out" / f"{made[2][0].stem}_kept.svg").read_text()
    assert "block</text>" in drawn and not re.search(r">\s*\d+\.\d+\s*</text>", drawn), "no half of a block"


def test_time_is_told_by_engine_and_who_cannot_run_a_model_is_named(made, tmp_path, monkeypatch):
    from vitlr.engines import runners
    from vitlr.engines.names import installed
    from vitlr.errors import RunError

    there = [name for name in installed() if name in runners.OTHERS]
    if not there:
        pytest.skip("neither ONNX Runtime nor OpenVINO is installed")
    called = [{"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[name] for name in there]
    seen = check_alone(report(made[2][0], tmp_path / "out", engines=None).read_text())
    assert all(name in seen.words for name in called) and "torch.compile" not in seen.words
    assert "dense, 1 at once" in seen.words and "dense, 8 at once" in seen.words

    def fails(model, path):
        raise RunError("no such operation in ONNX")

    monkeypatch.setattr(runners, "export", fails)
    seen = check_alone(report(made[2][0], tmp_path / "out", engines=there).read_text())
    assert f"Not timed: small in {', '.join(there)}: no such operation in ONNX" in seen.words
    assert not any(name in seen.words for name in called) and "plain torch" in seen.words


def test_hostile_names_become_text(made, batches, tmp_path):
    model, _, paths = made
    small = vitlr.load(paths[0])
    plan = vitlr.Plan.from_dict(small.vitlr_info["plan"])
    layers = [replace(row, name=f"{EVIL}.{i}.{EVIL[:200]}", reason=EVIL) for i, row in enumerate(plan.layers)]
    widths = [replace(row, name=f"{EVIL}{i}") for i, row in enumerate(plan.widths)]
    evil = replace(plan, layers=tuple(layers), widths=tuple(widths), budget=EVIL)
    path = tmp_path / "<b onclick=alert(1)>&amp;.safetensors"
    vitlr.save(small, path, plan=evil, recipe={"images": EVIL})
    names = [EVIL] * 5
    out = report(path, tmp_path / "out", validation=batches, reference=model, class_names=names)
    seen = check_alone(out.read_text())
    assert "b" in seen.tags and EVIL in seen.words and path.name in seen.words
    for svg in (tmp_path / "out").glob("*.svg"):
        assert "<script" not in svg.read_text()


def test_predicted_losses_of_any_size_are_drawn(made, tmp_path):
    small = vitlr.load(made[2][0])
    plan = vitlr.Plan.from_dict(small.vitlr_info["plan"])
    layers = tuple(replace(row, error=(-1) ** i * 1.7e308) for i, row in enumerate(plan.layers))
    vitlr.save(small, tmp_path / "huge.safetensors", plan=replace(plan, layers=layers))
    check_alone(report(tmp_path / "huge.safetensors", tmp_path / "out").read_text())


def test_a_file_without_a_plan_is_shown_without_one(tiny_vit, tmp_path):
    vitlr.save(tiny_vit(), tmp_path / "dense.safetensors")
    assert "holds no plan" in check_alone(report(tmp_path / "dense.safetensors", tmp_path / "out").read_text()).words


def test_the_images_with_the_largest_divergence_are_spotted(tiny_vit, batches):
    dense, small = tiny_vit(), tiny_vit(seed=1)
    judge = Judge(dense, batches)
    judge.of_dense()
    spotting = disagreement.Spotting(small, judge.recorded, 4)
    judge.of(spotting)
    with torch.no_grad():
        images = torch.cat([images for images, _ in batches])
        p, q = dense(images).double().log_softmax(1), small(images).double().log_softmax(1)
    distances = (p.exp() * (p - q)).sum(1)
    worst = distances.argsort(descending=True)[:4]
    assert [one.distance for one in spotting.found] == pytest.approx(distances[worst].tolist(), rel=1e-4)
    assert torch.equal(spotting.found[0].image, images[worst[0]])
    assert spotting.found[0].dense[0][0] == int(p[worst[0]].argmax()) and len(spotting.found[0].small) == 5


def test_a_thumbnail_is_the_image_as_it_was_before_it_was_scaled():
    import io

    from PIL import Image

    pixels = torch.zeros(3, 40, 50)
    pixels[0] = 1.0
    uri = disagreement.thumbnail((pixels - 0.5) / 0.25, [0.5] * 3, [0.25] * 3)
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.size == (50, 40) and image.getpixel((20, 20))[0] > 245 and image.getpixel((20, 20))[1] < 10
    assert disagreement.thumbnail(torch.zeros(1, 400, 300), [0.5], [0.5]).startswith("data:image/jpeg;base64,")


def test_bad_input_is_one_clear_line(made, batches, tmp_path):
    model, stats, paths = made
    with pytest.raises(InputError, match="is empty"):
        report([], tmp_path / "out")
    with pytest.raises(InputError, match="give it as reference="):
        report(paths, tmp_path / "out", stats=stats)
    with pytest.raises(InputError, match="2 class names"):
        report(paths[:1], tmp_path / "out", validation=batches, reference=model, class_names=["a", "b"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another one"):
        report(paths, tmp_path / "file" / "out")
    with pytest.raises(InputError, match="no such file"):
        report(tmp_path / "none.safetensors", tmp_path / "out")


def test_a_page_that_would_be_too_large_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr("vitlr.reporting.report.MOST", 1000)
    with pytest.raises(InputError, match="give fewer files"):
        report(made[2][0], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        ("blocks.3.mlp.fc1", "mlp.fc1", ("3",)),
        ("stages.0.blocks.1.attn.qkv", "attn.qkv", ("0", "1")),
        ("blocks.2.mlp.0", "mlp.0", ("2",)),
        ("head", "head", ()),
        ("vit.encoder.layer.11.attention.output.dense", "attention.output.dense", ("11",)),
    ],
)
def test_layers_are_placed_by_the_numbers_in_their_names(name, kind, numbers):
    assert place(name) == (kind, numbers)


def test_more_kinds_than_colours_are_put_together():
    rows = [type("Row", (), {"name": f"{block}.kind{i}"}) for block in range(2) for i in range(20)]
    found = by_kind(rows)
    assert len(found) == 8 and len(found["others"]) == 26 and {block for block, _ in found["others"]} == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(made, batches, tmp_path, image_folder, scheme):
    """In headless Chromium at the width of a phone: nothing is wider than the screen, and the colours are as asked."""
    from PIL import Image

    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("there is no Chromium")
    model, stats, paths = made
    images = open_data(image_folder(), model, need_labels=True)
    path = report(paths, tmp_path / "out", validation=images, reference=model, stats=stats, pictures=2)
    shot = tmp_path / "shot.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/own"]
    flags += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--window-size=500,1600"]
    done = subprocess.run(
        [browser, *flags, f"--screenshot={shot}", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    if not shot.is_file():
        pytest.skip(f"Chromium took no picture: {done.stderr[-300:]}")
    pixels = Image.open(shot).convert("L")
    edge = [pixels.getpixel((497, y)) for y in range(0, 1600, 7)]  # the margin right of everything
    assert max(edge) - min(edge) < 4, "something is wider than a phone"
    assert edge[0] > 240 if scheme == "light" else edge[0] < 40
