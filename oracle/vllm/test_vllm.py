"""vLLM loads what we write, generates from it, and computes what transformers computes.

On a CPU, where vLLM has kernels for few schemes. Each model runs in a process of its own,
because an engine does not give back all that it took.
"""

import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from helpers import run_convert
from safetensors.torch import load_file, save_file

# vLLM asks for these, and no llama needs them. Their wheels on PyPI are for CUDA and fail
# beside a torch for CPUs, so they count as not installed, here and in what vLLM starts.
ABSENT = "import sys; sys.modules |= dict.fromkeys(('torchaudio', 'torchcodec', 'torchvision'))"
exec(ABSENT)

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from streamq.formats import FORMATS  # noqa: E402

VOCAB, NEW = 512, 8
PROMPTS = [[(7 * i + 3 * n) % VOCAB for i in range(n)] for n in (5, 33, 64)]

# Bounds of the mean |difference| of log-probabilities between vLLM and transformers, which
# sum and round to bf16 in different orders: 0.0018 for the model as it is, whose
# log-probabilities spread by 0.4. Quantizing the inputs turns such differences into whole
# steps: 0.008 (int8) and 0.015 (e4m3), as far as transformers in bf16 is from itself in f32.
BOUNDS = {
    "bf16": 0.005,
    "W4A16": 0.005,
    "W4A16_ASYM": 0.005,
    "FP8_DYNAMIC": 0.02,
    "W8A8": 0.012,
}

# Formats that transformers needs gptqmodel for: there it has our values instead. They are run
# in f16, as their config says, because vLLM rounds their scales to the dtype it runs in. It
# makes 0.0002; one projection of fourteen with the scales of the rows before makes 0.02.
OTHERS = [("awq", "W4A16_ASYM"), ("gptq", "W4A16"), ("gptq_v2", "W4A16")]
OTHERS_BOUND = 0.0005

ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # With AMX, vLLM would quantize the inputs of 4-bit layers to 8 bits, unasked.
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random model whose rows differ in size, as transformers saves it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= torch.randn(module.out_features, 1).mul(0.5).exp()
    folder = tmp_path_factory.mktemp("llama") / "bf16"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _generate(folder, dtype="bfloat16"):
    """Of each prompt: the new tokens, and the log-probabilities of all tokens after the first."""
    site = folder.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(ABSENT)
    os.environ.update(ENV, PYTHONPATH=str(site))
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder), dtype=dtype, skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=128, max_num_seqs=4, max_logprobs=-1,
    )  # fmt: skip
    how = SamplingParams(
        temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False,
        logprobs=-1, prompt_logprobs=-1,
    )  # fmt: skip
    made = []
    for r in llm.generate([{"prompt_token_ids": p} for p in PROMPTS], how, use_tqdm=False):
        (out,) = r.outputs
        rows = [*r.prompt_logprobs[1:], *out.logprobs]
        made.append((out.token_ids, [[row[t].logprob for t in range(VOCAB)] for row in rows]))
    return made


def _vllm(folder, dtype="bfloat16"):
    """All tokens of each prompt, and the log-probabilities of all of them after the first."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        made = pool.submit(_generate, folder, dtype).result()
    assert [len(new) for new, _ in made] == [NEW] * len(PROMPTS)
    tokens = [[*p, *new] for p, (new, _) in zip(PROMPTS, made, strict=True)]
    found = np.concatenate([np.float32(rows) for _, rows in made])
    assert found.shape == (sum(map(len, tokens)) - len(tokens), VOCAB)
    return tokens, found


@torch.no_grad()
def _transformers(folder, tokens, dtype=torch.bfloat16):
    """The log-probabilities of all tokens after the first, given those before them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows = [model(torch.tensor([t[:-1]])).logits[0] for t in tokens]
    return torch.cat(rows).float().log_softmax(-1).numpy()


def _spoiled(folder, to, suffix="weight_scale", dim=0):
    """A copy in which each row of one projection has the scales of the row before it."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj." + suffix
    tensors[name] = tensors[name].roll(1, dim)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("name", BOUNDS)
def test_vllm_computes_what_transformers_computes(name, source, tmp_path):
    """In prefill and in decoding, over the whole vocabulary."""
    out = source
    if name != "bf16":
        out = tmp_path / "out"
        run_convert(source, out, name)
    tokens, found = _vllm(out)

    def apart(folder):
        theirs = _transformers(folder, tokens)
        assert found.shape == theirs.shape
        return abs(found - theirs).mean()

    assert apart(out) < BOUNDS[name]
    if name != "bf16":  # the bound is tight enough to see one wrong projection of fourteen
        assert apart(_spoiled(out, tmp_path / "spoiled")) > BOUNDS[name]


@pytest.mark.parametrize(("fmt", "name"), OTHERS)
def test_vllm_computes_with_the_values_of_other_formats(fmt, name, source, tmp_path):
    """AWQ and GPTQ, against transformers with the weights that ours are dequantized to.

    One layer is left out in part, which their configs say each in its way.
    """
    out = tmp_path / "out"
    run_convert(source, out, name, format=FORMATS[fmt], ignore=("model.layers.1.mlp.*",))
    tokens, found = _vllm(out, "float16")

    def apart(folder):
        run_convert(folder, folder.parent / "values", "F16", overwrite=True)
        theirs = _transformers(folder.parent / "values", tokens, torch.float16)
        return abs(found - theirs).mean()

    assert apart(out) < OTHERS_BOUND
    assert apart(_spoiled(out, tmp_path / "spoiled", "scales", 1)) > OTHERS_BOUND
