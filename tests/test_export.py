"""Exported programs compute what the model computes."""

import importlib

import onnx
import onnxruntime
import pytest
import torch

from cifar_ignite import export
from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.config import SyntheticConfig
from cifar_ignite.data.synthetic import make_synthetic
from cifar_ignite.errors import TrainingError
from cifar_ignite.evaluation.inference import create_inference_forward, run_inference
from cifar_ignite.evaluation.trained_model import load_trained_model

export_module = importlib.import_module("cifar_ignite.export")  # cifar_ignite.export is the function


@pytest.fixture
def overrides(trained_run, tmp_path):
    """Overrides that name the output directory of a trained model."""
    return [f"output_dir={tmp_path / 'outputs'}"]


def test_exported_programs_match_evaluation(command, overrides, tmp_path):
    """All four files, loaded without this project, against the probabilities of an evaluation; and their metadata."""
    status, out, err = command("export")
    assert (status, err) == (0, "")
    directory = tmp_path / "outputs" / "exports"
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["tiny_float32.onnx", "tiny_float32.pt2", "tiny_uint8.onnx", "tiny_uint8.pt2"]
    assert "logits (N, 10)" in out
    assert "airplane, automobile" in out

    trained = load_trained_model(None, None, [*overrides, "precision=fp32"])
    dataset = make_synthetic(SyntheticConfig(test_size=256, seed=5), train=False)
    expected, _ = run_inference(trained, create_inference_forward(trained), dataset)
    temperature = load_checkpoint(trained.path)["temperatures"]["plain"]
    for name in names:
        program, metadata = load_program(directory / name)
        assert metadata == {"temperature": repr(temperature)}
        images = dataset.images if "uint8" in name else dataset.images / 255
        for batch_size in (1, 2, 256):
            logits = program(images[:batch_size])
            assert logits.dtype == torch.float32
            assert torch.allclose(logits, expected[:batch_size], atol=1e-4), (name, batch_size)
    graph = onnx.load(directory / "tiny_uint8.onnx").graph
    assert [entry.name for entry in graph.input] == ["images"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param  # a symbolic size: any batch size


def load_program(path):
    """Return the function from images to logits of an exported program, and its metadata."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), metadata
    metadata = {"temperature": ""}
    program = torch.export.load(path, extra_files=metadata)
    return program.module(), {key: value for key, value in metadata.items() if value}


def test_export_without_onnx_packages_and_temperature_writes_pt2_only(overrides, tmp_path, monkeypatch, caplog):
    path = tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["temperatures"]
    torch.save(checkpoint, path)
    monkeypatch.setattr(export_module, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with caplog.at_level("INFO"):
        files = export(overrides=overrides)
    assert [path.name for path in files] == ["tiny_uint8.pt2", "tiny_float32.pt2"]
    assert [load_program(path)[1] for path in files] == [{}, {}]
    assert "no ONNX: no_such_package not installed; pip install no_such_package" in caplog.text


def test_onnx_program_without_temperature_has_no_metadata(tmp_path):
    program = export_module.export_program(torch.nn.Flatten(), torch.zeros(2, 3, 4, 4))
    export_module.save_onnx(program, tmp_path / "a.onnx", {})
    assert load_program(tmp_path / "a.onnx")[1] == {}


@pytest.mark.parametrize(("size", "count"), [(32, 256), (48, 113), (224, 5), (512, 2), (1024, 2)])
def test_programs_are_verified_with_fewer_large_images(size, count):
    assert export_module.example_images(size, torch.uint8).shape == (count, 3, size, size)


def test_export_of_large_images_is_verified_in_batches_of_one_and_several(tmp_path, caplog):
    batch_sizes = []

    def save(program, path):
        path.write_bytes(b"x")
        return lambda images: batch_sizes.append(len(images)) or images.mean((1, 2, 3))

    model = lambda images: images.mean((1, 2, 3))  # noqa: E731
    images = export_module.example_images(224, torch.float32)
    with caplog.at_level("INFO"):
        export_module.export_and_verify(save, None, model, images, tmp_path / "a.pt2")
    assert batch_sizes == [1] * 5 + [5]
    assert "(N=1)" in caplog.text
    assert "(N=5)" in caplog.text


@pytest.mark.parametrize(("offset", "expected"), [(1e-3, "0.001"), (torch.nan, "nan")])
def test_export_of_different_logits_writes_nothing(tmp_path, offset, expected):
    def save_wrong(program, path):
        path.write_bytes(b"x")
        return lambda images: images + offset

    images = export_module.example_images(224, torch.float32)
    with pytest.raises(TrainingError, match=rf"a.pt2: logits differ by {expected}"):
        export_module.export_and_verify(save_wrong, None, torch.nn.Identity(), images, tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("overrides")
def test_export_to_unwritable_directory_prints_one_line(command, tmp_path):
    (tmp_path / "outputs" / "exports").write_text("a file, not a directory")
    status, _, err = command("export")
    assert status == 2
    assert err.startswith("cifar_ignite: output_dir: cannot write to ")
    assert err.count("\n") == 1
