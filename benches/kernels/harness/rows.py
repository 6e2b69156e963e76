"""4, 8 and 16 rows a step against one: the number of warps of each product stays, so rows keep their bits."""
import json, os, sys, time
from token_program import *
out = os.environ.get("OUT", ".")
best = json.load(open(sys.argv[1]))
best = best.get("best", best)
result = {}
t0 = time.time()
for key in sys.argv[2:]:
    name, form = key.split("/")
    base = {k: tuple(v) for k, v in best[f"{name} {form}"].items()}
    m = Model(name, form, rows=1)
    one = [m.time(base, l, 20) for l in (300, 4080)]
    del m
    torch.cuda.empty_cache()
    print(f"{key}: one row {one[0]:.3f} / {one[1]:.3f} ms {base}", flush=True)
    result[key] = {"1": dict(ms=one, config=base)}
    for R in (4, 8, 16):
        t1 = time.time()
        layers = {"8b": 6}.get(name)
        m = Model(name, form, rows=R, capacity=512, layers=layers)
        cand = {}
        for part in PART_ORDER:
            if part == "att":
                w, splits = base["att"][0], base["att"][2]
                cand[part] = [(w, s, p, 1, splits) for p in (1, 2, 4) for s in (1, 2)] + [(w, 1, splits), (w, 2, splits), base["att"]]
                continue
            w = base[part][0]
            k = m.shapes[part][1] if part != "head" else m.m["hidden"]
            normed = part in ("qkv", "up", "head")
            d0 = FORMATS["fp16"] if part == "head" else FORMATS[form]
            cs = []
            for st in ((0,) if normed else (0, 1)):
                for t in (2, 4):
                    for s in (2, 3, 4, 6, 8, 12):
                        for b in (1, 2):
                            c = (w, t, s, b, st, 2 if b == 2 or w <= 8 else 1)
                            d = dict(d0, WARPS=w, TILES=t, STAGES=s, ROWS=8 if R <= 8 else 16, STREAM=st)
                            size = product_shared(d, k, R, normed)
                            if size * b <= 225 * 1024 and w * b <= 32 and size * b >= 40 * 1024:
                                cs.append(c)
            cand[part] = cs
        cfg = {p: (cs[len(cs) // 2] if p != "att" else base["att"]) for p, cs in cand.items()}
        jobs = []
        for p, cs in cand.items():
            for c in cs:
                jobs.append(("attention.cu", m.attention_defines(c)) if p == "att" else ("product.cu", m.defines(c, FORMATS["fp16"] if p == "head" else None)))
        n = prepare(jobs)
        bestt = m.time(cfg, 300, 9, warm=2)
        for p in PART_ORDER:
            for c in cand[p]:
                trial = dict(cfg, **{p: c})
                try:
                    t = m.time(trial, 300, 7, warm=2)
                except RuntimeError as e:
                    continue
                if t < bestt * 0.999:
                    bestt, cfg = t, trial
        m = None
        torch.cuda.empty_cache()
        m = Model(name, form, rows=R, capacity=4224)
        r = [m.time(cfg, l, 15) for l in (300, 4080)]
        parts = {}
        for p in ("qkv", "att", "out", "up", "down", "head"):
            rest = [q for q in ("embed", "qkv", "att", "out", "up", "down", "head", "argmax") if q != p]
            parts[p] = round(r[0] - m.time(cfg, 300, 9, only=rest), 3)
        print(f"{key}: {R} rows {r[0]:.3f} / {r[1]:.3f} ms, {r[0] / one[0]:.3f} / {r[1] / one[1]:.3f} x one row; a part less, ms: {parts} ({n} compiled, {time.time() - t1:.0f} s): {cfg}", flush=True)
        result[key][str(R)] = dict(ms=r, parts=parts, config=cfg)
        json.dump(result, open(f"{out}/rows.json", "w"))
        del m
        torch.cuda.empty_cache()
print(f"{time.time() - t0:.0f} s")
