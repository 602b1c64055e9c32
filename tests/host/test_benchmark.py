"""The erasure benchmark's own parts: the narrow model is the shipped one, and erasers get the scores they deserve."""

import json
from dataclasses import replace

import pytest
import torch

from demo.captions import REFERENCES, photo
from demo.classifier import judged
from experiments import attacks, cells
from experiments.cells import Plan
from experiments.erasure import measured
from experiments.methods import REPLACED, gate, gated, methods
from experiments.narrow import plain_narrow_model
from experiments.studio import CLOSED_FORM, STEPS, studio
from unguide_bench.scores import BASE, OTHER, means_of, shares_by_kind
from unguide_core.formats import save_adapter

SEEDS = (700_001, 700_002)
GATED = gated("selective")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The base model's images of two classes, two seeds each."""
    made = Plan(tmp_path_factory.mktemp("benchmark"), SEEDS, ("cat", "dog"))
    made.claim()
    for klass in made.concepts:
        cells.generate_base(made, klass)
    save_adapter(studio().lora("selective", "cat").adapter, made.trained("cat"))  # as if trained by this run
    return made


def score(plan, method, concept="cat"):
    cells.generate_cell(plan, method, concept)
    return means_of(cells.done(plan, method, concept))[method]


def test_base_is_a_useless_eraser_and_a_replaced_prompt_a_perfect_one(plan):
    base, replaced = score(plan, BASE), score(plan, REPLACED)
    assert (base.acc_e.value, base.acc_s.value, base.acc_g.value, base.h_o.value) == (100.0, 100.0, 100.0, 0.0)
    assert replaced.h_o.value == 100.0
    assert (replaced.recall, replaced.false_alarms) == (100.0, 0.0)
    assert (base.reference, replaced.reference) == (0.0, 100.0)


def test_unguide_leaves_other_images_bit_identical_at_no_evaluation(plan):
    found = score(plan, GATED)
    assert found.h_o.value == 100.0
    assert found.reference > 50.0
    assert found.identical_unrelated == 100.0
    assert found.max_abs_diff_unrelated == 0.0
    spent = {(image.kind == OTHER, image.evaluations) for image in cells.done(plan, GATED, "cat")}
    assert spent == {(True, 2 * STEPS), (False, 2 * STEPS)}


def test_the_same_seeds_give_the_same_images_and_scores(plan, tmp_path):
    again = replace(plan, folder=tmp_path, concepts=("cat",))
    again.claim()
    cells.generate_base(again, "cat")

    def images(of):
        cells.generate_cell(of, GATED, "cat")
        return [image for image in cells.done(of, GATED, "cat") if image.label == "cat"]

    assert images(plan) == images(again)
    assert len(images(again)) == len(SEEDS) * 14  # a name, three synonyms, ten scenes


def test_a_run_generates_only_what_is_missing_and_the_narrow_model_is_the_shipped_one(plan):
    score(plan, BASE, "dog")
    cells.time_methods(plan, [BASE], "cat", "dog")
    before = {path: path.stat().st_mtime_ns for path in plan.folder.rglob("*")}
    found = measured(plan, [BASE], ["dog"], [], jobs=1)
    assert {path: path.stat().st_mtime_ns for path in plan.folder.rglob("*")} == before
    assert len(found.images) == len(SEEDS) * 15  # a name, three synonyms, the other class, ten scenes
    assert found.attacks == []
    assert all(image.seconds > 0 for image in found.images)
    assert found.agreement["latents"] < 1e-4
    assert found.agreement["images"] <= 1
    assert found.agreement["scores"] < 1e-3
    assert found.agreement["decisions"] == 0


def test_a_folder_of_another_run_is_refused(plan):
    with pytest.raises(ValueError, match="holds images of another run"):
        replace(plan, seeds=(1,)).claim()
    plan.claim()
    settings = plan.folder / "settings.json"
    said = json.loads(settings.read_text())
    assert said["seeds"] == list(SEEDS)
    settings.write_text(json.dumps({**said, "models": "those before they were trained anew"}))
    try:
        with pytest.raises(ValueError, match="holds images of another run"):
            plan.claim()
    finally:
        settings.write_text(json.dumps(said))


def test_every_way_to_erase_generates(plan):
    at = cells.knowing(plan, "cat")
    with torch.inference_mode():
        for name, generate in methods().items():
            generated = generate(at, "cat", photo("cat"), SEEDS[:1])
            assert generated.latents.isfinite().all(), name
            assert generated.evaluations >= 2 * STEPS - 2, name  # the official schedule is one step short


def test_inverted_noise_gives_the_image_that_it_was_made_from(plan):
    at = studio()
    latents = torch.from_numpy(cells.base_images(plan, "cat")[f"{photo('cat')} latents"])
    with torch.inference_mode():
        noise = attacks.inverted(at, latents, at.encode(photo("cat")))
        again = at.generate(at.model, at.encode(photo("cat")), SEEDS, noise=noise)
    other = latents.flip(0)
    assert (again.latents - latents).norm() < 0.5 * (again.latents - other).norm()


def test_a_word_optimised_on_the_base_model_is_detected(plan):
    at, lora = studio(), studio().lora("selective", "cat")
    latents = torch.from_numpy(cells.base_images(plan, "cat")[f"{photo('cat')} latents"])
    with torch.inference_mode():
        text = attacks.optimised("cat", latents)
        shown = at.generate(at.model, text, SEEDS)
        erased = at.guided(lora, text, SEEDS, gate(at))
    assert [seen for seen, _ in judged(at.images(shown.latents))] == ["cat", "cat"]
    assert erased.detected == (True, True)
    assert "cat" not in [seen for seen, _ in judged(at.images(erased.latents))]


def test_words_found_on_the_lora_are_words_of_the_vocabulary(plan, monkeypatch):
    monkeypatch.setattr(attacks, "EMBEDDING_STEPS", 20)
    lora = studio().lora("selective", "cat")
    latents = torch.from_numpy(cells.base_images(plan, "cat")[f"{photo('cat')} latents"])
    ((found, _),) = attacks.optimised("cat", latents, lora, words=2)
    narrow = plain_narrow_model()
    known = narrow.text.token_embedding.detach()
    tokens = narrow.tokenizer([photo("cat cat")])
    place = int((tokens[0] == narrow.tokenizer(["cat"])[0, 1]).nonzero()[0, 0])
    words = known.new_empty(0, known.shape[1])
    for number in range(2):  # the encoder is causal: a word's states depend on it and those before
        tried = [torch.cat([words, row[None], row.new_zeros(1 - number, len(row))]) for row in known]
        apart = [
            float((attacks.with_words(narrow.text, tokens, place, one) - found)[0, place + number].abs().max())
            for one in tried
        ]
        assert min(apart) < 1e-4
        words = tried[apart.index(min(apart))][: number + 1]


def test_few_steps_are_erased_as_many_are(plan):
    """In one or two steps the shipped adapter, here also the trained one, leaves blurs that are taken for cats."""
    cells.generate_few_steps(plan, "cat")
    found = shares_by_kind(cells.done(plan, cells.FEW_STEPS, "cat"))
    assert list(found) == ["1 step", "2 steps", "4 steps", "8 steps"]
    assert (found["8 steps"][BASE], found["8 steps"][REPLACED]) == ((100.0, None), (0.0, None))
    for kind, of_kind in found.items():
        for method in set(of_kind) - {BASE, REPLACED}:
            shown, detected = of_kind[method]
            assert detected == 100.0, (kind, method)
            blurred = kind in ("1 step", "2 steps") and method != gated(CLOSED_FORM)
            assert shown <= (75.0 if blurred else 12.5), (kind, method)  # of eight images at most six, or one


def test_a_scene_stays_where_the_concept_is_erased_from_it(plan):
    base, erased = score(plan, BASE), score(plan, GATED)
    assert base.scenes > 90.0
    assert base.scene_kept == 100.0
    assert erased.scenes <= 5.0
    assert erased.scenes_recall >= 95.0
    assert 50.0 < erased.scene_kept <= 100.0
    assert base.outside == 0.0 < erased.outside


def test_references_are_scenes_that_show_no_class():
    at = studio()
    with torch.inference_mode():
        for scene in REFERENCES.values():
            shown = at.generate(at.model, at.encode(photo(scene)), SEEDS)
            assert [seen for seen, _ in judged(at.images(shown.latents))] == ["other", "other"], scene
