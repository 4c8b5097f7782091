"""The multimodal examples learn, both backends learn the same, and their data is what they say."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

FOLDER = Path(__file__).resolve().parent.parent / "examples"
SYSTEMS = {  # example → its System, and the options that are tried
    "image_voice_matching": ("Matching", ("mmd", "cka", "feature", "js", "none")),
    "picture_text_classifier": ("Classifier", ("concat", "weighted", "attention", "picture", "text")),
    "image_audio_classifier": ("Classifier", ("parallel", "sequential", "tree", "image", "voice")),
    "cross_encoder": ("CrossEncoder", ("1", "2")),
    "picture_text_matching": ("Matching", ("none", "mmd", "cka", "transfer", "both")),
}
OPTIONS = [(name, option) for name, (_, options) in SYSTEMS.items() for option in options]


@pytest.fixture(scope="module")
def load():
    """A module of the examples by its name."""
    sys.path.insert(0, str(FOLDER))  # their own processes import it too
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def stand_in(load, tmp_path_factory):
    """A cache with generated files in place of the packages': tones for digits, coloured bars for emoji."""
    data = load("data")
    root = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    speakers = [(f"speech/asterisk-core-sounds-{language}-wav/digits", "wav") for language in data.LANGUAGES]
    speakers += [(f"examples/{p.name}", p.endings[0].split(".")[1]) for p in data.OTHER_SPEAKERS.values()]
    for place, ending in speakers:
        (root / place).mkdir(parents=True)
        for digit in range(10):
            time = np.arange(3000 + 100 * digit) / data.RATE
            wave = 0.3 * np.sin(2 * np.pi * (250 + 150 * digit) * time) + 0.01 * rng.standard_normal(len(time))
            how = data._GSM if ending == "gsm" else {"samplerate": data.RATE}
            soundfile.write(root / place / f"{digit}.{ending}", wave, **how)
    for package in data.speech.PACKAGES:
        (root / "speech" / package.name).mkdir(exist_ok=True)
        (root / "speech" / package.name / ".complete").write_text("")
    for package in data.OTHER_SPEAKERS.values():
        (root / "examples" / package.name / ".complete").write_text("")
    groups = [f"group {i % 3}" for i in range(240)]
    images = rng.integers(0, 60, (240, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        image[4 * (i % 8) : 4 * (i % 8) + 4, :, i % 3] += 180
    names = [f"thing{i % 8} kind{i % 3} number{i}" for i in range(240)]
    np.savez(root / "examples" / "emoji-32.npz", images=images, names=names, groups=groups, subgroups=groups)
    return root


@pytest.fixture(params=["generated", "recorded"])
def cache(request, load, stand_in, monkeypatch):
    """Generated data, and the real where it is cached."""
    if request.param == "generated":
        monkeypatch.setenv("MMFAST_CACHE", str(stand_in))
    elif not load("data").is_cached():
        pytest.skip("the packages are not cached; python examples/data.py fetches them")
    return request.param


def settings(module, **changes):
    """For short runs, of data with little noise: ten steps must show that the loss falls."""
    small = {"batch": 24, "steps": 10, "copies": 2, "image_snr": 20.0, "voice_snr": 20.0, **changes}
    known = {field.name for field in dataclasses.fields(module.Settings)}
    return module.Settings(**{name: value for name, value in small.items() if name in known})


@pytest.mark.parametrize("name, option", OPTIONS)
def test_backends_agree_and_the_loss_falls(load, stand_in, monkeypatch, name, option):
    """The same start and the same batches: losses agree until rounding parts them."""
    monkeypatch.setenv("MMFAST_CACHE", str(stand_in))
    module = load(name)
    system = getattr(module, SYSTEMS[name][0])
    reference, fused = (load("training").train(system, settings(module), option, b) for b in ("reference", "auto"))
    assert reference.losses[0] == pytest.approx(fused.losses[0], rel=1e-5)
    assert reference.losses[:3] == pytest.approx(fused.losses[:3], rel=1e-2)
    for run in (reference, fused):
        assert np.mean(run.losses[-3:]) < 0.98 * np.mean(run.losses[:3])
        assert len(run.losses) == len(run.seconds) == 10 and run.steps == [1, 10]
        assert all(map(math.isfinite, (*run.losses, *run.quality.values(), *run.chance.values())))
        assert set(run.chance) <= set(run.quality) and run.chance
    assert "MMFAST_BACKEND" not in os.environ


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_of_the_backends_agree(load, cache, name):
    module, training = load(name), load("training")
    system = getattr(module, SYSTEMS[name][0])
    option = system.defaults[1] if name in ("cross_encoder", "picture_text_matching") else system.variants[0]
    option = "attention" if name == "picture_text_classifier" else option
    found = {}
    for backend in ("reference", "auto"):
        with training.backend(backend):
            torch.manual_seed(0)
            made = system(settings(module), option)
            torch.manual_seed(1)  # of dropout
            loss = made.loss(0)
            loss.backward()
            grads = [p.grad.flatten() for p in made.model.parameters() if p.grad is not None]
            found[backend] = (loss.item(), torch.cat(grads))
    assert found["auto"][0] == pytest.approx(found["reference"][0], rel=1e-5)
    a, b = (found[backend][1] for backend in ("auto", "reference"))
    assert (a - b).norm() < 1e-3 * b.norm() and b.norm() > 1e-3


def test_the_ops_of_a_system_follow_its_backend(load, stand_in, monkeypatch):
    """What is called the reference is one, and what is called fused is not."""
    from mmfast import _backend

    monkeypatch.setenv("MMFAST_CACHE", str(stand_in))
    module, training = load("image_voice_matching"), load("training")
    seen, choose = [], _backend.choose

    def spy(op, device, requested=None):
        choice = choose(op, device, requested)
        seen.append((op, choice[0]))
        return choice

    monkeypatch.setattr(_backend, "choose", spy)
    for name, expected in (("reference", "reference"), ("auto", "cpu" if _backend._C else "reference")):
        seen.clear()
        training.train(module.Matching, settings(module, steps=1), "mmd", name)
        assert {backend for _, backend in seen} == {expected} and {op for op, _ in seen} >= {"mel", "mmd"}


def test_a_run_can_be_repeated(load, stand_in, monkeypatch):
    monkeypatch.setenv("MMFAST_CACHE", str(stand_in))
    module = load("image_voice_matching")
    first, second = (load("training").train(module.Matching, settings(module), "mmd") for _ in range(2))
    assert first.losses == second.losses and first.quality == second.quality


@pytest.mark.parametrize("name", SYSTEMS)
def test_command_prints_a_table_and_draws(load, stand_in, monkeypatch, tmp_path, capsys, name):
    """In one process here; its own processes are those of the next test."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tabulate")
    monkeypatch.setenv("MMFAST_CACHE", str(stand_in))
    module, training = load(name), load("training")
    system = getattr(module, SYSTEMS[name][0])
    option = SYSTEMS[name][1][0]

    def here(system, settings, variants, backends):
        return [training.train(system, settings, v, b) for v in variants for b in backends]

    monkeypatch.setattr(training, "train_each", here)
    arguments = ["--steps", "3", "--batch", "32", f"--{system.option}", option, "--compare", "--out", str(tmp_path)]
    if "copies" in {field.name for field in dataclasses.fields(module.Settings)}:
        arguments += ["--copies", "2"]
    assert training.main(system, module.Settings, module.__doc__, arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 8 and f"{option} reference" in lines[2] and f"{option} fused" in lines[3]
    assert "1.00×" in lines[2] and "×" in lines[3] and "chance" in lines[4]
    assert lines[7].startswith(f"| {option}") and re.search(r"\d× .*[+-]\d\.\de[+-]\d\d", lines[7])
    for picture in ("curves.png", "picture.png"):
        written = (tmp_path / picture).read_bytes()
        assert written.startswith(b"\x89PNG") and len(written) > 5000


def test_gains_are_written_into_the_pages(load, stand_in, monkeypatch, tmp_path, capsys):
    pytest.importorskip("tabulate")
    monkeypatch.setenv("MMFAST_CACHE", str(stand_in))
    gains, training = load("gains"), load("training")

    def here(system, settings, variants, backends):
        return [training.train(system, settings, v, b) for v in variants for b in backends]

    monkeypatch.setattr(training, "train_each", here)
    monkeypatch.setattr(gains, "FOLDER", tmp_path)
    for name in gains.EXAMPLES:
        page = (FOLDER / f"{name}.md").read_text()
        assert page.count("\n## Gain of the swap\n\n<!-- gain: begin -->\n") == 1
        (tmp_path / f"{name}.md").write_text(page)
    assert gains.main(["picture_text_classifier", "--steps", "1"]) == 0
    page, before = ((at / "picture_text_classifier.md").read_text() for at in (tmp_path, FOLDER))
    outside = gains.written(page, ""), gains.written(before, "")
    assert outside[0] == outside[1] and page != before
    assert "--fusion attention --steps 1 --compare" in page and "| attention |" in page
    assert page.split("<!-- gain: begin -->\n")[1].split("<!-- gain: end -->")[0] in capsys.readouterr().out
    with pytest.raises(ValueError, match="one section between"):
        gains.written("# A page", "")
    with pytest.raises(SystemExit):
        gains.main(["no_such_example"])


def test_each_run_has_a_process_of_its_own(load, stand_in, monkeypatch):
    monkeypatch.setenv("MMFAST_CACHE", str(stand_in))
    module, training = load("image_voice_matching"), load("training")
    (run,) = training.train_each(module.Matching, settings(module, steps=2, threads=1), ["mmd"], ["reference"])
    here = training.train(module.Matching, settings(module, steps=2), "mmd", "reference")
    assert run.losses == pytest.approx(here.losses, rel=1e-5) and run.peak > 0


def test_without_data_the_command_says_so(load, monkeypatch, tmp_path, capsys):
    module, training = load("picture_text_classifier"), load("training")

    def none(*arguments):
        raise load("data").Unavailable("no apt-get here")

    monkeypatch.setattr(training, "train_each", none)
    assert training.main(module.Classifier, module.Settings, module.__doc__, ["--out", str(tmp_path)]) == 1
    assert "needs data that cannot be had: no apt-get here" in capsys.readouterr().err


def test_spoken_digits(load, cache):
    known, unknown = load("data").spoken_digits(copies=3)
    assert known.waves.shape == (150, 8000) and unknown.waves.shape == (30, 8000)
    assert known.languages == [language for language in ("en", "es", "fr", "it", "ru") for _ in range(30)]
    assert known.labels.tolist() == [digit for _ in range(5) for digit in range(10) for _ in range(3)]
    assert unknown.labels.tolist() == list(range(10)) * 3 and sorted(set(unknown.languages)) == ["es", "fr", "it"]
    for some in (known, unknown):
        assert some.lengths.min() > 800 and some.lengths.max() <= 8000
        beyond = torch.arange(8000) >= some.lengths[:, None]
        assert (some.waves[beyond] == 0).all() and (some.waves.abs().amax(1) > 0.02).all()
    again, _ = load("data").spoken_digits(copies=3)
    assert torch.equal(again.waves, known.waves) and not torch.equal(known.waves[0], known.waves[1])


def test_written_digits_are_of_other_writers(load):
    known, unknown = load("data").written_digits()
    assert (len(known.labels), len(unknown.labels)) == (1257, 540)
    for some in (known, unknown):
        assert some.images.min() == 0 and some.images.max() == 1
        assert some.labels.bincount().min() > len(some.labels) / 12
    seen = {tuple(image.flatten().tolist()) for image in known.images}
    assert not seen & {tuple(image.flatten().tolist()) for image in unknown.images}


def test_families_of_emoji_stay_together(load, cache):
    data = load("data")
    known, unknown = data.emoji()
    assert not {data.family(name) for name in known.names} & {data.family(name) for name in unknown.names}
    assert not set(known.names) & set(unknown.names) and len(unknown.names) > 20
    if cache == "recorded":
        assert len(known.names) + len(unknown.names) == 1601 and len(known.group_names) == 8
        assert not any(name.startswith("flag:") or "skin tone" in name for name in known.names + unknown.names)
        # Each group is there on both sides, and the pictures are pictures: no two alike but for a few.
        assert set(known.groups.tolist()) == set(unknown.groups.tolist()) == set(range(8))
        assert len({image.numpy().tobytes() for image in known.images}) > 0.99 * len(known.names)
    for some in (known, unknown):
        assert some.images.shape == (len(some.names), 3, 32, 32) and 0.5 < some.images.max() <= 1
        assert some.words.shape[0] == len(some.lengths) == len(some.groups) == len(some.names)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("option", [("--steps", "0"), ("--batch", "1"), ("--seed", "-1"), ("--threads", "-1")])
def test_settings_that_nothing_can_be_trained_with(load, capsys, name, option):
    module, training = load(name), load("training")
    with pytest.raises(SystemExit) as stop:
        training.options(getattr(module, SYSTEMS[name][0]), module.Settings).parse_args(option)
    assert stop.value.code == 2 and "must be at least" in capsys.readouterr().err


def test_help_fetches_nothing(load, monkeypatch):
    data = load("data")
    monkeypatch.setattr(data, "written_digits", lambda: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        data.main(["--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("woman cook", "man cook", True),
        ("red heart", "blue heart", True),
        ("one o’clock", "ten-thirty", True),
        ("keycap: 1", "keycap: 9", True),
        ("man", "woman", False),
        ("red apple", "pineapple", False),
    ],
)
def test_family(load, one, other, same):
    data = load("data")
    assert (data.family(one) == data.family(other)) == same


def test_words_that_were_never_seen_have_parts_that_were(load):
    words, lengths = load("data").as_words(["cat face", "bobcat", ""])
    assert words.shape == (3, 8, 24) and lengths.tolist() == [2, 1, 0]
    cat, bobcat = (set(w[w > 0].tolist()) for w in (words[0, 0], words[1, 0]))
    assert cat & bobcat and cat - bobcat and (words[2] == 0).all() and (words[0, 2:] == 0).all()


def test_noise_has_the_power_that_was_asked_for(load):
    x = 0.1 + torch.rand(3, 1, 4000) * torch.tensor([1.0, 5.0, 0.2])[:, None, None]
    noisy = load("data").add_noise(x, 3.0, torch.Generator().manual_seed(0))
    ratio = x.square().mean((1, 2)) / (noisy - x).square().mean((1, 2))
    torch.testing.assert_close(ratio, torch.full((3,), 10**0.3), rtol=0.1, atol=0)


def test_retrieval_measures(load):
    module = load("image_voice_matching")
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3]])
    same = torch.tensor([[True, False, True], [False, False, True]])
    assert module.first(scores, same) == 0.5
    assert module.mean_average_precision(scores, same) == pytest.approx((1 + 0.5) / 2)


def test_triplet_loss_is_that_of_a_loop(load):
    module = load("image_voice_matching")
    a, b = (torch.nn.functional.normalize(torch.randn(7, 5), dim=1) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    terms = [
        max(0.0, 0.3 + float(a[i] @ b[j] - a[i] @ b[i])) for i in range(7) for j in range(7) if labels[i] != labels[j]
    ]
    expected = sum(terms) / sum(term > 0 for term in terms)
    assert module.triplet(a, b, labels, 0.3).item() == pytest.approx(expected, rel=1e-5)


def test_similarity_is_one_matrix_read_by_rows_and_by_columns(load):
    """Against softmax(S) V and softmax(Sᵀ) V with S written out, over what exists of the second modality."""
    block = load("cross_encoder").Similarity(8, heads=2)
    x, y, count = torch.randn(3, 5, 8), torch.randn(3, 7, 8), torch.tensor([7, 4, 1])
    to_x, to_y = block(x, y, count)
    for item, n in enumerate(count.tolist()):
        x_n, y_n = block.norms[0](x[item]), block.norms[1](y[item])
        keys, values = ([layer(z).view(-1, 2, 4).transpose(0, 1) for layer, z in zip(layers, (x_n, y_n), strict=True)]
                        for layers in (block.keys, block.values))  # fmt: skip
        s = keys[0] @ keys[1].mT / 2
        rows, columns = s[..., :n].softmax(2) @ values[1][:, :n], s.mT.softmax(2) @ values[0]
        expected = [out(a.transpose(0, 1).flatten(1)) for out, a in zip(block.out, (rows, columns), strict=True)]
        torch.testing.assert_close(to_x[item] - x[item], expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(to_y[item] - y[item], expected[1], atol=1e-5, rtol=1e-4)
