"""Fine-tuning: learning rates layer by layer, frozen parts, new heads."""

import numpy as np
import pytest
from runs import images, model

import tinyvit as package
from tinyvit import TrainStep, optim
from tinyvit import functional as F
from tinyvit.engine import tensor
from tinyvit.optim.param_groups import layer_number
from tinyvit.training.finetune import freeze, init_head, order_head

# --- learning rates -----------------------------------------------------------------------------------------------


def beit_layer(name, num_layers):
    """The rule of BEiT's optim_factory.py (get_num_layer_for_vit), in its own words; num_layers is depth + 2."""
    if name in ("cls_token", "mask_token", "pos_embed", "dist_token", "reg_token"):
        return 0
    if name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return num_layers - 1


@pytest.mark.parametrize("overrides", [{}, {"distilled": True}, {"representation_size": 8}, {"depth": 12},
                                       {"global_pool": "seq", "class_token": False},
                                       {"global_pool": "avg", "reg_tokens": 2, "init_values": 0.1}])  # fmt: skip
def test_layers_are_numbered_as_in_beit(overrides):
    net = model(**overrides)
    depth = net.config.depth
    for name, _ in net.named_parameters():
        assert layer_number(name, depth) == beit_layer(name, depth + 2), name


def test_learning_rates_fall_layer_by_layer_and_the_head_has_its_own():
    net = model(distilled=True)
    scales, decays = {}, {}
    names = {id(p): name for name, p in net.named_parameters()}
    for group in optim.param_groups(net, 0.05, layer_decay=0.5, head_lr_scale=10):
        for p in group["params"]:
            scales[names[id(p)]], decays[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    assert scales.keys() == set(names.values())
    expected = {"cls_token": 1 / 16, "patch_embed.proj.weight": 1 / 16, "blocks.0.attn.qkv.weight": 1 / 8,
                "blocks.1.norm1.bias": 1 / 4, "blocks.2.mlp.fc2.bias": 1 / 2, "norm.weight": 1, "head.weight": 10,
                "head_dist.bias": 10}  # fmt: skip
    assert {name: scales[name] for name in expected} == expected
    plain = optim.param_groups(net, 0.05)
    assert len(plain) == 2 and all(group["lr_scale"] == 1 for group in plain)
    for group in plain:
        assert all(decays[names[id(p)]] == group["weight_decay"] for p in group["params"])
    for wrong in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="layer_decay must lie above 0"):
            optim.param_groups(net, 0.05, layer_decay=wrong)


def test_a_step_moves_each_layer_by_its_own_rate():
    """Adam's first step is the learning rate itself, whatever the gradient: sign(g) lr."""
    net = model()
    init_head(net, "normal")
    before = net.state_dict()
    opt = optim.AdamW(optim.param_groups(net, 0.0, layer_decay=0.5, head_lr_scale=4), lr=1e-3, eps=1e-30)
    TrainStep(net, opt, threads=1)(images(), np.arange(6) % 5)
    after = net.state_dict()
    rates = {"patch_embed.proj.weight": 1e-3 / 16, "blocks.1.mlp.fc1.weight": 1e-3 / 4, "head.bias": 4e-3}
    for name, rate in rates.items():
        assert np.allclose(np.abs(after[name] - before[name]), rate, rtol=1e-2), name


# --- a new head ---------------------------------------------------------------------------------------------------


def test_a_new_head_is_zero_or_truncated_normal():
    net = model(embed_dim=256, num_classes=100, num_heads=4, distilled=True)
    body = {name: a for name, a in net.state_dict().items() if not name.startswith("head")}
    init_head(net, "normal", seed=3)
    for head in (net.head, net.head_dist):
        weight = head.weight.numpy()
        assert np.abs(weight).max() <= 0.04 and weight.std() == pytest.approx(0.02 * 0.8796, rel=0.03)
        assert abs(weight.mean()) < 5e-4 and not head.bias.numpy().any() and weight.dtype == np.float32
    assert not np.array_equal(net.head.weight.numpy(), net.head_dist.weight.numpy())
    first = net.head.weight.numpy()
    init_head(net, "normal", seed=3)
    assert np.array_equal(first, net.head.weight.numpy())
    init_head(net, "normal", seed=4)
    assert not np.array_equal(first, net.head.weight.numpy())
    init_head(net, "zeros")
    assert not net.head.weight.numpy().any() and not net.head_dist.weight.numpy().any()
    assert all(np.array_equal(net.state_dict()[name], a) for name, a in body.items())


def test_a_new_head_resembles_no_other_weights():
    net = model(embed_dim=64, num_heads=4, num_classes=5, seed=7)
    init_head(net, "normal", seed=7)
    head = net.head.weight.numpy().ravel()  # (320,)
    for name, p in net.named_parameters():
        other = p.numpy().ravel()[: head.size]
        if name != "head.weight" and other.size == head.size and other.std() > 0:
            assert abs(np.corrcoef(head, other)[0, 1]) < 0.3, name


def test_classes_in_another_order_take_their_rows_along():
    net = model(distilled=True, num_classes=3)
    init_head(net, "normal")
    before = net.eval()(images()).numpy()
    order_head(net, [2, 0, 1])
    assert np.array_equal(net(images()).numpy(), before[:, [2, 0, 1]])


# --- frozen parts -------------------------------------------------------------------------------------------------


def backward_operations(monkeypatch, net, call):
    """The names of the operations whose vjp ran in `call()`, and how many blocks' outputs went on the tape."""
    ran = []

    class Counted(tensor.Node):
        __slots__ = ()

        def __init__(self, name, inputs, vjp, *rest):
            super().__init__(name, inputs, lambda *dy: (ran.append(name), vjp(*dy))[1], *rest)

    monkeypatch.setattr(tensor, "Node", Counted)
    call()
    monkeypatch.undo()
    return sorted(ran)


@pytest.mark.parametrize("part", [0, 1, 2, 3, "all-but-head"])
def test_no_backward_pass_runs_in_frozen_blocks(monkeypatch, part):
    """What runs backward is what would run in a model that has nothing but the thawed blocks."""
    net = model(proj_drop_rate=0.1, drop_path=0.2)
    init_head(net, "normal")
    freeze(net, part)
    before = net.state_dict()
    step = TrainStep(net, optim.SGD(optim.param_groups(net, 0.1), lr=0.1), threads=1)
    ran = backward_operations(monkeypatch, net, lambda: step(images(), np.arange(6) % 5))
    assert ran.count("qkv_attention") == (0 if part == "all-but-head" else 3 - part)
    if part == "all-but-head":
        assert set(ran) <= {"linear", "cross_entropy", "multiply"} and ran.count("linear") == 1
    after = net.state_dict()
    for name in after:
        thawed = name.startswith("head") if part == "all-but-head" else layer_number(name, 3) > part
        assert np.array_equal(before[name], after[name]) != thawed, name


def test_frozen_parts_compute_as_in_evaluation():
    rates = dict(proj_drop_rate=0.5, pos_drop_rate=0.5, drop_path=0.5, drop_rate=0.5)
    net = model(**rates)
    init_head(net, "normal")
    freeze(net, 2)
    assert not net.pos_drop.training and not net.blocks[1].mlp.drop.training
    assert net.blocks[2].mlp.drop.training and net.head_drop.training and net.training
    package.predict(net, images())  # evaluation leaves the modes as they were
    assert not net.pos_drop.training and net.blocks[2].mlp.drop.training
    net = model(**rates)
    freeze(net, "all-but-head")
    assert not net.blocks[2].drop_path.training and net.head_drop.training
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    for wrong in (4, -1, "head"):
        with pytest.raises(ValueError, match="expected all-but-head or 0 to 3 blocks"):
            freeze(net, wrong)


@pytest.mark.parametrize("part", [1, "all-but-head"])
def test_a_step_leaves_frozen_parts_of_a_loaded_model_in_evaluation_mode(trained, part):
    net = package.load_model(trained / "run", drop_path=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5)
    assert not net.training
    freeze(net, part)
    step = TrainStep(net, optim.SGD(optim.param_groups(net, 0.0), lr=0.1), threads=1)
    step(np.zeros((4, 3, 32, 32), np.float32), np.arange(4) % 3)
    assert net.training and net.head_drop.training
    assert not net.pos_drop.training and not any(m.training for _, m in net.blocks[0].named_modules())
    assert net.blocks[1].mlp.drop.training == (part == 1)
    net.requires_grad_(True).train()
    assert all(module.training for _, module in net.named_modules())


def test_python_users_freeze_with_requires_grad_():
    net = model()
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    F.cross_entropy(net(images()), np.arange(6) % 5).backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
