"""A captured GhostNet behind HTTP: who posts an image gets its classes, as JSON::

    pip install starlette uvicorn
    python examples/serve.py --pretrained
    curl --data-binary @photo.jpg http://localhost:8000/classify

The event loop takes requests, and a pool of threads answers them: any number of threads may call a captured network at once.
Each image is computed by one thread, and there is a thread for each core, so that nobody waits for another in the middle
of an image. ``--unfused`` serves PyTorch's own forward, for comparison.
"""

from __future__ import annotations

import argparse
import io
import os
from asyncio import get_running_loop
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
import uvicorn
from PIL import Image, UnidentifiedImageError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import ghostfused
from ghostfused.cli.verify import calibrate


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ghostnet_100", help="one of timm.list_models('*ghost*')")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--checkpoint", type=Path, help="weights to load; with neither, they are random")
    parser.add_argument("--size", type=int, help="height and width of the input; default: the model's own")
    parser.add_argument("--top", type=int, default=5, help="classes in an answer")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that answer; default: the cores")
    parser.add_argument("--unfused", action="store_true", help="by PyTorch alone")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args(argv)


class Classifier:
    """From a file's bytes to classes; any number of threads may call it at once."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(0)
        checkpoint = str(options.checkpoint) if options.checkpoint else ""
        model = timm.create_model(options.model, pretrained=options.pretrained, checkpoint_path=checkpoint).eval()
        if not (options.pretrained or options.checkpoint):
            calibrate(model, torch.randn(2, 3, 64, 64))
        config = timm.data.resolve_model_data_config(model)
        if options.size:
            config["input_size"] = (3, options.size, options.size)
        self.transform = timm.data.create_transform(**config)
        example = torch.zeros(1, *config["input_size"])
        self.forward = model if options.unfused else ghostfused.capture(model, example, partial=True)
        self.top = options.top

    @torch.inference_mode()
    def __call__(self, file: bytes) -> dict:
        with Image.open(io.BytesIO(file)) as image:
            x = self.transform(image.convert("RGB"))
        scores, classes = self.forward(x[None]).softmax(1)[0].topk(self.top)
        return {"classes": classes.tolist(), "scores": scores.tolist()}


def app(classifier: Classifier, pool: ThreadPoolExecutor) -> Starlette:
    async def classify(request: Request) -> JSONResponse:
        file = await request.body()
        try:
            return JSONResponse(await get_running_loop().run_in_executor(pool, classifier, file))
        except (UnidentifiedImageError, OSError) as error:  # OSError: one that is cut off
            return JSONResponse({"error": f"body: expected an image, got {len(file)} bytes: {error}"}, 400)

    return Starlette(routes=[Route("/classify", classify, methods=["POST"])])


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    torch.set_num_threads(1)  # before the pool's threads begin, which take it over
    with ThreadPoolExecutor(options.workers) as pool:
        served = app(Classifier(options), pool)
        uvicorn.run(served, host=options.host, port=options.port, access_log=False)


if __name__ == "__main__":
    main()
