"""open -> plan -> load as one call: any source becomes a model that is ready to run.

The model is built without memory (torch's meta device) and filled tensor by tensor. Where a dialect's ops are views, a
parameter *is* the mapped file (copy-on-write, so it can be trained): nothing is copied and nothing is read before the
first token needs it.

Why not as others do it: transformers initialises what is missing at random and warns; litgpt converts to a second file
first; both and `torch.load` hold the weights as private memory. Here a plan without a fault comes first, then views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import open_checkpoint
from .checkpoint.arrays import same_bits
from .checkpoint.base import Array, Checkpoint, TensorInfo
from .errors import LoadstoneError, PlanError, TokenizerError
from .weightmap import Identity, apply, identify, make_plan
from .weightmap.plan import GIVEN_UP, Step

if TYPE_CHECKING:  # inspect and plan use this module too, and must not wait for torch
    import torch

    from .model import GPT
    from .tokenizer import Tokenizer


def open_source(
    source: str | Path | torch.nn.Module | Checkpoint,
    *,
    revision: str | None = None,
    dialect: str | None = None,
    config: Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
    ignore_config: Iterable[str] = (),
) -> Identity:
    """Open any source, recognise it and plan its load; only headers are read, torch is not imported.

    Args:
        source: a file, a folder, a hub name (`owner/name`, `owner/name@revision`), an alias (`gpt2`, `smollm2`), a URL,
            an open `Checkpoint`, or a live `nn.Module` that uses a known dialect's names.
        revision: of a hub name.
        dialect: insist on one (`hf`, `openai`, `raschka`, `nanogpt`, `lesson`, `gguf`, `meta`).
        config: `GPTConfig` fields that you know better than the file.
        ignore: exact names of tensors to leave out.
        ignore_config: config fields that you know to be harmless.

    Raises a LoadstoneError if the source cannot be had, read or recognised. The plan may still have problems.
    """
    return identify(
        _open(source, revision), dialect=dialect, overrides=config, ignore=ignore, ignore_config=ignore_config
    )


def load(
    source: str | Path | torch.nn.Module | Checkpoint,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> tuple[GPT, Tokenizer | None]:
    """Load any checkpoint into a model, and the tokenizer that belongs to it.

    Args:
        source: see `open_source`, which also documents the other options (`revision`, `dialect`, `config`, `ignore`,
            `ignore_config`).
        dtype: `auto` keeps the stored type (block-quantised and fp8 weights become float32, mixed types the widest, or
            that of the matrices if every vector fits it), or a torch type or its name.
        device: where the parameters go.
        progress: called with (bytes done, bytes in all) after each tensor.

    Returns (model in eval mode, tokenizer or None if none was found).
    Raises PlanError if a tensor is missing, unused, mismatched or claimed twice; then no parameter was allocated.
    """
    identity = open_source(source, **options)
    model = load_model(identity, dtype=dtype, device=device, progress=progress)
    return model, load_tokenizer_for(identity)


def load_model(
    identity: Identity,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> GPT:
    """The model of an opened source. Settles a doubtful tie first, so `identity.plan` and `.config` may change."""
    import torch

    from .model import GPT

    plan, checkpoint = identity.plan, identity.checkpoint
    plan.require_clean(str(checkpoint.path))
    target_type = _target_dtype(identity, dtype)
    require_device(device)
    settle_tie(identity)
    plan = identity.plan
    with torch.device("meta"):
        model = GPT(identity.config)
    for target, array in parameters(identity, progress=progress):
        _assign(model, target, to_tensor(array).to(device=device, dtype=target_type))
    if left := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise AssertionError(f"the plan was clean, yet these parameters were not filled: {left}")
    return model.eval()


def parameters(
    identity: Identity,
    *,
    read: Callable[[Step], Array] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Array]]:
    """Each parameter's name and value, one tensor of the file at a time; views where the ops are. No torch here.

    `read` gives a step's tensor in another form than `Checkpoint.read` does (rows of blocks, say). The plan is clean
    and a doubtful tie is settled.
    """
    checkpoint, steps = identity.checkpoint, identity.plan.steps
    total, done = sum(checkpoint.info(step.source).nbytes for step in steps), 0
    for step in steps:
        arrays = apply(step.ops, [read(step) if read else checkpoint.read(step.source)], identity.config)
        while arrays:  # whoever does not keep an array gives its pages back before the next one is read
            yield step.targets[-len(arrays)], arrays.pop(0)
        done += checkpoint.info(step.source).nbytes
        if progress:
            progress(done, total)


def load_tokenizer_for(identity: Identity) -> Tokenizer | None:
    """The tokenizer beside or inside the checkpoint (GPT-2's by name where only its size tells), checked against it.

    What does not agree, and why GPT-2's could not be had, goes to `identity.remarks`.
    Raises TokenizerError if the tokenizer is broken or has more tokens than the model has rows.
    """
    from .tokenizer import check_tokenizer, gpt2_tokenizer, load_tokenizer

    checkpoint, config = identity.checkpoint, identity.config
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.metadata if checkpoint.format == "gguf" else None)
    if tokenizer is None and config.architecture == "gpt2" and 50_257 <= config.vocab_size <= 50_304:
        try:
            tokenizer = gpt2_tokenizer(checkpoint.folder)
        except TokenizerError as error:
            identity.remarks.append(str(error))
    if tokenizer is not None:
        identity.remarks += check_tokenizer(
            tokenizer, vocab_size=config.vocab_size, bos_id=config.bos_id, eos_ids=config.eos_ids
        )
    return tokenizer


def require_tokenizer(tokenizer: Tokenizer | None, source: str, remarks: Sequence[str] = ()) -> Tokenizer:
    """Raises LoadstoneError if there is none, with the remarks that may say why."""
    if tokenizer is not None:
        return tokenizer
    problem = (
        f"{source}: no tokenizer lies beside the weights (tokenizer.json, vocab.json + merges.txt, or encoder.json + "
        "vocab.bpe), so text cannot be turned into tokens."
    )
    raise LoadstoneError(" ".join([problem, *remarks, "Put the model's own tokenizer files into its folder."]))


def settle_tie(identity: Identity) -> None:
    """Where head and embedding are both stored, compare their bytes: equal ones are one parameter, tied.

    Raises PlanError if the config says that they are tied and they differ.
    """
    checkpoint, plan = identity.checkpoint, identity.plan
    sources = {target: step.source for step in plan.steps for target in step.targets}
    head, embedding = plan.duplicate_head or sources.get("head.weight"), sources.get("tok_emb.weight")
    untied_by_config = identity.tie_is_known and not identity.config.tied
    if not plan.clean or head is None or embedding is None or untied_by_config:
        return
    equal = same_bits(checkpoint.read(head), checkpoint.read(embedding))
    if identity.tie_is_known and not equal:
        raise PlanError(
            f"{checkpoint.path}: {identity.config_source} says that head and embedding are tied, but {head} "
            f"differs from {embedding}. If the head is a parameter of its own, load with --set tied=false; if not, one "
            "of the two tensors is damaged."
        )
    if equal != identity.config.tied:
        identity.config = identity.config.with_overrides({"tied": equal})
        given_up = [name for name, reason in plan.ignored.items() if reason == GIVEN_UP]
        identity.plan = make_plan(identity.config, checkpoint.tensors, identity.weight_map, ignore=given_up)
    identity.tie_is_known = True
    identity.plan.tie = (
        f"head is the embedding (tied); {head} is a second, equal copy"
        if equal
        else f"head is a parameter of its own; {head} differs from {embedding}"
    )


def to_tensor(array: Array) -> torch.Tensor:
    """A torch tensor over the array's own memory (bf16 and fp8 too, which numpy and torch name differently)."""
    import torch

    if not array.flags.writeable:
        array = array.copy()
    if array.dtype.kind in "fiub" and array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    carrier = np.dtype(f"u{array.dtype.itemsize}")
    return torch.from_numpy(array.view(carrier)).view(getattr(torch, array.dtype.name))


class ModuleCheckpoint(Checkpoint):
    """A live `nn.Module`, read as if it were a file: its state dict's names, no copy."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(Path(type(module).__name__), "module")
        self._state = module.state_dict()
        seen: dict[tuple[Any, ...], str] = {}
        for name, tensor in self._state.items():
            kind = str(tensor.dtype).removeprefix("torch.")
            self.tensors[name] = TensorInfo(tuple(tensor.shape), kind, tensor.numel() * tensor.element_size())
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and seen.setdefault(key, name) != name:
                self.aliases[name] = seen[key]
        from .config import GPTConfig

        if isinstance(config := getattr(module, "config", None), GPTConfig):
            self.metadata = {"config": config}
        elif to_dict := getattr(config, "to_dict", None):
            self.metadata = {"hf_config": to_dict()}

    @property
    def folder(self) -> None:
        return None

    def read(self, name: str) -> Array:
        import ml_dtypes
        import torch

        tensor = self._state[name].detach().cpu()
        if tensor.dtype == torch.bfloat16:
            bits: Array = tensor.view(torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        array: Array = tensor.numpy()
        return array


def _open(source: str | Path | torch.nn.Module | Checkpoint, revision: str | None) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, (str, Path)):
        from .checkpoint.hub import resolve

        return open_checkpoint(resolve(source, revision=revision))
    return ModuleCheckpoint(source)


def _target_dtype(identity: Identity, wanted: str | torch.dtype) -> torch.dtype:
    """The one floating type that the model will have. Raises PlanError for an unknown name or integer weights."""
    import torch

    checkpoint = identity.checkpoint
    matrices, widest = None, None  # the widest type of matrices, and of all
    vectors = []
    for step in identity.plan.steps:
        # Blocks (Q4_1, ...) are read as float32; fp8 has too few bits to compute in.
        stored = getattr(torch, step.dtype, torch.float32)
        stored = torch.float32 if stored.is_floating_point and stored.itemsize == 1 else stored
        if not stored.is_floating_point:
            raise PlanError(
                f"{checkpoint.path}: {step.source} holds {step.dtype}; weights must be floating point. "
                "Quantised PyTorch checkpoints cannot be read; a GGUF of the same model can."
            )
        widest = stored if widest is None else torch.promote_types(widest, stored)
        if len(checkpoint.info(step.source).shape) > 1:
            matrices = stored if matrices is None else torch.promote_types(matrices, stored)
        else:
            vectors.append(step.source)
    if wanted == "auto":
        # GGUF keeps norms and biases in float32 beside 16-bit matrices; most came from 16 bits, and fit them again.
        if matrices and matrices != widest and all(_fits(checkpoint.read(name), matrices) for name in vectors):
            return matrices
        return widest or torch.float32
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise PlanError(f"dtype {wanted} is not supported; use auto, float32, bfloat16, float16 or float64.")
    return found


def _fits(array: Array, dtype: torch.dtype) -> bool:
    import torch

    tensor = to_tensor(array)
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def require_device(device: str | torch.device) -> None:
    """Find out before anything is loaded. Raises PlanError if torch does not know the device or has no such thing."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PlanError(f"device {str(device)!r} cannot be used here: {reason}. `--device cpu` always can.") from None


def _assign(model: GPT, name: str, tensor: torch.Tensor) -> None:
    """Put the tensor itself in the parameter's place (no copy)."""
    import torch

    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    expected = getattr(module, leaf).shape
    if tensor.shape != expected:
        raise AssertionError(f"{name}: planned {tuple(expected)}, got {tuple(tensor.shape)}")
    setattr(module, leaf, torch.nn.Parameter(tensor))
