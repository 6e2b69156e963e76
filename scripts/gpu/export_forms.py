"""Two ways of writing a decoder's norms and attention as ONNX, for make_model.py.

`GenAi` is the form of onnxruntime-genai's builder: com.microsoft's GroupQueryAttention and SimplifiedLayerNormalization.
`Plain` is what torch-based exporters of the optimum kind emit: ONNX's own operators alone, angles computed from
`position_ids`, a mask, the cache grown by Concat, keys and values repeated for each query head. TensorRT's parser takes
only the second.
"""

import numpy as np

EPSILON = 1e-5


class GenAi:
    opsets = {"": 21, "com.microsoft": 1}
    position_ids = False

    def __init__(self, out, config, theta, positions, kind):
        self.out, self.config = out, config
        out.small("one", np.array(1, np.int64))
        out.small("ones", np.array([1], np.int64))
        out.node("ReduceSum", ["attention_mask", "ones"], ["lengths"], keepdims=0)
        out.node("Sub", ["lengths", "ones"], ["last"])
        out.node("Cast", ["last"], ["seqlens_k"], to=out.INT32)
        out.node("Shape", ["attention_mask"], ["mask_shape"])
        out.node("Gather", ["mask_shape", "one"], ["total"], axis=0)
        out.node("Cast", ["total"], ["total_length"], to=out.INT32)
        frequencies = theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
        angles = np.outer(np.arange(positions, dtype=np.float64), frequencies)
        for name, table in (("cos_cache", np.cos(angles)), ("sin_cache", np.sin(angles))):
            out.weight(name, table.astype(kind))

    def norm(self, name, x, scale):
        return self.out.node("SimplifiedLayerNormalization", [x, scale], [name], axis=-1, epsilon=EPSILON, stash_type=1)

    def attention(self, name, q, k, v, past, present):
        c = self.config
        return self.out.node(
            "GroupQueryAttention", [q, k, v, *past, "seqlens_k", "total_length", "cos_cache", "sin_cache"], [name, *present],
            domain="com.microsoft", num_heads=c.num_attention_heads, kv_num_heads=c.num_key_value_heads, do_rotary=1,
            rotary_interleaved=0, local_window_size=-1, softcap=0.0, scale=float(c.head_dim) ** -0.5)  # fmt: skip


class Plain:
    opsets = {"": 17}
    position_ids = True

    def __init__(self, out, config, theta, positions, kind):
        self.out, self.config = out, config
        heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        ints = lambda name, *values: out.small(name, np.array(values, np.int64))
        for n in range(4):
            ints(f"axis_{n}", n)
        ints("half", d // 2), ints("whole", d), ints("inner_axes", 1, 2), ints("mask_axes", 1, 3)
        ints("split_heads", 0, 0, heads, d), ints("split_kv_heads", 0, 0, kv_heads, d), ints("join", 0, 0, heads * d)
        ints("groups", 1, 1, heads // kv_heads, 1, 1), ints("all_heads", 0, heads, -1, d)
        out.small("zero", np.array(0, np.int64)), out.small("step", np.array(1, np.int64))
        out.small("square", np.array(2, np.float32)), out.small("epsilon", np.array(EPSILON, np.float32))
        out.small("scale", np.array(d**-0.5, kind))
        out.small("nothing", np.array(0, kind)), out.small("lowest", np.array(np.finfo(kind).min, kind))
        frequencies = theta ** -(np.arange(0, d, 2, dtype=np.float64) / d)
        out.small("inv_freq", frequencies.astype(np.float32)[None, None])

        out.node("Unsqueeze", ["position_ids", "axis_2"], ["positions"])
        out.node("Cast", ["positions"], ["positions_float"], to=out.FLOAT)
        out.node("Mul", ["positions_float", "inv_freq"], ["angles"])
        out.node("Concat", ["angles", "angles"], ["angles_twice"], axis=-1)
        for name, op in (("cos", "Cos"), ("sin", "Sin")):
            out.node(op, ["angles_twice"], [name + "_float"])
            out.node("Cast", [name + "_float"], [name + "_cast"], to=out.element)
            out.node("Unsqueeze", [name + "_cast", "axis_1"], [name])
        # A key is seen from positions at or after its own, if the mask has it.
        out.node("Shape", ["attention_mask"], ["mask_shape"])
        out.node("Gather", ["mask_shape", "step"], ["total"], axis=0)
        out.node("Range", ["zero", "total", "step"], ["keys"])
        out.node("Unsqueeze", ["position_ids", "mask_axes"], ["queries"])
        out.node("LessOrEqual", ["keys", "queries"], ["causal"])
        out.node("Cast", ["attention_mask"], ["present_keys"], to=out.BOOL)
        out.node("Unsqueeze", ["present_keys", "inner_axes"], ["present_mask"])
        out.node("And", ["causal", "present_mask"], ["allowed"])
        out.node("Where", ["allowed", "nothing", "lowest"], ["mask"])

    def norm(self, name, x, scale):
        out, n = self.out, name + "/"
        out.node("Cast", [x], [n + "wide"], to=out.FLOAT)
        out.node("Pow", [n + "wide", "square"], [n + "squares"])
        out.node("ReduceMean", [n + "squares"], [n + "mean"], axes=[-1])
        out.node("Add", [n + "mean", "epsilon"], [n + "shifted"])
        out.node("Sqrt", [n + "shifted"], [n + "root"])
        out.node("Div", [n + "wide", n + "root"], [n + "normed"])
        out.node("Cast", [n + "normed"], [n + "narrow"], to=out.element)
        return out.node("Mul", [scale, n + "narrow"], [name])

    def attention(self, name, q, k, v, past, present):
        out, n = self.out, name + "/"

        def heads(x, shape, part):
            out.node("Reshape", [x, shape], [n + part + "_split"])
            return out.node("Transpose", [n + part + "_split"], [n + part], perm=[0, 2, 1, 3])

        def rotated(x, part):
            out.node("Slice", [x, "axis_0", "half", "axis_3"], [n + part + "_low"])
            out.node("Slice", [x, "half", "whole", "axis_3"], [n + part + "_high"])
            out.node("Neg", [n + part + "_high"], [n + part + "_turned"])
            out.node("Concat", [n + part + "_turned", n + part + "_low"], [n + part + "_half"], axis=-1)
            out.node("Mul", [x, "cos"], [n + part + "_cos"])
            out.node("Mul", [n + part + "_half", "sin"], [n + part + "_sin"])
            return out.node("Add", [n + part + "_cos", n + part + "_sin"], [n + part + "_rotated"])

        def for_all_heads(x, part):
            out.node("Unsqueeze", [x, "axis_2"], [n + part + "_grouped"])
            out.node("Shape", [n + part + "_grouped"], [n + part + "_shape"])
            out.node("Mul", [n + part + "_shape", "groups"], [n + part + "_wanted"])
            out.node("Expand", [n + part + "_grouped", n + part + "_wanted"], [n + part + "_repeated"])
            return out.node("Reshape", [n + part + "_repeated", "all_heads"], [n + part + "_all"])

        q = rotated(heads(q, "split_heads", "q"), "q")
        k = rotated(heads(k, "split_kv_heads", "k"), "k")
        v = heads(v, "split_kv_heads", "v")
        out.node("Concat", [past[0], k], [present[0]], axis=2)
        out.node("Concat", [past[1], v], [present[1]], axis=2)
        keys, values = for_all_heads(present[0], "keys"), for_all_heads(present[1], "values")
        out.node("Transpose", [keys], [n + "keys_turned"], perm=[0, 1, 3, 2])
        out.node("MatMul", [q, n + "keys_turned"], [n + "products"])
        out.node("Mul", [n + "products", "scale"], [n + "scaled"])
        out.node("Add", [n + "scaled", "mask"], [n + "masked"])
        out.node("Cast", [n + "masked"], [n + "masked_wide"], to=out.FLOAT)
        out.node("Softmax", [n + "masked_wide"], [n + "weights_wide"], axis=-1)
        out.node("Cast", [n + "weights_wide"], [n + "weights"], to=out.element)
        out.node("MatMul", [n + "weights", values], [n + "mixed"])
        out.node("Transpose", [n + "mixed"], [n + "turned"], perm=[0, 2, 1, 3])
        return out.node("Reshape", [n + "turned", "join"], [name])


FORMS = {"genai": GenAi, "plain": Plain}
