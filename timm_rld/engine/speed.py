"""How large a network is, and how long it takes."""

from __future__ import annotations

import copy
import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..pairing import Normalize, Teacher

Network = tuple[nn.Module, Normalize]
SECONDS, ROUNDS, WARM_UP = 1.0, 30, 2  # of a batch size: at most, and rounds that do not count


def size_of(model: nn.Module, input_size: Sequence[int]) -> dict[str, Any]:
    """Return a network's `parameters`, `multiply_adds` of an image (None where they cannot be counted), and
    `weights_mb`: bytes of its state dict / 10⁶, about those of model.safetensors.

    Multiply-adds are half of what `torch.utils.flop_counter` counts: those of convolutions, matrix products and
    attention, and nothing of norms and activations. No tensor is computed: the pass runs on torch's meta device.

    Args:
        model: on any device, the meta device too.
        input_size: (C, H, W).
    """
    state = [v for v in model.state_dict().values() if isinstance(v, Tensor)]
    return {
        'parameters': sum(p.numel() for p in model.parameters()),
        'multiply_adds': _multiply_adds(model, input_size),
        'weights_mb': round(sum(v.numel() * v.element_size() for v in state) / 1e6, 3),
    }


@torch.no_grad()
def _multiply_adds(model: nn.Module, input_size: Sequence[int]) -> int | None:
    from torch.utils.flop_counter import FlopCounterMode

    meta = torch.device('meta')
    state = {k: v.to(meta) for k, v in (*model.named_parameters(), *model.named_buffers())}
    training = model.training
    try:
        with FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model.eval(), state, (torch.empty(1, *input_size, device=meta),))
        return int(counter.get_total_flops()) // 2
    except Exception:  # a network that makes tensors elsewhere, or looks into them
        return None
    finally:
        model.train(training)


def latencies(
    networks: dict[str, Network], input_size: Sequence[int], batch_sizes: Sequence[int], accelerator: Accelerator,
    channels_last: bool,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return what a batch takes, from uint8 pixels on the device to logits: the median of warm passes, in milliseconds.

    All are measured as this package runs a frozen network: batch norms folded, in the precision and memory layout of
    the run, not compiled. They take turns, so that variation in the machine's speed affects them alike. It lasts
    seconds, or a pass of each where that is longer.

    Args:
        networks: by name; they are copied.
        input_size: (C, H, W) of the pixels.
        batch_sizes: of the passes.
        accelerator: for device and precision.
        channels_last: the memory layout.

    Returns:
        For each network `latency_ms`, by batch size as a text, and `latency_device`.
    """
    device = accelerator.device
    frozen = {
        name: frozen_network(*network, input_size, channels_last).to(device) for name, network in networks.items()
    }
    found: dict[str, dict[str, float]] = {name: {} for name in networks}
    for batch_size in dict.fromkeys(batch_sizes):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (batch_size, *input_size), generator=generator, dtype=torch.uint8).to(device)

        def run(network: Teacher, pixels: Tensor = pixels) -> None:
            with accelerator.autocast():
                network(pixels)

        passes = {name: functools.partial(run, network) for name, network in frozen.items()}
        for name, ms in median_ms(passes, device).items():
            found[name][str(batch_size)] = ms
    return {name: {'latency_ms': ms, 'latency_device': device_name(device)} for name, ms in found.items()}


def frozen_network(model: nn.Module, normalize: Normalize, input_size: Sequence[int], channels_last: bool) -> Teacher:
    """Return a copy of a network, on the CPU, as this package runs one that is not trained: uint8 pixels to logits,
    batch norms folded.

    Args:
        input_size: (C, H, W) of the pixels.
        channels_last: the memory layout.
    """
    network = Teacher(copy.deepcopy(model).cpu(), copy.deepcopy(normalize).cpu())
    network.optimize_for_inference(tuple(input_size), channels_last)  # type: ignore[arg-type]
    return network


def median_ms(passes: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each of some passes, which take turns for about a second. Of passes so long
    that there is no time for a second one, the first counts."""
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    begin = time.perf_counter()
    for number in range(WARM_UP + ROUNDS):
        for name, run in passes.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - started)
        if number + 1 == WARM_UP and time.perf_counter() - begin < SECONDS:
            seconds = {name: [] for name in passes}
        if time.perf_counter() - begin > SECONDS:
            break
    return {name: float(f'{1000 * statistics.median(values):.4g}') for name, values in seconds.items()}


def device_name(device: torch.device) -> str:
    """Return a device's name, of a CPU with the number of its threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    name = platform.processor() or platform.machine()
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            name = next((line.partition(':')[2].strip() for line in f if line.startswith('model name')), name)
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f'{name}, {threads} thread{"s" if threads > 1 else ""}'
