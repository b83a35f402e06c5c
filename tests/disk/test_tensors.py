"""What a file of torch.save holds is known without torch and without running anything in it."""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import clean_environment

from runmgr.disk import integrity
from runmgr.disk.tensors import StoredTensor, TensorFile
from runmgr.errors import CheckpointCorrupt, InvalidInput

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
    "complex128", "uint16", "uint32", "float8_e4m3fn",
]  # fmt: skip


def _saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def _bytes_of(file, stored, dtype):
    buffer = bytearray(stored.span * dtype.itemsize)
    file.read(stored.record, stored.start * dtype.itemsize, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=dtype).as_strided(stored.shape, stored.stride)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_found_where_it_lies(tmp_path, name):
    dtype = getattr(torch, name)
    tensor = (torch.arange(12) % 7).to(dtype).reshape(3, 4)
    with TensorFile(
        _saved(tmp_path / "a.pth", {"net": {"w": tensor, "turned": tensor.t(), "part": tensor[1]}})
    ) as file:
        weights = file.weights()
        assert [weights[key].dtype for key in weights] == [name] * 3
        assert weights["w"] == StoredTensor(name, "a/data/0", 0, (3, 4), (4, 1))
        assert (weights["part"].start, weights["part"].span, weights["turned"].stride) == (4, 4, (1, 4))
        for key, expected in (("w", tensor), ("turned", tensor.t()), ("part", tensor[1])):
            found = _bytes_of(file, weights[key], dtype)
            assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), key


@pytest.mark.parametrize(
    ("tensor", "is_dense"),
    [
        (torch.zeros(()), True),
        (torch.zeros(0, 3), True),
        (torch.zeros(2, 3, 4).permute(2, 0, 1), True),
        (torch.zeros(1, 4, 1, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(10)[::2], False),
        (torch.zeros(3).expand(4, 3), False),
        (torch.zeros(4, 4)[:, :2], False),
    ],
    ids=["scalar", "empty", "permuted", "channels last", "every other", "expanded", "columns"],
)
def test_whether_memory_is_filled_without_gaps(tmp_path, tensor, is_dense):
    with TensorFile(_saved(tmp_path / "a.pth", {"w": tensor})) as file:
        assert file.weights()["w"].is_dense == is_dense


def test_what_weights_only_refuses_is_looked_into_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    weights = collections.OrderedDict(w=torch.nn.Parameter(torch.ones(2)))
    content = {
        "net": weights, "acc": np.float64(0.5), "options": argparse.Namespace(lr=1), "evil": Evil(), "epoch": 3,
        "sparse": {"s": torch.eye(2).to_sparse()}, "optimizer_state_dict": {"state": {0: {"step": torch.ones(())}}},
    }  # fmt: skip
    with TensorFile(_saved(tmp_path / "a.pth", content)) as file:
        assert file.content["epoch"] == 3
        assert file.weights() == {"w": StoredTensor("float32", "a/data/0", 0, (2,), (1,))}
    assert not (tmp_path / "ran").exists()


STATE = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "key", "found"),
    [
        ({"net": STATE, "ema_net": STATE, "epoch": 1}, None, True),
        ({"net": STATE, "ema_net": STATE}, "ema_net", True),
        ({"state_dict": STATE, "epoch": 1, "acc": torch.ones(())}, None, True),
        (STATE, None, True),
        (STATE | {"part._extra_state": {"scale": torch.ones(1)}}, None, True),
        ({"model": STATE, "ema": STATE}, None, "has no state dict 'net': it has 'model', 'ema'; choose with --key"),
        ({"net": STATE}, "ema", "has no state dict 'ema': it has 'net'; choose"),
        (STATE, "net", "the file is a state dict itself; leave the key out"),
        ({"epoch": 1}, None, "it has none"),
        ([1], None, "it has none"),
    ],
)
def test_the_state_dict_is_found_or_those_that_there_are_are_named(tmp_path, content, key, found):
    with TensorFile(_saved(tmp_path / "a.pth", content)) as file:
        if found is True:
            assert file.weights(key)["w"].shape == (2,)
        else:
            with pytest.raises(InvalidInput, match=found):
                file.weights(key)


def test_what_is_no_checkpoint_says_what_it_is(tmp_path):
    with pytest.raises(InvalidInput, match=r"before 1\.6"):
        TensorFile(_saved(tmp_path / "old.pth", STATE, _use_new_zipfile_serialization=False))
    path = _saved(tmp_path / "cut.pth", STATE)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointCorrupt, match=r"cut\.pth is damaged"):
        TensorFile(path)


def test_looking_into_a_file_loads_no_torch(tmp_path):
    path = _saved(tmp_path / "a.pth", {"net": STATE})
    code = (
        "import sys, pathlib; from runmgr.disk.tensors import TensorFile\n"
        "with TensorFile(pathlib.Path(sys.argv[1])) as file: print(file.weights()['w'].shape, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=clean_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "(2,) False\n"


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crcs_of_two_stretches_join_into_that_of_both(first, second):
    assert integrity.joined_crc(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_crcs_join_over_gigabytes():
    zeros, size = bytes(1 << 20), 0
    crc = joined = zlib.crc32(b"start")
    for count in (1, 2, 4, 8):
        for _ in range(count):
            crc = zlib.crc32(zeros, crc)
        joined, size = integrity.joined_crc(joined, zlib.crc32(zeros * count), count << 20), size + count
    assert joined == crc
    whole = integrity.joined_crc(7, 0, 5 << 30)
    for _ in range(5):
        crc = 7 if _ == 0 else crc
        crc = integrity.joined_crc(crc, 0, 1 << 30)
    assert crc == whole
