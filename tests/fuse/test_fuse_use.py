"""What people do with a network after fusing it: copy, save, cast, average, distribute, train it, alone and in timm's and
ultralytics' loops."""

import copy
import io
import pickle

import pytest
import torch
from networks import assert_same, assert_same_training, first, fused_inside, gradients, network
from torch import nn

import ghostfused
from ghostfused import fuse, fuse_with_report, unfuse
from ghostfused.cli.verify import network_verdict
from ghostfused.numerics import TOLERANCES, relative_error

# ---- copies and files


def through_file(fused):
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file], ids=["copy", "pickle", "file"]
)
@pytest.mark.parametrize("name", ["ghostnet", "attention", "yolov8n-ghost"])
def test_copies(duplicate, name):
    model, x = network(name), torch.randn(2, 3, 64, 64)
    fused = fuse(model)
    twin = duplicate(fused)
    assert fused_inside(twin) == fused_inside(fused) > (0, 0)
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
        assert_same(twin(x), model, x)
        original = unfuse(twin)
        assert torch.equal(first(original(x)), first(model(x)))
    assert fused_inside(original) == (0, 0)


@pytest.mark.parametrize("name", ["ghostnet", "attention", "yolov8n-ghost"])
def test_state_dict_goes_both_ways_by_way_of_a_file(name):
    model, x = network(name), torch.randn(2, 3, 64, 64)
    buffer = io.BytesIO()

    def carry(source, target):
        buffer.seek(0), buffer.truncate()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer, weights_only=True), strict=True)

    def scrambled():
        other = network(name)
        with torch.no_grad():
            for t in (*other.parameters(), *other.buffers()):
                t.add_(1)
        return other

    for source, target in ((model, fuse(scrambled())), (fuse(model), scrambled())):
        carry(source, target)
        assert list(target.state_dict()) == list(model.state_dict())
        with torch.no_grad():
            assert_same(target(x), model, x)


def test_weights_that_are_assigned_take_effect():
    model, x = network("small"), torch.randn(2, 3, 16, 12)
    fused = fuse(model)
    other = {k: v * 1.25 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    for each in (model, fused):
        each.load_state_dict(other, assign=True)
    with torch.no_grad():
        assert_same(fused(x), model, x)


# ---- dtypes and layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["small", "attention"])
def test_cast_after_fusing(name, dtype):
    model, x = network(name), torch.randn(2, 3, 24, 20)
    fused = fuse(model)
    verdict = network_verdict(model, fused, x, dtype)
    assert verdict.ok, verdict
    with torch.inference_mode():
        assert fused.to(dtype)(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["small", "attention", "ghostnet"])
def test_channels_last(name):
    model, x = network(name), torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    fused = fuse(model).to(memory_format=torch.channels_last)
    layouts = []
    for m in fused.modules():
        if isinstance(m, ghostfused.FusedGhostBottleneck):
            m.register_forward_hook(
                lambda m, x, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    with torch.no_grad():
        assert_same(fused(x), model, x)
    assert layouts
    assert all(layouts), "no layer falls back to NCHW"


def test_autocast():
    model, x = network("ghostnet"), torch.randn(2, 3, 64, 64)
    fused = fuse(model)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = fused(x), model(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    tolerance = TOLERANCES[torch.bfloat16]
    assert relative_error(ours, expected) <= max(tolerance.factor * relative_error(theirs, expected), tolerance.floor)


# ---- averages of weights


@pytest.mark.parametrize("kind", ["timm", "torch", "ultralytics"])
def test_averaged_models(kind):
    model, x = network("ghostnet"), torch.randn(2, 3, 64, 64)
    averages, models = [], [model, fuse(model)]
    for each in models:
        if kind == "timm":
            average = pytest.importorskip("timm.utils").ModelEmaV3(each, decay=0.5)
        elif kind == "torch":
            average = torch.optim.swa_utils.AveragedModel(each, use_buffers=True)
            average.update_parameters(each)
        else:
            average = pytest.importorskip("ultralytics.utils.torch_utils").ModelEMA(each, decay=0.5, tau=1)
        with torch.no_grad():
            for p in each.parameters():
                p.mul_(1.1)
        (average.update_parameters if kind == "torch" else average.update)(each)
        averages.append(
            {"timm": lambda a: a.module, "torch": lambda a: a.module, "ultralytics": lambda a: a.ema}[kind](average)
        )
    theirs, ours = averages
    assert fused_inside(ours) == fused_inside(models[1]) > (0, 0)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        assert_same(ours(x), theirs, x)
        difference = (theirs(x) - model(x)).abs().max()
    assert difference > 1e-4, "the average is not the last model"


# ---- training


def test_distributed_data_parallel(training, tmp_path):
    """Alone in its group, a replica computes what the network itself does, to the bit."""
    fused, x = fuse(network("ghostnet")).train(training), torch.randn(2, 3, 64, 64)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        results = []
        for wrap in (lambda m: m, nn.parallel.DistributedDataParallel):
            twin = copy.deepcopy(fused)
            torch.manual_seed(3)  # dropout
            out = wrap(twin)(x)
            out.square().sum().backward()
            results.append((out, gradients(twin), *twin.buffers()))
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(ours, alone) for alone, ours in zip(*results, strict=True))


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize("frozen", [False, True])
def test_training_by_timms_optimizer_and_scheduler(frozen):
    """Two steps; with frozen statistics the fused forward runs and backward goes through it."""
    pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    model = network("ghostnet").double()
    images, labels = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 3, 1, 6])
    results = []
    fused = fuse(model)
    for each in (model, fused):
        torch.manual_seed(5)
        optimizer = create_optimizer_v2(each, opt="adamw", lr=1e-3, weight_decay=0.05)
        scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4)
        average = ModelEmaV3(each, decay=0.9)
        losses = []
        for epoch in range(2):
            each.train()
            if frozen:
                for m in each.modules():
                    if isinstance(m, nn.BatchNorm2d):
                        m.eval()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(each(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(each.parameters(), 1.0)
            optimizer.step()
            average.update(each)
            scheduler.step(epoch + 1)
            losses.append(float(loss.detach()))
        results.append(losses)
        each.eval()
    assert results[0][0] != pytest.approx(results[0][1], abs=1e-3), "training did something"
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(fused(images), model(images), rtol=1e-4, atol=1e-4)


# ---- ultralytics


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))  # unless it is imported already
        yield pytest.importorskip("ultralytics")


def test_ultralytics_own_fuse_before_and_after_ours(ultralytics):
    model, x = network("yolov8n-ghost"), torch.rand(1, 3, 64, 64)
    for fused in (
        fuse(model).fuse(verbose=False),  # folds the norms into the convolutions
        fuse(network("yolov8n-ghost").fuse(verbose=False)),
    ):
        assert fused_inside(fused)[0] == 26
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        with torch.no_grad():
            assert_same(fused(x), model, x)


def test_ultralytics_loss_and_a_step(ultralytics):
    from ultralytics.cfg import get_cfg

    model = network("yolov8n-ghost").float()
    model.args = get_cfg()
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.3, 0.3]])
    labels = {"cls": torch.tensor([[0.0], [1.0], [2.0]]), "bboxes": boxes, "batch_idx": torch.tensor([0.0, 0.0, 1.0])}

    def step(m, images):
        loss, _ = m({"img": images, **labels})  # as their trainer calls it
        loss.sum().backward()
        return loss

    assert_same_training(fuse(model), model, torch.rand(2, 3, 64, 64), step)


def test_timms_ghostnet_in_float32():
    model = network("ghostnet_100")

    def step(m, images):
        torch.manual_seed(3)  # dropout
        loss = nn.functional.cross_entropy(m(images), torch.tensor([2, 5]))
        loss.backward()
        return loss

    assert_same_training(fuse(model), model, torch.randn(2, 3, 64, 64), step)


def test_ultralytics_trainer(ultralytics, tmp_path):
    """Their whole loop (average, checkpoints, validation, stripping the optimizer) on a fused detector."""
    from PIL import Image
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):
        def get_model(self, cfg=None, weights=None, verbose=True):
            return fuse(super().get_model(cfg, weights, verbose), inplace=True)

    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        pixels = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"labels/{i}.txt").write_text("0 0.5 0.5 0.4 0.3\n1 0.3 0.3 0.2 0.2\n")
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [a, b]\n")
    yolo = ultralytics.YOLO("yolov8n-ghost.yaml", task="detect")
    yolo.train(
        trainer=Trainer, data=str(data), epochs=1, imgsz=64, batch=2, workers=0, device="cpu", plots=False,
        project=str(tmp_path), name="run", verbose=False,
    )  # fmt: skip
    trained = ultralytics.YOLO(tmp_path / "run/weights/best.pt")
    assert fused_inside(trained.model)[0] == 26
    model, x = unfuse(trained.model).float().eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_same(trained.model.eval()(x), model, x)
    (result,) = trained.predict(tmp_path / "images/0.png", imgsz=64, conf=1e-6, device="cpu", verbose=False)
    assert len(result.boxes) > 0


@pytest.mark.usefixtures("trained_by_kernels")
def test_a_second_fuse_changes_nothing_after_training():
    fused = fuse(network("small"))
    fused.train()(torch.randn(2, 3, 16, 12)).sum().backward()
    again, report = fuse_with_report(fused.eval())
    assert report == []
    assert fused_inside(again) == fused_inside(fused)
