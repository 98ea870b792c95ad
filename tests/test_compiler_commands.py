"""Model files and the commands that read them: planned, compiled, described, and refused in one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from keras_nets import L, flat, mlp, randomise
from typer.testing import CliRunner

from tinyfleet.edge.model.graph import LOSSES
from tinyfleet.edge.model.program import Program
from tinyfleet.firmware_tools import model_cli
from tinyfleet.firmware_tools.compiler import compile as compiler
from tinyfleet.firmware_tools.readers.common import CompileError


def rewrite(source: Path, target: Path, **members: str | bytes) -> Path:
    """A .keras file with some of its members replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.partition(".")[0], old.read(name)))
    return target


def hdf5(fill: Callable[[h5py.File], object]) -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        fill(file)
    return content.getvalue()


def bomb(file: h5py.File) -> None:
    file.create_dataset("zeros", data=np.zeros(4_000_000, np.float32), compression="gzip")


def void(file: h5py.File) -> None:
    file.create_dataset("nothing", shape=(1 << 40,), dtype="f4", chunks=(1024,))


def elsewhere(file: h5py.File) -> None:
    file["link"] = h5py.ExternalLink("/etc/hostname", "/x")


def loop(file: h5py.File) -> None:
    file.create_group("group")["again"] = file["/"]


def test_a_bad_file_is_refused_in_one_line(tmp_path):
    good = tmp_path / "good.keras"
    mlp().save(good)
    text = tmp_path / "text.keras"
    text.write_text("not a model")
    description = json.loads(zipfile.ZipFile(good).read("config.json"))
    description["config"]["layers"][1]["config"]["units"] = -8
    negative = json.dumps(description)
    del description["config"]["layers"][1]["config"]["units"]
    foreign = zipfile.ZipFile(good).read("config.json").decode().replace('"keras.initializers"', '"os"', 1)
    compiled = json.loads(zipfile.ZipFile(good).read("config.json")) | {"compile_config": "x"}
    cases = {
        tmp_path / "absent.keras": "there is no file",
        text: "not a .keras file",
        rewrite(good, tmp_path / "old.keras", metadata='{"keras_version": "2.15.0"}'): "Keras 2.15.0",
        rewrite(good, tmp_path / "json.keras", config="{"): "not a .keras file",
        rewrite(good, tmp_path / "units.keras", config=json.dumps(description)): "units",
        rewrite(good, tmp_path / "negative.keras", config=negative): "has weights of the shape",
        rewrite(good, tmp_path / "compiled.keras", config=json.dumps(compiled)): "not as Keras 3 writes it",
        rewrite(good, tmp_path / "list.keras", config="[]"): "not as Keras 3 writes it",
        rewrite(good, tmp_path / "weights.keras", model="gone"): "the weights in .* are damaged",
        rewrite(good, tmp_path / "others.keras", model=hdf5(lambda file: None)): "Keras cannot load",
        rewrite(good, tmp_path / "bomb.keras", model=hdf5(bomb)): "claim more than it holds",
        rewrite(good, tmp_path / "void.keras", model=hdf5(void)): "claim more than it holds",
        rewrite(good, tmp_path / "elsewhere.keras", model=hdf5(elsewhere)): "too many, or elsewhere",
        rewrite(good, tmp_path / "loop.keras", model=hdf5(loop)): "too many, or elsewhere",
        rewrite(good, tmp_path / "module.keras", config=foreign): "a part of the module os",
    }
    for path, words in cases.items():
        with pytest.raises(CompileError, match=words) as refusal:
            compiler.compile_model(path)
        assert "\n" not in str(refusal.value)


def test_the_commands(tmp_path):
    path, out = tmp_path / "model.keras", tmp_path / "model.mote"
    randomise(mlp()).save(path)
    run = CliRunner()
    compiled = run.invoke(model_cli.app, ["compile", str(path), "--out", str(out), "--train-from", "head", "--json"])
    facts = json.loads(compiled.stdout)
    program = Program.parse(out.read_bytes())
    assert facts["model"] == program.model_id.hex()
    assert facts["trainable_parameters"] == program.n_params == 330
    table = run.invoke(model_cli.app, ["plan", str(path), "--ram-budget", "8KB"]).stdout
    assert "train from 'hidden'" in table
    assert "biases from 'hidden'" in table
    assert "2,410" in table
    assert "train all layers from 'head' on" in table
    chosen = run.invoke(model_cli.app, ["compile", str(path), "--out", str(out), "--ram-budget", "8KB"])
    assert "train all layers from 'head' on" in chosen.stdout
    assert Program.parse(out.read_bytes()).n_params == 330
    for loss in LOSSES:
        assert loss in run.invoke(model_cli.app, ["compile", "--help"], env={"COLUMNS": "200"}).stdout
    refused = run.invoke(model_cli.app, ["compile", str(path), "--out", str(tmp_path)])
    assert "cannot write" in str(refused.exception)


def test_a_description_says_what_the_engine_needs(tmp_path, capsys):
    path, program = tmp_path / "model.keras", tmp_path / "model.mote"
    model = randomise(mlp())
    model.save(path)
    program.write_bytes(compiler.compile_model(model).data)
    run = CliRunner()
    takes = compiler.plan_model(path)
    about = json.loads(run.invoke(model_cli.app, ["describe", str(path), "--json"]).stdout)
    assert (about["engine"], about["run_ram_bytes"], about["train_ram_bytes"], about["storage_bytes"]) == (
        "mote",
        takes.run.ram_bytes,
        takes.trainable.ram_bytes,
        takes.trainable.initial_bytes,
    )
    assert (
        f"tf:trainRamBytes {takes.trainable.ram_bytes} ;" in run.invoke(model_cli.app, ["describe", str(path)]).stdout
    )
    assert json.loads(run.invoke(model_cli.app, ["describe", str(program), "--json"]).stdout)["parameters"] == 2410

    flat(L.Dense(4, "gelu", name="g")).save(path)  # not for the engine: described all the same, without its memory
    model_cli.describe(path, as_json=True)
    described = capsys.readouterr()
    assert json.loads(described.out)["run_ram_bytes"] is None
    assert "note: the engine cannot run it: layer 'g' (Dense)" in described.err


def test_a_plan_needs_neither_keras_nor_tensorflow(tmp_path):
    path = tmp_path / "model.keras"
    mlp().save(path)
    code = (
        "import sys\n"
        "from tinyfleet.__main__ import cli\n"
        "try: cli(['model', 'plan', sys.argv[1], '--json'])\n"
        "finally: assert not {'tensorflow', 'keras'} & set(sys.modules)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, path], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["train_from"]["hidden"]["parameters"] == 2410


def test_a_tflite_file_is_planned_and_cut_from_the_command_line(tmp_path):
    """What the plan says of a cut is what the compiled program takes; a budget chooses the most that fits."""
    folder = os.environ.get("TINYFLEET_DATA")
    if not folder or not (Path(folder) / "tflite").is_dir():
        pytest.skip("TINYFLEET_DATA has no folder tflite")
    model = Path(folder) / "tflite" / "mlperf_tiny__kws_ref_model.tflite"

    def say(*words):
        command = [sys.executable, "-m", "tinyfleet", "model", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    plan = json.loads(say("plan", model, "--ram-budget", "64KB", "--json").stdout)
    assert (plan["selection"]["train_from"], plan["selection"]["bias_only"]) == ("dense", False)
    assert plan["selection"]["memory"] == plan["train_from"]["dense"]
    assert plan["bias_from"]["conv2d_4"]["ram_bytes"] < 65536 < plan["train_from"]["conv2d_4"]["ram_bytes"]
    done = say("compile", model, "--train-from", "dense", "--classes", 12, "--out", tmp_path / "a.mote", "--json")
    assert json.loads(done.stdout)["ram_bytes"] == plan["train_from"]["dense"]["ram_bytes"]
    done = say("compile", model, "--train-from", "conv2d_4", "--bias-only", "--out", tmp_path / "b.mote", "--json")
    assert json.loads(done.stdout)["ram_bytes"] == plan["bias_from"]["conv2d_4"]["ram_bytes"]
    done = say("compile", model, "--ram-budget", "64KB", "--out", tmp_path / "c.mote", "--json")
    assert json.loads(done.stdout)["selection"] == plan["selection"]
    assert Program.parse((tmp_path / "c.mote").read_bytes()).arena_bytes == plan["selection"]["memory"]["ram_bytes"]
    assert "too few" in say("plan", model, "--ram-budget", "1KB").stderr
    assert "no layer is named 'nope'" in say("compile", model, "--train-from", "nope").stderr
    assert "name a layer with --train-from, or give a --ram-budget" in say("compile", model, "--classes", 4).stderr


def test_the_sparse_update_is_planned_and_compiled_from_the_command_line(tmp_path):
    folder = os.environ.get("TINYFLEET_DATA")
    if not folder or not (Path(folder) / "tflite").is_dir():
        pytest.skip("TINYFLEET_DATA has no folder tflite")
    model, floats = (Path(folder) / "tflite" / f"mlperf_tiny__{n}.tflite" for n in ("kws_ref_model", "ad01_fp32"))
    run = CliRunner()

    def say(*words):
        return run.invoke(model_cli.app, [*map(str, words)])

    out = tmp_path / "sparse.mote"
    options = ["--int8", "--ram-budget", "90KB", "--classes", 4]
    chosen = json.loads(say("plan", model, *options, "--json").stdout)["selection"]
    compiled = json.loads(say("compile", model, *options, "--out", out, "--json").stdout)
    program = Program.parse(out.read_bytes())
    assert compiled["selection"] == chosen
    assert program.arena_bytes == chosen["memory"]["ram_bytes"] <= 90 * 1024
    assert program.trains_int8
    assert program.output_shape == (4,)
    trained = {name: update["channels"] for name, update in chosen["updates"].items()}
    assert trained["dense"] == 4
    assert [shape[-1] for name, shape in program.parameters if name.endswith("/bias")] == list(trained.values())
    words = say("plan", model, *options).stdout
    assert "train in int8" in words
    assert "dense: 4 channels" in words

    rows = json.loads(say("plan", model, "--int8", "--json").stdout)
    say("compile", model, "--int8", "--train-from", "conv2d_4", "--out", out)
    assert Program.parse(out.read_bytes()).arena_bytes == rows["train_from"]["conv2d_4"]["ram_bytes"]
    say("compile", model, "--int8", "--train-from", "conv2d_4", "--bias-only", "--out", out)
    assert Program.parse(out.read_bytes()).arena_bytes == rows["bias_from"]["conv2d_4"]["ram_bytes"]

    keras_file = tmp_path / "m.keras"
    mlp().save(keras_file)
    refusals = {
        "no int8 layers": ["plan", floats, "--int8"],
        "leave --int8 out": ["compile", keras_file, "--int8", "--ram-budget", "64KB"],
        "is too small": ["plan", model, "--int8", "--ram-budget", "1KB"],
        "without momentum": ["compile", model, "--int8", "--ram-budget", "64KB", "--momentum"],
        "leave out --train-from and --bias-only": ["compile", model, "--ram-budget", "64KB", "--train-from", "dense"],
        "is not a size": ["plan", model, "--ram-budget", "much"],
    }
    for words, command in refusals.items():
        refused = say(*command)
        assert refused.exit_code == 1
        assert words in str(refused.exception)
        assert "\n" not in str(refused.exception)
