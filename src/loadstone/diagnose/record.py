"""Run prompts through a live model and note what it computes at every point, whoever wrote the model.

No table of another program's modules is needed: the weight table already says it. The rule that makes
`blocks.0.attn.q.weight` from `h.0.attn.c_attn.weight` names the module `h.0.attn.c_attn`, and what the rule's ops do to
the rows of the weight, they do to the columns of the module's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model import GPT
from ..weightmap import Identity, apply
from ..weightmap.ops import Op, Squeeze, Transpose
from ..weightmap.plan import unwrap
from .points import is_point, split
from .trace import ACTIVATIONS_UP_TO, Prompt, kept_positions

# Points that no weight has as its output: they are the input of the module that comes next.
INPUT_OF = {"attn.out": "attn.context", "mlp.down": "mlp.hidden"}
ROUTER = ".router"  # a module within the one that is all experts together


@dataclass(frozen=True)
class Tap:
    """Where in a module to listen: its input or its output, and which points that is after `ops` on its columns."""

    module: str
    points: tuple[str, ...]
    ops: tuple[Op, ...] = ()
    is_input: bool = False


def taps(identity: Identity) -> Iterator[Tap]:
    """Every point of a module that was opened as a source."""
    for step in identity.plan.steps:
        module, _, leaf = step.source.rpartition(".")
        points = tuple(target.removesuffix(".weight") for target in step.targets)
        if points[0].endswith(ROUTER):
            yield Tap(module.rpartition(".")[0], (points[0].removesuffix(ROUTER),))
        if leaf != "weight" or not is_point(points[0], identity.config):
            continue
        # How the weight lies is the module's own affair; how its rows are ordered shows in the output.
        ops = tuple(op for op in step.ops if not isinstance(op, (Transpose, Squeeze)))
        yield Tap(module, points, ops)
        block, part = split(points[0])
        if part in INPUT_OF:
            yield Tap(module, (f"{block}.{INPUT_OF[part]}",), is_input=True)
    for layer in range(identity.config.n_layers):
        name = block_module(identity, layer)
        yield Tap(name, (f"blocks.{layer}",))
        if layer == 0:
            yield Tap(name, ("embedding",), is_input=True)


def block_module(identity: Identity, layer: int) -> str:
    """The name of the module that is a whole block: what the block's tensors are called up to the layer's number."""
    target = f"blocks.{layer}.norm1.weight"
    source = next(step.source for step in identity.plan.steps if target in step.targets)
    template = str(identity.weight_map.source_of("blocks.{i}.norm1.weight"))
    prefix = unwrap(source)[1]
    return prefix + template[: template.index("{i}")] + str(layer)


def record(module: nn.Module, identity: Identity, prompts: Sequence[Tensor], *, activations: bool) -> list[Prompt]:
    """Run prompts of ids [T] through a module; activations of those that are longer than 1 and not too long.

    Args:
        module: a GPT of any program; called with ids [1, T] it gives logits, or an object that has them.
        identity: the same module as `open_source` recognises it.
        activations: False keeps only the logits.
    """
    found = []
    for ids in prompts:
        values: dict[str, Tensor] = {}
        hooks = []
        for tap in taps(identity) if activations and len(ids) > 1 else ():
            # Of a long prompt the embedding alone is kept: it shows damaged rows of learned positions.
            if len(ids) <= ACTIVATIONS_UP_TO or tap.points == ("embedding",):
                hooks.append(_listen(module, tap, identity, values))
        try:
            logits = _logits(module, ids)
        finally:
            for hook in hooks:
                hook.remove()
        positions = kept_positions(len(ids))
        found.append(Prompt(ids, positions, logits[positions], values))
    return found


@torch.inference_mode()
def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    options = {} if isinstance(module, GPT) else {"use_cache": False}
    result = module(ids[None], **options)
    return getattr(result, "logits", result)[0].detach().float().cpu()


def _listen(module: nn.Module, tap: Tap, identity: Identity, values: dict[str, Tensor]) -> Any:
    def keep(value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        columns = tensor[0].detach().float().cpu().T.numpy()  # [width, T]: as the rows of a weight
        parts = apply(tap.ops, [columns], identity.config)
        for point, part in zip(tap.points, parts, strict=True):
            values[point] = torch.from_numpy(part.T.copy())

    def before(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(positional[0] if positional else named["hidden_states"])

    def after(_: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
        keep(output)

    target = module.get_submodule(tap.module)
    if tap.is_input:
        return target.register_forward_pre_hook(before, with_kwargs=True)
    hook: Callable[..., Any] = after
    return target.register_forward_hook(hook)
