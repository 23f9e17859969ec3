"""``Compressor`` and ``CompressConfig`` as users of msmodelslim know them.

Same names, same arguments; nothing is unpickled, no NPU is needed. Names of files and of
arguments are those of msmodelslim's documentation of ``weight_compression``.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from streamq.errors import CheckpointError, PlanError, WriteError

from .tables import Array, Mode
from .tiles import compress

#: What is compressed, and what it is called then.
_COMPRESSED = {"W8A8S": "W8A8SC", "W16A16S": "W16A16SC"}
_WEIGHTS = "quant_model_weight_w8a8sc.safetensors"
_DESCRIPTION = "quant_model_description_w8a8sc.json"
_SEED = 0


@dataclass(frozen=True)
class CompressConfig:
    """How to compress.

    ``do_pseudo_sparse``: keep each element with probability ``sparse_ratio``, zero the others,
    before compressing; the same ones in every run. ``is_debug``: print what each weight
    saved. ``compress_disable_layers``: names left as they are. ``multiprocess_num``: threads.
    ``record_detail_root`` is accepted, but no temporary data is written.
    """

    do_pseudo_sparse: bool = False
    sparse_ratio: float = 1
    is_debug: bool = False
    compress_disable_layers: Sequence[str] = ()
    record_detail_root: str = "./"
    multiprocess_num: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sparse_ratio <= 1:
            raise PlanError(f"sparse_ratio is a share from 0 to 1, not {self.sparse_ratio}")
        if self.multiprocess_num < 1:
            raise PlanError(f"multiprocess_num is at least 1, not {self.multiprocess_num}")


class Compressor:
    """Compresses weights for the decompression engine of the 310P.

    Either ``weight_path``, an ``.npz``, ``.npy`` or ``.safetensors`` file of which every i8
    matrix is compressed, or ``weight``, by name numpy arrays or torch tensors, with
    ``quant_model_description``, of which the weights that it calls W8A8S or W16A16S are.
    """

    def __init__(
        self,
        config: CompressConfig,
        weight_path: str | Path | None = None,
        weight: Mapping[str, Any] | None = None,
        quant_model_description: Mapping[str, Any] | None = None,
    ) -> None:
        if (weight_path is None) == (weight is None):
            raise PlanError("give the Compressor either weight_path or weight")
        if weight is not None and quant_model_description is None:
            raise PlanError("weight needs its quant_model_description")
        self.config = config
        self.description = dict(quant_model_description or {})
        self.weights = _load(Path(weight_path)) if weight_path is not None else dict(weight or {})
        self._done: tuple[dict[str, Array], dict[str, Array], dict[str, Array]] | None = None

    def run(
        self, weight_transpose: bool = False
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        """Compress; by name of the weight: stream i8 ``[c]``, index i8, info i64 ``[5]``."""
        streams, indices, infos = {}, {}, {}
        for name in self.weights:
            mode = self._mode(name)
            if mode is None:
                continue
            weight = self._sparse(name, _array(self.weights[name]))
            weight = weight.view(np.int8)
            streams[name], indices[name], infos[name] = compress(
                weight, mode, transpose=weight_transpose, workers=self.config.multiprocess_num
            )
            if self.config.is_debug:
                share = streams[name].size / weight.size
                saved = f"{share:.3f} of its size" if share < 1 else "stored as is"
                print(f"{name}: {weight.size} -> {streams[name].size} bytes, {saved}")
        self._done = streams, indices, infos
        return self._done

    def export(self, arr_dict: Mapping[str, Array], path: str | Path, dtype: Any = np.int8) -> None:
        """Write each array as ``<key>.dat``, raw and of ``dtype``, into the folder ``path``."""
        folder = _folder(path)
        for key, array in arr_dict.items():
            if Path(key).name != key:
                raise WriteError(f"{key!r} is not the name of a file")
            try:
                (folder / f"{key}.dat").write_bytes(np.asarray(array).astype(dtype).tobytes())
            except OSError as error:
                raise WriteError(f"{folder / key}.dat cannot be written: {error}") from None

    def export_safetensors(
        self,
        path: str | Path,
        safetensors_name: str | None = None,
        json_name: str | None = None,
    ) -> None:
        """Write all weights, compressed or not, and their description into the folder ``path``.

        A compressed weight is ``X.weight``, ``X.index`` and ``X.info``, and W8A8SC in the
        description. The names of the files are those of msmodelslim where None.
        """
        if self._done is None:
            raise PlanError("call run() before export_safetensors()")
        streams, indices, infos = self._done
        tensors, description = {}, dict(self.description)
        for name in self.weights:
            if name not in streams:
                tensors[name] = _array(self.weights[name])
                continue
            base = name.removesuffix("weight")
            of = {name: streams[name], f"{base}index": indices[name], f"{base}info": infos[name]}
            tensors |= of
            kind = _COMPRESSED.get(self._kind(name) or "W8A8S")
            description |= dict.fromkeys(of, kind)
            stem = name.removesuffix(".weight")
            if stem in description:
                description[stem] = kind
            description |= {
                key: _COMPRESSED[said]
                for key, said in self.description.items()
                if key.rpartition(".")[0] == stem and said in _COMPRESSED
            }
        whole = description.get("model_quant_type")
        if isinstance(whole, str):
            description["model_quant_type"] = _COMPRESSED.get(whole, whole)
        folder = _folder(path)
        try:
            save_file(tensors, folder / (safetensors_name or _WEIGHTS), {"format": "pt"})
            text = json.dumps(description, indent=2)
            (folder / (json_name or _DESCRIPTION)).write_text(text)
        except (OSError, SafetensorError) as error:
            raise WriteError(f"{folder} cannot be written: {error}") from None

    def _kind(self, name: str) -> str | None:
        said = self.description.get(name, self.description.get(name.removesuffix(".weight")))
        return said if isinstance(said, str) else None

    def _mode(self, name: str) -> Mode | None:
        """How a tensor is coded, None where it is not."""
        weight, skipped = self.weights[name], self.config.compress_disable_layers
        if name in skipped or name.removesuffix(".weight") in skipped or len(weight.shape) != 2:
            return None
        dtype = str(weight.dtype).removeprefix("torch.")
        if not self.description:
            return "low" if dtype == "int8" else None
        kind = self._kind(name)
        if kind == "W8A8S" and dtype == "int8":
            return "low"
        return "high" if kind == "W16A16S" and dtype in ("float16", "bfloat16") else None

    def _sparse(self, name: str, weight: Array) -> Array:
        if not self.config.do_pseudo_sparse:
            return weight
        rng = np.random.default_rng([_SEED, zlib.crc32(name.encode())])
        kept = rng.random(weight.shape, np.float32) < self.config.sparse_ratio
        return np.where(kept, weight, np.zeros((), weight.dtype))


def _load(path: Path) -> dict[str, Array]:
    """Arrays by name, of a file that holds data only."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = np.load(path, allow_pickle=False)
        return dict(loaded) if path.suffix == ".npz" else {path.stem: loaded}
    except (OSError, EOFError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except ValueError:
        raise CheckpointError(
            f"{path} is pickled, and unpickling runs code: where it is trusted, write it anew "
            f"with np.savez({path.stem + '.npz'!r}, **weights) and give that file"
        ) from None


def _array(tensor: Any) -> Array:
    """A numpy array, or a torch tensor as one, contiguous."""
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().cpu().contiguous()
        if str(tensor.dtype) == "torch.bfloat16":  # numpy() refuses it
            bits = tensor.view(sys.modules["torch"].int16).numpy()
            return np.asarray(bits.view(ml_dtypes.bfloat16))
        tensor = tensor.numpy()
    return np.ascontiguousarray(tensor)


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder} cannot be made: {error}") from None
    return folder
