import json, os, sys, time
from token_program import *
out = os.environ.get("OUT", ".")
log, best = [], {}
t0 = time.time()
jobs = []
for f in ("fp16", "int8", "int4g128", "int4g32"):
    for c in PRODUCTS:
        jobs.append(("product.cu", dict(FORMATS[f], WARPS=c[0], TILES=c[1], STAGES=c[2], ROWS=1, STREAM=0, RESIDENT=c[5] if len(c) > 5 else 2, DEPENDENT=1)))
for hd in (64, 128):
    for c in ATTENTIONS:
        jobs.append(("attention.cu", dict(HEAD_DIM=hd, WARPS=c[0], STAGES=c[1], CLUSTER=c[3] if len(c) > 3 else 1, SPLITS=c[2], MANY=0, DEPENDENT=1)))
print("compiled", prepare(jobs), f"{time.time() - t0:.0f} s", flush=True)
budget = float(sys.argv[1])
only = sys.argv[2:]
plan = [("8b", "fp16", 6), ("1b", "fp16", None), ("8b", "int4g128", 8), ("1b", "int4g128", None), ("smol", "fp16", None), ("8b", "int8", 8), ("8b", "int4g32", 8), ("1b", "int4g32", None), ("1b", "int8", None), ("smol", "int4g32", None)]
plan = [p for p in plan if not only or f'{p[0]}/{p[1]}' in only]
seed = json.load(open("seed.json"))
for name, form, layers in plan:
    if time.time() - t0 > budget:
        print("no time for", name, form)
        continue
    key = f"{name} {form}"
    best[key] = tune(name, form, layers, log=log, passes=1, budget=9, start=seed.get(key))
    json.dump(dict(best=best, log=log), open(f"{out}/sweep.json", "w"))
prepare([(f, dict(d, **e)) for name, form, _ in plan if f"{name} {form}" in best for m in [Model.__new__(Model)] for _ in [m.__dict__.update(d=FORMATS[form], m=MODELS[name], rows=1, dep=1, extra={})] for f, d in m.jobs(best[f"{name} {form}"]) for e in ({},)])
for name, form, _ in plan:
    key = f"{name} {form}"
    if key not in best or time.time() - t0 > budget + 60:
        continue
    m = Model(name, form)
    r = {}
    for what, dep, extra in (("all", 1, {}), ("again", 1, {})):
        m.dep, m.extra = dep, extra
        r[what] = [m.time(best[key], l, 30) for l in (300, 4080)]
    print(f"{key}: " + "; ".join(f"{k} {v[0]:.3f} / {v[1]:.3f}" for k, v in r.items()) + f" ms a token at 300 / 4080; {m.bytes / r['all'][0] / 1e9:.2f} TB/s of weights", flush=True)
    del m
    torch.cuda.empty_cache()
print(f"{time.time() - t0:.0f} s")
