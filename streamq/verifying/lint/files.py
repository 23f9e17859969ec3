"""Files, index, tied weights, and blocks that loaders concatenate."""

from __future__ import annotations

from typing import Any

from streamq.stored import bytes_of
from streamq.tensors import TensorInfo

from .facts import INDEX, Facts, Rule

#: What the format of a file may be for transformers 4.
MARKS = ("pt", "tf", "flax", "mlx")
_HEADS = ("lm_head", "embed_out", "output")
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "embed_in", "word_embeddings")


def _without_format(facts: Facts) -> list[str]:
    return [f for f, said in facts.checkpoint.metadata.items() if said.get("format") not in MARKS]


def _map(facts: Facts) -> dict[str, Any]:
    found = (facts.json(INDEX) or {}).get("weight_map")
    return found if isinstance(found, dict) else {}


def _ghosts(facts: Facts) -> list[str]:
    """Tensors that the index names and no shard has."""
    return [name for name in _map(facts) if name not in facts.checkpoint.tensors]


def _lost_files(facts: Facts) -> list[str]:
    names = dict.fromkeys(f for f in _map(facts).values() if isinstance(f, str))
    return [f for f in names if not (facts.checkpoint.root / f).is_file()]


def _unnamed_files(facts: Facts) -> list[str]:
    named = {f for f in _map(facts).values() if isinstance(f, str)}
    shards = sorted(p.name for p in facts.checkpoint.root.glob("*.safetensors"))
    return [f for f in shards if named and f not in named]


def _no_metadata(facts: Facts) -> list[str]:
    index = facts.json(INDEX)
    return [INDEX] if index is not None and not isinstance(index.get("metadata"), dict) else []


def _unfound(facts: Facts) -> list[str]:
    """The files of a checkpoint that transformers finds no way into."""
    usual = (INDEX, "model.safetensors")
    has_one = any((facts.checkpoint.root / name).is_file() for name in usual)
    return [] if has_one else facts.checkpoint.files


def _consolidated(facts: Facts) -> list[str]:
    found = sorted(p.name for p in facts.checkpoint.root.glob("consolidated*.safetensors"))
    return [] if set(facts.checkpoint.files) <= set(found) else found


def _weights(facts: Facts, leaves: tuple[str, ...]) -> list[TensorInfo]:
    """The weights of modules whose names end so."""
    ends = tuple(f"{leaf}.weight" for leaf in leaves)
    named = [t for name, t in facts.checkpoint.tensors.items() if name.endswith(ends)]
    return [t for t in named if t.name.split(".")[-2] in leaves]


def _tie(facts: Facts) -> bool | None:
    for config in (facts.config, facts.family.config):
        if isinstance(tie := config.get("tie_word_embeddings"), bool):
            return tie
    return None


def _both(facts: Facts) -> tuple[TensorInfo, TensorInfo] | None:
    """Head and embedding, of one shape, where the config ties them and both are there."""
    heads = _weights(facts, ("lm_head",)) if _tie(facts) else []
    embeddings = _weights(facts, _EMBEDDINGS) if heads else []
    return next(((h, e) for h in heads for e in embeddings if h.shape == e.shape), None)


def _equal(facts: Facts, a: TensorInfo, b: TensorInfo) -> bool:
    if a.dtype != b.dtype:
        return False
    step = 1 << 20
    pieces = ((at, min(step, a.nbytes - at)) for at in range(0, a.nbytes, step))
    c = facts.checkpoint
    return all(bytes_of(c, a, at, n) == bytes_of(c, b, at, n) for at, n in pieces)


def _untied(facts: Facts) -> list[str]:
    found = _both(facts)
    return [found[0].name] if found and not _equal(facts, *found) else []


def _twice(facts: Facts) -> list[str]:
    found = _both(facts)
    return [found[0].name] if found and _equal(facts, *found) else []


def _headless(facts: Facts) -> list[str]:
    """The head of a language model with an embedding, where it is neither there nor tied."""
    kinds = facts.config.get("architectures")
    causal = isinstance(kinds, list) and any("ForCausalLM" in str(kind) for kind in kinds)
    names = {part for name in facts.checkpoint.tensors for part in name.split(".")[:-1][-1:]}
    if not causal or _tie(facts) is not False or names & {*_HEADS}:
        return []
    return ["lm_head.weight"] if _weights(facts, _EMBEDDINGS) else []


def _merged_blocks(facts: Facts) -> list[str]:
    """Members of fused layers, all but the last, whose rows end within a block."""
    odd = []
    for fusion in facts.fused():
        checked = fusion.members if fusion.expert else fusion.members[:-1]
        odd += [s.module for s in checked
                if s.scheme.block[0] > 1 and s.shape[0] % s.scheme.block[0]]  # fmt: skip
    return odd


_BLOCKS = ("compressed-tensors", "fp8")

RULES = (
    # transformers 4: modeling_utils.py, from_pretrained and load_state_dict raise for another
    # format and, in older ones, for none; fastsafetensors refuses none (its tracker, 96).
    Rule("no-format", "transformers 4 and fastsafetensors", "warning",
         'refuse files without "format": "pt" in __metadata__; streamq repair adds it',
         _without_format),
    # vLLM: model_loader/weight_utils.py, filter_duplicate_safetensors_files; transformers:
    # modeling_utils.py opens what the index names.
    Rule("index-lost-files", "vLLM 0.32 and transformers 5.17", "error",
         "refuse an index that names files which are missing", _lost_files),
    # vLLM looks at the files of an index, not at its names, and loads what these hold.
    Rule("index-ghosts", "vLLM 0.32", "error",
         "does not notice that tensors which the index names are in no file", _ghosts),
    Rule("index-unnamed-files", "vLLM 0.32 and transformers 5.17", "warning",
         "leave out files that the index does not name", _unnamed_files),
    # transformers: utils/hub.py, get_checkpoint_shard_files: index["metadata"].
    Rule("index-metadata", "transformers 5.17", "error",
         "refuses an index without metadata; streamq repair writes another", _no_metadata),
    # transformers: modeling_utils.py, _get_resolved_checkpoint_files.
    Rule("unfound", "transformers 5.17", "warning",
         f"looks for model.safetensors or {INDEX} and finds neither", _unfound),
    # vLLM: model_loader/default_loader.py, _prepare_weights, load format "auto".
    Rule("consolidated", "vLLM 0.32", "warning",
         "loads consolidated*.safetensors where there is one, and nothing else", _consolidated),
    # transformers: modeling_utils.py, tie_weights; vLLM: models/utils.py, AutoWeightsLoader
    # loads the first name of a tied parameter only.
    Rule("tied-and-different", "vLLM 0.32 and transformers 5.17", "error",
         "differ: the config ties the head to the embedding, vLLM does so, and transformers "
         "takes the head that is stored and is another", _untied),
    Rule("tied-twice", "vLLM 0.32 and transformers 5.17", "warning",
         "tie the head to the embedding, so that the second copy only takes space", _twice),
    Rule("no-head", "transformers 5.17", "error",
         "makes a random head, because there is none and tie_word_embeddings is false",
         _headless),
    # vLLM: quantization/utils/fp8_utils.py, validate_fp8_block_shape and its _moe.
    Rule("merged-blocks", "vLLM 0.32", "warning",
         "refuses fused layers whose parts end within a block of scales, the last one aside; for "
         "experts no part may", _merged_blocks, _BLOCKS),
)  # fmt: skip
