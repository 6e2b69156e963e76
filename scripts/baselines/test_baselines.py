"""Tests of the baselines: python -m unittest discover -s scripts/baselines. Needs numpy, onnx, onnxruntime, blake3; no torch."""

import copy
import json
import re
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path += [str(HERE), str(ROOT / "scripts/gpu")]

import make_model
import onnxruntime_baseline
import outputs
import schema
import stepwise
import weights_hash

FIXTURE = ROOT / "fixtures/exports/llama-optimum/model.onnx"


class Summaries(unittest.TestCase):
    def test_as_numpy(self):
        samples = np.random.default_rng(3).gamma(2.0, size=101).tolist()
        found = schema.summary(samples)
        self.assertAlmostEqual(found["stddev"], np.std(samples, ddof=1))
        self.assertAlmostEqual(found["mean"], np.mean(samples))
        for name, percent in (("p50", 50), ("median", 50), ("p90", 90), ("p99", 99)):
            self.assertAlmostEqual(found[name], np.percentile(samples, percent))
        self.assertEqual(schema.summary([2.0])["stddev"], 0)

    def test_stability_compares_quarters(self):
        self.assertTrue(schema.stable([1.0, 9.0, 9.0, 1.04]))
        self.assertFalse(schema.stable([1.0, 1.0, 1.0, 1.06]))
        self.assertFalse(schema.stable([1.06, 1.0, 1.0, 1.0]))
        self.assertFalse(schema.stable([1.0, 1.0, 1.0]), "too few samples")


class WeightsHash(unittest.TestCase):
    # Also the vector of the Rust side.
    VECTOR = "6aa0641c5f73a4028e271715eb5c75a400ca4d325a66edcaa413bb80c13dcd0b"
    A, B = np.array([[1, 2], [3, 0.1]], "<f4"), np.array([1.0, -0.0], "<f2")

    def test_vector_in_any_order_and_dtype(self):
        hashed = weights_hash.weights_hash
        self.assertEqual(hashed([("b.weight", self.B), ("a.weight", self.A)]), self.VECTOR)
        wide = self.B.astype(np.float32)
        self.assertEqual(hashed([("a.weight", self.A), ("b.weight", wide)]), self.VECTOR)
        bf16 = (wide.view(np.uint32) >> 16).astype(np.uint16)
        self.assertEqual(hashed([("a.weight", self.A), ("b.weight", bf16)]), self.VECTOR)

    def test_every_part_counts(self):
        hashed = weights_hash.weights_hash
        for other in (("c.weight", self.A), ("a.weight", self.A.T), ("a.weight", self.A.reshape(4)), ("a.weight", -self.A)):
            self.assertNotEqual(hashed([("b.weight", self.B), other]), self.VECTOR)
        plus_zero = np.array([1.0, 0.0], "<f2")
        self.assertNotEqual(hashed([("a.weight", self.A), ("b.weight", plus_zero)]), self.VECTOR, "-0 is not +0")

    def test_a_tied_head_is_left_out_and_another_is_not(self):
        embedding = ("model.embed_tokens.weight", self.A)
        alone = weights_hash.weights_hash([embedding])
        self.assertEqual(weights_hash.weights_hash([embedding, ("lm_head.weight", self.A)]), alone)
        self.assertNotEqual(weights_hash.weights_hash([embedding, ("lm_head.weight", 2 * self.A)]), alone)

    def test_what_is_not_a_number_is_refused(self):
        for kind in (np.float16, np.float32):
            with self.assertRaises(schema.Unusable):
                weights_hash.weights_hash([("a", np.array([1, np.nan], kind))])

    def test_larger_than_any_fp16_is_bf16_or_fp32(self):
        self.assertEqual(weights_hash.narrowed(np.array([65536.0], np.float32))[0], "bf16")
        self.assertEqual(weights_hash.narrowed(np.array([65537.0], np.float32))[0], "f32")


def a_document():
    """Measured by ONNX Runtime on a small fixture, as the command line does it."""
    with tempfile.TemporaryDirectory() as folder:
        workload, result = Path(folder) / "workload.json", Path(folder) / "result.json"
        workload.write_text(json.dumps(outputs.made_workload([1, 5], 40, 97, 7)))
        done = run(FIXTURE, "--workload", workload, "-o", result, "--as-reference")
        assert done.returncode == 0, done.stderr
        return json.loads(result.read_text()), json.loads(workload.read_text())


def run(*arguments):
    cases = ["--prefill", "8,20", "--live", "20", "--end-to-end", "8:6", "--threads", "1", "--decode-samples", "32"]
    command = [sys.executable, HERE / "onnxruntime_baseline.py", *arguments, *cases]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


class Documents(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.document, cls.workload = a_document()

    def edited(self, edit):
        document = copy.deepcopy(self.document)
        edit(document)
        return schema.check(document)

    def test_what_a_baseline_writes_is_whole(self):
        document = self.document
        self.assertEqual(schema.check(document), [])
        self.assertEqual(len(document["decode"][0]["samples_ms"]), 32)
        self.assertEqual([len(run["itl_samples_ms"]) for run in document["end_to_end"][0]["runs"]], [5] * 4)
        self.assertEqual(self.workload["forced"], document["outputs"]["greedy_tokens"])
        self.assertEqual(document["workload"]["prompts"][0]["tokens"], 40)

    def test_memory_is_told(self):
        memory = self.document["memory"]
        self.assertLess(memory["peak_anonymous_host_bytes"], memory["peak_host_bytes"])
        self.assertGreater(memory["peak_anonymous_host_bytes"], 1 << 20)

    def test_what_is_paid_once_for_each_length_is_in_no_sample(self):
        class Once(onnxruntime_baseline.Decoder):
            seen = set()

            def step(self, ids):
                length = self.length + len(ids)
                ms, token = super().step(ids)
                ms += 0 if length in self.seen else 1e6
                self.seen.add(length)
                return ms, token

        with tempfile.TemporaryDirectory() as folder:
            workload, result = Path(folder) / "workload.json", Path(folder) / "result.json"
            workload.write_text(json.dumps(outputs.made_workload([1], 40, 97, 7)))
            cases = ["--outputs", "0", "--prefill", "9", "--live", "20", "--end-to-end", "8:30"]
            given = [FIXTURE, "--workload", workload, "-o", result, *cases]
            given = stepwise.parser("").parse_args(list(map(str, given)))
            stepwise.measure(given, Once, "onnxruntime", "once", {})
            measured = json.loads(result.read_text())
        self.assertEqual(schema.check(measured), [])
        self.assertLess(measured["prefill"][0]["ms"]["max"], 1e6)
        self.assertLess(measured["decode"][0]["ms"]["max"], 1e6)
        self.assertLess(measured["end_to_end"][0]["latency_ms"]["max"], 1e6)

    def test_its_tokens_are_those_recorded_with_the_fixture(self):
        recorded = json.loads(FIXTURE.with_name("reference.json").read_text())
        decoder = onnxruntime_baseline.Decoder(FIXTURE, 1)
        n = len(recorded["greedy_tokens"])
        self.assertEqual(stepwise.timed(decoder, recorded["prompt"], n)[2], recorded["greedy_tokens"])

    def test_edited_files_are_found_out(self):
        def sample(d):
            d["decode"][0]["samples_ms"][3] *= 0.5

        def median(d):
            d["prefill"][0]["ms"]["median"] *= 0.9

        def rate(d):
            d["decode"][0]["output_tokens_per_s"] *= 1.1

        def verdict(d):
            d["prefill"][1]["stable"] = not d["prefill"][1]["stable"]

        def gap(d):
            d["end_to_end"][0]["runs"][0]["itl_samples_ms"].pop()

        def field(d):
            del d["model"]

        def version(d):
            d["schema"] = "lapidary-bench/2"

        def margin(d):
            d["outputs"]["logits"][1]["margin"] += 0.01

        def order(d):
            top = d["outputs"]["logits"][0]["top"]
            top[3], top[2] = top[2], top[3]

        def device(d):
            d["decode"][0]["gpu_ms"] = 1.2 * d["decode"][0]["ms"]["median"]

        def no_time(d):
            d["decode"][0]["gpu_ms"] = 0

        def layers(d):
            d["profile"] = {"decode": {"live": 5, "total_ms": 3.0, "groups": {"rest": 3.0}, "layers": [["a", 1.0], ["b", 1.5]]}}

        def groups(d):
            d["profile"] = {"decode": {"live": 5, "total_ms": 2.5, "groups": {"rest": 2.0}, "layers": [["a", 1.0], ["b", 1.5]]}}

        def error(d):
            d["error"] = "out of memory"

        for edit in (sample, median, rate, verdict, gap, field, version, margin, order, device, no_time, layers, groups, error):
            self.assertNotEqual(self.edited(edit), [], edit.__name__)

    def test_what_holds_together_is_taken(self):
        def measured(d):
            d["decode"][0]["gpu_ms"] = 0.9 * d["decode"][0]["ms"]["median"]
            d["profile"] = {"decode": {"live": 5, "total_ms": 2.5, "groups": {"rest": 2.5}, "layers": [["a", 1.0], ["b", 1.5]]}}

        def failed(d):
            d |= {"error": "out of memory", "prefill": [], "decode": [], "end_to_end": [], "outputs": None}

        self.assertEqual((self.edited(measured), self.edited(failed)), ([], []))

    def test_rounds_are_merged_into_a_document_that_follows_from_its_samples(self):
        other = copy.deepcopy(self.document)
        other["decode"][0]["samples_ms"] = [2 * sample for sample in other["decode"][0]["samples_ms"]]
        other["memory"]["peak_anonymous_host_bytes"] = 1 << 50
        merged = schema.merged([self.document, other])
        self.assertEqual(schema.check(merged), [])
        self.assertEqual(merged["decode"][0]["ms"]["count"], 64)
        self.assertEqual(len(merged["end_to_end"][0]["runs"]), 8)
        self.assertEqual(merged["memory"]["peak_anonymous_host_bytes"], 1 << 50)

    def test_other_weights_and_missing_files_are_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            workload, result = Path(folder) / "workload.json", Path(folder) / "result.json"
            missing = run(FIXTURE, "--workload", workload, "-o", result)
            self.assertEqual((missing.returncode, result.exists()), (2, False), missing.stderr)
            self.assertIn("workload.json: no such file", missing.stderr)
            workload.write_text(json.dumps(self.workload))
            other = run(FIXTURE, "--workload", workload, "-o", result, "--weights-hash", "0" * 64)
            self.assertEqual((other.returncode, result.exists()), (2, False), other.stderr)
            self.assertIn("hash to", other.stderr)


class Comparing(unittest.TestCase):
    """Outputs of a made-up reference, and how far others may be from it."""

    def setUp(self):
        draw = np.random.default_rng(5)
        self.rows = draw.normal(size=(3, 200)).astype(np.float32) * 4
        greedy = [[int(row.argmax()) for row in self.rows]]
        self.outputs = self.of(self.rows, greedy)
        self.reference = {"system": {"name": "transformers"}, "model": {"dtype": "fp32"}, "outputs": self.outputs}

    @staticmethod
    def of(rows, greedy):
        listed = [outputs.row(0, step, row) for step, row in enumerate(rows)]
        return {"prompts": [[1, 2]], "greedy_tokens": greedy, "logits": listed, "reference": None}

    def test_the_same_is_equal_and_noise_within_the_limit_too(self):
        same = outputs.compare(self.outputs, "fp16", self.reference)
        self.assertTrue(same["equal"])
        self.assertEqual((same["worst_relative_logit_error"], same["greedy_equal_up_to"]), (0.0, [3]))
        noise = np.random.default_rng(6).normal(size=self.rows.shape) * 0.01
        near = outputs.compare(self.of(self.rows + noise, self.outputs["greedy_tokens"]), "fp16", self.reference)
        self.assertTrue(near["equal"] and near["worst_relative_logit_error"] > 0)
        far = outputs.compare(self.of(self.rows + noise, self.outputs["greedy_tokens"]), "fp32", self.reference)
        self.assertFalse(far["equal"], "the limit follows the dtype")

    def test_another_token_counts_where_the_reference_was_sure(self):
        greedy = [[*self.outputs["greedy_tokens"][0][:1], 7, 7]]
        found = outputs.compare(self.of(self.rows, greedy), "fp16", self.reference)
        self.assertEqual(found["greedy_equal_up_to"], [1])
        self.assertFalse(found["equal"] or found["first_difference"][0]["within_error"])

    def test_another_token_is_within_the_error_where_two_were_near(self):
        rows = self.rows.copy()
        first, second = np.argsort(-rows[1])[:2]
        rows[1, second] = rows[1, first] - 0.01
        reference = dict(self.reference, outputs=self.of(rows, self.outputs["greedy_tokens"]))
        ours = rows + np.random.default_rng(8).normal(size=rows.shape) * 0.02
        ours[1, [first, second]] = rows[1, [second, first]]
        greedy = [[self.outputs["greedy_tokens"][0][0], int(second), 7]]
        found = outputs.compare(self.of(ours, greedy), "fp16", reference)
        self.assertTrue(found["equal"], found)
        self.assertEqual((found["differing_within_error"], found["differing_though_clear"]), (1, 0))

    def test_a_row_may_be_as_undecided_as_it_is_noisy(self):
        draw = np.random.default_rng(9)
        rows = self.rows.copy()
        first, second = np.argsort(-rows[2])[:2]
        rows[2, second] = rows[2, first] - 0.1
        reference = dict(self.reference, outputs=self.of(rows, self.outputs["greedy_tokens"]))
        ours = rows + draw.normal(size=rows.shape) * np.array([[0.001], [0.001], [0.08]])
        ours[2, [first, second]] = rows[2, [second, first]]
        greedy = [[*self.outputs["greedy_tokens"][0][:2], int(second)]]
        found = outputs.compare(self.of(ours, greedy), "fp16", reference)
        self.assertTrue(found["equal"], found)
        # The same error everywhere else, and this row as sure as the others: then the token is wrong.
        ours[2] = rows[2]
        ours[2, [first, second]] = rows[2, [second, first]]
        found = outputs.compare(self.of(ours, greedy), "fp16", reference)
        self.assertEqual((found["differing_though_clear"], found["equal"]), (1, False))

    def test_one_logit_far_off_does_not_excuse_itself(self):
        rows = self.rows.copy()
        first, second = np.argsort(-rows[1])[:2]
        rows[1, second] = rows[1, first] - 0.3
        reference = dict(self.reference, outputs=self.of(rows, self.outputs["greedy_tokens"]))
        ours = rows.copy()
        ours[1, second] += 0.6
        found = outputs.compare(self.of(ours, self.outputs["greedy_tokens"]), "bf16", reference)
        self.assertEqual((found["differing_though_clear"], found["equal"]), (1, False))

    def test_other_prompts_are_refused(self):
        with self.assertRaises(schema.Unusable):
            outputs.compare(self.outputs | {"prompts": [[1, 3]]}, "fp16", self.reference)


class MadeModels(unittest.TestCase):
    """Both forms of make_model's exports say the same: com.microsoft's operators and ONNX's own."""

    @staticmethod
    def model():
        facts = make_model.SIZES["tiny"]
        config = types.SimpleNamespace(**{k: v for k, v in facts.items() if k != "rope_theta"}, rope_theta=facts["rope_theta"])
        draw = np.random.default_rng(1)

        def module(*shape):
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
            return types.SimpleNamespace(weight=(draw.normal(size=shape) * scale + (len(shape) == 1)).astype(np.float32))

        h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
        q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
        layer = lambda: types.SimpleNamespace(
            input_layernorm=module(h), post_attention_layernorm=module(h),
            self_attn=types.SimpleNamespace(q_proj=module(q, h), k_proj=module(kv, h), v_proj=module(kv, h), o_proj=module(h, q)),
            mlp=types.SimpleNamespace(gate_proj=module(f, h), up_proj=module(f, h), down_proj=module(h, f)))  # fmt: skip
        body = types.SimpleNamespace(embed_tokens=module(config.vocab_size, h), norm=module(h),
                                     layers=[layer() for _ in range(config.num_hidden_layers)])  # fmt: skip
        return types.SimpleNamespace(config=config, dtype="torch.float32", model=body, lm_head=module(config.vocab_size, h))

    def test_plain_operators_compute_what_the_fused_ones_do(self):
        model, prompt = self.model(), [5, 17, 250, 3, 99, 7]
        with tempfile.TemporaryDirectory() as folder:
            rows, hashes = [], []
            for form in ("genai", "plain"):
                path = Path(folder) / form / "model.onnx"
                make_model.export(model, path.parent, 64, form)
                hashes.append(weights_hash.of_file(path))
                decoder = onnxruntime_baseline.Decoder(path, 1)
                # A prompt, then more tokens after the cache.
                rows.append(np.stack([decoder.feed(prompt), decoder.feed([8]), decoder.feed([9, 10])]))
        self.assertLess(np.abs(rows[0] - rows[1]).max(), 1e-4 * np.abs(rows[0]).max())
        self.assertEqual(hashes[0], hashes[1])


class TheLibrary(unittest.TestCase):
    def test_never_uses_tensorrts_own_parser(self):
        parser = re.compile(r"onnx_?parser", re.IGNORECASE)
        manifest = (ROOT / "Cargo.toml").read_text()
        self.assertIsNone(parser.search(manifest), "a feature of trtx would bring it in")
        self.assertIn("default-features = false", re.search(r"^trtx = .*$", manifest, re.M)[0], "trtx's defaults have it")
        uses = [path for path in (ROOT / "src").rglob("*.rs") if re.search(r"OnnxParser|nvonnxparser", path.read_text())]
        self.assertEqual(uses, [])


if __name__ == "__main__":
    unittest.main()
