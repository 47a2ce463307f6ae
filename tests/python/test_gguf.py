"""SmolLM2-135M from its GGUF file: packed weights that stand for exactly its values, and a model that computes with them."""

import math
import struct

import numpy
import pytest
import torch

import subbyte
from subbyte import FormatError, PackedWeight

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tensors(gguf_path):
    return subbyte.load_gguf(gguf_path)


@pytest.fixture(scope="module")
def packed_model(gguf_path):
    return subbyte.model_from_gguf(gguf_path)


@pytest.fixture(scope="module")
def float_model(gguf_path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf_path.parent), gguf_file=gguf_path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def ids(gguf_path, matthew):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
    return tokenizer(matthew, return_tensors="pt").input_ids[:, :256]


def test_every_tensor_equals_what_the_gguf_package_reads_bit_for_bit(gguf_path, tensors):
    reader = gguf.GGUFReader(str(gguf_path))
    assert len(reader.tensors) == len(tensors) == 272
    packed = 0
    for theirs in reader.tensors:
        ours = tensors[theirs.name]
        expected = torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type).copy())
        if isinstance(ours, PackedWeight):
            packed += 1
            assert ours.nbytes < 9 / 8 * ours.numel()
            ours = ours.dequantize(torch.float32)
        assert torch.equal(ours.float(), expected.view(ours.shape)), theirs.name
    assert packed == 211


def test_the_metadata_is_the_files_and_long_arrays_are_counted(tensors):
    assert tensors.metadata["general.architecture"] == "llama" and tensors.metadata["llama.attention.head_count"] == 9
    assert tensors.metadata["tokenizer.ggml.tokens"] == {"type": "string", "count": 49152, "values": None}
    assert tensors.types["token_embd.weight"] == "Q8_0" and tensors.types["blk.0.attn_q.weight"] == "Q4_1"


def test_all_weights_equal_transformers_own_after_the_row_order_is_undone(packed_model, float_model):
    theirs = dict(float_model.named_parameters())
    count = 0
    for name, ours in packed_model.named_parameters():
        if isinstance(ours, PackedWeight):
            count += 1
            ours = ours.dequantize(torch.float32)
        assert torch.equal(ours, theirs[name]), name
    assert count == 211
    assert packed_model.lm_head.weight is packed_model.model.embed_tokens.weight
    assert sum(isinstance(m, subbyte.nn.Linear) for m in packed_model.modules()) == 211  # 210 and the tied head


def test_logits_match_and_perplexity_agrees_to_four_digits(packed_model, float_model, ids):
    with torch.inference_mode():
        a, b = packed_model(ids).logits, float_model(ids).logits
    scale = float(b.abs().max())
    assert float((a - b).abs().max()) < 2e-4 * scale

    def perplexity(logits):
        return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]).item())

    assert f"{perplexity(a):.4g}" == f"{perplexity(b):.4g}" and perplexity(a) < 60


def test_the_packed_model_saves_and_loads_and_generates_the_same(packed_model, ids, tmp_path, gguf_path):
    subbyte.save(packed_model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 110e6
    config = transformers.AutoConfig.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
    again = transformers.AutoModelForCausalLM.from_config(config)
    subbyte.load_weights_(again, subbyte.load(tmp_path / "model.safetensors"))
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids[:, :32]).logits, packed_model(ids[:, :32]).logits)


def test_row_order_undoes_the_interleaving_of_llama_cpp():
    heads, rows, columns = 3, 24, 5
    w = torch.randn(rows, columns)
    stored = w.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)  # as the converter writes it
    from subbyte.transformers_gguf import rotary_row_order

    assert torch.equal(stored[rotary_row_order(rows, heads)], w)
    packed = PackedWeight.from_float(stored, bits=3, group_size=2)
    moved = subbyte.functional.permute_rows(packed, rotary_row_order(rows, heads))
    assert torch.equal(moved.dequantize(), packed.dequantize()[rotary_row_order(rows, heads)])
    with pytest.raises(ValueError, match="5 heads"):
        rotary_row_order(24, 5)


def test_a_damaged_file_is_a_format_error_and_a_missing_one_is_not_found(tmp_path, gguf_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(gguf_path.read_bytes()[:100_000])
    with pytest.raises(FormatError, match="broken.gguf"):
        subbyte.load_gguf(path)
    path.write_bytes(b"GGUX" + bytes(60))
    with pytest.raises(FormatError):
        subbyte.load_gguf(path)
    with pytest.raises(FileNotFoundError, match="none.gguf"):
        subbyte.load_gguf(tmp_path / "none.gguf")


def test_a_file_of_another_architecture_is_refused_by_name(tensors):
    other = subbyte.TensorFile(tensors, {**tensors.metadata, "general.architecture": "mamba"})
    with pytest.raises(ValueError, match="'mamba'"):
        subbyte.llama_tensors(other)


def gguf_bytes(values=(), tensors=()):
    """A GGUF file of (key, value type, encoded value) and (name, data of one float32 vector)."""
    text = lambda b: struct.pack("<Q", len(b)) + b  # noqa: E731
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    out += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in values)
    for i, (name, data) in enumerate(tensors):
        out += text(name) + struct.pack("<IQIQ", 1, len(data) // 4, 0, 32 * i)
    out += bytes(-len(out) % 32)
    return out + b"".join(data.ljust(32, b"\0") for _, data in tensors)


def test_names_that_are_not_utf8_are_format_errors_and_texts_are_replaced(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tensors=[(b"t\xff", bytes(8))]))
    with pytest.raises(FormatError, match=r"tensor 't\\xff' at byte 24: the name is not valid UTF-8"):
        subbyte.load_gguf(path)
    path.write_bytes(gguf_bytes([(b"k\xff", 4, bytes(4))]))
    with pytest.raises(FormatError, match=r"key 'k\\xff' at byte 24: the key is not valid UTF-8"):
        subbyte.load_gguf(path)
    string = struct.pack("<Q", 2) + b"a\xff"
    path.write_bytes(gguf_bytes([(b"one", 8, string), (b"list", 9, struct.pack("<IQ", 8, 1) + string)], [(b"t", bytes(8))]))
    read = subbyte.load_gguf(path)
    assert read.metadata["one"] == "a\ufffd" and read.metadata["list"]["values"] == ["a\ufffd"]
    assert torch.equal(read["t"], torch.zeros(2))


def test_adversarial_blocks_equal_the_gguf_package_bit_for_bit(tmp_path):
    # Scales and minima that are zero, subnormal, largest, infinite and NaN of both signs, before random codes.
    extremes = numpy.array(
        [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x3C00, 0xBC00, 0x7C01], "<u2"
    )
    rng, path = numpy.random.default_rng(3), str(tmp_path / "m.gguf")
    writer, expected = gguf.GGUFWriter(path, "llama"), {}
    for kind, block_bytes, floats in (("Q4_0", 18, 1), ("Q4_1", 20, 2), ("Q8_0", 34, 1)):
        rows, columns = 40, 96
        blocks = rng.integers(0, 256, (rows * columns // 32, block_bytes), dtype=numpy.uint8)
        blocks[:, : 2 * floats] = rng.choice(extremes, (len(blocks), floats)).view(numpy.uint8)
        data, kind_id = blocks.reshape(rows, -1), getattr(gguf.GGMLQuantizationType, kind)
        writer.add_tensor(kind, data, raw_dtype=kind_id)
        with numpy.errstate(all="ignore"):
            expected[kind] = gguf.quants.dequantize(data, kind_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for kind, tensor in subbyte.load_gguf(path).items():
        values, wanted = tensor.dequantize(torch.float32).numpy(), expected[kind]
        both_nan = numpy.isnan(values) & numpy.isnan(wanted)
        assert both_nan.any() and ((values.view("u4") == wanted.view("u4")) | both_nan).all()
