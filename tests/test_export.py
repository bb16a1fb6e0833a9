"""Programs that are taken elsewhere say what the model says."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cifar_ignite import export as exporting
from cifar_ignite.config import RunFailedError, SyntheticConfig
from cifar_ignite.data import draw_synthetic
from cifar_ignite.engines import create_forward
from cifar_ignite.evaluate import run_evaluator
from cifar_ignite.export import Deployed, export
from cifar_ignite.trained import load_trained


@pytest.fixture
def trained(command, tiny_file, tmp_path):
    """The output folder with a trained network, as overrides."""
    assert command("train", "--config", tiny_file)[0] == 0
    return [f"output_dir={tmp_path / 'outputs'}"]


def test_programs_say_what_an_evaluation_says(command, trained, tmp_path):
    """All four files, loaded without this project, against the probabilities that evaluation computes."""
    status, out, err = command("export")
    assert (status, err) == (0, "")
    folder = tmp_path / "outputs" / "exports"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["tiny_float32.onnx", "tiny_float32.pt2", "tiny_uint8.onnx", "tiny_uint8.pt2"]
    assert "logits (N, 10)" in out
    assert "airplane, automobile" in out

    network = load_trained(None, None, [*trained, "precision=fp32"])
    images = draw_synthetic(SyntheticConfig(test_size=256, seed=5), train=False)
    forward = create_forward(network.model, torch.device("cpu"), torch.float32)
    expected, _ = run_evaluator(network.model, forward, images, network.config, torch.device("cpu"))
    for name in names:
        given = images.images if "uint8" in name else images.images / 255
        for size in (1, 2, 256):
            batch = given[:size]
            if name.endswith(".pt2"):
                logits = torch.export.load(folder / name).module()(batch)
            else:
                session = onnxruntime.InferenceSession(folder / name)
                logits = torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])
            assert logits.dtype == torch.float32
            assert torch.allclose(logits.softmax(1), expected[:size], atol=1e-5), (name, size)
    graph = onnx.load(folder / "tiny_uint8.onnx").graph
    assert [entry.name for entry in graph.input] == ["images"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param  # a name: any number of images


def test_normalisation_is_inside():
    network = Deployed(torch.nn.Flatten(), (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = (images.numpy() / 255 - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape([0.5, 0.25, 1], (3, 1, 1))
    assert np.allclose(network(images).numpy().reshape(expected.shape), expected, atol=1e-6)
    assert torch.allclose(network(images / 255), network(images), atol=1e-6)


def test_without_the_packages_for_onnx_the_rest_is_written(trained, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(exporting, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with caplog.at_level("INFO"):
        files = export(overrides=trained)
    assert [path.name for path in files] == ["tiny_uint8.pt2", "tiny_float32.pt2"]
    assert "no ONNX: no_such_package not installed; pip install -e '.[onnx]'" in caplog.text


def test_a_program_that_says_something_else_is_not_written(trained, tmp_path, monkeypatch):
    def write_wrong(program, path):
        path.write_bytes(b"x")
        return lambda images: program.module()(images) + 1e-3

    monkeypatch.setattr(exporting, "write_torch", write_wrong)
    with pytest.raises(RunFailedError, match=r"tiny_uint8.pt2: its logits differ by 0.001 from the model's"):
        export(overrides=trained)
    assert list((tmp_path / "outputs" / "exports").iterdir()) == []
    monkeypatch.setattr(
        exporting, "write_torch", lambda program, path: lambda images: torch.full((len(images), 10), torch.nan)
    )
    with pytest.raises(RunFailedError, match="differ by nan"):
        export(overrides=trained)


def test_an_export_that_cannot_be_written_is_one_line(command, trained, tmp_path):
    (tmp_path / "outputs" / "exports").write_text("in the way")
    status, _, err = command("export")
    assert status == 2
    assert err.startswith("cifar_ignite: output_dir: cannot write into ")
    assert err.count("\n") == 1
