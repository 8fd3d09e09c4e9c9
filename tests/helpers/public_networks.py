"""Networks of public packages and of ``users_networks.py``, with the number of Ghost modules, bottlenecks and modules left alone."""

import copy

import pytest
import users_networks

from ghostfused.models import paper, seed


def timm_model(name):
    return pytest.importorskip("timm", reason="timm's own models are what is fused").create_model(name, num_classes=5)


def yolo(cfg, fused=False):
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason="ultralytics' own models are what is fused")
    model = tasks.DetectionModel(copy.deepcopy(cfg), nc=5, verbose=False)
    return model.eval().fuse(verbose=False) if fused else model


FAMILIES = {
    "seed": (lambda: seed.GhostNet(num_classes=5), 30, 15, 0),
    "paper": (lambda: paper.GhostNet(num_classes=5, width=0.5), 32, 16, 0),
    "official_v1": (users_networks.official, 8, 4, 0),
    "official_v2": (lambda: users_networks.official(mode="attn"), 8, 4, 0),
    "nanodet": (users_networks.nanodet, 4, 2, 0),
    "ghostfacenets": (users_networks.ghostfacenets, 4, 2, 0),
    **{f"timm_{name}": (lambda name=name: timm_model(name), 32, 16, 0) for name in (
        "ghostnet_050", "ghostnet_100", "ghostnetv2_100", "ghostnetv3_050", "ghostnetv3_100",
    )},
    "yolov8n_ghost": (lambda: yolo("yolov8n-ghost.yaml"), 21, 10, 5),
    "yolov8n_ghost_fused": (lambda: yolo("yolov8n-ghost.yaml", fused=True), 21, 10, 5),
    "yolov5s_ghost": (lambda: yolo(users_networks.YOLOV5S_GHOST), 24, 11, 6),
    "yolov5s_ghost_fused": (lambda: yolo(users_networks.YOLOV5S_GHOST, fused=True), 24, 11, 6),
}  # fmt: skip
