"""Files of token ids: headers are believed, and a wrong number format is told with what to set instead."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from producer.corpus.sources.token_layouts import Layout, read_layout

FORMATS = ("<u2", "<u4", "<i8", ">u2", ">u4", ">i8")
SETTINGS = {"uint16": "<u2", "uint32": "<u4", "int32": "<i4", "int64": "<i8"}


def text_like(vocabulary: int, count: int = 40_000) -> np.ndarray:
    """Ids as a language gives them: the frequent ones are the first of the vocabulary, and any of it may come."""
    generator = np.random.default_rng(0)
    frequent = np.minimum(generator.zipf(1.3, count), vocabulary - 1)
    return np.where(generator.random(count) < 0.7, frequent, generator.integers(0, vocabulary, count))


def padded(ids: np.ndarray, pad: int) -> np.ndarray:
    """Nine of ten windows' positions are padding."""
    return np.where(np.arange(len(ids)) % 250 < 25, ids, pad)


def layout_of(path: Path, data: bytes, expected: str = "uint16") -> Layout | str:
    path.write_bytes(data)
    return read_layout(path, len(data), np.dtype(SETTINGS[expected]))


TEXTS = {
    "GPT-2": text_like(50_257),
    "Llama 2": text_like(32_000),
    "64,000": text_like(64_000),
    "Llama 3": text_like(128_256),
    "Gemma": text_like(262_144),
    "of frequent ids above 65,536": text_like(60_000) + 128_000,
    "uniform": np.random.default_rng(1).integers(0, 50_257, 40_000),
    "padded with 0": padded(text_like(50_257), 0),
    "padded with EOS": padded(text_like(50_257), 50_256),
}
WHOLE = [(name, wrote) for name in TEXTS for wrote in FORMATS if wrote[1:] != "u2" or TEXTS[name].max() < 2**16]


@pytest.mark.parametrize(("name", "wrote"), WHOLE)
def test_a_text_is_read_in_its_own_format_and_in_no_other(tmp_path: Path, name: str, wrote: str) -> None:
    """Each format under each setting: what is right is read, what is wrong is refused with the setting that helps."""
    path, data = tmp_path / "a.bin", TEXTS[name].astype(wrote).tobytes()
    for setting, dtype in SETTINGS.items():
        layout = layout_of(path, data, setting)
        if dtype.replace("i4", "u4") == wrote:
            assert layout == Layout(np.dtype(dtype))
            continue
        if name.startswith("padded") and wrote == ">u2":
            continue  # too few ids to tell the order of bytes; the vocabulary tells
        assert isinstance(layout, str)
        advice_for = {dtype: f'set corpus.token_dtype = "{name}"' for name, dtype in SETTINGS.items()}
        advice = advice_for.get(wrote, f".astype('{wrote.replace('>', '<')}').tofile('NEW.bin')")
        assert advice in layout
        assert f"the ids are {', '.join(map(str, TEXTS[name][:4]))}, … up to " in layout
        assert sum(one in layout for one in (*advice_for.values(), "tofile")) == 1


@pytest.mark.parametrize(
    "ids",
    [
        np.random.default_rng(0).integers(0, 65, 40_000),
        np.random.default_rng(0).integers(0, 5, 40_000),
        np.random.default_rng(0).integers(0, 65_536, 40_000),
        np.zeros(40_000, int),
        np.full(40_000, 7),
        np.arange(64),
        np.array([7, 65_535]),
        np.array([5]),
        np.stack([np.arange(5000) % 128 + 16, np.arange(5000) % 32], 1).ravel(),
        np.stack([np.arange(5000) % 1024 + 1024 * book for book in range(8)], 1).ravel(),
        np.arange(40_000) % 300 * 128,
    ],
    ids=["characters", "letters", "uniform", "zeros", "one", "64", "two", "single", "notes", "codebooks", "sparse"],
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_unusual_ids_in_the_right_format_are_no_fault(tmp_path: Path, ids: np.ndarray, setting: str) -> None:
    """Few distinct ids, small files, and kinds of tokens that alternate."""
    dtype = np.dtype(SETTINGS[setting])
    assert layout_of(tmp_path / "a.bin", ids.astype(dtype).tobytes(), setting) == Layout(dtype)


@pytest.mark.parametrize("wrote", ["<u4", "<i8", ">u4", ">i8"])
def test_a_small_file_tells_how_wide_its_numbers_are(tmp_path: Path, wrote: str) -> None:
    """In either order of bytes; some hundred ids are enough."""
    layout = layout_of(tmp_path / "a.bin", text_like(128_256, 400).astype(wrote).tobytes())
    assert isinstance(layout, str) and "of wider numbers are" in layout


def test_the_fault_may_begin_anywhere(tmp_path: Path) -> None:
    """The sample covers the whole of a large file, not only its beginning; a part in another format is not enough."""
    data = bytes(4_000_000) + text_like(128_256, 200_000).astype("<u4").tobytes()
    assert isinstance(layout_of(tmp_path / "a.bin", data), str)


def test_what_is_right_against_all_appearances_can_be_said_by_a_header(tmp_path: Path) -> None:
    """Every second id is 0 indeed."""
    ids = np.stack([np.arange(1, 500), np.zeros(499)], 1).ravel().astype("<u2")
    path = tmp_path / "a.npy"
    error = layout_of(path, ids.tobytes())
    assert isinstance(error, str) and "if it is right, write it with numpy.save: headers decide" in error
    np.save(path, ids)
    layout = read_layout(path, path.stat().st_size, np.dtype("<i8"))
    assert layout == Layout(np.dtype("<u2"), 128, 998)


def test_the_advice_on_the_order_of_bytes_can_be_followed(tmp_path: Path) -> None:
    """It is a command."""
    path = tmp_path / "a.bin"
    error = layout_of(path, TEXTS["GPT-2"].astype(">u2").tobytes())
    assert isinstance(error, str)
    code = error.split('python -c "import numpy; ')[1].split('"')[0].replace("NEW.bin", str(tmp_path / "b.bin"))
    exec(code, {"numpy": np})
    assert np.fromfile(tmp_path / "b.bin", "<u2").tolist() == TEXTS["GPT-2"].tolist()


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8", ">i8", "u1"])
def test_numpy_files_say_their_format(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.arange(12).astype(dtype).reshape(3, 4))
    data = (tmp_path / "a.npy").read_bytes()
    assert layout_of(tmp_path / "a.bin", data) == Layout(np.dtype(dtype), 128, 12)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(9), "a .npy file of float64; expected whole numbers"),
        (np.array([None] * 9), "a .npy file of object; expected whole numbers"),
        (np.ones((3, 3), int, order="F"), "a .npy file in column order; write numpy.ascontiguousarray(ids)"),
    ],
)
def test_numpy_files_that_hold_no_ids_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    layout = layout_of(tmp_path / "a.npy", (tmp_path / "a.npy").read_bytes())
    assert isinstance(layout, str) and layout.startswith(message)


def test_numpy_files_that_are_damaged_are_refused(tmp_path: Path) -> None:
    """Cut short, or with a header that is none."""
    np.save(tmp_path / "a.npy", np.arange(12))
    data = (tmp_path / "a.npy").read_bytes()
    error = layout_of(tmp_path / "a.bin", data[:-8])
    assert error == "its header promises 12 ids of int64, and 88 bytes follow; replace the file"
    wrong = layout_of(tmp_path / "a.bin", data[:20] + b"(" * 80 + data[100:])
    assert isinstance(wrong, str) and "a header that cannot be read" in wrong


def llm_c(magic: int, version: int, count: int, ids: bytes) -> bytes:
    return struct.pack("<256i", magic, version, count, *[0] * 253) + ids


def test_files_of_llm_c_say_their_format(tmp_path: Path) -> None:
    """GPT-2 in uint16, Llama 3 in uint32; a version of which nothing is known is refused."""
    path = tmp_path / "a.bin"
    gpt2 = llm_c(20240520, 1, 3, np.array([50_256, 1, 2], "<u2").tobytes())
    assert layout_of(path, gpt2, "uint32") == Layout(np.dtype("<u2"), 1024, 3)
    llama = llm_c(20240801, 7, 2, np.array([128_000, 1], "<u4").tobytes())
    assert layout_of(path, llama) == Layout(np.dtype("<u4"), 1024, 2)
    assert "promises 3 ids of uint16, and 4 bytes follow" in str(layout_of(path, gpt2[:-2]))
    assert "llm.c, version 9, which Sluice cannot read" in str(layout_of(path, llm_c(20240520, 9, 0, b"")))


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_the_index_of_megatron_says_the_format_of_its_ids(tmp_path: Path, code: int, dtype: str) -> None:
    """The .bin file has no header; its .idx lies beside it."""
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 1, 1) + bytes(40)
    (tmp_path / "a.idx").write_bytes(index)
    ids = np.array([5, 0] * 99, dtype)  # as uint16 without a header these would be doubted
    assert layout_of(tmp_path / "a.bin", ids.tobytes()) == Layout(np.dtype(dtype))
    (tmp_path / "a.idx").write_bytes(index.replace(bytes([code]), b"\x07", 1))
    assert "number format 7, which is no whole number" in str(layout_of(tmp_path / "a.bin", ids.tobytes()))
    assert "an index of Megatron" in str(layout_of(tmp_path / "b.idx", index))


def test_packed_files_of_lit_gpt_say_their_format(tmp_path: Path) -> None:
    head = b"LITPKDS" + struct.pack("<QBQ", 1, 8, 2)
    assert layout_of(tmp_path / "a.bin", head + b"\1\0\2\0", "int64") == Layout(np.dtype("<u2"), 24)


def test_text_is_no_file_of_tokens(tmp_path: Path) -> None:
    """A list of ids as text, too."""
    for text in (b"Once upon a time. " * 9, b"1 2 3 4\n" * 20):
        assert str(layout_of(tmp_path / "a.bin", text)).startswith("plain text, no token ids; set corpus.kind")


def test_the_first_advice_is_the_last(tmp_path: Path) -> None:
    """Following what a refusal says leads to the ids, never to another refusal."""
    path, data = tmp_path / "a.bin", TEXTS["GPT-2"].astype("<i8").tobytes()
    error = layout_of(path, data)
    assert isinstance(error, str)
    setting = error.split('corpus.token_dtype = "')[1].split('"')[0]
    assert layout_of(path, data, setting) == Layout(np.dtype("<i8"))
