"""Allocation of bits: under its target, of least error, always the same, better than uniform."""

import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from test_recipe import checkpoint, dense, moe, schemes_of

from streamq import api
from streamq.allocate import CANDIDATES, Unit, allocate, candidates_of, share_out
from streamq.checkpoint import open_checkpoint
from streamq.cli import cli
from streamq.errors import PlanError
from streamq.recipe import load
from streamq.verifying import verify

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "bytes-llama"
#: Bits per byte of the example in uniform W4A16, and the bytes of its shards (README).
UNIFORM, UNIFORM_SIZE = 1.8382, 1186080


def unit(name, sizes, errors):
    return Unit(name, {}, list(sizes), list(errors), 1.0)


def random_units(rng, count, options):
    sizes = np.cumsum(rng.integers(1, 9, (count, options)), 1).tolist()
    errors = np.cumsum(rng.random((count, options)) ** 3, 1)[:, ::-1].tolist()
    return [unit(f"u{i}", *row) for i, row in enumerate(zip(sizes, errors, strict=True))]


@pytest.mark.parametrize("seed", range(20))
def test_close_to_the_best_of_all_choices(seed):
    """By trying all: at most the last step that did not fit is lost."""
    rng = np.random.default_rng(seed)
    units = random_units(rng, 4, 4)
    budget = int(sum(u.sizes[0] for u in units) + rng.integers(0, 40))
    chosen = share_out(units, budget)
    assert sum(u.sizes[i] for u, i in zip(units, chosen, strict=True)) <= budget
    best = min(
        sum(u.errors[i] for u, i in zip(units, c, strict=True))
        for c in itertools.product(range(4), repeat=4)
        if sum(u.sizes[i] for u, i in zip(units, c, strict=True)) <= budget
    )
    steps = [
        u.errors[a] - u.errors[b] for u in units for a, b in itertools.combinations(range(4), 2)
    ]
    error = sum(u.errors[i] for u, i in zip(units, chosen, strict=True))
    assert best <= error + 1e-12 <= best + max(steps) + 1e-9


def test_ties_go_by_name_and_a_budget_too_small_is_refused():
    units = [unit(n, (1, 2), (2.0, 1.0)) for n in "ba"]
    assert share_out(units, 3) == [0, 1]
    assert share_out(units, 4) == [1, 1]
    with pytest.raises(PlanError, match="the smallest candidates take 2 B, more than the 1 B"):
        share_out(units, 1)


def test_candidates_that_are_larger_and_worse_are_never_chosen():
    units = [unit("a", (1, 2, 3, None), (3.0, 4.0, 1.0, None))]
    assert [share_out(units, b) for b in (1, 2, 3, 9)] == [[0], [0], [2], [2]]
    with pytest.raises(PlanError, match="no candidate fits 'a'"):
        share_out([unit("a", (None,), (None,))], 9)


@pytest.mark.parametrize(
    ("names", "said"),
    [(["w4a16"], "two schemes or more"), (["w4a16", "w4a16"], "two schemes or more"),
     (["w4a16", "bf16"], "'bf16' is no quantization"), (["w4a16", "w9"], "unknown scheme"),
     (["w4a16:x", "w8a16"], "is not NAME or NAME:GROUP_SIZE")],
)  # fmt: skip
def test_candidates_that_make_no_sense(names, said):
    with pytest.raises(PlanError, match=said):
        candidates_of(names)


def allocated(src, *, names=CANDIDATES, **target):
    with open_checkpoint(src) as source:
        candidates = candidates_of(names)
        return allocate(source, api.options(candidates[0].name), candidates, **target)


def test_the_recipe_is_under_its_target_and_says_so_again(tmp_path):
    src = dense(tmp_path / "in")
    recipe, said = allocated(src, bits=5.0)
    assert "bits a weight" in said[-1]
    plan = api.plan(src, recipe={"scheme": "w4a16"})
    numel = sum(t.numel for s in plan.shards for w in s.weights for t in w.sources)
    (tmp_path / "r.toml").write_text(recipe.text)
    plan = api.plan(src, recipe=tmp_path / "r.toml")
    assert plan.warnings == []
    assert 4.8 < 8 * sum(size for _, size in plan.schemes.values()) / numel <= 5.0
    assert allocated(src, bits=5.0, workers=1)[0] == recipe
    assert load(tmp_path / "r.toml").rules == recipe.rules
    exact = allocated(src, size=plan.bytes_out)[0]
    assert api.plan(src, recipe=tmp_path / "r.toml").bytes_out == plan.bytes_out
    (tmp_path / "s.toml").write_text(exact.text)
    assert api.plan(src, recipe=tmp_path / "s.toml").bytes_out <= plan.bytes_out


@pytest.mark.parametrize("make", [dense, moe])
def test_measured_errors_are_those_of_the_conversion(make, tmp_path):
    from streamq.converting import Settings
    from streamq.measure import measure, units_of
    from streamq.planning import make_plan

    src = make(tmp_path / "in")
    candidates = candidates_of(["w3a16", "w4a16:32", "nvfp4a16", "fp8_dynamic", "fp8_block"])
    with open_checkpoint(src) as source:
        options = api.options("w3a16")
        plans = [make_plan(source, api.options(s.name, group_size=s.block[1] if s.element == "int"
                                               else None)) for s in candidates]  # fmt: skip
        units = units_of(plans)
        measure(source, units, candidates, options, 2)
    for i, scheme in enumerate(candidates):
        size = scheme.block[1] if scheme.element == "int" else None
        done = api.convert(src, tmp_path / str(i), scheme.name, group_size=size,
                           settings=Settings(stats=True, sync=False))  # fmt: skip
        noise = sum(loss.noise for loss in done.quality._sums.values())
        assert sum(u.errors[i] for u in units) == pytest.approx(noise, rel=1e-6)
        assert sum(u.sizes[i] for u in units) == sum(n for _, n in plans[i].schemes.values())


def test_experts_of_a_layer_get_one_scheme(tmp_path):
    src = moe(tmp_path / "in")
    recipe, _ = allocated(src, bits=4.5)
    plan = api.plan(src, recipe={"scheme": "w4a16"})
    (tmp_path / "r.toml").write_text(recipe.text)
    plan = api.plan(src, recipe=tmp_path / "r.toml")
    for layer in range(2):
        found = {s for n, s in schemes_of(plan).items() if f"layers.{layer}.mlp.experts" in n}
        assert len(found) == 1
    api.convert(src, tmp_path / "out", recipe=tmp_path / "r.toml")
    assert verify(tmp_path / "out").failures == []


def test_candidates_that_do_not_fit_are_left_out(tmp_path):
    src = checkpoint(tmp_path / "in", ["model.layers.0.mlp.down_proj"])
    _, said = allocated(src, names=["w4a16", "w4a16:192", "w8a16"], bits=6)
    assert said[0].startswith("the candidate w4a16:192 is left out: tensor ")
    with pytest.raises(PlanError, match="the candidate w4a16:192 is left out"):
        allocated(src, names=["w4a16:192", "w8a16:192"], bits=6)


def test_the_command_line(tmp_path, capsys):
    src = dense(tmp_path / "in")

    def run(*args):
        with pytest.raises(SystemExit) as e:
            cli([str(a) for a in args], prog_name="streamq")
        return e.value.code, capsys.readouterr()

    code, said = run("allocate", src, "--target-bits", "4.6")
    assert code == 0
    assert "bits a weight" in said.err
    code, _ = run("allocate", src, "--target-bits", "4.6", "-o", tmp_path / "r.toml")
    assert (tmp_path / "r.toml").read_text() == said.out
    code, said = run("convert", src, tmp_path / "out", "--target-bits", "4.6", "--no-sync")
    assert code == 0, said.err
    assert (tmp_path / "out" / "recipe.toml").read_text() == (tmp_path / "r.toml").read_text()
    code, said = run("convert", src, tmp_path / "again", "--recipe", tmp_path / "r.toml", "-q")
    one, two = (tmp_path / n / "model.safetensors" for n in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()
    code, said = run("plan", src, "--target-size", "1kB")
    assert (code, "the smallest candidates take" in said.err) == (1, True)
    for wrong in (
        ("plan", src, "--target-bits", "5", "--target-size", "1GB"),
        ("plan", src, "--candidates", "w4a16,w8a16", "-s", "w4a16"),
        ("plan", src, "--target-bits", "5", "-s", "w4a16"),
        ("plan", src, "--target-bits", "5", "--recipe", tmp_path / "r.toml"),
        ("plan", src, "--target-bits", "5", "--to", "w4a16:x"),
        ("allocate", src),
    ):
        assert run(*wrong)[0] == 2, wrong


def test_on_a_trained_model_it_beats_uniform_four_bits_at_their_size(tmp_path):
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("bits", EXAMPLES / "bits_per_byte.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(EXAMPLES))
    recipe, _ = allocated(MODEL, size=UNIFORM_SIZE)
    (tmp_path / "r.toml").write_text(recipe.text)
    done = api.convert(MODEL, tmp_path / "out", recipe=tmp_path / "r.toml")
    assert api.plan(MODEL, "w4a16").bytes_out == UNIFORM_SIZE
    assert done.bytes_out <= UNIFORM_SIZE
    assert module.bits_per_byte(tmp_path / "out") < UNIFORM - 0.001
