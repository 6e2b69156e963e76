"""Tiny decoder LLMs, exported by every common exporter, with reference logits.

`families` builds random-weight models and saves them as Hugging Face checkpoints, `exporters` turns a
checkpoint into an ONNX file, `reference` decodes with ONNX Runtime (and with torch beside it) and writes
reference.json. Used by make_fixtures.py and held_out_exports.py; needs torch, transformers and the exporters,
which neither Lapidary nor its tests do. `cached` decodes exports whose caches grow, and needs numpy only.
"""
