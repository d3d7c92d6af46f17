"""Reading T5X checkpoints: the released one, and small ones whole and damaged."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import shutil
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mt3_keras.models.config import ISMIR2021, MT3, MT3Config
from mt3_keras.models.t5x import (
    CheckpointError,
    check_leaves,
    config_of,
    expected_leaves,
    load_t5x,
    read_t5x,
)
from tests.t5x_writer import pack_array, random_leaves, write_t5x, write_tree, write_zarr, zarr_spec

Leaves = dict[str, NDArray[np.float32]]

SMALL = dataclasses.replace(
    MT3,
    spectrogram=dataclasses.replace(MT3.spectrogram, num_mels=12),
    network=dataclasses.replace(
        MT3.network, width=16, num_heads=1, num_encoder_layers=2, num_decoder_layers=2, mlp_width=24
    ),
)
QUERY = "encoder.layers_0.attention.query.kernel"
VALUE = "decoder.layers_1.self_attention.value.kernel"


@pytest.fixture(scope="module")
def leaves() -> Leaves:
    return random_leaves(SMALL)


@pytest.fixture(scope="module")
def whole(leaves: Leaves, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_t5x(tmp_path_factory.mktemp("whole") / "small", leaves)


@pytest.fixture
def copy(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkpoint for the test to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def assert_same(found: Leaves, expected: Leaves) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def message_of(load: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load()
    message = str(caught.value)
    assert message.isprintable(), "must be one line"
    return message


# The released checkpoint


def test_the_released_mt3_has_the_papers_sizes_and_its_norm_scales(shared: pathlib.Path) -> None:
    folder = shared / "checkpoints" / "mt3"
    if not folder.is_dir():
        pytest.skip(f"needs the released checkpoint: {folder} is none")
    config, leaves = load_t5x(folder)
    assert config == MT3
    assert len(leaves) == 189
    assert sum(values.size for values in leaves.values()) == 45_896_704
    for name, low, high in (
        ("decoder.decoder_norm.scale", 0.040, 11.05),
        ("encoder.encoder_norm.scale", 0.054, 1.379),
        ("decoder.layers_0.pre_self_attention_layer_norm.scale", 0.093, 2.197),
    ):
        scale = leaves[name]
        assert (scale.min(), scale.max()) == pytest.approx((low, high), abs=0.005)
    assert leaves["decoder.decoder_norm.scale"].mean() == pytest.approx(0.684, abs=0.0006)


@pytest.mark.parametrize(
    ("config", "num_numbers"),
    [(MT3, 45_896_704), (ISMIR2021, 46_027_776)],
    ids=["mt3", "ismir2021"],
)
def test_expected_leaves_count_as_published(config: MT3Config, num_numbers: int) -> None:
    shapes = expected_leaves(config)
    assert len(shapes) == 189
    assert sum(len(shape) == 1 for shape in shapes.values()) == 42
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == num_numbers


# What is written is read


def test_a_checkpoint_comes_back_as_written(whole: pathlib.Path, leaves: Leaves) -> None:
    config, found = load_t5x(whole)
    assert config == SMALL
    assert_same(found, leaves)


@pytest.mark.parametrize("inline", [lambda name: True, lambda name: False], ids=["inline", "zarr"])
def test_every_leaf_may_be_inline_or_zarr(
    inline: Callable[[str], bool], leaves: Leaves, tmp_path: pathlib.Path
) -> None:
    assert_same(read_t5x(write_t5x(tmp_path / "t", leaves, inline=inline)), leaves)


@pytest.mark.parametrize(
    "layout",
    [
        {"chunks": lambda shape: tuple(-(-n // 2) for n in shape)},
        {"chunks": lambda shape: tuple(7 for _ in shape)},
        {"chunks": lambda shape: tuple(n + 3 for n in shape)},
        {"chunks": lambda shape: tuple(7 for _ in shape), "order": "F", "separator": "/"},
        {"order": "F"},
        {"compress": False},
        {"dtype": "<f8"},
    ],
    ids=["halves", "ragged", "larger", "ragged F /", "F", "plain", "f8"],
)
def test_the_zarr_layout_changes_nothing(
    layout: dict[str, Any], leaves: Leaves, tmp_path: pathlib.Path
) -> None:
    few = {name: leaves[name] for name in (QUERY, VALUE, "decoder.decoder_norm.scale")}
    assert_same(read_t5x(write_t5x(tmp_path / "t", few, inline=lambda name: False, **layout)), few)


@pytest.mark.parametrize(("dtype", "error"), [("<f2", 2**-11), ("bfloat16", 2**-7)])
def test_half_floats_come_back_to_their_precision(
    dtype: str, error: float, leaves: Leaves, tmp_path: pathlib.Path
) -> None:
    values = np.abs(leaves[QUERY]) + np.float32(0.01)
    found = read_t5x(write_t5x(tmp_path / "t", {QUERY: values}, dtype=dtype))[QUERY]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values, rtol=error, atol=0)
    assert not np.array_equal(found, values)


def test_bfloat16_of_format_2_reads_like_that_of_format_3(
    leaves: Leaves, tmp_path: pathlib.Path
) -> None:
    few = {QUERY: leaves[QUERY]}
    new = write_t5x(tmp_path / "new", few, dtype="bfloat16", compress=False)
    old = write_t5x(tmp_path / "old", few, dtype="bfloat16", compress=False, version=2)
    header = old / f"target.{QUERY}" / ".zarray"
    header.write_text(header.read_text().replace("bfloat16", "<u2"))
    assert_same(read_t5x(old), read_t5x(new))


def test_the_only_step_of_a_run_is_found_from_its_parent(
    leaves: Leaves, tmp_path: pathlib.Path
) -> None:
    write_t5x(tmp_path / "checkpoint_1000", leaves)
    (tmp_path / "checkpoint_2000.tmp-1").mkdir()
    assert_same(load_t5x(tmp_path)[1], leaves)
    write_t5x(tmp_path / "checkpoint_2000", leaves)
    message = message_of(lambda: load_t5x(tmp_path))
    assert "2 checkpoints" in message
    assert "checkpoint_2000" in message


def test_a_spec_never_leads_out_of_the_checkpoint(leaves: Leaves, tmp_path: pathlib.Path) -> None:
    """A path written on another machine means the folder of that name here."""
    folder = write_t5x(tmp_path / "t", {QUERY: leaves[QUERY]})
    for path in ("/bucket/model/checkpoint_7/", "../../", ""):
        spec = {"driver": "zarr", "kvstore": {"path": f"{path}target.{QUERY}"}}
        write_tree(folder, {"version": 3, "optimizer": {"target": {"x": spec}}})
        assert_same(read_t5x(folder), {"x": leaves[QUERY]})
    spec = {"driver": "zarr", "kvstore": {"path": "a/.."}}
    write_tree(folder, {"version": 3, "optimizer": {"target": {"x": spec}}})
    assert "leaf x must name a zarr folder" in message_of(lambda: read_t5x(folder))


# Which model it is


def test_the_embeddings_rows_tell_the_vocabulary(leaves: Leaves) -> None:
    rows = ISMIR2021.network.vocabulary_rows
    old = dict(leaves)
    old["decoder.token_embedder.embedding"] = np.zeros((rows, 16), np.float32)
    old["decoder.logits_dense.kernel"] = np.zeros((16, rows), np.float32)
    config = config_of(old)
    check_leaves(old, config)
    assert config.vocabulary == ISMIR2021.vocabulary
    assert config.network.segment_frames == 512
    old["decoder.token_embedder.embedding"] = np.zeros((1000, 16), np.float32)
    message = message_of(lambda: config_of(old))
    assert "1000" in message
    assert "1536 rows or 1664 rows" in message


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (QUERY, (16, 60), "multiple of 64 columns: got 60"),
        (QUERY, (16, 64, 1), "must be a matrix: got shape (16, 64, 1)"),
        ("encoder.continuous_inputs_projection.kernel", (12, 15), "width must be even"),
        ("encoder.layers_0.mlp.wi_0.kernel", (16, 0), "mlp_width must be positive"),
        ("decoder.token_embedder.embedding", None, "token_embedder.embedding is missing"),
    ],
)
def test_impossible_sizes_are_named(
    name: str, shape: tuple[int, ...] | None, expected: str, leaves: Leaves
) -> None:
    changed = {other: values for other, values in leaves.items() if other != name}
    if shape is not None:
        changed[name] = np.zeros(shape, np.float32)
    assert expected in message_of(lambda: config_of(changed))


def test_a_far_layer_number_is_left_over_and_asks_for_no_more_layers(leaves: Leaves) -> None:
    changed = {**leaves, "encoder.layers_999999999.mlp.wo.kernel": leaves[QUERY]}
    message = message_of(lambda: check_leaves(changed, config_of(changed)))
    assert "1 left over (encoder.layers_999999999.mlp.wo.kernel)" in message


def test_faults_are_counted_and_the_first_few_named(leaves: Leaves) -> None:
    few = {name: leaves[name] for name in list(leaves)[:-10]}
    message = message_of(lambda: check_leaves(few, SMALL))
    assert "10 missing" in message
    assert "..." in message
    assert "copy the folder again" in message


# Damage


def remove_leaf(folder: pathlib.Path) -> str:
    shutil.rmtree(folder / f"target.{QUERY}")
    return f"target.{QUERY}/.zarray: file is missing"


def edit_target(folder: pathlib.Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tree = msgpack.unpackb((folder / "checkpoint").read_bytes())
    edit(tree["optimizer"]["target"])
    write_tree(folder, tree)


def forget_leaf(folder: pathlib.Path) -> str:
    edit_target(folder, lambda target: target["decoder"].pop("decoder_norm"))
    return "1 missing (decoder.decoder_norm.scale)"


def add_leaf(folder: pathlib.Path) -> str:
    edit_target(folder, lambda target: target["decoder"].update(bias=pack_array(np.zeros(3))))
    return "1 left over (decoder.bias)"


def add_what_is_no_array(folder: pathlib.Path) -> str:
    edit_target(folder, lambda target: target["decoder"].update(bias="text"))
    return "checkpoint: leaf decoder.bias is no array"


def add_a_whole_number_array(folder: pathlib.Path) -> str:
    edit_target(folder, lambda target: target["decoder"].update(bias=pack_array(np.arange(3))))
    return "checkpoint: leaf decoder.bias is no array of numbers"


def add_a_name_of_two_lines(folder: pathlib.Path) -> str:
    edit_target(folder, lambda target: target["decoder"].update({"a\nb": pack_array(np.zeros(3))}))
    return r"'a\nb' is no name of a leaf"


def make_inline_shape_absurd(folder: pathlib.Path) -> str:
    packed = msgpack.ExtType(1, msgpack.packb(((2**40, 2**40), "float32", b"")))
    edit_target(folder, lambda target: target["decoder"].update(bias=packed))
    return "checkpoint: leaf decoder.bias"


def name_another_driver(folder: pathlib.Path) -> str:
    spec = zarr_spec("target.decoder.bias") | {"driver": "zarr3"}
    edit_target(folder, lambda target: target["decoder"].update(bias=spec))
    return "leaf decoder.bias must name a zarr folder: got driver 'zarr3'"


def truncate_chunk(folder: pathlib.Path) -> str:
    chunk = folder / f"target.{VALUE}" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-40])
    return f"target.{VALUE}/0.0: holds less than 4096 bytes"


def truncate_checksum(folder: pathlib.Path) -> str:
    chunk = folder / f"target.{VALUE}" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    return f"target.{VALUE}/0.0: cut short"


def flip_a_bit(folder: pathlib.Path) -> str:
    chunk = folder / f"target.{VALUE}" / "0.0"
    values = bytearray(chunk.read_bytes())
    values[len(values) // 2] ^= 1
    chunk.write_bytes(values)
    return f"target.{VALUE}/0.0: damaged"


def swell_chunk(folder: pathlib.Path) -> str:
    chunk = folder / f"target.{VALUE}" / "0.0"
    chunk.write_bytes(gzip.compress(bytes(2**22)))
    return f"target.{VALUE}/0.0: holds more than 4096 bytes"


def remove_chunk(folder: pathlib.Path) -> str:
    (folder / f"target.{VALUE}" / "0.0").unlink()
    return f"target.{VALUE}/0.0: file is missing"


def change_shape(folder: pathlib.Path) -> str:
    shutil.rmtree(folder / f"target.{VALUE}")
    write_zarr(folder / f"target.{VALUE}", np.zeros((16, 32), np.float32))
    return f"1 wrongly shaped ({VALUE} (16, 32) for (16, 64))"


def put_nan(folder: pathlib.Path) -> str:
    shutil.rmtree(folder / f"target.{VALUE}")
    write_zarr(folder / f"target.{VALUE}", np.full((16, 64), np.nan, np.float32))
    return f"1 not finite ({VALUE})"


def put_too_large_float64(folder: pathlib.Path) -> str:
    edit_target(
        folder,
        lambda target: target["decoder"]["decoder_norm"].update(
            scale=pack_array(np.full(16, 1e300))
        ),
    )
    return "1 not finite (decoder.decoder_norm.scale)"


def edit_header(folder: pathlib.Path, **changes: Any) -> str:
    path = folder / f"target.{VALUE}" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return f"target.{VALUE}/.zarray: "


def name_unknown_compressor(folder: pathlib.Path) -> str:
    return edit_header(folder, compressor={"id": "blosc"}) + "compressor must be None or gzip: got"


def name_filter(folder: pathlib.Path) -> str:
    return edit_header(folder, filters=[{"id": "delta"}]) + "filters must be"


def name_unknown_dtype(folder: pathlib.Path) -> str:
    return edit_header(folder, dtype=[["a", "<i4"]]) + "dtype must be"


def make_shape_absurd(folder: pathlib.Path) -> str:
    return edit_header(folder, shape=[10**12, 10**12]) + "not a zarr header"


def make_chunks_absurd(folder: pathlib.Path) -> str:
    return edit_header(folder, chunks=[10**12, 10**12]) + "not a zarr header"


def make_shape_empty(folder: pathlib.Path) -> str:
    return edit_header(folder, shape=[0, 10**12]) + "not a zarr header"


def make_chunks_flat(folder: pathlib.Path) -> str:
    return edit_header(folder, chunks=[1024]) + "not a zarr header"


def nest_header_deeply(folder: pathlib.Path) -> str:
    (folder / f"target.{VALUE}" / ".zarray").write_text("[" * 100_000)
    return f"target.{VALUE}/.zarray: not a zarr header"


def truncate_tree(folder: pathlib.Path) -> str:
    path = folder / "checkpoint"
    path.write_bytes(path.read_bytes()[:-100])
    return "checkpoint: not a T5X checkpoint, or damaged"


def put_text(folder: pathlib.Path) -> str:
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-7"\n')
    return "checkpoint: not a T5X checkpoint"


def put_other_tree(folder: pathlib.Path) -> str:
    write_tree(folder, {"params": {}})
    return "checkpoint: not a T5X checkpoint"


def put_deep_tree(folder: pathlib.Path) -> str:
    (folder / "checkpoint").write_bytes(b"\x91" * 100_000)
    return "checkpoint: not a T5X checkpoint"


def put_old_version(folder: pathlib.Path) -> str:
    write_tree(folder, {"version": 1, "optimizer": {"target": {}}})
    return "format version must be 2 or 3: got '1'"


def make_chunk_a_folder(folder: pathlib.Path) -> str:
    remove_chunk(folder)
    (folder / f"target.{VALUE}" / "0.0").mkdir()
    return f"target.{VALUE}/0.0: file is missing"


def empty_folder(folder: pathlib.Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "it has no file `checkpoint`"


def put_file_for_folder(folder: pathlib.Path) -> str:
    shutil.rmtree(folder)
    folder.write_text("")
    return "no such folder"


def remove_folder(folder: pathlib.Path) -> str:
    shutil.rmtree(folder)
    return "no such folder"


@pytest.mark.parametrize(
    "damage",
    [
        remove_leaf,
        forget_leaf,
        add_leaf,
        add_what_is_no_array,
        add_a_whole_number_array,
        add_a_name_of_two_lines,
        make_inline_shape_absurd,
        name_another_driver,
        truncate_chunk,
        truncate_checksum,
        flip_a_bit,
        swell_chunk,
        remove_chunk,
        change_shape,
        put_nan,
        put_too_large_float64,
        name_unknown_compressor,
        name_filter,
        name_unknown_dtype,
        make_shape_absurd,
        make_chunks_absurd,
        make_shape_empty,
        make_chunks_flat,
        nest_header_deeply,
        truncate_tree,
        put_text,
        put_other_tree,
        put_deep_tree,
        put_old_version,
        make_chunk_a_folder,
        empty_folder,
        put_file_for_folder,
        remove_folder,
    ],
    ids=lambda damage: damage.__name__,
)
def test_damage_is_one_line_that_names_the_place(
    damage: Callable[[pathlib.Path], str], copy: pathlib.Path
) -> None:
    expected = damage(copy)
    message = message_of(lambda: load_t5x(copy))
    assert expected in message
    assert message.startswith(str(copy))
    assert ";" in message, "must say what to do"


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_no_byte_of_the_tree_or_of_a_header_can_do_worse_than_an_error(
    place: float, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "bytes"
    shutil.rmtree(folder, ignore_errors=True)
    write_t5x(folder, {QUERY: np.ones((2, 2), np.float32), "a.scale": np.ones(2, np.float32)})
    for path in (folder / "checkpoint", folder / f"target.{QUERY}" / ".zarray"):
        values = bytearray(path.read_bytes())
        values[int(place * len(values))] = value
        path.write_bytes(values)
        try:
            found = read_t5x(folder)
        except CheckpointError as error:
            assert str(error).isprintable()
        else:
            assert all(array.dtype == np.float32 for array in found.values())


def test_headers_that_claim_billions_take_no_memory(copy: pathlib.Path) -> None:
    nested_arrays = b"\xdd\x00\xff\xff\xff" * 1000  # each says it holds 2**24 - 1 items
    tree = b"\x82\xa7version\x03\xa9optimizer" + nested_arrays + bytes(2**24)
    (copy / "checkpoint").write_bytes(tree)
    tracemalloc.start()
    try:
        assert "damaged" in message_of(lambda: read_t5x(copy))
        assert tracemalloc.get_traced_memory()[1] < 3 * len(tree)
    finally:
        tracemalloc.stop()
