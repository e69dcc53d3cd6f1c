"""Who may import whom, and how little importing the library costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cyclekd

ROOT = Path(__file__).parent.parent
PACKAGE, INTEGRATIONS = ROOT / "cyclekd", ROOT / "integrations"

LAYERS = [
    {"errors", "structure", "checkpointing", "randomness", "_version"},
    {"outputs", "probe", "caches", "slots", "stem"},
    {"stacks", "looking", "losses"},
    {"passes"},
    {"stack_hooks"},
    {"reentry"},
    {"wrap"},
    {"report"},
    {"__init__"},
]
"""A module imports from rows above its own alone."""

INTEGRATION_LAYERS = [
    {"runs.__init__", "runs.errors", "runs.seeds", "runs.stopping", "runs.environment"},
    {"runs.folder", "runs.processes", "runs.sampling", "runs.loading", "runs.checkpoints"},
    {"runs.progress"},
    {"runs.curves", "runs.card"},
    {"runs.training"},
    {"runs.arguments"},
    {"runs.start"},
    {"deit.__init__", "deit.decoding", "deit.randaugment", "deit.sources", "deit.distillation"},
    {"deit.augment", "deit.columns"},
    {"deit.arguments", "deit.data", "deit.deploy", "deit.recipe", "deit.task"},
    {"deit.streams"},
    {"deit.train"},
    {"tokenpose.errors", "tokenpose.skeletons"},
    {"tokenpose.shapes"},
    {"tokenpose.models.__init__", "tokenpose.models.heads", "tokenpose.models.transformer"},
    {"tokenpose.models.backbones", "tokenpose.models.config"},
    {"tokenpose.models.baselines", "tokenpose.models.tokenpose"},
    {"tokenpose.models.create"},
    {"tokenpose.losses.__init__", "tokenpose.losses.flow", "tokenpose.losses.targets"},
    {"tokenpose.losses.supervised"},
    {"tokenpose.losses.distilpose"},
    {"tokenpose.keypoints.__init__", "tokenpose.keypoints.decoding"},
    {"tokenpose.keypoints.export", "tokenpose.keypoints.flips", "tokenpose.keypoints.geometry"},
    {"tokenpose.weights.__init__", "tokenpose.weights.layouts"},
    {"tokenpose.weights.reference"},
    {"tokenpose.weights.hub"},
    {"tokenpose.weights.convert"},
    {"tokenpose.figures.__init__", "tokenpose.figures.body", "tokenpose.figures.shapes"},
    {"tokenpose.figures.parts"},
    {"tokenpose.figures.canvas"},
    {"tokenpose.figures.draw"},
    {"tokenpose.data.__init__", "tokenpose.data.annotations"},
    {"tokenpose.data.people", "tokenpose.data.views", "tokenpose.data.warp"},
    {"tokenpose.data.contexts"},
    {"tokenpose.data.crops"},
    {"tokenpose.evaluation.__init__", "tokenpose.evaluation.matching"},
    {"tokenpose.evaluation.crowdpose", "tokenpose.evaluation.scoring"},
    {"tokenpose.evaluation.precision"},
    {"tokenpose.evaluation.predicting"},
    {"tokenpose.prediction.__init__", "tokenpose.prediction.drawing", "tokenpose.prediction.photos"},
    {"tokenpose.prediction.detection", "tokenpose.prediction.video"},
    {"tokenpose.prediction.predictor"},
    {"tokenpose.prediction.results"},
    {"tokenpose.evaluation.arguments", "tokenpose.evaluation.pictures"},
    {"tokenpose.evaluation.subject"},
    {"tokenpose.evaluation.speed"},
    {"tokenpose.evaluation.report"},
    {"tokenpose.evaluation.evaluate"},
    {"tokenpose.training.__init__", "tokenpose.training.arguments", "tokenpose.training.objective"},
    {"tokenpose.training.data", "tokenpose.training.model", "tokenpose.training.task"},
    {"tokenpose.training.report"},
    {"tokenpose.training.train"},
    {"tokenpose.__init__"},
]
"""The same for integrations/: whatever a kind of training has for itself comes after what all of them share."""

STANDARD_OR_TORCH = {*sys.stdlib_module_names, "torch", "cyclekd"}


def imported(path):
    """Names that a file imports anywhere in it, other than for its types alone."""
    names = set()
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_every_module_has_its_layer():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set().union(*LAYERS)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_modules_import_from_lower_layers_torch_and_the_standard_library(path):
    row = next(i for i, layer in enumerate(LAYERS) if path.stem in layer)
    allowed = set().union(*LAYERS[:row])
    for name in imported(path):
        assert name.split(".")[0] in STANDARD_OR_TORCH, name
        if name.startswith("cyclekd."):
            assert name.removeprefix("cyclekd.") in allowed, name


def integration_modules():
    files = sorted(INTEGRATIONS.rglob("*.py"))
    return {".".join(path.relative_to(INTEGRATIONS).with_suffix("").parts): path for path in files}


def names_taken_from_cyclekd(path):
    """What `from cyclekd import ...` names anywhere in a file."""
    froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in froms if node.module == "cyclekd" for alias in node.names}


def test_every_integration_module_has_its_layer():
    assert integration_modules().keys() == set().union(*INTEGRATION_LAYERS)


def test_every_integration_module_has_one_layer():
    assert sum(map(len, INTEGRATION_LAYERS)) == len(set().union(*INTEGRATION_LAYERS))


@pytest.mark.parametrize("name", sorted(set().union(*INTEGRATION_LAYERS)))
def test_integrations_import_from_lower_layers_and_the_public_names_of_the_library(name):
    path = integration_modules()[name]
    row = next(i for i, layer in enumerate(INTEGRATION_LAYERS) if name in layer)
    allowed = {f"cyclekd.integrations.{below}" for below in set().union(*INTEGRATION_LAYERS[:row])} | {"cyclekd"}
    for module in imported(path):
        assert module is not None, "a relative import"
        assert module.split(".")[0] not in ("integrations", "examples", "benchmarks", "tests"), module
        if module.split(".")[0] == "cyclekd":
            assert module in allowed, module
    assert names_taken_from_cyclekd(path) <= set(cyclekd.__all__)


def test_pose_models_do_not_need_pycocotools():
    code = "import sys, cyclekd.integrations.tokenpose; print('pycocotools' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stdout + done.stderr


def test_importing_the_library_loads_torch_alone():
    heavy = {"timm", "transformers", "accelerate", "datasets", "torchvision", "PIL", "matplotlib", "safetensors"}
    code = f"import sys, cyclekd; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "\n", done.stdout + done.stderr
