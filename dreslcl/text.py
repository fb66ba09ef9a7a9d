"""How a report becomes vectors: by the encoder's text tower, by the words of the training reports, by a sentence encoder, or elsewhere.

A report is cleaned of what character recognition leaves and cut into pieces; each piece has a vector. A training step draws some of a
report's pieces; everywhere else (retrieval, `embed_text`, prompts) a text is the mean of all its pieces. Both belong to the model, so a
text has one vector. `make_text` chooses; the figures behind its choice are in examples/RESULTS.md.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from .common import ConfigError, ModelError, write_bytes, write_json
from .encoder import Encoder

log = logging.getLogger(__name__)

WINDOW = 64  # words of a piece
WIDTH = 256  # of an LSA vector
TFIDF = {"sublinear_tf": True, "stop_words": "english", "token_pattern": r"(?u)\b[a-zA-Z]{3,}\b"}  # letters only: no number, no barcode
MIN_PATIENTS = 3  # whose reports hold a word that LSA keeps: rarer ones may name a patient, most are misread
PLACES = frozenset(  # where a slide of TCGA comes from, not what it shows
    "tcga uuid asterand bioserve candler christiana cornell cureline emory greenville harvard hopkins ilsbio indivumed kettering mayo "
    "mskcc penrose pittsburgh roswell sloan uvm vanderbilt vermont".split()
)
MEDICAL = {"biomedclip": "15 million figures of PubMed Central, arXiv 2303.00915", "quiltnet": "Quilt-1M, histology, arXiv 2306.11207"}
"""OpenCLIP models pretrained on medical text, by a part of their names, and on what: `--text auto` uses their text tower."""


def clean_report(text: str) -> str:
    """Mend what optical character recognition leaves: split words, control characters, rows of dots and dashes."""
    text = re.sub(r"(\w)-\s*\n\s*(\w)", r"\1\2", text)
    text = re.sub(r"[^\w\s.,;:()/%<>=+\-'\"°µ&#?!]", " ", text)
    text = re.sub(r"([._\-=*])\1{2,}", " ", text)
    return re.sub(r"\s+", " ", text).strip()


class Text(nn.Module):
    """Vectors of texts, of width X. The class itself stands for vectors made elsewhere: it knows their width and encodes nothing.

    Attributes:
        kind: vectors, tower, lsa or sentence.
        dim: X.
        learns: whether training changes the vectors; else each piece is encoded once.
    """

    kind, learns, room = "vectors", False, WINDOW
    described: tuple[str, ...] = ("kind", "dim", "learns")

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def size(self, text: str) -> int:
        """What of a text counts against `room`: its words."""
        return len(text.split())

    def pieces(self, report: str) -> list[str]:
        """A cleaned report in windows of words whose sizes add up to at most `room`, each sharing half with the one before. Never empty."""
        text = clean_report(report)
        if self.size(text) <= self.room:
            return [text]
        words, found, start, stop = text.split(), [], 0, 0
        ends = np.cumsum([0, *(max(1, self.size(word)) for word in words)])
        while stop < len(words):
            stop = max(start + 1, int(np.searchsorted(ends, ends[start] + self.room, "right")) - 1)
            found.append(" ".join(words[start:stop]))
            start = max(start + 1, (start + stop) // 2)
        return found

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n X"]:
        """Unit-norm vectors of pieces, float32; zero for a piece of which nothing is known.

        Raises:
            ModelError: the vectors are made elsewhere, or what makes them is missing here.
        """
        raise ModelError("this model was trained on report vectors made elsewhere and reads no text; use --report-embeddings")

    def vector(self, report: str) -> Float[Tensor, "X"]:
        """The one vector of a text: the mean over its pieces."""
        return self.encode(self.pieces(report)).mean(0)

    def describe(self) -> dict[str, Any]:
        """What `load` needs beside tensors; JSON-able."""
        return {name: getattr(self, name) for name in self.described}

    def save(self, folder: Path) -> None:
        """Write `text.json` into a folder, and `text.safetensors` where there are tensors."""
        write_json(Path(folder) / "text.json", self.describe())

    @staticmethod
    def load(folder: Path, encoder: Encoder | None) -> "Text":
        """Read what `save` wrote; `encoder` has the text tower. Nothing is fitted or downloaded.

        Raises:
            ModelError: no such files, or damaged ones.
        """
        file = Path(folder) / "text.json"
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            kind, dim = told["kind"], told["dim"]
            if kind == "tower" and encoder is not None:
                return Tower(encoder, told["learns"])
            if kind == "sentence":
                return Sentence(told["name"], dim, told["check"])
            if kind == "lsa":
                return Lsa(told["vocabulary"], **load_file(file.with_suffix(".safetensors")))
            if kind == "vectors":
                return Text(dim)
            raise ValueError(f"kind {kind} without its encoder")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"{file}: no whole description of report vectors ({str(error).splitlines()[0]})") from error


class Tower(Text):
    """The encoder's own text tower, OpenCLIP's or a Hugging Face one inside it; a piece fits its context."""

    kind = "tower"

    def __init__(self, encoder: Encoder, learns: bool):
        super().__init__(encoder.dim)
        self._encoder = (encoder,)  # in a tuple: its weights are the encoder's, not a part of this module
        self.learns, self.room = learns, encoder.context - 2  # the start and end tokens

    def size(self, text: str) -> int:
        """Tokens."""
        tokenizer = self._encoder[0].tokenizer
        inner = getattr(tokenizer, "tokenizer", None)  # a Hugging Face tokenizer keeps its own inside
        return len(tokenizer.encode(text) if inner is None else inner.encode(text, add_special_tokens=False))

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n X"]:
        """As Text.encode, with gradient where one is asked for."""
        encoder = self._encoder[0]
        parts = [encoder.tokenizer(list(texts[i : i + 64])).to(encoder.mean.device) for i in range(0, len(texts), 64)]
        return F.normalize(torch.cat([encoder.clip.encode_text(part) for part in parts]).to(encoder.mean.dtype), dim=-1)


class Lsa(Text):
    """Latent semantic analysis (Deerwester et al. 1990): TF-IDF of words, reduced by an SVD, both learnt from the training reports alone.

    It keeps the words that several patients' reports hold, and their statistics: no report, no rare word.
    """

    kind, described = "lsa", (*Text.described, "vocabulary")

    def __init__(self, vocabulary: list[str], idf: Float32[np.ndarray, "V"], components: Float32[np.ndarray, "X V"]):
        super().__init__(len(components))
        if components.shape[1:] != (len(vocabulary),):
            raise ValueError(f"{len(vocabulary)} words, components of shape {components.shape}")
        self.vocabulary, self.idf, self.components = vocabulary, idf, components
        self.tfidf = TfidfVectorizer(vocabulary=vocabulary, **TFIDF)
        self.tfidf.idf_ = idf.astype(float)

    @classmethod
    def fit(cls, reports: Sequence[str], patients: Sequence[str] | None = None) -> "Lsa":
        """Learn the words of reports. `patients` says whose each is; without it each counts as another patient's.

        Raises:
            ConfigError: the patients share too few words.
        """
        cut, words = [Text(0).pieces(report) for report in reports], TfidfVectorizer(**TFIDF).build_analyzer()
        known: dict[Any, set[str]] = {}
        for patient, pieces in zip(patients or range(len(cut)), cut, strict=True):
            known.setdefault(patient, set()).update(word for piece in pieces for word in words(piece))
        counts = Counter(word for found in known.values() for word in found)
        vocabulary = sorted(word for word, n in counts.items() if n >= MIN_PATIENTS and word not in PLACES)
        if len(vocabulary) < 2:
            there = f"the reports of {len(known)} patients share {len(vocabulary)} words, counting those of at least {MIN_PATIENTS}"
            raise ConfigError(f"{there}: too few to tell them apart by; use --text tower or --report-embeddings")
        tfidf = TfidfVectorizer(vocabulary=vocabulary, **TFIDF)
        svd = TruncatedSVD(min(WIDTH, len(vocabulary) - 1), random_state=0)
        svd.fit(tfidf.fit_transform([piece for pieces in cut for piece in pieces]))
        return cls(vocabulary, np.float32(tfidf.idf_), np.ascontiguousarray(svd.components_, np.float32))

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n X"]:
        """As Text.encode; zero for a piece without a known word."""
        return torch.from_numpy(np.float32(normalize(self.tfidf.transform(texts) @ self.components.T)))

    def save(self, folder: Path) -> None:
        """As Text.save."""
        write_bytes(Path(folder) / "text.safetensors", save({"idf": self.idf, "components": self.components}))
        super().save(folder)


class Sentence(Text):
    """A model of sentence-transformers, by name or folder; loaded when a text is first encoded, and never copied.

    Args:
        check: how the model's vector of one word began in training; another model under the same name is refused.
    """

    kind, described = "sentence", (*Text.described, "name", "check")

    def __init__(self, name: str, dim: int = 0, check: Sequence[float] = ()):
        super().__init__(dim)
        self.name, self.check = name, list(check)
        if not dim:
            word = self.encode(["carcinoma"])[0]
            self.dim, self.check = len(word), [round(value, 4) for value in word[:8].tolist()]

    @cached_property
    def model(self) -> Any:
        """The loaded sentence encoder."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ModelError(f"--text sentence:{self.name} needs sentence-transformers: pip install 'dreslcl[text]'") from error
        try:
            model = SentenceTransformer(self.name)
        except Exception as error:  # many types for a name that does not exist, a folder that is none, a missing network
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"sentence encoder {self.name} cannot be loaded ({why}); without a network give its folder") from error
        if self.check and not np.allclose(model.encode(["carcinoma"], normalize_embeddings=True)[0, :8], self.check, atol=0.01):
            raise ModelError(f"sentence encoder {self.name} gives other vectors than in training: it is another model now")
        return model

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n X"]:
        """As Text.encode."""
        return torch.from_numpy(np.float32(self.model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)))


def make_text(
    setting: str, encoder: Encoder | None, reports: Sequence[str] | Sequence[np.ndarray], patients: Sequence[str] | None = None
) -> Text:
    """What `EncoderConfig.text` asks for. The training reports are texts, or vectors (n, X) made elsewhere; `patients` says whose each is.

    `auto` is the tower where its weights are pretrained on medical text (`MEDICAL`), else lsa. `tower` is frozen where its weights are
    pretrained and learns where they are random; `tower:tune` learns. `sentence:NAME` takes a name or folder.

    Raises:
        ConfigError: an unknown setting, or reports that share too few words.
        ModelError: the sentence encoder cannot be loaded.
    """
    if not isinstance(reports[0], str):
        return Text(reports[0].shape[1])
    pretrained = encoder is not None and encoder.pretrained
    medical = pretrained and any(name in encoder.name.lower() for name in MEDICAL)
    if setting in ("tower", "tower:tune") or (setting == "auto" and medical):
        if not pretrained:
            log.warning("%s: the text tower has random weights and learns from these reports alone; --text lsa does better", encoder.name)
        return Tower(encoder, setting == "tower:tune" or not pretrained)
    if setting in ("auto", "lsa"):
        return Lsa.fit(reports, patients)
    kind, _, name = setting.partition(":")
    if kind == "sentence" and name:
        return Sentence(name)
    raise ConfigError(f"text must be auto, lsa, tower, tower:tune or sentence:NAME, got {setting!r}")
