"""The U-Net as an OpenVINO model: what the extra ``[openvino]`` is for."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import openvino as ov
import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock
from openvino import opset13 as ops

from segqc.networks.plan import Triple
from segqc.networks.unet import MeanOfNetworks, StemUNet

Node: TypeAlias = ov.Output

_SPATIAL: Final = (2, 3, 4)
_THROUGH_PLANE_FIRST: Final = (0, 1, 4, 2, 3)
_BACK: Final = (0, 1, 3, 4, 2)


class OpenVinoNetwork:
    """A network compiled for the CPU; windows of any shape go through it. Threads may share it.

    Inside, the through-plane axis comes first: convolutions run fastest along the last axis, which is the shortest one
    in the canonical frame.
    """

    def __init__(self, network: StemUNet | MeanOfNetworks, in_channels: int, *, bfloat16: bool, threads: int) -> None:
        members = [m for m in network.modules() if isinstance(m, StemUNet)]
        x = ops.parameter([-1, in_channels, -1, -1, -1], np.float32)
        total = _network(x.output(0), members[0])
        for member in members[1:]:
            total = ops.add(total, _network(x.output(0), member)).output(0)
        mean = ops.multiply(total, np.float32(1 / len(members)))
        self._compiled = ov.Core().compile_model(
            ov.Model([mean], [x]),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._out_channels = int(mean.output(0).get_partial_shape()[1].get_length())
        self._requests = threading.local()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, out_channels, a, b, c) of a batch (N, in_channels, a, b, c), one after the other."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        windows = x.permute(_THROUGH_PLANE_FIRST).contiguous()
        answers = torch.empty(len(x), self._out_channels, *x.shape[2:])
        for window, answer in zip(windows.split(1), answers.split(1), strict=True):
            found = self._requests.own.infer([window.numpy()], share_inputs=True, share_outputs=True)
            answer.copy_(torch.from_numpy(found[0]).permute(_BACK))  # the next one is written over what is shared
        return answers


def _network(x: Node, network: StemUNet) -> Node:
    """`StemUNet.forward`."""
    logits = _u_net(x, network)
    if network.mask_skip is None:
        return logits
    masks = ops.slice(x, [1], [int(x.get_partial_shape()[1].get_length())], [1], [1]).output(0)
    trust = network.mask_skip.trust
    said = _biased(ops.multiply(masks, _per_channel(2 * trust)).output(0), -trust)
    return ops.add(logits, said).output(0)


def _u_net(x: Node, network: StemUNet) -> Node:
    """Its U-Net: DynUNet's, the stem and its inverse."""
    unet, blocks = network.unet, math.prod(network.stem)
    if blocks > 1:
        x = _convolved(x, _one_hot(int(x.get_partial_shape()[1].get_length()), network.stem), network.stem)
    x = _block(x, unet.input_block)
    skips = []
    for block in [*unet.downsamples, unet.bottleneck]:
        skips.append(x)
        x = _block(x, block)
    for block in unet.upsamples:
        up = block.transp_conv.conv
        x = ops.concat([_transposed(x, up.weight, up.stride), skips.pop()], axis=1).output(0)
        x = _block(x, block.conv_block)
    last = unet.output_block.conv.conv
    x = _biased(_convolved(x, last.weight), last.bias)
    if network.smoothing is None:
        return x
    x = _transposed(x, _one_hot(last.out_channels // blocks, network.stem), network.stem)
    reach = [0, 0, *(n // 2 for n in _turned(network.smoothing.kernel_size))]
    padded = ops.pad(x, reach, reach, "edge").output(0)
    return _biased(_convolved(padded, network.smoothing.weight), network.smoothing.get_parameter("bias"))


def _block(x: Node, block: UnetBasicBlock) -> Node:
    """Two convolutions with instance norm and leaky ReLU."""
    for convolution, norm in ((block.conv1.conv, block.norm1), (block.conv2.conv, block.norm2)):
        x = _convolved(x, convolution.weight, convolution.stride, convolution.padding)
        x = ops.mvn(x, np.array(_SPATIAL), True, norm.eps, "inside_sqrt").output(0)
        x = ops.multiply(x, _per_channel(norm.weight)).output(0)
        x = _biased(x, norm.bias)
        x = ops.prelu(x, np.float32(block.lrelu.negative_slope)).output(0)
    return x


def _convolved(
    x: Node, weight: torch.Tensor, stride: Sequence[int] = (1, 1, 1), padding: Sequence[int] = (0, 0, 0)
) -> Node:
    pads = list(_turned(padding))
    return ops.convolution(x, _kernel(weight), list(_turned(stride)), pads, pads, [1, 1, 1]).output(0)


def _transposed(x: Node, weight: torch.Tensor, stride: Sequence[int]) -> Node:
    return ops.convolution_backprop_data(x, _kernel(weight), list(_turned(stride))).output(0)


def _biased(x: Node, bias: torch.Tensor) -> Node:
    return ops.add(x, _per_channel(bias)).output(0)


def _one_hot(channels: int, factors: Triple) -> torch.Tensor:
    """The kernel of `space_to_depth` as a convolution, and of `depth_to_space` as a transposed one."""
    blocks = math.prod(factors)
    kernel = torch.eye(blocks).reshape(blocks, *factors)
    weight = torch.zeros(channels, blocks, channels, *factors)
    for channel in range(channels):
        weight[channel, :, channel] = kernel
    return weight.reshape(channels * blocks, channels, *factors)


def _kernel(weight: torch.Tensor) -> Node:
    return ops.constant(weight.detach().cpu().permute(_THROUGH_PLANE_FIRST).contiguous().numpy()).output(0)


def _per_channel(values: torch.Tensor) -> Node:
    return ops.constant(values.detach().cpu().reshape(1, -1, 1, 1, 1).numpy()).output(0)


def _turned(sizes: Sequence[int]) -> tuple[int, int, int]:
    return sizes[2], sizes[0], sizes[1]
