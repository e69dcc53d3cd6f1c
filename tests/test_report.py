"""Figures of cycle_report against hand-computed ones, and its warnings."""

import math

import pytest
import timm
import torch
from torch import nn

import toys
from cyclekd import cycle_report, run_cycles, wrap_multicycle


def test_figures_are_those_of_the_tokens():
    model = wrap_multicycle(toys.Toy(), 3)
    report = cycle_report(model, toys.images())
    with torch.no_grad():
        t1, t2, t3 = run_cycles(model.eval(), toys.images()).tokens
    assert report.cycles == 3 and report.stack == "blocks" and report.blocks == 3
    assert report.token_norm == pytest.approx([t.square().mean().sqrt().item() for t in (t1, t2, t3)])
    expected = [((a - b).square().sum() / b.square().sum()).item() for a, b in ((t1, t2), (t2, t3))]
    assert report.token_distance == pytest.approx(expected)
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_agreement_is_the_share_of_equal_choices():
    model = wrap_multicycle(toys.Toy(), 2)
    x = torch.randn(64, 5, 4)
    report = cycle_report(model, x)
    first, second = (output.argmax(-1) for output in run_cycles(model.eval(), x).outputs)
    assert report.agreement == pytest.approx([(first == second).float().mean().item()])
    assert cycle_report(wrap_multicycle(toys.LossToy(), 2), x).agreement is not None  # {"logits": ...}


def test_agreement_is_none_where_no_predictions_are_found():
    class Boxes(toys.Toy):
        def forward_head(self, x):
            return {"boxes": super().forward_head(x)}

    assert cycle_report(wrap_multicycle(Boxes(), 2), toys.images()).agreement is None


def test_agreement_of_heat_maps_is_that_of_their_peaks():
    class Heatmaps(toys.Toy):
        def forward_head(self, x):
            return x.reshape(x.shape[0], 2, 4, 5)

    model = wrap_multicycle(Heatmaps(), 2)
    report = cycle_report(model, toys.images())
    peaks = [output.flatten(2).argmax(-1) for output in run_cycles(model.eval(), toys.images()).outputs]
    assert report.agreement == pytest.approx([(peaks[0] == peaks[1]).float().mean().item()])


def test_macs_are_stem_plus_n_stacks_plus_n_heads():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, num_classes=10)
    parts = {name: macs(module, x) for name, module, x in [
        ("stem", model.patch_embed, torch.zeros(2, 3, 32, 32)),
        ("stack", model.blocks, torch.zeros(2, 5, 192)),
        ("head", model.head, torch.zeros(2, 192)),
    ]}  # fmt: skip
    report = cycle_report(wrap_multicycle(model, 3), torch.zeros(2, 3, 32, 32))
    assert report.macs_deployed == parts["stem"] + parts["stack"] + parts["head"]
    assert report.macs_trained == parts["stem"] + 3 * parts["stack"] + 3 * parts["head"]


def macs(module, x):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = wrap_multicycle(toys.BatchNormToy(), 2).train(training)
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    hooked = [len(module._forward_hooks) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    cycle_report(model, toys.images())
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooked
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_collapsed_cycles_are_warned_of():
    model = toys.Toy()
    for block in model.blocks:
        nn.init.zeros_(block.mix.weight), nn.init.zeros_(block.mix.bias)
    report = cycle_report(wrap_multicycle(model, 2), toys.images())
    assert "cycles 1 and 2 have collapsed" in report.warnings[0] and "lower rho or alpha" in report.warnings[0]


def test_growing_and_infinite_norms_are_warned_of():
    class Growing(toys.Block):
        def forward(self, x):
            return 3 * x

    report = cycle_report(wrap_multicycle(toys.Toy(Growing), 2), toys.images())
    assert "token norm grows 27 times from cycle 1 to 2" in report.warnings[0]
    report = cycle_report(wrap_multicycle(toys.Toy(Growing), 40), toys.images())
    assert "not finite" in report.warnings[-1]


def test_a_healthy_model_is_not_warned_of_and_prints_every_cycle():
    report = cycle_report(wrap_multicycle(toys.Toy(), 3), toys.images())
    assert report.warnings == ()
    lines = str(report).splitlines()
    assert lines[0] == "stack blocks (3 blocks), 3 cycles"
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert "MACs of these inputs" in lines[-1]


def test_pruned_tokens_have_no_distance_where_their_number_differs():
    class Dropping(toys.PruningToy):
        def forward_features(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)[:, 1:] if x.shape[1] > 2 else block(x)
            return x

    report = cycle_report(wrap_multicycle(Dropping(), 2, stack="blocks"), toys.images(tokens=9))
    assert math.isnan(report.token_distance[0]) and report.warnings == ()
