"""Wrapping in place and back: nothing of the base is lost, and what cannot be wrapped is refused with words."""

import copy
import inspect
import io
import os
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn

import cyclekd
import toys
from cyclekd import CycleError, CycleLoss, CycleOutput, run_cycles, set_cycles, unwrap_multicycle, wrap_multicycle


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def patches(model):
    return [module for module in model.modules() if "forward" in vars(module)]


# -- one cycle, evaluation, and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [toys.Toy, toys.BatchNormToy, toys.TwoStreamToy], ids=lambda make: make.__name__)
def test_one_cycle_is_bitwise_the_plain_model(make):
    model, labels = make(), torch.tensor([0, 2])
    plain = copy.deepcopy(model)
    parts = CycleLoss(nn.functional.cross_entropy)(wrap_multicycle(model, 1, stack="blocks")(toys.images()), labels)
    loss = nn.functional.cross_entropy(plain(toys.images()), labels)
    parts.total.backward(), loss.backward()
    assert torch.equal(parts.total, loss)
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name


def test_one_cycle_of_a_timm_model_is_bitwise_the_plain_model():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, drop_path_rate=0.5, num_classes=5)
    plain = copy.deepcopy(model).train()
    x = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    output = wrap_multicycle(model, 1).train()(x)
    torch.manual_seed(1)
    expected = plain(x)
    assert torch.equal(output.outputs[0], expected)
    output.outputs[0].square().sum().backward(), expected.square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_evaluation_is_bitwise_the_base_and_no_hook_is_left():
    model = toys.BatchNormToy()
    expected = copy.deepcopy(model).eval()(toys.images())
    wrap_multicycle(model, 3).eval()
    assert torch.equal(model(toys.images()), expected)
    assert hooks(model) == 0 and not patches(model)


def test_wrapping_in_evaluation_mode_puts_on_no_hook():
    assert hooks(wrap_multicycle(toys.Toy().eval(), 2)) == 0


def test_unwrap_gives_back_the_same_object_class_keys_and_output():
    model = toys.BatchNormToy()
    before, attributes = list(model.state_dict()), set(vars(model))
    wrapped = wrap_multicycle(model, 2)
    wrapped(toys.images()).outputs[1].sum().backward()
    assert unwrap_multicycle(wrapped) is model
    assert type(model) is toys.BatchNormToy
    assert list(model.state_dict()) == before and set(vars(model)) == attributes
    assert hooks(model) == 0 and not patches(model)
    assert model.training and not isinstance(model(toys.images()), CycleOutput)
    fresh = toys.BatchNormToy()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model.eval()(toys.images()), fresh.eval()(toys.images()))


def test_unwrapped_output_equals_the_never_wrapped_one():
    model = toys.Toy()
    expected = model(toys.images())
    assert torch.equal(unwrap_multicycle(wrap_multicycle(model, 2))(toys.images()), expected)


def test_the_class_keeps_name_module_and_signature():
    model = toys.CachingToy()
    signature = inspect.signature(model.forward)
    wrap_multicycle(model, 2)
    assert type(model).__name__ == "CachingToy" and type(model).__module__ == "toys"
    assert isinstance(model, toys.CachingToy)
    assert inspect.signature(model.forward) == signature


def test_modes():
    model = wrap_multicycle(toys.Toy(), 2)
    x = toys.images()
    assert isinstance(model(x), CycleOutput) and len(model(x).outputs) == 2
    model.eval()
    one_pass = model(x)
    assert torch.equal(one_pass, run_cycles(model, x).outputs[0])
    set_cycles(model, inference_cycles=3)
    assert torch.equal(model(x), run_cycles(model, x, cycles=3).outputs[2])
    assert not torch.equal(model(x), one_pass)
    set_cycles(model, inference_cycles=1)
    assert torch.equal(model(x), one_pass) and hooks(model) == 0


def test_training_set_by_hand_still_cycles():
    model = wrap_multicycle(toys.Toy().eval(), 2)
    model.training = True
    output = model(toys.images())
    assert not torch.equal(output.tokens[0], output.tokens[1])


def test_set_cycles_takes_effect_at_the_next_call():
    model = wrap_multicycle(toys.Toy(), 2)
    for cycles in (1, 4, 2):
        set_cycles(model, cycles)
        assert len(model(toys.images()).outputs) == cycles


def test_set_and_run_cycles_find_the_wrapped_model_inside_others():
    inner = wrap_multicycle(toys.Toy(), 2)
    outer = nn.ModuleDict({"module": nn.Sequential(inner)})
    set_cycles(outer, 3)
    assert len(run_cycles(outer, toys.images()).outputs) == 3


def test_run_cycles_leaves_mode_hooks_and_statistics_as_they_were():
    model = wrap_multicycle(toys.BatchNormToy(), 2).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        run_cycles(model, toys.images())
    assert not model.training and hooks(model) == 0 and not patches(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_base_loss_becomes_the_whole_objective():
    model, labels = toys.LossToy(), torch.tensor([0, 2])
    wrap_multicycle(model, 2, loss=CycleLoss(alpha=0.5))
    output = model(toys.images(), labels=labels)
    task = sum(each["loss"] for each in output.outputs)
    torch.testing.assert_close(output.loss, task + 0.5 * nn.functional.mse_loss(*output.tokens))
    assert model(toys.images()).loss is None
    assert output[0] is output.loss


def test_generate_makes_one_pass_in_training():
    class Generator(toys.Toy):
        def generate(self, x):
            return self(x)

    model = wrap_multicycle(Generator(), 2)
    x = toys.images()
    assert torch.equal(model.generate(x), run_cycles(model, x).outputs[0])
    assert len(model(x).outputs) == 2


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_cycle_with_their_own_weights(how, mode):
    model = wrap_multicycle(toys.BatchNormToy(), 2).train(mode)
    twin = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}[how](
        model
    )
    assert type(twin) is type(model) and list(twin.state_dict()) == list(model.state_dict())
    assert twin.training is mode
    expected = run_cycles(copy.deepcopy(model), toys.images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the copy must not look at these
    for found, output in zip(run_cycles(twin, toys.images()).outputs, expected.outputs, strict=True):
        assert torch.equal(found, output)
    assert hooks(twin.eval()) == 0 and not patches(twin)
    assert type(unwrap_multicycle(twin)) is toys.BatchNormToy
    assert hooks(model) > 0 or not mode


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_timm_ema_of_a_wrapped_model_follows_it():
    from timm.utils import ModelEmaV3

    model = wrap_multicycle(toys.Toy(), 2)
    ema = ModelEmaV3(model, decay=0.0)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    ema.update(model)
    x = toys.images()
    assert torch.equal(ema.module.eval()(x), model.eval()(x))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycles", [0, -1, 1.5, "2", True, None])
@pytest.mark.parametrize("name", ["cycles", "inference_cycles"])
def test_counts_below_one_or_not_whole_are_refused(name, cycles):
    with pytest.raises(CycleError, match=rf"{name} is a whole number of at least 1"):
        wrap_multicycle(toys.Toy(), **{name: cycles})


def test_bad_counts_are_refused_between_steps_too():
    model = wrap_multicycle(toys.Toy(), 2)
    with pytest.raises(CycleError, match=r"set_cycles.*at least 1"):
        set_cycles(model, 0)
    with pytest.raises(CycleError, match=r"run_cycles.*at least 1"):
        run_cycles(model, toys.images(), cycles=0)


def test_wrapping_twice_is_refused():
    model = wrap_multicycle(toys.Toy(), 2)
    with pytest.raises(CycleError, match=r"Toy is wrapped already.*set_cycles.*unwrap_multicycle"):
        wrap_multicycle(model, 3)
    with pytest.raises(CycleError, match=r"Sequential is wrapped already, at '0'"):
        wrap_multicycle(nn.Sequential(model), 2)


def test_a_compiled_model_is_refused():
    with pytest.raises(CycleError, match=r"OptimizedModule.*wrap first, then torch.compile"):
        wrap_multicycle(torch.compile(toys.Toy()), 2)
    model = toys.Toy()
    model.compile()
    with pytest.raises(CycleError, match=r"Toy was compiled by model.compile\(\): wrap first"):
        wrap_multicycle(model, 2)


def test_a_model_with_a_forward_of_its_own_is_refused():
    model = toys.Toy()
    model.forward = lambda x: x
    with pytest.raises(CycleError, match=r"Toy carries a forward on the object.*Wrap before accelerator.prepare"):
        wrap_multicycle(model, 2)


def test_a_forward_put_on_the_object_later_survives_unwrapping():
    model = toys.Toy()
    expected = model(toys.images())
    wrap_multicycle(model, 2)
    inner = model.forward
    model.forward = lambda x: inner(x)
    assert len(model(toys.images()).outputs) == 2
    assert torch.equal(unwrap_multicycle(model)(toys.images()), expected)


def test_data_parallel_is_refused_at_both_ends():
    with pytest.raises(CycleError, match=r"DataParallel.*DistributedDataParallel"):
        wrap_multicycle(nn.DataParallel(toys.Toy()), 2)
    replica = wrap_multicycle(toys.Toy(), 2)
    replica._is_replica = True  # what nn.DataParallel sets on the copies it runs in threads
    with pytest.raises(CycleError, match=r"Toy runs in several threads.*DistributedDataParallel"):
        replica(toys.images())


def test_what_is_no_module_is_refused():
    with pytest.raises(CycleError, match=r"torch.nn.Module and got function"):
        wrap_multicycle(lambda x: x, 2)


def test_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still met
        script = torch.jit.trace(toys.Toy(), toys.images())
    with pytest.raises(CycleError, match=r"TorchScript.*wrap the Python model"):
        wrap_multicycle(script, 2)


def test_a_loss_that_is_no_cycle_loss_is_refused():
    with pytest.raises(CycleError, match=r"give a CycleLoss"):
        wrap_multicycle(toys.Toy(), 2, loss=nn.functional.cross_entropy)


def test_functions_that_need_a_wrapped_model_say_so():
    with pytest.raises(CycleError, match=r"set_cycles\(Toy\) needs one model.*found 0: call wrap_multicycle"):
        set_cycles(toys.Toy(), 2)
    with pytest.raises(CycleError, match=r"run_cycles.*found 2"):
        run_cycles(nn.ModuleList([wrap_multicycle(toys.Toy()), wrap_multicycle(toys.Toy())]))
    with pytest.raises(CycleError, match=r"Toy is not a wrapped model.*accelerator.unwrap_model"):
        unwrap_multicycle(toys.Toy())


def test_every_public_name_is_documented():
    for name in cyclekd.__all__:
        assert name == "__version__" or getattr(cyclekd, name).__doc__, name


@pytest.mark.parametrize("order", ["wrap first", "peft first"])
def test_peft_adapters_train_in_cycles_and_merge_into_the_base(order):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["mix"], init_lora_weights=False)
    if order == "wrap first":
        model = peft.get_peft_model(wrap_multicycle(toys.Toy(), 2), config)
    else:
        model = wrap_multicycle(peft.get_peft_model(toys.Toy(), config), 2)
    x = toys.images()
    set_cycles(model, 3)
    output = model.train()(x)
    output.outputs[2].sum().backward()
    assert len(output.outputs) == 3
    assert all((p.grad is not None) == ("lora" in name) for name, p in model.named_parameters())
    expected = model.eval()(x)
    if order == "wrap first":
        base = unwrap_multicycle(model.merge_and_unload())
    else:
        base = unwrap_multicycle(model).merge_and_unload()
    assert type(base) is toys.Toy
    torch.testing.assert_close(base(x), expected)


class KeepingFile(toys.Toy):
    """Holds something that cannot be copied, and says so."""

    def __init__(self):
        super().__init__()
        self.log = open(os.devnull)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "log"}


class Forgetful(toys.Toy):
    """Is copied by its weights alone."""

    def __getstate__(self):
        return {"weights": self.state_dict()}


class Reducing(toys.Toy):
    def __reduce__(self):
        return Reducing, ()


class SelfCopying(toys.Toy):
    def __deepcopy__(self, memo):
        return type(self)()


def test_a_model_is_copied_as_it_says_itself():
    twin = copy.deepcopy(wrap_multicycle(KeepingFile(), 2))
    assert not hasattr(twin, "log") and len(twin(toys.images()).outputs) == 2


@pytest.mark.parametrize(
    ("make", "method"), [(Forgetful, "__getstate__"), (Reducing, "__reduce__"), (SelfCopying, "__deepcopy__")]
)
def test_a_copy_that_would_train_without_cycles_is_refused(make, method):
    with pytest.raises(CycleError, match=rf"{make.__name__} says by its own {method}.*unwrap_multicycle"):
        copy.deepcopy(wrap_multicycle(make(), 2))


def test_a_model_made_by_the_class_of_a_wrapped_one_is_not_wrapped_and_can_be():
    fresh = type(wrap_multicycle(toys.Toy(), 2))()
    assert type(fresh) is toys.Toy
    assert len(wrap_multicycle(fresh, 3)(toys.images()).outputs) == 3


def test_a_class_that_allows_no_subclass_is_refused():
    class Registered(toys.Toy):
        def __init_subclass__(cls, *, name):
            super().__init_subclass__()

    with pytest.raises(CycleError, match="Registered allows no subclass of itself"):
        wrap_multicycle(Registered(), 2)
