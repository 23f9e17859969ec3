"""Scales that are missing, or differ where a loader has room for one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import inf, prod

from streamq.tensors import DTYPES, TensorInfo

from .facts import Facts, Find, Fusion, Rule

#: The suffixes of the second scale of weights, and of the scale of activations.
GLOBAL = ("weight_global_scale", "weight_scale_2")
INPUT = ("input_global_scale", "input_scale")

_KV = re.compile(r"(?:\.[kv]_proj)?\.([kv])_scale$")


def unequal(facts: Facts, suffixes: tuple[str, ...]) -> Iterator[tuple[Fusion, list[str]]]:
    """Fused groups whose scales differ, with the modules that differ from the first."""
    for fusion in facts.fused():
        values = {
            s.module: facts.value(t)
            for s in fusion.members for suffix, t in s.tensors.items() if suffix in suffixes
        }  # fmt: skip
        first = next(iter(values.values()), None)
        if odd := [module for module, value in values.items() if value != first]:
            yield fusion, odd


def _differing(suffixes: tuple[str, ...], expert: bool) -> Find:
    def find(facts: Facts) -> list[str]:
        return [m for f, odd in unequal(facts, suffixes) if f.expert is expert for m in odd]

    return find


def _without(suffixes: tuple[str, ...], activations: bool) -> Find:
    """Quantized modules of two-level schemes that lack one of ``suffixes``."""

    def find(facts: Facts) -> list[str]:
        missing: list[str] = []
        if facts.found is None:
            return missing
        for module, parts in facts.found.parts.items():
            scheme = facts.found.scheme_of(module)
            if scheme is None or not scheme.two_level or (activations and not scheme.activation):
                continue
            if "weight_scale" in parts and not any(s in parts for s in suffixes):
                missing.append(module)
        return missing

    return find


def _kv_scales(facts: Facts) -> dict[str, dict[str, TensorInfo]]:
    """Scales of the cache of keys and values by attention module, under "k" and "v"."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, t in facts.checkpoint.tensors.items():
        if name.endswith(("k_scale", "v_scale")) and (match := _KV.search(name)):
            found.setdefault(name[: match.start()], {})[match[1]] = t
    return found


def _says_kv(facts: Facts) -> bool:
    q = facts.quantization
    older = q.get("quantization")
    older = older if isinstance(older, dict) else {}
    beside = (facts.json("hf_quant_config.json") or {}).get("quantization")
    beside = beside if isinstance(beside, dict) else {}
    asked = (q.get("kv_cache_scheme"), older.get("kv_cache_quant_algo"),
             beside.get("kv_cache_quant_algo"))  # fmt: skip
    return any(asked)


def _no_kv_scales(facts: Facts) -> list[str]:
    return ["no k_scale or v_scale"] if _says_kv(facts) and not _kv_scales(facts) else []


def _half_kv_scales(facts: Facts) -> list[str]:
    return [m for m, parts in _kv_scales(facts).items() if len(parts) == 1 and "v" in parts]


def _wide_kv_scales(facts: Facts) -> list[str]:
    found = _kv_scales(facts).values()
    return [t.name for parts in found for t in parts.values() if prod(t.shape) != 1]


def _odd_kv_scales(facts: Facts) -> list[str]:
    odd = []
    for parts in _kv_scales(facts).values():
        for t in parts.values():
            readable = prod(t.shape) == 1 and DTYPES[t.dtype].numpy is not None
            if readable and not 0 < facts.value(t) < inf:
                odd.append(t.name)
    return odd


_REPAIR = "; streamq repair gives them one"
_CT, _MO = ("compressed-tensors",), ("modelopt",)

RULES = (
    # vLLM: schemes/compressed_tensors_w4a4_nvfp4.py, process_weights_after_loading: max(), and
    # a warning once. The stored number is a divisor there.
    Rule("fused-global-scale", "vLLM 0.32", "error",
         "takes the largest weight_global_scale of a fused layer for all of its parts, so that "
         "the others come out too small" + _REPAIR, _differing(GLOBAL, False), _CT),
    # vLLM: compressed_tensors_moe_w4a4_nvfp4.py and modelopt.py (ModelOptNvFp4FusedMoE),
    # process_weights_after_loading: column 0, and a warning once.
    Rule("fused-global-scale-experts", "vLLM 0.32", "error",
         "takes the global scale of an expert's gate_proj for its up_proj as well" + _REPAIR,
         _differing(GLOBAL, True), _CT + _MO),
    # vLLM: modelopt.py, KNvfp4Static.process: max(), a multiplier here.
    Rule("fused-weight-scale-2", "vLLM 0.32", "error",
         "takes the largest weight_scale_2 of a fused layer for all of its parts, so that the "
         "others come out too large" + _REPAIR, _differing(GLOBAL, False), _MO),
    # SGLang: compressed_tensors_w4a4_nvfp4.py (0541d3be) and modelopt_quant.py,
    # ModelOptFp4LinearMethod: max(), the former without a word.
    Rule("sglang-fused-global-scale", "SGLang (0541d3be)", "error",
         "takes the largest global scale of a fused layer for all of its parts" + _REPAIR,
         _differing(GLOBAL, False), _CT + _MO),
    # SGLang: compressed_tensors_w4a4_nvfp4_moe.py (00c99676), process_weights_after_loading.
    Rule("sglang-fused-global-scale-experts", "SGLang (00c99676)", "error",
         "takes the global scale of an expert's gate_proj for its up_proj as well" + _REPAIR,
         _differing(GLOBAL, True), _CT + _MO),
    # TensorRT-LLM: _torch/modules/linear.py (00bbf71e), NVFP4LinearMethod.load_weight_scales
    # asserts; fused_moe/quantization.py, load_expert_fc31_alpha_nvfp4 does.
    Rule("trtllm-weight-scale-2", "TensorRT-LLM (00bbf71e)", "error",
         "refuses fused layers whose weight_scale_2 differ" + _REPAIR,
         lambda f: _differing(GLOBAL, False)(f) + _differing(GLOBAL, True)(f), _MO),
    # The same places, for the scale of the activations; vLLM warns once.
    Rule("fused-input-scale", "vLLM 0.32", "warning",
         "takes the largest input scale of a fused layer for all of its parts",
         lambda f: _differing(INPUT, False)(f) + _differing(INPUT, True)(f), _CT + _MO),
    Rule("trtllm-input-scale", "TensorRT-LLM (00bbf71e)", "error",
         "refuses fused layers whose input_scale differ",
         _differing(INPUT, False), _MO),
    # vLLM: model_loader/default_loader.py, load_weights: whether all parameters were loaded is
    # asked of unquantized models only, and these are torch.empty.
    Rule("no-global-scale", "vLLM 0.32", "error",
         "does not notice that the global scale is missing and takes what its memory holds",
         _without(GLOBAL, False), _CT + _MO),
    # SGLang: both NVFP4 linears make them by torch.empty (SGLang pull request 14102).
    Rule("sglang-no-global-scale", "SGLang (0541d3be)", "error",
         "does not notice that the global scale is missing and takes what its memory holds",
         _without(GLOBAL, False), _CT + _MO),
    Rule("no-input-scale", "vLLM 0.32", "error",
         "does not notice that the scale of the activations is missing and takes what its memory "
         "holds", _without(INPUT, True), _CT + _MO),
    # vLLM: quantization/kv_cache.py, BaseKVCacheMethod.process_weights_after_loading.
    Rule("no-kv-scale", "vLLM 0.32", "warning",
         "takes 1.0 for the scales of the fp8 cache of keys and values that the config speaks of",
         _no_kv_scales),
    Rule("half-kv-scale", "vLLM 0.32", "error",
         "refuses a v_scale without its k_scale", _half_kv_scales),
    Rule("odd-kv-scale", "vLLM 0.32", "error",
         "takes a scale of the cache that is not above zero for one that is not there",
         _odd_kv_scales),
    # vLLM: quantization/kv_cache.py, KVCacheScaleParameter.weight_loader; compressed-tensors has
    # scales by head, which go another way.
    Rule("wide-kv-scale", "vLLM 0.32", "error",
         "refuses scales of the cache that are not one number", _wide_kv_scales,
         ("modelopt", "fp8", "awq", "gptq", "plain")),
)  # fmt: skip
