"""The other training programs on slices of their data, and what all share: a run that is killed goes on with the same bits."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import subbyte

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from bench import training_memory  # noqa: E402
from examples import texts, training  # noqa: E402
from examples.binary_embedding import __main__ as binary_embedding  # noqa: E402
from examples.char_lm import __main__ as char_lm  # noqa: E402
from examples.demo import models  # noqa: E402
from examples.finetune_smollm2 import __main__ as finetune  # noqa: E402
from examples.finetune_smollm2 import source  # noqa: E402

CPU = torch.device("cpu")
SMALL_LM = "--seeds 1 --steps 60 --rounds 3 --batch 8 --length 32 --width 32 --layers 1 --validation-windows 50 --device cpu".split()


def ignore(n):
    pass


# ---- texts


def test_verses_come_from_the_program_or_from_its_written_output(tmp_path):
    texts.main([str(tmp_path)])
    written = texts.verses(folder=tmp_path)
    assert written == texts.verses() and len(written) == 31102
    assert written[0] == texts.Verse("Ge", 1, 1, "In the beginning God created the heaven and the earth.")
    learn, held_out = texts.without_books(written[:3] + written[-2:], ("Rev",))
    assert learn.startswith("In the beginning") and "moved upon the face of the waters." in learn
    assert held_out.startswith("He which testifieth") and held_out not in learn


def test_a_text_without_verses_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="examples.texts"):
        texts.verses(folder=tmp_path)
    (tmp_path / texts.FILE).write_text("Ge1:1 In the beginning\nnothing\n")
    with pytest.raises(ValueError, match="'nothing' is no verse"):
        texts.verses(folder=tmp_path)


# ---- the shared loop


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    def argv(output):
        return ["--settings", "8/2", *SMALL_LM, "--output", str(output)]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "examples.char_lm", *argv(killed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list((killed / "checkpoints").glob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = torch.load(next((killed / "checkpoints").glob("*.pt")), weights_only=True)["run"]
    assert 1 <= len(done["losses"]) < 3, "it was killed between its first and its last round"
    char_lm.main(argv(killed))
    char_lm.main(argv(whole))
    runs = [json.loads((folder / "results.json").read_text())["runs"]["8/2"][0] for folder in (killed, whole)]
    for key in ("losses", "validation", "sample"):
        assert runs[0][key] == runs[1][key], key


def test_a_damaged_checkpoint_is_never_left_behind(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    training.save_atomically({"round": 1}, path)

    def interrupted(state, part):
        Path(part).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.save_atomically({"round": 2}, path)
    assert torch.load(path, weights_only=True) == {"round": 1}


def test_the_table_shows_mean_and_spread():
    score = training.Score("accuracy", "right, %", 100, 1)
    run = {"losses": [0.5], "seconds": 1.0, "steps": 10, "bytes_per_weight": 3.0}
    runs = [{**run, "accuracy": [0.1, 0.5]}, {**run, "accuracy": [0.9, 0.6]}]
    text = training.table("title", {"a": runs}, {"a": "label"}, score, CPU, [("n", lambda runs: str(len(runs)))])
    assert "| label | 55.0 | 10.0 | 0.500 | 3.00 | 100.0 | 2 |" in text


# ---- character language model


@pytest.mark.parametrize("name", char_lm.SETTINGS)
def test_a_character_model_learns(name, tmp_path):
    args = char_lm.arguments([*SMALL_LM, "--output", str(tmp_path)])
    run = char_lm.train(args, name, 0, char_lm.Text(args, CPU), CPU, ignore)
    assert run["losses"][-1] < 0.85 * run["losses"][0], run
    assert run["validation"][-1] < 3.2 < math.log(63), run  # of 63 characters


def test_every_matrix_of_the_character_model_is_packed():
    model = char_lm.SETTINGS["8/2"].convert(char_lm.CharacterModel(63, 32, 1, length=16))
    dense = [name for name, p in model.named_parameters() if p.dim() == 2 and not isinstance(p, subbyte.PackedWeight)]
    assert dense == [] and isinstance(model.token.weight, subbyte.PackedWeight)


def test_the_held_out_gospel_is_not_learnt(tmp_path):
    text = char_lm.Text(char_lm.arguments(["--output", str(tmp_path)]), CPU)
    learn = text.decode(text.learn[:4_200_000].tolist())
    assert "For God so loved the world, that he gave his only begotten Son" not in learn and "In the beginning" in learn
    assert text.decode(text.validation[0].tolist()).startswith("In the beginning was the Word")


def test_the_character_program_writes_its_results(tmp_path, capsys):
    char_lm.main(["--settings", "fp32", *SMALL_LM, "--output", str(tmp_path)])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "float32" in (tmp_path / "table.md").read_text()
    assert char_lm.PROMPT in (tmp_path / "samples.txt").read_text()


def test_steps_that_do_not_divide_into_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        char_lm.arguments(["--steps", "10", "--rounds", "4"])
    assert "--steps is 10, expected a multiple of --rounds, 4" in capsys.readouterr().err


# ---- binary embedding


def test_a_trained_binary_table_beats_the_one_that_was_drawn(tmp_path):
    argv = "--epochs 2 --verses 4000 --rows 8192 --dim 64 --device cpu".split()
    args = binary_embedding.arguments([*argv, "--output", str(tmp_path)])
    dataset = binary_embedding.load(args, CPU)
    runs = {name: binary_embedding.train(args, name, 0, dataset, CPU, ignore) for name in binary_embedding.SETTINGS}
    accuracy = {name: run["accuracy"][-1] for name, run in runs.items()}
    for name in ("float", "signs", "diode"):
        assert accuracy[name] > 1.2 * accuracy["frozen"] > 0, accuracy
    assert runs["signs"]["bytes_per_weight"] < 2 < runs["float"]["bytes_per_weight"]


def test_the_averages_of_signs_survive_a_checkpoint(tmp_path):
    argv = "--verses 2000 --rows 4096 --dim 64 --device cpu".split()

    class Interrupted(Exception):
        pass

    def run(folder, advance=ignore):
        args = binary_embedding.arguments([*argv, "--epochs", "2", "--output", str(tmp_path / folder)])
        return binary_embedding.train(args, "signs", 0, binary_embedding.load(args, CPU), CPU, advance)

    steps = 0

    def interrupt(n):
        nonlocal steps
        steps += n
        if steps == 40:  # in the second epoch of 29 steps
            raise Interrupted

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("cut", interrupt)
    resumed = run("cut")
    assert resumed["losses"] == whole["losses"] and resumed["accuracy"] == whole["accuracy"]


# ---- SmolLM2


def test_the_configuration_is_the_one_that_transformers_reads(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = models.gguf_path()
    theirs = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name).to_dict()
    ours = source.config_of(subbyte.load_gguf(path).metadata).to_dict()
    different = {key for key in ours if ours[key] != theirs.get(key)}
    assert different <= {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype"}


def test_smollm2_learns_from_written_tokens(tmp_path, monkeypatch):
    found = texts.verses()
    slice_of_it = [verse for verse in found if verse.book in ("Mat", "Mark", "John")]
    monkeypatch.setattr(texts, "verses", lambda: slice_of_it)
    finetune.main(["--write", str(tmp_path)])
    monkeypatch.setattr(source, "tokenize", None)  # as on a machine that cannot
    argv = "--settings 4 --steps 3 --rounds 1 --batch 2 --length 24 --windows 1 --measured-length 64 --device cpu".split()
    finetune.main([*argv, "--lr-factor", "3", "--data", str(tmp_path), "--output", str(tmp_path)])
    run = json.loads((tmp_path / "results.json").read_text())["runs"]["4"][0]
    assert run["perplexity"][-1] < 0.95 * run["before"] < 60, run
    assert run["bytes_per_weight"] < 4, run
    assert "perplexity before" in (tmp_path / "table.md").read_text()


# ---- memory


@pytest.mark.parametrize(
    "name, limit", [("8 bits, 8-bit moments, update in backward", 3.2), ("4 bits, 4-bit moments, update in backward", 1.7)]
)
def test_packed_training_stays_within_its_bytes_a_weight(name, limit):
    class Arguments:
        device, width, layers = "cpu", 2048, 8

    told = training_memory.run_in_its_own_process(name, Arguments)
    weights = Arguments.width**2 * Arguments.layers
    held = (told["peak"] - told["gradient_of_a_layer"]) / weights
    assert 0.4 * limit < held < limit + 0.1, told  # 0.1 byte a weight is 3 MB: stacks and workspaces that a larger model dwarfs
