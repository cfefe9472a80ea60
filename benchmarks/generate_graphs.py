"""GPT-2's model files for ONNX Runtime, OpenVINO and CTranslate2, as contenders of benchmarks/generate.py read them.

    python benchmarks/generate_graphs.py onnx-int8 FOLDER      FOLDER/model/model.safetensors -> FOLDER/onnx-int8/

*Others*: each program gets a GPT-2 of its own operators, as the tools around it (onnxruntime-genai, optimum-intel,
CTranslate2's converter) make them: no tracing stands between, and no torch. ONNX Runtime: fused attention on keys and
values that stay where they are (GroupQueryAttention), SkipLayerNormalization, FastGelu. OpenVINO: a stateful model; its
plug-in fuses attention with the cache, and linear layers with what follows them. CTranslate2: its own decoder.

Of each program's ways the fastest for a prompt of 512 (AVX-512). ONNX Runtime: int8 by dynamic quantisation, a scale
for each channel (8-bit MatMulNBits takes twice the time), int4 by MatMulNBits in blocks of 128 (32 takes a quarter
more). OpenVINO: nncf's int8, a scale for each channel; its int4 in blocks of 128, with embedding and head in int8, as
nncf leaves them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]
LAYERS, HEADS, HEAD_WIDTH, CONTEXT, VOCABULARY, EPSILON = 12, 12, 64, 1024, 50_257, 1e-5
CACHES = [f"{side}{layer}" for layer in range(LAYERS) for side in ("keys", "values")]
MICROSOFT = "com.microsoft"


def write_onnx(target: Path, weights: Weights, width: str) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model, path = onnx_graph(weights, tied=width == "float32"), target / "model.onnx"
    if width == "int8":
        # Types are not inferred through Microsoft's operators, so the one there is has to be told.
        told = {"DefaultTensorType": onnx.TensorProto.FLOAT}
        quantize_dynamic(
            model, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
            use_external_data_format=True, extra_options=told,
        )  # fmt: skip
        return
    if width == "int4":
        quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=128, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        model = quantizer.model.model
    onnx.save_model(model, path, save_as_external_data=True, location="model.bin")


def onnx_graph(weights: Weights, tied: bool) -> Any:
    """`tied`: the head is the embedding; else a MatMul of its own, which quantisers know."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    stored = dict(weights) | {"last": np.array(-1, np.int64)}
    if not tied:
        stored["head"] = weights["wte.weight"].T

    def op(kind: str, *inputs: str, domain: str = "", more: tuple[str, ...] = (), **attributes: Any) -> str:
        name = f"{kind}{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name, *more], name=name, domain=domain, **attributes))
        return name

    def linear(x: str, name: str) -> str:
        return op("MatMul", x, f"{name}.weight")

    def add_and_norm(x: str, new: str, bias: str, norm: str) -> tuple[str, str]:
        """x + new + bias, and that normalised."""
        added = f"sum{len(nodes)}"
        inputs = (x, new, f"{norm}.weight", f"{norm}.bias", bias)
        more = ("", "", added)
        return added, op("SkipLayerNormalization", *inputs, domain=MICROSOFT, more=more, epsilon=EPSILON)

    x = op("Add", op("Gather", "wte.weight", "ids"), op("Gather", "wpe.weight", "positions"))
    normed = op("LayerNormalization", x, "h.0.ln_1.weight", "h.0.ln_1.bias", axis=-1, epsilon=EPSILON)
    for layer in range(LAYERS):
        h, own = f"h.{layer}.", CACHES[2 * layer : 2 * layer + 2]
        qkv = op("Add", linear(normed, h + "attn.c_attn"), h + "attn.c_attn.bias")
        inputs = (qkv, "", "", *(f"past_{cache}" for cache in own), "last_place", "total")
        mixed = op(
            "GroupQueryAttention", *inputs, domain=MICROSOFT, more=tuple(own), num_heads=HEADS, kv_num_heads=HEADS
        )
        x, normed = add_and_norm(x, linear(mixed, h + "attn.c_proj"), h + "attn.c_proj.bias", h + "ln_2")
        up = op("FastGelu", linear(normed, h + "mlp.c_fc"), h + "mlp.c_fc.bias", domain=MICROSOFT)
        following = f"h.{layer + 1}.ln_1" if layer + 1 < LAYERS else "ln_f"
        x, normed = add_and_norm(x, linear(up, h + "mlp.c_proj"), h + "mlp.c_proj.bias", following)
    final = op("Gather", normed, "last", axis=1)
    logits = op("Gemm", final, "wte.weight", transB=1) if tied else op("MatMul", final, "head")

    def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    cache = [1, HEADS, CONTEXT, HEAD_WIDTH]
    given = [value(name, [1, "tokens"], TensorProto.INT64) for name in ("ids", "positions")]
    given += [value("last_place", [1], TensorProto.INT32), value("total", [], TensorProto.INT32)]
    given += [value(f"past_{name}", cache) for name in CACHES]
    found = [value(logits, [1, VOCABULARY]), *(value(name, cache) for name in CACHES)]
    constants = [numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in stored.items()]
    sets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(
        helper.make_graph(nodes, "gpt2", given, found, constants), opset_imports=sets, ir_version=10
    )


def write_openvino(target: Path, weights: Weights, width: str) -> None:
    import nncf
    import openvino

    model = openvino_graph(weights)
    if width.endswith("int8"):
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    if width.endswith("int4"):
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=128, ratio=1.0)
    openvino.save_model(model, target / "model.xml", compress_to_fp16=width == "bfloat16")


def openvino_graph(weights: Weights) -> Any:
    import openvino.opset15 as op
    from openvino import Model, PartialShape, Type

    def numbers(*values: int) -> Any:
        return op.constant(np.array(values, np.int64))

    constants = {name: op.constant(np.asarray(array, order="C")) for name, array in weights.items() if array.ndim == 1}
    constants |= {name: op.constant(weights[name]) for name in ("wte.weight", "wpe.weight")}
    last, zero, one, two = (op.constant(np.int64(number)) for number in (-1, 0, 1, 2))
    inputs = {"ids": op.parameter([1, -1], Type.i64), "positions": op.parameter([1, -1], Type.i64)}
    inputs["beam"] = op.parameter([1], Type.i32)  # of no use here, but the plug-in knows caches by it
    for name, each in inputs.items():
        each.output(0).set_names({name})
    stores: list[Any] = []

    def norm(x: Any, name: str) -> Any:
        normal = op.mvn(x, numbers(-1), True, EPSILON, "inside_sqrt")
        return op.add(op.multiply(normal, constants[f"{name}.weight"]), constants[f"{name}.bias"])

    def linear(x: Any, name: str) -> Any:
        matrix = op.constant(np.ascontiguousarray(weights[f"{name}.weight"].T))
        return op.add(op.matmul(x, matrix, False, True), constants[f"{name}.bias"])

    def with_past(new: Any, name: str) -> Any:
        nothing = op.constant(np.zeros((1, HEADS, 0, HEAD_WIDTH), np.float32))
        past = op.read_value(nothing, name, Type.f32, PartialShape([-1, HEADS, -1, HEAD_WIDTH]))
        joined = op.concat([op.gather(past, inputs["beam"], zero), new], 2)
        stores.append(op.assign(joined, name))
        return joined

    def causal(keys: Any) -> Any:
        """0 for keys up to a token's own place, and very little for others."""
        places = op.range(zero, op.gather(op.shape_of(keys), two, zero), one, Type.i64)
        seen = op.less_equal(op.unsqueeze(places, zero), op.transpose(inputs["positions"], numbers(1, 0)))
        lowest = op.constant(np.finfo(np.float32).min)
        return op.unsqueeze(op.select(seen, op.constant(np.float32(0)), lowest), numbers(0, 1))

    x = op.add(
        op.gather(constants["wte.weight"], inputs["ids"], zero),
        op.gather(constants["wpe.weight"], inputs["positions"], zero),
    )
    mask = None
    for layer in range(LAYERS):
        h, own = f"h.{layer}.", CACHES[2 * layer : 2 * layer + 2]
        parts = op.split(linear(norm(x, h + "ln_1"), h + "attn.c_attn"), two, 3).outputs()
        shape = numbers(0, 0, HEADS, HEAD_WIDTH)
        q, k, v = (op.transpose(op.reshape(part, shape, True), numbers(0, 2, 1, 3)) for part in parts)
        keys, values = with_past(k, own[0]), with_past(v, own[1])
        mask = mask or causal(keys)
        mixed = op.transpose(op.scaled_dot_product_attention(q, keys, values, mask), numbers(0, 2, 1, 3))
        x = op.add(x, linear(op.reshape(mixed, numbers(0, 0, HEADS * HEAD_WIDTH), True), h + "attn.c_proj"))
        up = op.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc"), "tanh")
        x = op.add(x, linear(up, h + "mlp.c_proj"))
    final = norm(op.gather(x, last, one), "ln_f")
    logits = op.matmul(final, constants["wte.weight"], False, True)
    return Model([op.result(logits)], stores, list(inputs.values()), "gpt2")


def write_ctranslate2(target: Path, weights: Weights, width: str) -> None:
    from ctranslate2.specs import common_spec, transformer_spec

    made = transformer_spec.TransformerDecoderModelSpec.from_config(
        LAYERS, HEADS, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )
    decoder = made.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["wte.weight"]
    decoder.position_encodings.encodings = weights["wpe.weight"]

    def norm(spec: Any, name: str) -> None:
        spec.gamma, spec.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def linear(spec: Any, name: str) -> None:
        spec.weight, spec.bias = np.ascontiguousarray(weights[f"{name}.weight"].T), weights[f"{name}.bias"]

    norm(decoder.layer_norm, "ln_f")
    for layer, spec in enumerate(decoder.layer):
        h, attention = f"h.{layer}.", spec.self_attention
        norm(attention.layer_norm, h + "ln_1")
        linear(attention.linear[0], h + "attn.c_attn")
        linear(attention.linear[1], h + "attn.c_proj")
        norm(spec.ffn.layer_norm, h + "ln_2")
        linear(spec.ffn.linear_0, h + "mlp.c_fc")
        linear(spec.ffn.linear_1, h + "mlp.c_proj")
    made.register_vocabulary([str(token) for token in range(VOCABULARY)])
    made.config.bos_token = made.config.eos_token = made.config.unk_token = str(VOCABULARY - 1)
    made.validate()
    made.optimize(quantization=None if width == "float32" else width)
    made.save(str(target))


WRITERS = {"onnx": write_onnx, "openvino": write_openvino, "ctranslate2": write_ctranslate2}


def write(name: str, place: Path) -> None:
    from safetensors.numpy import load_file

    weights = load_file(place / "model" / "model.safetensors")
    kind, _, width = name.partition("-")
    (place / name).mkdir()
    WRITERS[kind](place / name, {key.removeprefix("transformer."): array for key, array in weights.items()}, width)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
