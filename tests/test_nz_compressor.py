"""``Compressor`` as scripts for msmodelslim use it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streamq.errors import CheckpointError, PlanError, WriteError
from streamq.nz import CompressConfig, Compressor
from streamq.nz.tiles import decompress

UP, DOWN, NORM = (f"model.layers.0.{m}.weight" for m in ("mlp.up_proj", "mlp.down_proj", "norm"))


def weights():
    rng = np.random.default_rng(0)
    few = rng.integers(-7, 8, (96, 320), np.int8) * (rng.random((96, 320)) < 0.5)
    return {UP: few.astype(np.int8), DOWN: few.T.astype(np.int8).copy(), NORM: np.ones(96, "f2")}


DESCRIPTION = {"model_quant_type": "W8A8S", UP: "W8A8S", DOWN: "W8A8S", NORM: "FLOAT",
               "model.layers.0.mlp.up_proj.deq_scale": "W8A8S"}  # fmt: skip


@pytest.mark.parametrize("transpose", [False, True])
def test_weights_and_description_are_exported(tmp_path, capsys, transpose):
    config = CompressConfig(
        do_pseudo_sparse=False, sparse_ratio=1, is_debug=True, record_detail_root=str(tmp_path),
        compress_disable_layers=[DOWN], multiprocess_num=2,
    )  # fmt: skip
    compressor = Compressor(config, weight=weights(), quant_model_description=DESCRIPTION)
    streams, indices, infos = compressor.run(weight_transpose=transpose)
    assert [*streams] == [*indices] == [*infos] == [UP]
    assert f"{UP}: 30720 -> " in capsys.readouterr().out
    compressor.export_safetensors(str(tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "quant_model_weight_w8a8sc.safetensors")
    base = UP.removesuffix("weight")
    assert {*stored} == {UP, base + "index", base + "info", DOWN, NORM}
    for suffix, dtype in (("weight", "i1"), ("index", "i1"), ("info", "i8")):
        assert stored[base + suffix].dtype == dtype
    back = decompress(*(stored[base + s] for s in ("weight", "index", "info")), transpose=transpose)
    assert (back == weights()[UP]).all()
    assert (stored[DOWN] == weights()[DOWN]).all()
    said = json.loads((tmp_path / "out" / "quant_model_description_w8a8sc.json").read_text())
    assert said["model_quant_type"] == "W8A8SC"
    assert {said[base + s] for s in ("weight", "index", "info", "deq_scale")} == {"W8A8SC"}
    assert (said[DOWN], said[NORM]) == ("W8A8S", "FLOAT")


def test_names_of_files_are_the_callers(tmp_path):
    compressor = Compressor(CompressConfig(), weight={}, quant_model_description={})
    with pytest.raises(PlanError, match="run"):
        compressor.export_safetensors(tmp_path)
    compressor.run()
    compressor.export_safetensors(tmp_path, "model-rank-0-part-0.safetensors", "d.json")
    assert {p.name for p in tmp_path.iterdir()} == {"model-rank-0-part-0.safetensors", "d.json"}


def test_f16_is_compressed_as_its_bytes():
    x = np.random.default_rng(0).integers(-3, 4, (64, 64)).astype(np.float16)
    compressor = Compressor(CompressConfig(), weight={UP: x},
                            quant_model_description={UP: "W16A16S"})  # fmt: skip
    streams, indices, infos = compressor.run()
    assert infos[UP].tolist() == [8, 8, 128, 64, 1]
    assert streams[UP].view(np.uint8)[0] == 0x88
    back = decompress(streams[UP], indices[UP], infos[UP])
    assert (back.view(np.float16) == x).all()


@pytest.mark.parametrize("suffix", ["npz", "npy", "safetensors"])
def test_files_of_data_are_read(tmp_path, suffix):
    path = tmp_path / f"up.{suffix}"
    if suffix == "npz":
        np.savez(path, up=weights()[UP])
    elif suffix == "npy":
        np.save(path, weights()[UP])
    else:
        save_file({"up": weights()[UP]}, path)
    compressor = Compressor(CompressConfig(), str(path))
    compress_weight, compress_index, compress_info = compressor.run()
    compressor.export(compress_weight, tmp_path / "weight")
    compressor.export(compress_index, tmp_path / "index")
    compressor.export(compress_info, tmp_path / "info", dtype=np.int64)
    read = [np.fromfile(tmp_path / f / "up.dat", np.int64 if f == "info" else np.int8)
            for f in ("weight", "index", "info")]  # fmt: skip
    assert (decompress(*read) == weights()[UP]).all()


def test_pseudo_sparse_is_the_same_each_time():
    config = CompressConfig(do_pseudo_sparse=True, sparse_ratio=0.25)
    runs = [Compressor(config, weight=weights(), quant_model_description=DESCRIPTION).run()
            for _ in range(2)]  # fmt: skip
    assert all((runs[0][0][n] == runs[1][0][n]).all() for n in (UP, DOWN))
    kept = np.count_nonzero(decompress(*(part[UP] for part in runs[0])))
    assert abs(kept / np.count_nonzero(weights()[UP]) - 0.25) < 0.02


def test_pickles_are_refused_with_the_way_out(tmp_path):
    path = tmp_path / "weights.npy"
    np.save(path, weights(), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"np\.savez\('weights\.npz', \*\*weights\)"):
        Compressor(CompressConfig(), path)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda p: Compressor(CompressConfig()), PlanError, "either"),
        (lambda p: Compressor(CompressConfig(), weight={}), PlanError, "description"),
        (lambda p: CompressConfig(sparse_ratio=2), PlanError, "share"),
        (lambda p: CompressConfig(multiprocess_num=0), PlanError, "at least 1"),
        (lambda p: Compressor(CompressConfig(), p / "none.npz"), CheckpointError, "cannot be read"),
        (lambda p: Compressor(CompressConfig(), weight={}, quant_model_description={}).export(
            {"../x": np.zeros(1)}, p), WriteError, "not the name of a file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path, call, error, said):
    with pytest.raises(error, match=said):
        call(tmp_path)
