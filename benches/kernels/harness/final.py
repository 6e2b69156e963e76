"""Every figure of the table with the best configurations: final.py best.json [budget seconds]. Writes $OUT/final.json."""
import json, os, sys, time
from token_program import *
out = os.environ.get("OUT", ".")
best = json.load(open(sys.argv[1]))
for f in sys.argv[3:]:
    best.update(json.load(open(f))["best"])
budget = float(sys.argv[2])
t0 = time.time()
plan = [("8b", "fp16"), ("8b", "int8"), ("8b", "int4g128"), ("8b", "int4g32"), ("1b", "fp16"), ("1b", "int8"), ("1b", "int4g128"), ("1b", "int4g32"), ("smol", "fp16"), ("smol", "int4g32"),
        ("8b", "int4g32z"), ("8b", "int4g64"), ("8b", "int8g32"), ("1b", "int4g32z"), ("1b", "int8g32"), ("smol", "int8")]
near = {"int4g32z": "int4g32", "int4g64": "int4g128", "int8g32": "int8", "int8": "fp16"}
todo, res = [], {}
for name, form in plan:
    key = f"{name} {form}"
    if key not in best:
        best[key] = best.get(f"{name} {near[form]}")
    todo.append((name, form, {k: tuple(v) for k, v in best[key].items()}))
m = Model.__new__(Model)
jobs = []
for name, form, cfg in todo:
    for dep in (1, 0):
        m.__dict__.update(d=FORMATS[form], m=MODELS[name], rows=1, dep=dep, extra={})
        jobs += m.jobs(cfg)
print("compiled", prepare(jobs), f"{time.time() - t0:.0f} s", flush=True)
for name, form, cfg in todo:
    if time.time() - t0 > budget:
        print("no time for", name, form)
        continue
    m = Model(name, form)
    r = [m.time(cfg, l, 31) for l in (300, 4080)]
    again = [m.time(cfg, l, 31) for l in (300, 4080)]
    parts = {}
    for p in ("qkv", "att", "out", "up", "down", "head"):
        rest = [q for q in ("embed", "qkv", "att", "out", "up", "down", "head", "argmax") if q != p]
        parts[p] = round(r[0] - m.time(cfg, 300, 11, only=rest), 4)
    m.dep = 0
    plain = [m.time(cfg, l, 15) for l in (300, 4080)]
    kv = [m.m["layers"] * 2 * m.m["kv"] * m.m["hd"] * 2 * l for l in (300, 4080)]
    res[f"{name} {form}"] = dict(ms=r, again=again, part_less_ms=parts, no_dependent_launch_ms=plain, weight_bytes=m.bytes, kv_bytes=kv, tb_s=[(m.bytes + k) / t / 1e9 for k, t in zip(kv, r)], config=cfg)
    print(f"{name} {form}: {r[0]:.3f} / {r[1]:.3f} (again {again[0]:.3f} / {again[1]:.3f}) ms; {(m.bytes + kv[0]) / r[0] / 1e9:.2f} / {(m.bytes + kv[1]) / r[1] / 1e9:.2f} TB/s; a part less {parts}; no dependent launch {plain[0]:.3f} / {plain[1]:.3f}", flush=True)
    json.dump(res, open(f"{out}/final.json", "w"))
    del m
    torch.cuda.empty_cache()
print(f"{time.time() - t0:.0f} s")
