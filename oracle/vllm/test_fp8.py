"""vLLM reads our fp8 block checkpoints, with f32 scales and with powers of two.

It has no CPU kernel for them, so its own loading runs, and torch multiplies with what it
loaded: that tests names, fused loading and scales, not its kernels.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from helpers import run_convert
from test_modelopt import _spoiled, _Torch
from test_modelopt import blocks as blocks_fixture
from test_modelopt import source as source_fixture
from test_vllm import NEW, PROMPTS, VOCAB, _generate, _transformers

from streamq.formats import named
from streamq.schemes import SCHEMES

source, blocks = source_fixture, blocks_fixture
FORMATS = {"f32": named("fp8"), "ue8m0": named("fp8", scale_fmt="ue8m0")}
#: Of the mean |difference| of log-probabilities; the same model in bf16 has 0.0018.
BOUND = 0.005
SPOILED = "model.layers.0.mlp.gate_proj.weight_scale_inv"


class _Blocks(_Torch):
    """A kernel that multiplies in torch with the blocks as vLLM loaded them."""

    def process_weights_after_loading(self, layer):
        """The scales have another name than ModelOpt's."""
        layer.weight_scale = layer.weight_scale_inv
        super().process_weights_after_loading(layer)


def _generate_in_torch(folder):
    """``_generate`` with the kernel above."""
    from vllm.model_executor.layers.quantization import fp8

    fp8.init_fp8_linear_kernel = lambda **_: _Blocks()
    return _generate(folder)


@pytest.mark.parametrize("scales", FORMATS)
def test_vllm_computes_with_our_numbers(scales, blocks, tmp_path):
    """In prefill and in decoding, over the whole vocabulary."""
    out = tmp_path / "out"
    run_convert(blocks, out, "FP8_BLOCK", format=FORMATS[scales])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        made = pool.submit(_generate_in_torch, out).result()
    assert [len(new) for new, _ in made] == [NEW] * len(PROMPTS)
    tokens = [[*p, *new] for p, (new, _) in zip(PROMPTS, made, strict=True)]
    found = np.concatenate([np.float32(rows) for _, rows in made])
    assert found.shape == (sum(map(len, tokens)) - len(tokens), VOCAB)

    def apart(folder):
        floats = folder.with_name(folder.name + "-bf16")
        run_convert(folder, floats, "BF16")
        return abs(found - _transformers(floats, tokens)).mean()

    right, wrong = apart(out), apart(_spoiled(out, tmp_path / "spoiled", SPOILED))
    print(f"\nfp8 {scales}: {right:.5f}, spoiled {wrong:.5f}")
    assert right < BOUND < wrong


def test_an_ignored_name_within_a_quantized_one():
    """Exact names, for vLLM, beside the regexes that transformers needs."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    layer = "model.layers.0.mlp."
    modules = [layer + p for p in ("gate_proj", "up_proj", "down_proj")]
    scheme = FORMATS["f32"].concrete(SCHEMES["FP8_BLOCK"])
    written = FORMATS["f32"].config({scheme: modules}, ["lm_head", layer + "gate"], {})
    config = Fp8Config.from_config(written["quantization_config"])
    fused = {"gate_up_proj": ["gate_proj", "up_proj"]}
    assert config.weight_block_size == [128, 128]
    assert config.activation_scheme == "dynamic"
    for name in ("gate_up_proj", "down_proj"):
        assert not is_layer_skipped(layer + name, config.ignored_layers, fused)
    for name in ("lm_head", layer + "gate"):
        assert is_layer_skipped(name, config.ignored_layers, fused)
