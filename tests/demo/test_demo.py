"""The demo's parts on small inputs, and the whole of it in its --quick form."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from examples.demo import mixed, passages, plots  # noqa: E402
from examples.demo.twin import shuffled_twin  # noqa: E402


def small_llama(tied):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=2,
        vocab_size=50,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # norms of ones would hide a norm that was not permuted
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_the_twin_is_the_same_function_with_every_matrix_reordered(tied):
    model = small_llama(tied)
    twin = shuffled_twin(model, seed=1)
    ids = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model(ids).logits, twin(ids).logits
    assert (expected - found).abs().max() < 1e-5 * expected.abs().max()
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters()):
        assert not torch.equal(ours, theirs), name
        assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values), name


def test_a_shuffled_group_mixes_channels_of_several_groups():
    model = small_llama(True)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.copy_(torch.arange(80).repeat(48, 1))
    groups = shuffled_twin(model).model.layers[0].mlp.down_proj.weight[0, :16].div(16, rounding_mode="floor").unique()
    assert len(groups) > 1


def test_widths_keep_the_budget_and_favour_what_matters():
    rise = {
        name: {bits: weight * 4.0**-bits for bits in mixed.WIDTHS}
        for name, weight in (("a.q", 1.0), ("a.k", 1e3), ("b.q", 1e-3))
    }
    sizes = {"a.q": 1000, "a.k": 500, "b.q": 2000}
    widths = mixed.choose_widths(rise, sizes, mean_bits=4.0)
    assert sum(widths[n] * sizes[n] for n in sizes) <= 4.0 * sum(sizes.values())
    assert widths["a.k"] > widths["a.q"] > widths["b.q"]
    assert mixed.histogram(widths)["k"] == {str(widths["a.k"]): 1}


@pytest.mark.parametrize("in_features, expected", [(576, "uint8*64+uint4*512"), (1536, "uint8*128+uint4*1408")])
def test_a_mixed_row_has_whole_groups_of_wide_columns(in_features, expected):
    assert mixed.row_layout(in_features, 64) == expected


def test_no_evaluation_text_is_calibrated_on():
    calibration = passages.calibration_text()
    for text in passages.evaluation_texts().values():
        assert len(text) > 20000
        for start in range(0, 20000, 500):
            assert not any(text[start : start + 60] in other for other in calibration)


def test_a_text_without_enough_tokens_is_refused():
    class Tokenizer:
        def __call__(self, text, return_tensors):
            return type("Encoding", (), {"input_ids": torch.arange(len(text))[None]})

    assert passages.windows(Tokenizer(), "x" * 50, 2, 16).shape == (2, 16)
    with pytest.raises(ValueError, match="has 20 tokens, 2 windows of 16 need 32"):
        passages.windows(Tokenizer(), "x" * 20, 2, 16)


def test_two_plots_on_one_page_share_no_ids():
    row = {
        "label": "a",
        "errors": {"model.layers.0.x": 0.1, "model.layers.1.x": 0.2},
        "size": {"codes_bytes": 1e6, "affine_bytes": 1e5, "embedding_bytes": 1e6, "other_bytes": 1e3},
    }
    first, second = plots.error_plot([row]), plots.size_plot([row])
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    for svg, own in zip((first, second), ids):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= own
        assert plots.INK not in svg and "currentColor" in svg


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--quick", "--output", output],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return output, done.stdout


def test_the_quick_demo_finds_everything_exact_that_must_be(quick_run):
    results = json.loads((quick_run[0] / "results.json").read_text())
    assert len(results["checks"]) == 6
    assert all(check["holds"] for check in results["checks"])
    assert results["rows"][1]["imported"] and set(results["rows"][1]["errors"].values()) == {0.0}


def test_the_quick_demo_measures_what_packing_costs_and_gains(quick_run):
    results = json.loads((quick_run[0] / "results.json").read_text())
    rows = {row["key"]: row for row in results["rows"]}
    dense = rows["float32"]
    for passage, perplexity in dense["perplexity"].items():
        assert rows["8g64"]["perplexity"][passage] < 1.02 * perplexity
        assert rows["8g64"]["perplexity_a8"][passage] < 1.1 * perplexity
        assert 1.05 * perplexity < rows["4g64"]["perplexity"][passage] < 4 * perplexity
        assert rows["2g64"]["perplexity"][passage] > 10 * perplexity
    # 128 tokens of one passage do not rank settings 10 % apart; the two passages together do.
    gain = [math.log(rows["mixed"]["perplexity"][p] / rows["4g64"]["perplexity"][p]) for p in dense["perplexity"]]
    assert sum(gain) < 0
    assert rows["mixed"]["bits_per_weight"] <= rows["4g64"]["bits_per_weight"]
    for key, bits in (("8g64", 8.5), ("4g64", 4.5), ("2g64", 2.5)):
        assert rows[key]["bits_per_weight"] == pytest.approx(bits)
    assert rows["4g64"]["size"]["total_bytes"] < dense["size"]["total_bytes"] / 5
    for row in rows.values():
        assert all(value > 0 for value in row["speed"].values())


def test_the_report_is_one_page_that_loads_nothing(quick_run):
    page = (quick_run[0] / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|<script|<link', page)
    for label in ("4 bits, g64", "mixed by matrix, g64", "imported Q4_1"):
        assert label in page and label in quick_run[1]
