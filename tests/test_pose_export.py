"""A pose model with its decoding as one module and as ONNX: key points in pixels, equal in both."""

import pytest
import torch

from cyclekd.integrations.tokenpose import (
    KeypointModel,
    PoseError,
    create_model,
    decode_heatmaps,
    decode_output,
    export_onnx,
    heatmap_target,
    load_reference_checkpoint,
)
from golden import golden

SMALL = {"input_size": (64, 48), "num_keypoints": 5}


def informed(name, **overrides):
    """A model whose output follows the image, on top of what a trained one predicts: a Gaussian per key point."""
    model = create_model(name, **overrides)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    last = model.head.mlp[-1]
    if model.config.head == "heatmap":
        size = torch.tensor([*model.config.input_size[::-1]])
        points = (0.2 + 0.6 * torch.rand(1, 1, 2)) * size
        maps = heatmap_target(
            points, torch.ones(1, 1), input_size=model.config.input_size, heatmap_size=model.config.feature_size
        )
        last.weight.data *= 0.02  # small beside the Gaussian, large beside what is compared
        last.bias.data = maps.values.flatten().clone()
    return model


def test_key_points_are_in_pixels_of_the_input():
    model = create_model("tokenpose_s_v1", depth=1, **SMALL)
    heatmaps = torch.zeros(1, 5, 16, 12)
    heatmaps[0, :, 5, 7] = 1.0
    found = decode_output(model.config, heatmaps, "argmax")
    assert found.coordinates[0].tolist() == [[28.0, 20.0]] * 5 and found.scores.tolist() == [[1.0] * 5]
    regression = create_model("sdpose_reg", depth=1, **SMALL)
    found = decode_output(regression.config, torch.tensor([[[0.5, 0.25, 0.0, 0.0]]]))
    assert found.coordinates.tolist() == [[[24.0, 16.0]]] and found.scores.tolist() == [[0.5]]
    token = create_model("tokenreg_s", depth=1, **SMALL)
    found = decode_output(token.config, torch.tensor([[[0.5, 0.25, 0.9, 1.0, 1.0]]]))
    assert found.coordinates.tolist() == [[[24.0, 16.0]]] and found.scores[0].tolist() == pytest.approx([0.9])


def test_a_model_of_several_cycles_decodes_its_first():
    model, images = informed("sdpose_s_v1", depth=2, **SMALL), torch.randn(2, 3, 64, 48)
    found = KeypointModel(model)(images)
    expected = decode_heatmaps(model.eval()(images))
    assert torch.equal(found.coordinates, 4 * expected.coordinates) and torch.equal(found.scores, expected.scores)
    assert not model.training


def test_nothing_is_written_over_and_a_missing_folder_is_said(tmp_path):
    model = create_model("tokenpose_s_v1", depth=1, **SMALL)
    (tmp_path / "pose.onnx").write_text("mine")
    with pytest.raises(PoseError, match="exists; choose another name"):
        export_onnx(model, tmp_path / "pose.onnx")
    assert (tmp_path / "pose.onnx").read_text() == "mine"
    with pytest.raises(PoseError, match=r"there is no folder .*nowhere"):
        export_onnx(model, tmp_path / "nowhere/pose.onnx")


def check_onnx(model, images, path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    training = model.training
    export_onnx(model, path)
    torch._dynamo.reset()
    assert model.training == training
    session = runtime.InferenceSession(path)
    assert [each.name for each in session.get_outputs()] == ["keypoints", "scores"]
    for batch in (images, images[:1]):  # of any size
        keypoints, scores = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            found = KeypointModel(model)(batch)
        assert (torch.from_numpy(keypoints) - found.coordinates).abs().max() <= 1e-3
        assert (torch.from_numpy(scores) - found.scores).abs().max() <= 1e-4
    assert (found.coordinates[0] - KeypointModel(model)(images)[0][1]).abs().max() > 0.01  # images tell


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, overrides",
    [
        ("sdpose_s_v1_ppt", {"depth": 2, "prune_at": (1,)}),
        ("sdpose_reg", {"depth": 1}),
    ],
)
def test_onnx_runtime_gives_the_same_key_points_to_a_thousandth_of_a_pixel(name, overrides, tmp_path):
    check_onnx(informed(name, **overrides, **SMALL), torch.randn(3, 3, 64, 48), tmp_path / "pose.onnx")


@pytest.mark.slow
def test_onnx_runtime_agrees_on_the_published_architecture(tmp_path):
    model = create_model("sdpose_s_v1")
    load_reference_checkpoint(model, golden("weights_s_v1"))
    height, width = model.config.input_size
    maps = heatmap_target(
        torch.rand(1, 1, 2) * 100 + 40, torch.ones(1, 1), input_size=(height, width), heatmap_size=(64, 48)
    )
    model.head.mlp[-1].bias.data += 100 * maps.values.flatten()  # random weights have no peak: DARK would be undefined
    check_onnx(model, golden("input_common")["input"], tmp_path / "pose.onnx")
