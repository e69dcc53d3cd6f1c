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
    regression = create_model("sdpose_reg", depth=1, cycles=1, **SMALL)
    found = decode_output(regression.config, torch.tensor([[[0.5, 0.25, 0.0, 0.0]]]))
    assert found.coordinates.tolist() == [[[24.0, 16.0]]] and found.scores.tolist() == [[0.5]]
    token = create_model("tokenreg_s", depth=1, **SMALL)
    found = decode_output(token.config, torch.tensor([[[0.5, 0.25, 0.9, 1.0, 1.0]]]))
    assert found.coordinates.tolist() == [[[24.0, 16.0]]] and found.scores[0].tolist() == pytest.approx([0.9])


def test_in_the_aligned_convention_the_last_pixels_coincide():
    config = create_model("tokenpose_s_v1", depth=1, **SMALL).config
    heatmaps = torch.zeros(1, 5, 16, 12)
    heatmaps[0, :, 15, 11] = 1.0
    aligned = decode_output(config, heatmaps, "argmax", aligned=True).coordinates[0, 0]
    assert aligned.tolist() == pytest.approx([47.0, 63.0])
    assert decode_output(config, heatmaps, "argmax").coordinates[0, 0].tolist() == [44.0, 60.0]


def test_a_model_of_several_cycles_decodes_its_first():
    model, images = informed("sdpose_s_v1", depth=2, **SMALL), torch.randn(2, 3, 64, 48)
    whole = KeypointModel(model)
    assert model.training  # it may be in the middle of a training
    with pytest.raises(PoseError, match=r"got those of every cycle in training: call model.eval\(\) first"):
        whole(images)
    found = whole.eval()(images)
    expected = decode_heatmaps(model(images))
    assert torch.equal(found.coordinates, 4 * expected.coordinates) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("wrong", [torch.nn.Linear, KeypointModel, torch.nn.DataParallel], ids=lambda it: it.__name__)
def test_other_models_and_methods_are_refused_before_an_export_begins(wrong, tmp_path):
    model = create_model("tokenpose_s_v1", depth=1, **SMALL)
    other = wrong(1, 1) if wrong is torch.nn.Linear else wrong(model)
    with pytest.raises(PoseError, match=rf"take a model of create_model .* and got a {wrong.__name__}"):
        export_onnx(other, tmp_path / "pose.onnx")
    with pytest.raises(PoseError, match=r"method='newton'\): there are 'dark'"):
        export_onnx(model, tmp_path / "pose.onnx", "newton")


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
    with torch.autocast("cpu", torch.bfloat16):  # as at the end of a training
        export_onnx(model, path)
    torch._dynamo.reset()
    assert model.training == training
    session = runtime.InferenceSession(path)
    assert [each.name for each in session.get_outputs()] == ["keypoints", "scores"]
    for batch in (images, images[:1]):  # of any size
        keypoints, scores = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            found = KeypointModel(model).eval()(batch)
        assert (torch.from_numpy(keypoints) - found.coordinates).abs().max() <= 1e-3
        assert (torch.from_numpy(scores) - found.scores).abs().max() <= 1e-4
    assert (found.coordinates[0] - KeypointModel(model)(images)[0][1]).abs().max() > 0.01  # images tell


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, overrides",
    [
        ("sdpose_s_v1_ppt", {"depth": 2, "prune_at": (1,)}),
        ("sdpose_reg", {"depth": 1, "cycles": 1}),
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


@pytest.mark.parametrize("method, place", [("argmax", (20.0, 32.0)), ("quarter", (21.0, 33.0))])
def test_the_method_asked_for_decodes(method, place):
    model = create_model("tokenpose_s_v1", depth=1, **SMALL)
    heatmaps = torch.zeros(1, 5, 16, 12)
    heatmaps[0, :, 8, 5] = 1.0
    heatmaps[0, :, 8, 6] = heatmaps[0, :, 9, 5] = 0.5
    model.forward = lambda images: heatmaps
    assert KeypointModel(model, method)(None).coordinates[0].tolist() == [list(place)] * 5


@pytest.mark.parametrize("exporting", [False, True])
def test_export_hands_on_the_method_and_leaves_the_model_as_it_was(exporting, tmp_path, monkeypatch):
    seen = []

    class Program:
        def save(self, path):
            path.write_text("onnx")

    def record(module, arguments, **options):
        seen.append((module, arguments, options))
        return Program()

    monkeypatch.setattr(torch.onnx, "export", record)
    model = create_model("tokenpose_s_v1", depth=1, **SMALL).double().train(exporting)
    assert export_onnx(model, tmp_path / "pose.onnx", "quarter") == tmp_path / "pose.onnx"
    ((module, (images,), options),) = seen
    assert module.method == "quarter" and not module.training and not module.model.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32} and images.dtype == torch.float32
    assert module.model is not model and model.training == exporting
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert list(options["dynamic_shapes"]["images"]) == [0]  # the batch, and nothing else
