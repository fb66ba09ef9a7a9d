"""How a report becomes vectors: by the encoder's text tower, by the words of the training reports, by a sentence encoder, or elsewhere.

A report is cut into pieces, and each piece has a vector. A training step draws some of a report's pieces; everywhere else (retrieval,
`embed_text`, prompts) a text is the mean of all its pieces. `make_text` chooses; the figures behind it are in examples/RESULTS.md.
"""

import json
import logging
import re
from collections import Counter, defaultdict
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
from torch import Tensor, nn

from .common import ConfigError, ModelError, reason, write_bytes, write_json
from .encoder import Encoder

log = logging.getLogger(__name__)
WINDOW = 64  # most words of a piece
WIDTH = 256  # of an LSA vector
TFIDF = {"sublinear_tf": True, "stop_words": "english", "token_pattern": r"(?u)\b[a-zA-Z]{3,}\b"}  # letters only: no number, no barcode
MIN_PATIENTS = 3  # whose reports hold a word that LSA keeps: rarer ones may name a patient, most are misread
# words that say where a slide of TCGA comes from, not what it shows
PLACES = set("tcga uuid asterand christiana cureline emory ilsbio indivumed kettering mayo mskcc roswell sloan uvm vanderbilt".split())
MEDICAL = {"biomedclip": "15 million figures of PubMed Central, arXiv 2303.00915", "quiltnet": "Quilt-1M, histology, arXiv 2306.11207"}
"""OpenCLIP models pretrained on medical text, by a part of their names, and on what: `--text auto` uses their text tower."""


def clean_report(text: str) -> str:
    """Mend what optical character recognition leaves: split words, control characters, rows of dots and dashes."""
    text = re.sub(r"(\w)-\s*\n\s*(\w)", r"\1\2", text)
    text = re.sub(r"[^\w\s.,;:()/%<>=+\-'\"°µ&#?!]", " ", text)
    text = re.sub(r"([._\-=*])\1{2,}", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def mask_words(text: str, words: str) -> str:
    """A text without some words, given with commas between them, in any case; `adeno*` stands for all that begins so."""
    patterns = (re.escape(word.strip()).replace(r"\*", r"\w*") for word in words.split(",") if word.strip())
    return re.sub(rf"(?<!\w)({'|'.join(patterns) or '(?!)'})(?!\w)", " ", text, flags=re.IGNORECASE)  # (?!): no word, no match


class Text(nn.Module):
    """Vectors of texts, of width X = `dim`; `learns`: training changes them. As it is, for vectors made elsewhere: it encodes nothing."""

    kind, learns, room = "vectors", False, WINDOW
    described: tuple[str, ...] = ("kind", "dim", "learns")  # what `load` needs beside tensors; JSON-able

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def size(self, text: str) -> int:
        """What of a text counts against `room`: its words."""
        return len(text.split())

    def pieces(self, report: str) -> list[str]:
        """The sentences of a cleaned report; one of a size above `room` in windows, each sharing half with the one before. Never empty."""
        found: list[str] = []
        for sentence in re.split(r"(?<=[.!?;])\s+", clean_report(report)):
            words, start, stop = [sentence] if self.size(sentence) <= self.room else sentence.split(), 0, 0
            ends = np.cumsum([0, *(max(1, self.size(word)) for word in words)])
            while stop < len(words):
                stop = max(start + 1, int(np.searchsorted(ends, ends[start] + self.room, "right")) - 1)
                found.append(" ".join(words[start:stop]))
                start = max(start + 1, (start + stop) // 2)
        return found

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n X"]:
        """Vectors of pieces, float32, of unit norm but for LSA's. ModelError where they are made elsewhere, or cannot be made here."""
        raise ModelError("this model was trained on report vectors made elsewhere and reads no text; use --report-embeddings")

    def vector(self, report: str | Float32[np.ndarray, "n X"]) -> Float[Tensor, "X"]:
        """The one vector of a text: the mean over its pieces; of vectors made elsewhere: their mean."""
        return (torch.from_numpy(report) if isinstance(report, np.ndarray) else self.encode(self.pieces(report))).mean(0)

    def save(self, folder: Path) -> None:
        """Write `text.json` into a folder, and `text.safetensors` where there are tensors."""
        write_json(Path(folder) / "text.json", {name: getattr(self, name) for name in self.described})

    @staticmethod
    def load(folder: Path, encoder: Encoder | None) -> "Text":
        """Read what `save` wrote; `encoder` has the text tower. Nothing is fitted or downloaded. ModelError: no or damaged files."""
        file = Path(folder) / "text.json"
        try:
            match json.loads(file.read_text(encoding="utf-8")):
                case {"kind": "tower", "learns": learns} if encoder is not None:
                    return Tower(encoder, learns)
                case {"kind": "lsa", "vocabulary": vocabulary}:
                    return Lsa(vocabulary, **load_file(file.with_suffix(".safetensors")))
                case {"kind": "sentence", "name": name, "dim": dim, "check": check}:
                    return Sentence(name, dim, check)
                case {"kind": "vectors", "dim": dim}:
                    return Text(dim)
            why = "something is missing"
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            why = reason(error)
        raise ModelError(f"{file}: no whole description of report vectors ({why})")


class Tower(Text):
    """The encoder's own text tower, OpenCLIP's or a Hugging Face one inside it; a piece fits its context."""

    kind = "tower"

    def __init__(self, encoder: Encoder, learns: bool):
        super().__init__(encoder.dim)
        self._encoder = (encoder,)  # in a tuple: its weights are the encoder's, not a part of this module
        self.learns, self.room = learns, encoder.context - 2  # the start and end tokens

    def size(self, text: str) -> int:
        """Tokens."""
        own = self._encoder[0].tokenizer
        inner = getattr(own, "tokenizer", None)  # a Hugging Face tokenizer inside
        return len(inner.encode(text, add_special_tokens=False) if inner else own.encode(text))

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n X"]:
        """As Text.encode, with gradient where one is asked for."""
        (encoder,) = self._encoder
        tokens = encoder.tokenizer(list(texts)).to(encoder.mean.device)
        return F.normalize(encoder.clip.encode_text(tokens).to(encoder.mean.dtype), dim=-1)


class Lsa(Text):
    """Latent semantic analysis (Deerwester et al. 1990): TF-IDF of words, reduced by an SVD, both fitted on the training reports alone.

    It keeps words that several patients' reports hold: no report, no rare word. A sentence that says more has a longer vector.
    """

    kind, described = "lsa", (*Text.described, "vocabulary")

    def __init__(self, vocabulary: list[str], idf: Float32[np.ndarray, "V"], components: Float32[np.ndarray, "X V"]):
        super().__init__(len(components))
        self.vocabulary, self.idf, self.components = vocabulary, idf, components
        self.tfidf = TfidfVectorizer(vocabulary=vocabulary, norm=None, **TFIDF)
        self.tfidf.idf_ = idf.astype(float)

    @classmethod
    def fit(cls, reports: Sequence[str], patients: Sequence[str] | None = None) -> "Lsa":
        """Learn the words of reports; `patients` says whose each is, else each is another's. ConfigError: they share too few words."""
        reports, words = [clean_report(report) for report in reports], TfidfVectorizer(**TFIDF).build_analyzer()
        known: dict[Any, set[str]] = defaultdict(set)
        for patient, report in zip(patients or range(len(reports)), reports, strict=True):
            known[patient].update(words(report))
        counts = Counter(word for found in known.values() for word in found)
        vocabulary = sorted(word for word, n in counts.items() if n >= MIN_PATIENTS and word not in PLACES)
        if len(vocabulary) < 2:
            there = f"the reports hold {len(vocabulary)} words that at least {MIN_PATIENTS} of their {len(known)} patients share"
            raise ConfigError(f"{there}: too few to tell them apart by; use --text tower or --report-embeddings")
        tfidf = TfidfVectorizer(vocabulary=vocabulary, **TFIDF)
        svd = TruncatedSVD(min(WIDTH, len(vocabulary) - 1, len(reports) - 1), random_state=0).fit(tfidf.fit_transform(reports))
        text = cls(vocabulary, np.float32(tfidf.idf_), np.ascontiguousarray(svd.components_, np.float32))
        sentences = text.encode([piece for report in reports for piece in text.pieces(report)])
        text.components /= sentences.norm(dim=1).mean().item()  # 1 in the mean
        return text

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n X"]:
        """Vectors of pieces; zero for one without a known word."""
        return torch.from_numpy(np.float32(self.tfidf.transform(texts) @ self.components.T))

    def save(self, folder: Path) -> None:
        """As Text.save."""
        write_bytes(Path(folder) / "text.safetensors", save({"idf": self.idf, "components": self.components}))
        super().save(folder)


class Sentence(Text):
    """A model of sentence-transformers, by name or folder, loaded when first used; `check`: how the vector of a word began in training."""

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

            model = SentenceTransformer(self.name)
        except ImportError as error:
            raise ModelError(f"--text sentence:{self.name} needs sentence-transformers: pip install 'dreslcl[text]'") from error
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
    pretrained and learns where they are random; `tower:tune` learns. ConfigError or ModelError where it cannot be had.
    """
    if not isinstance(reports[0], str):
        return Text(reports[0].shape[1])
    pretrained = encoder is not None and encoder.reads
    medical = pretrained and any(name in encoder.name.lower() for name in MEDICAL)
    if setting in ("tower", "tower:tune") or (setting == "auto" and medical):
        if not pretrained:
            log.warning("%s: the text tower has random weights and learns from these reports alone; --text lsa does better", encoder.name)
        return Tower(encoder, setting == "tower:tune" or not pretrained)
    if setting in ("auto", "lsa"):
        try:
            return Lsa.fit(reports, patients)
        except ConfigError as error:
            if setting == "lsa" or encoder is None:
                raise
            log.warning("%s; the encoder's text tower reads them", str(error).split(":")[0])
            return Tower(encoder, not pretrained)
    kind, _, name = setting.partition(":")
    if kind == "sentence" and name:
        return Sentence(name)
    raise ConfigError(f"text must be auto, lsa, tower, tower:tune or sentence:NAME, got {setting!r}")
