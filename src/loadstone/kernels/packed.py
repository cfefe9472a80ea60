"""Weights packed for inference on an x86 CPU: a copy of each, in the order in which oneDNN reads it.

Where a call has few rows, torch gives `F.linear` in float32 to MKL, which then reads weights at half the speed that two
cores can (docs/performance.md). The packed copy lies beside the model and is used only while an engine's call runs: the
model called by itself computes the same bits as before, in training too, and its parameters stay the ones it has.

*Others*: torch.compile with frozen weights (our engine `compile`) packs likewise, and compiles for minutes first;
`mkldnn_utils.to_mkldnn` puts modules in the place of modules, so names, state dict and training are lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import GPT, Linear
from .linear import ONEDNN, X86
from .memory import free_memory
from .replacing import replaced

# What inductor calls to pack a constant weight; a build of torch without oneDNN lacks it.
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
SHARE = 3  # of the free memory, the packed copies may take one part in so many


class PackedProduct:
    """F.linear with one weight. It goes by the packed copy as long as that weight is the very one that was packed.

    What writes to a parameter counts its version up, and `.data = `, `.to` and `assign=True` give it other memory:
    then the copy is dropped, for good, and torch's product answers. Writes that torch does not count (fused
    optimizers, `weight.data[...] = `, numpy) are seen by `look`, if they touched the diagonal.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._version = weight, weight._version
        self._memory = weight.detach()  # kept, so that nothing else can come to lie at its address
        self._diagonal = self._memory.diagonal().clone()
        self._packed: Tensor | None = _PACK(self._memory.contiguous())  # type: ignore[misc]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._packed is not None and not self._same(weight):
            self._drop()
        if self._packed is None or x.dtype != weight.dtype or torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        return ONEDNN(x, self._packed, bias, "none", [], "")  # type: ignore[misc]

    def _same(self, weight: Tensor) -> bool:
        return weight is self._weight and weight._version == self._version and weight.is_set_to(self._memory)

    def look(self) -> None:
        """Compare the diagonal with what was packed: one number of each row of a square matrix."""
        if self._packed is not None and not torch.equal(self._memory.diagonal(), self._diagonal):
            self._drop()

    def _drop(self) -> None:
        """Give the memory back."""
        self._packed = None
        del self._weight, self._memory


class PackedWeights:
    """The packed products of a model, none if it was not packed."""

    def __init__(self, model: GPT, products: Mapping[nn.Module, PackedProduct] | None = None) -> None:
        self._model, self.products = model, dict(products or {})

    @contextmanager
    def used(self, *, prompt: bool) -> Iterator[None]:
        """Meanwhile the model computes with them. One that has been put into training drops them instead.

        Before a prompt each is looked at (`look`), which takes a millisecond for GPT-2: too much for a single token.
        """
        if self._model.training:
            self.products.clear()
        if prompt:
            for product in self.products.values():
                product.look()
        with replaced((module, "product", product) for module, product in self.products.items()):
            yield


def pack_for_inference(model: GPT) -> PackedWeights:
    """Pack the weights of a model's linear layers and head for calls without gradients; the model stays as it is.

    This takes as much memory as those weights, a tied head included: of GPT-2 its whole size once more. (The pages of a
    mapped file that nobody reads any more are the system's to drop.) Left out is whatever this is not made for:
    adapters, types other than float32 and bfloat16, other devices, other processors; a model in training mode; and all
    of it where the copies would take more than a third of the free memory.
    """
    weights = {module: weight for module, weight in _weights(model).items() if _packable(weight)}
    if model.training or SHARE * sum(weight.nbytes for weight in weights.values()) > free_memory():
        return PackedWeights(model)
    return PackedWeights(model, {module: PackedProduct(weight) for module, weight in weights.items()})


def _weights(model: GPT) -> dict[nn.Module, Tensor]:
    """By the module that multiplies with it: for the head that is the model. Adapters are subclasses of `Linear`."""
    layers = (module for module in model.blocks.modules() if type(module) is Linear)
    found: dict[nn.Module, Tensor] = {layer: layer.weight for layer in layers}
    if model.head is None or type(model.head) is Linear:
        found[model] = model.output[0]
    return found


def _packable(weight: Tensor) -> bool:
    """In this machine's memory, of a type that oneDNN has fast products for, counting its versions, no subclass."""
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and not weight.is_inference()
    return plain and weight.dtype in _types()


def _types() -> tuple[torch.dtype, ...]:
    if ONEDNN is None or _PACK is None or not X86 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ()
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)
