"""Greedy decoding with ONNX Runtime of exports whose caches grow: what each step is fed, and caches that go round.

Of `make_quantized_fixtures.py` and `quantized_references.py`; needs numpy only.
"""

import sys

import numpy as np

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def feeds(ports, tokens, past, caches):
    """Inputs of a step that reads these tokens after `past` others."""
    given, total = dict(caches), past + len(tokens)
    for port in ports:
        kind = DTYPES[port.type]
        if port.name == "input_ids":
            given[port.name] = np.array([tokens], kind)
        elif port.name == "attention_mask":
            given[port.name] = np.ones((1, total), kind)
        elif port.name == "position_ids":
            given[port.name] = np.arange(past, total, dtype=kind)[None]
        elif port.name not in given:
            sys.exit(f"error: there is nothing to give to the input {port.name!r}")
    return given


def empty(ports, head_dim=None):
    """Caches without tokens. `head_dim`: where the file leaves the elements of a head open."""
    caches = [p for p in ports if "past" in p.name and len(p.shape) == 4]
    widths = [p.shape[3] if isinstance(p.shape[3], int) else head_dim for p in caches]
    return {p.name: np.zeros([1, p.shape[1], 0, width], DTYPES[p.type]) for p, width in zip(caches, widths)}


def step(session, tokens, past, caches):
    """Logits of the last of these tokens in fp64, and the caches after it."""
    names = [o.name for o in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds(session.get_inputs(), tokens, past, caches))))
    after = {name: found[name.replace("past_key_values", "present")] for name in caches}
    return found["logits"][0, -1].astype(np.float64), after


def greedy(session, prompt, steps, head_dim=None):
    """Greedy tokens, with the logits of each step."""
    caches, tokens, rows, seen, feed = empty(session.get_inputs(), head_dim), [], [], 0, list(prompt)
    for _ in range(steps):
        row, caches = step(session, feed, seen, caches)
        seen += len(feed)
        feed = [int(np.argmax(row))]
        rows.append(row)
        tokens += feed
    return tokens, rows
