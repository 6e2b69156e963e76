"""The whole program right? Logits against torch in fp32, rows alone and together, with and without dependent launch."""
import json, sys
from token_program import *
bad = 0
seed = json.load(open("seed.json"))


def dense(m, w, n, k):
    d = m.d
    if d["FORMAT"] == 16:
        return w[0].view(n, k).float()
    if d["FORMAT"] == 8:
        c = w[0].view(torch.int8).view(n, k).float()
        return c * w[1][0].float()
    u = w[0].view(n, k // 2).int()
    c = torch.stack([u & 15, u >> 4], -1).view(n, k).float()
    c = c - 8 if d.get("ZEROS") else c - 16 * (c > 7)
    return c * w[1][0].float()


def reference(m, ids, lengths, keys, values):
    """One token a row; appends to keys and values"""
    c = m.m
    H, KV, D, h = c["heads"], c["kv"], c["hd"], c["hidden"]
    x = m.table[ids].float()
    rms = lambda v, w: v * torch.rsqrt((v * v).mean(-1, keepdim=True) + 1e-5) * w.float()
    for i, l in enumerate(m.layers):
        n = rms(x, m.norms[i][0])
        q, k, v = [n @ dense(m, w, r, h).T for w, r in zip(l["qkv"], (H * D, KV * D, KV * D))]
        o = []
        for r in range(len(ids)):
            L = lengths[r]
            cs, sn = m.cos[L], m.sin[L]
            rot = lambda t: torch.cat([t[..., :D // 2] * cs - t[..., D // 2:] * sn, t[..., D // 2:] * cs + t[..., :D // 2] * sn], -1)
            qq, kk = rot(q[r].view(H, D)), rot(k[r].view(KV, D))
            keys[i][r] = torch.cat([keys[i][r], kk[:, None]], 1)
            values[i][r] = torch.cat([values[i][r], v[r].view(KV, 1, D)], 1)
            K, V = keys[i][r].repeat_interleave(H // KV, 0), values[i][r].repeat_interleave(H // KV, 0)
            p = torch.softmax(torch.einsum("hd,hsd->hs", qq, K) * D ** -0.5, -1)
            o.append(torch.einsum("hs,hsd->hd", p, V).flatten())
        x = x + torch.stack(o) @ dense(m, l["out"][0], h, H * D).T
        n = rms(x, m.norms[i][1])
        g, u = [n @ dense(m, w, c["mlp"], h).T for w in l["up"]]
        x = x + (torch.nn.functional.silu(g) * u) @ dense(m, l["down"][0], h, c["mlp"]).T
    return rms(x, m.final) @ m.head.view(-1, h).float().T


for name, form, layers in (("smol", "fp16", 6), ("smol", "int4g32", 6), ("1b", "int4g128", 4), ("1b", "int8", 4), ("8b", "int4g32z", 2), ("8b", "fp16", 2)):
    torch.manual_seed(3)
    cfg1 = {k: tuple(v) for k, v in seed.get(f"{name} {form}", seed[f"{name} int4g32"] if "int4" in form else {}).items()}
    m = Model(name, form, rows=3, capacity=256, layers=layers)
    start = [5, 100, 37]
    cfg3 = {p: (c if p == "att" else (c[0], 2, 3, 1)) for p, c in cfg1.items()}
    m.ids.copy_(torch.tensor([11, 500, 30000]))
    ids0 = m.ids.clone()
    keys = [[m.keys[i][r, :, :start[r]].float() for r in range(3)] for i in range(layers)]
    values = [[m.values[i][r, :, :start[r]].float() for r in range(3)] for i in range(layers)]
    save = [k.clone() for k in m.keys], [v.clone() for v in m.values]
    outs = {}
    for dep in (1, 0):
        m.dep = dep
        for k, s in zip(m.keys + m.values, save[0] + save[1]):
            k.copy_(s)
        m.ids.copy_(ids0)
        m.lengths.copy_(torch.tensor(start))
        m.first.copy_(m.lengths)
        torch.cuda.synchronize()
        got = []
        prepare(m.jobs(cfg3))
        with torch.cuda.stream(stream):
            if dep:
                g = torch.cuda.CUDAGraph()
                for j in m.jobs(cfg3):
                    Kernel(j[0], {"product.cu": "product", "attention.cu": "attention"}.get(j[0], "embed"), **j[1])
                Kernel("token.cu", "argmax", DEPENDENT=1)
                with torch.cuda.graph(g, stream=stream, capture_error_mode="thread_local"):
                    m.run(cfg3)
            for step in range(5):
                (g.replay if dep else lambda: m.run(cfg3))()
                stream.synchronize()
                got.append((m.logits.clone(), m.ids.clone()))
        outs[dep] = got
    for (l1, i1), (l0, i0) in zip(outs[1], outs[0]):
        if not torch.equal(l1, l0) or not torch.equal(i1, i0):
            bad += 1
            print("WRONG: dependent launch changes bits", name, form)
    ids, worst = ids0.clone(), 0
    lens = list(start)
    for step in range(5):
        ref = reference(m, ids.long(), lens, keys, values)
        l, i = outs[1][step]
        e = ((l.float() - ref).norm() / ref.norm()).item()
        worst = max(worst, e)
        if i.tolist() != l.argmax(-1).tolist():
            bad += 1
            print("WRONG: argmax", name, form, i.tolist(), l.argmax(-1).tolist())
        ids = i
        lens = [v + 1 for v in lens]
    if not worst < 2e-2:
        bad += 1
        print("WRONG: logits", name, form, worst)
    if m.history[:, :5].T.tolist() != [i.tolist() for _, i in outs[1]]:
        bad += 1
        print("WRONG: history")
    # each row alone, with the configuration of one row
    for r in range(3):
        one = Model.__new__(Model)
        one.__dict__.update(m.__dict__)
        one.rows, one.dep = 1, 1
        for n in ("h", "qkv", "att", "mid", "logits", "ids", "lengths", "first", "history"):
            setattr(one, n, getattr(m, n)[r:r + 1])
        one.keys, one.values = [k[r:r + 1] for k in m.keys], [v[r:r + 1] for v in m.values]
        for k, s in zip(m.keys + m.values, save[0] + save[1]):
            k.copy_(s)
        m.ids.copy_(ids0)
        m.lengths.copy_(torch.tensor(start))
        torch.cuda.synchronize()
        for step in range(5):
            one.run(cfg1)
            stream.synchronize()
            if not torch.equal(one.logits[0], outs[1][step][0][r]):
                bad += 1
                print("WRONG: a row alone", name, form, r, step, (one.logits[0].float() - outs[1][step][0][r].float()).abs().max().item())
                break
    print(f"{name} {form}: logits within {worst:.1e} of fp32, 5 steps of 3 rows, same bits alone and together, with and without dependent launch", flush=True)
    del m, one
    torch.cuda.empty_cache()
print("whole program:", "WRONG" if bad else "all right")
