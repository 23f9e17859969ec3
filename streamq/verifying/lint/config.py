"""What config.json says and how each loader understands it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from streamq.families import BAD_REGEX
from streamq.formats import FORMATS
from streamq.stored import Stored

from ..readers import FUSED
from .facts import HF_QUANT, Facts, Find, Rule

#: What the models of compressed-tensors 0.17 and 0.19 have; both forbid other keys.
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGS_KEYS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic",
    "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


def _arguments(facts: Facts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Descriptions of tensors in the config groups, by their place."""
    for name, group in facts.groups.items():
        for key in ("weights", "input_activations", "output_activations"):
            if isinstance(args := group.get(key), dict):
                yield f"{name}.{key}", args


def _unknown_arguments(facts: Facts) -> list[str]:
    return [f"{place}.{key}" for place, args in _arguments(facts)
            for key in sorted(args.keys() - _ARGS_KEYS)]  # fmt: skip


def _unknown_keys(facts: Facts) -> list[str]:
    odd = [f"{name}.{key}" for name, group in facts.groups.items()
           for key in sorted(group.keys() - _GROUP_KEYS)]  # fmt: skip
    kv = facts.quantization.get("kv_cache_scheme")
    if isinstance(kv, dict):
        odd += [f"kv_cache_scheme.{key}" for key in sorted(kv.keys() - _ARGS_KEYS)]
    return odd + _unknown_arguments(facts)


def _unsaid_mxfp8(facts: Facts) -> list[str]:
    return [
        place for place, args in _arguments(facts)
        if place.endswith(".weights") and args.get("scale_dtype") != "torch.uint8"
        and (args.get("num_bits"), args.get("type"), args.get("group_size")) == (8, "float", 32)
    ]  # fmt: skip


def _moved_groups(facts: Facts) -> list[str]:
    return [place for place, args in _arguments(facts)
            if args.get("actorder") in ("group", "dynamic", True)]  # fmt: skip


def _odd_bits(facts: Facts) -> list[str]:
    return [s.module for s in facts.weights
            if s.scheme.element == "int" and s.scheme.bits not in (4, 8)]  # fmt: skip


def _odd_gptq(facts: Facts) -> list[str]:
    return [s.module for s in facts.weights
            if s.scheme.bits not in (4, 8) or not s.scheme.symmetric]  # fmt: skip


def _expert_weights(facts: Facts) -> list[str]:
    """Quantized experts that lie one by one."""
    return [s.module for s in facts.weights
            if re.search(r"\bexperts\.\d+\.", s.module)
            and (s.format.name == "modelopt" or s.scheme.two_level)]  # fmt: skip


def _half_scales(facts: Facts) -> list[str]:
    """Modules with f16 scales where the config asks for another dtype."""
    asked = facts.family.config.get("dtype") or facts.family.config.get("torch_dtype")
    if asked in (None, "float16", "auto"):
        return []
    return [s.module for s in facts.weights if s.tensors["scales"].dtype == "F16"]


def _layer(facts: Facts, s: Stored) -> str:
    """What vLLM and SGLang call the layer that a module becomes, or becomes part of."""
    if expert := re.match(r"^(.*\bexperts)\.\d+\.", s.module):
        return expert[1]
    found = facts.family.group_of(s.module)
    if found is None or found[1].name not in FUSED:
        return s.module
    return f"{found[0]}.{FUSED[found[1].name]}".lstrip(".")


def _texts(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _left_out_by_name(wild: bool) -> Find:
    """Quantized modules whose layer has an ignored name within its own."""

    def find(facts: Facts) -> list[str]:
        ignored = _texts(facts.quantization.get("ignore"))
        return [
            s.module for s in facts.weights
            if any(e in (layer := _layer(facts, s)) or (wild and fnmatchcase(layer, e))
                   for e in ignored)
        ]  # fmt: skip

    return find


def _excluded_by_trtllm(facts: Facts) -> list[str]:
    said = (facts.json(HF_QUANT) or {}).get("quantization")
    ignored = _texts(said.get("exclude_modules")) if isinstance(said, dict) else []
    return [s.module for s in facts.weights if any(fnmatchcase(s.module, e) for e in ignored)]


def _other_algo(facts: Facts) -> list[str]:
    said = (facts.json(HF_QUANT) or {}).get("quantization")
    if not isinstance(said, dict) or "quant_algo" not in facts.quantization:
        return []
    both = said.get("quant_algo"), facts.quantization["quant_algo"]
    return [] if str(both[0]).upper() == str(both[1]).upper() else [f"{both[0]} and {both[1]}"]


def _no_hf_quant(facts: Facts) -> list[str]:
    return [] if (facts.checkpoint.root / HF_QUANT).is_file() else [HF_QUANT]


def _left_out_by_ends(facts: Facts) -> list[str]:
    """Quantized modules that an entry of modules_to_not_convert begins or ends."""
    ignored = _texts(facts.quantization.get("modules_to_not_convert"))

    def test(name: str) -> bool:
        for entry in ignored:
            try:
                if re.match(entry, name) or name.endswith(entry):
                    return True
            except BAD_REGEX:
                return True  # transformers stops there
        return False

    return [s.module for s in facts.weights if test(s.module)]


def _unreadable(facts: Facts) -> list[str]:
    """The method, where one is named that none of the formats is."""
    method = facts.quantization.get("quant_method")
    known = [f.method for f in FORMATS.values()]
    return [] if facts.found or method is None or method in known else [str(method)]


_CT, _MO, _FP8 = ("compressed-tensors",), ("modelopt",), ("fp8",)

RULES = (
    # vLLM: compressed_tensors.py, _quantization_scheme_map_from_config validates the arguments
    # with compressed-tensors 0.17, whose QuantizationArgs forbids other keys.
    Rule("unknown-arguments", "vLLM 0.32", "error",
         "refuses keys that compressed-tensors 0.17 does not know", _unknown_arguments, _CT),
    # transformers: QuantizationConfig.model_validate of compressed-tensors 0.19; its
    # QuantizationScheme forbids other keys, too.
    Rule("unknown-keys", "transformers 5.17", "error",
         "refuses keys that compressed-tensors 0.19 does not know", _unknown_keys, _CT),
    # vLLM: compressed_tensors.py, _is_mxfp8, _get_scheme_from_parts.
    Rule("mxfp8-scale-dtype", "vLLM 0.32", "error",
         'does not know MXFP8 without "scale_dtype": "torch.uint8"', _unsaid_mxfp8, _CT),
    # vLLM: compressed_tensors.py, _quantization_scheme_map_from_config.
    Rule("group-actorder", "vLLM 0.32", "warning",
         "refuses groups of columns in another order (actorder)", _moved_groups, _CT),
    # SGLang: compressed_tensors.py, _get_scheme_from_parts, WNA16_SUPPORTED_BITS.
    Rule("sglang-bits", "SGLang (000659ae)", "warning",
         "has packed integers of 4 and 8 bits only", _odd_bits, _CT),
    # vLLM: auto_gptq.py, AutoGPTQConfig.TYPE_MAP.
    Rule("gptq-types", "vLLM 0.32", "warning",
         "has symmetric GPTQ of 4 and 8 bits only", _odd_gptq, ("gptq", "gptq_v2")),
    # vLLM: auto_awq.py and auto_gptq.py, create_weights: scales are made in params_dtype.
    Rule("scales-in-f16", "vLLM 0.32", "warning",
         "rounds scales to the dtype that config.json asks for, which is not float16",
         _half_scales, ("awq", "gptq", "gptq_v2")),
    # Measured: relative error of the logits 1.37 and 1.41 on a small mixture of experts.
    Rule("transformers-experts", "transformers 5.17", "warning",
         "loads quantized experts of this format wrongly, without a word", _expert_weights,
         _CT + _MO),
    # vLLM: modelopt.py, ModelOptQuantConfigBase.is_layer_excluded.
    Rule("ignored-within", "vLLM 0.32", "error",
         "leaves out modules whose name contains one in ignore, and these are quantized",
         _left_out_by_name(True), _MO),
    # SGLang: modelopt_quant.py (003ca3e5), get_quant_method.
    Rule("sglang-ignored-within", "SGLang (003ca3e5)", "error",
         "leaves out modules whose name contains one in ignore, and these are quantized",
         _left_out_by_name(False), _MO),
    # TensorRT-LLM: models/modeling_utils.py, is_module_excluded_from_quantization.
    Rule("trtllm-excluded", "TensorRT-LLM (00bbf71e)", "error",
         f"leaves out what exclude_modules of {HF_QUANT} matches, and these are quantized",
         _excluded_by_trtllm, _MO),
    # TensorRT-LLM: _torch/model_config.py, load_modelopt_quant_config reads that file; vLLM and
    # SGLang take config.json where it has a quantization_config.
    Rule("two-algorithms", "TensorRT-LLM (00bbf71e)", "error",
         f"reads quant_algo from {HF_QUANT}, vLLM and SGLang from config.json, and they differ",
         _other_algo, _MO),
    Rule("no-hf-quant-config", "TensorRT-LLM (00bbf71e)", "warning",
         "looks for the quantization in a file that is missing", _no_hf_quant, _MO),
    # transformers: quantizers/quantizers_utils.py, should_convert_module.
    Rule("ignored-by-ends", "transformers 5.17", "error",
         "leaves out what an entry of modules_to_not_convert begins or ends, and these are "
         "quantized", _left_out_by_ends, _FP8),
    Rule("unknown-method", "streamq", "warning",
         "does not know this quant_method and looked at names and files only", _unreadable),
)  # fmt: skip
