"""Peers that are inference engines outside of PyTorch. Each gets the module as ONNX, on as many threads as PyTorch."""

from __future__ import annotations

import importlib
import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .cases import Setting
from .peers import Peer, Run

_TYPES = {torch.float32: "float32", torch.float16: "float16"}


def missing(*packages: str) -> str | None:
    """Which of ``packages`` can't be imported, and why."""
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:  # a broken install raises anything
            return f"{package} can't be imported ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    return None


def to_onnx(module: nn.Module, x: Tensor) -> bytes:
    """``module`` for inputs of exactly x's shape."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is deprecated; the other takes 3 s a module where it takes 0.1
        names = {"input_names": ["x"], "output_names": ["out"]}
        torch.onnx.export(module, (x,), buffer, dynamo=False, **names)  # type: ignore[arg-type]
    return buffer.getvalue()


class Engine(Peer):
    device: str
    packages: tuple[str, ...]

    def unavailable(self, setting: Setting) -> str | None:
        if reason := super().unavailable(setting) or missing(*self.packages):
            return reason
        if setting.device != self.device:
            return f"runs on {self.device}"
        if setting.layout != "nchw":
            return "takes NCHW"
        if setting.torch_dtype not in _TYPES:
            return f"no {setting.dtype}"
        return None


class OnnxRuntime(Engine):
    """ONNX Runtime with its default options, by IO binding: no copies of input or output."""

    def __init__(self, provider: str):
        self.name = "onnxruntime" if provider == "CPU" else f"onnxruntime_{provider.lower()}"
        self.device = "cpu" if provider == "CPU" else "cuda"
        self.slow_to_prepare = provider == "TensorRT"
        self.provider = f"{provider}ExecutionProvider"
        self.packages = ("onnx", "onnxruntime")

    def unavailable(self, setting: Setting) -> str | None:
        reason = super().unavailable(setting)
        if reason is None:
            import onnxruntime

            available = onnxruntime.get_available_providers()
            if self.provider not in available:
                reason = f"this onnxruntime has no {self.provider}"
        return reason

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        import numpy as np
        import onnxruntime as ort

        with torch.no_grad():
            out = module(x).contiguous()
        session_options, run_options = ort.SessionOptions(), ort.RunOptions()
        session_options.intra_op_num_threads = torch.get_num_threads()
        session_options.log_severity_level = 3
        # its threads spin during a run, as by default, but not on into the next peer's
        session_options.add_session_config_entry("session.force_spinning_stop", "1")
        provider_options = {}
        if self.device == "cuda":  # on PyTorch's stream and without a synchronization, so that its events are in order
            provider_options["user_compute_stream"] = str(torch.cuda.current_stream().cuda_stream)
            run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.provider == "TensorrtExecutionProvider" and x.dtype == torch.float16:
            provider_options["trt_fp16_enable"] = "1"
        providers: list = [(self.provider, provider_options)]
        if self.device == "cuda":
            providers.append("CPUExecutionProvider")  # for what the GPU's provider leaves
        session = ort.InferenceSession(to_onnx(module, x), session_options, providers=providers)
        kind = np.dtype(_TYPES[x.dtype]).type
        bindings = {}

        def bind(x: Tensor):
            binding = session.io_binding()
            binding.bind_input("x", self.device, 0, kind, tuple(x.shape), x.data_ptr())
            binding.bind_output("out", self.device, 0, kind, tuple(out.shape), out.data_ptr())
            return binding

        def run(x: Tensor) -> Tensor:
            if x.data_ptr() not in bindings:
                bindings[x.data_ptr()] = bind(x)
            session.run_with_iobinding(bindings[x.data_ptr()], run_options)
            return out

        return run


class OpenVino(Engine):
    """OpenVINO in float32, or in the precision that it chooses by itself (bfloat16 where the CPU has it)."""

    device = "cpu"
    packages = ("onnx", "openvino")

    def __init__(self, precision: str):
        self.precision = precision
        self.name = "openvino" if precision == "float32" else "openvino_default"

    def unavailable(self, setting: Setting) -> str | None:
        reason = super().unavailable(setting)
        return reason or (f"no {setting.dtype}" if setting.dtype != "float32" else None)

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        import openvino as ov

        settings: dict = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        if self.precision == "float32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        core = ov.Core()
        # In a thread of its own: OpenVINO puts another signal stack in place of the calling thread's, and where two models
        # are freed in the order of their making, one that is gone: the next signal (a child's end) kills the process.
        with ThreadPoolExecutor(1) as thread:
            model = core.read_model(to_onnx(module, x))
            compiled = thread.submit(core.compile_model, model, "CPU", settings).result()
        chosen = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.computes_in = {"bf16": torch.bfloat16, "f16": torch.float16}.get(chosen)
        request = compiled.create_infer_request()
        inputs: dict[int, ov.Tensor] = {}

        def run(x: Tensor) -> Tensor:
            if x.data_ptr() not in inputs:
                inputs[x.data_ptr()] = ov.Tensor(x.numpy(), shared_memory=True)
            return torch.from_numpy(request.infer([inputs[x.data_ptr()]], share_outputs=True)[0])

        return run


class TorchTensorRT(Engine):
    """Torch-TensorRT, by torch.export."""

    name = "torch_tensorrt"
    device = "cuda"
    slow_to_prepare = True
    packages = ("tensorrt", "torch_tensorrt")

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        import torch_tensorrt

        return torch_tensorrt.compile(module, ir="dynamo", inputs=[x], enabled_precisions={x.dtype})
