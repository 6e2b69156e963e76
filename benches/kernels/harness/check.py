"""Every form of every kernel against float64, rows against rows bit for bit. `check.py small`: few, for compute-sanitizer."""
import itertools, random, sys, time
import torch
from kernels import *

torch.manual_seed(1)
random.seed(1)
dev = "cuda"
SMALL = len(sys.argv) > 1 and sys.argv[1] == "small"
stream = torch.cuda.Stream()
S = stream.cuda_stream
DT = {0: torch.float16, 1: torch.bfloat16}
SDT = {0: torch.float16, 1: torch.bfloat16, 2: torch.float32}
bad = 0


def arrange(d, v, k):
    """[n, groups] to the order of the kernel: [n / 8][columns][8][groups of a row in a column]"""
    depth, groups, _ = layout(d)
    n, g = v.shape
    m = (n + 7) // 8 * 8
    columns = (k + depth - 1) // depth if d["GROUP"] <= depth else g
    v = torch.nn.functional.pad(v, (0, columns * groups - g, 0, m - n))
    return v.view(m // 8, 8, columns, groups).transpose(1, 2).contiguous()


def make(d, n, k):
    """Returns the kernel's arrays and the weight in float64."""
    f, group, zeros, signed, bf = d["FORMAT"], d.get("GROUP", 0), d.get("ZEROS", 0), d.get("SIGNED", 1), d.get("BF16", 0)
    if f == 16:
        w = (torch.randn(n, k, device=dev) * 0.05).to(DT[bf])
        return w, None, None, w.double()
    sdt = SDT[d.get("SCALE", bf)]
    half = 8 if f == 4 else 128
    c = torch.randint(0, 2 * half, (n, k), device=dev)  # offset binary
    z = torch.randint(0, 2 * half, (n, k // group), device=dev) if zeros else None
    s = (torch.rand(n, k // group if group else 1, device=dev) * 0.02 / half + 0.005 / half).to(sdt)
    zz = z if zeros else torch.full_like(s, half, dtype=torch.long)
    w = ((c.view(n, zz.shape[1], -1) - zz[..., None]).double() * s.double()[..., None]).reshape(n, k)
    b = c ^ half if signed else c
    if f == 4:
        codes = (b[:, 0::2] | b[:, 1::2] << 4).to(torch.uint8)
    else:
        codes = b.to(torch.uint8)
    return codes.contiguous(), arrange(d, s, k) if group else s.flatten(), arrange(d, z.to(torch.uint8), k) if zeros else None, w


def act(v, kind):
    return [lambda v: v, torch.nn.functional.silu, torch.nn.functional.gelu, lambda v: torch.nn.functional.gelu(v, approximate="tanh"), torch.relu,
            lambda v: torch.relu(v) ** 2][kind](v)


def err(y, r):
    return ((y.double() - r).norm() / r.norm()).item()


def fail(*a):
    global bad
    bad += 1
    print("WRONG", *a, flush=True)


def products():
    forms = []
    for bf in (0, 1):
        forms += [dict(FORMAT=16, BF16=bf), dict(FORMAT=8, BF16=bf), dict(FORMAT=8, GROUP=32, ZEROS=1, BF16=bf), dict(FORMAT=8, GROUP=16, BF16=bf), dict(FORMAT=8, GROUP=64, BF16=bf),
                  dict(FORMAT=8, GROUP=128, ZEROS=1, SIGNED=0, BF16=bf), dict(FORMAT=4, GROUP=0, BF16=bf, SCALE=2)]
        for g in (16, 32, 64, 128, 256):
            forms += [dict(FORMAT=4, GROUP=g, BF16=bf), dict(FORMAT=4, GROUP=g, ZEROS=1, BF16=bf, SCALE=2), dict(FORMAT=4, GROUP=g, ZEROS=1, SIGNED=0, BF16=bf)]
        forms += [dict(FORMAT=4, GROUP=32, SIGNED=0, BF16=bf, SCALE=2), dict(FORMAT=8, SIGNED=0, BF16=bf, SCALE=2)]
    forms += [dict(FORMAT=16, ARCH=80), dict(FORMAT=8, GROUP=32, ZEROS=1, BF16=1, ARCH=80), dict(FORMAT=4, GROUP=32, ARCH=80)]
    work = []
    for i, f in enumerate(forms):
        # a pair of shapes with the same number of warps must agree bit for bit, whatever the rest
        w = (4, 8, 16, 6)[i % 4]
        dep = dict(DEPENDENT=0 if f.get("ARCH") == 80 else 1)
        one = dict(f, **dep, WARPS=w, TILES=2, STAGES=4, ROWS=8, STREAM=0)
        others = [dict(f, **dep, WARPS=w, TILES=t, STAGES=s, ROWS=r, STREAM=x) for t, s, r, x in ((2, 6, 1, 0), (4, 3, 8, 0), (4, 2, 16, 0), (2, 3, 16, 1), (2, 4, 1, 1)) if f.get("SCALE") != 2 or f.get("GROUP") != 16 or t < 4]
        work.append((f, one, others))
    if SMALL:
        work = [w for i, w in enumerate(work) if i % 12 == 0 or i in (3, 7, 8)]
    t0 = time.time()
    n = prepare([("product.cu", d) for _, one, others in work for d in [one] + others])
    print(f"compiled {n} forms of the product in {time.time() - t0:.0f} s", flush=True)
    worst = {}
    for f, one, others in work:
        name = " ".join(f"{k}{v}" for k, v in f.items())
        for k, n, epi in ((576 if not f.get("GROUP", 0) > 64 else 768, 200, "plain"), (2048, 264, "norm"), (4096, 128, "gated"), (5632, 1024 if not SMALL else 64, "parts"), (1536, 72, "odd")):
            group = f.get("GROUP", 0)
            if SMALL and k > 2048:
                continue
            if group and k % group:
                continue
            rows = 16
            x = torch.randn(rows, k, device=dev).to(DT[f["BF16"]] if "BF16" in f else torch.float16)
            dt = x.dtype
            xr = x.double()
            norm = residual = bias = None
            gated, kind = epi == "gated", 0
            if epi in ("norm", "gated"):
                norm = (1 + 0.1 * torch.randn(k, device=dev)).to(dt)
                xr = (xr * torch.rsqrt((xr * xr).mean(1, keepdim=True) + 1e-5) * norm.double()).to(dt).double()
            if epi == "parts":
                sizes = [n, 64, 40]
            elif epi == "gated":
                sizes = [n, n]
            else:
                sizes = [n - 3 if epi == "odd" and not group else n]
            ws = [make(one, m, k) for m in sizes]
            total = n if gated else sum(sizes)
            if epi == "odd" or epi == "gated":
                bias = [torch.randn(m, device=dev).to(dt) for m in sizes]
                kind = random.choice((1, 2, 3) if gated else (1, 2, 3, 4, 5))
            r = [xr @ w[3].T for w in ws]
            if bias:
                r = [a + b.double() for a, b in zip(r, bias)]
            r = act(r[0], kind) * r[1] if gated else torch.cat([act(v, kind) for v in r], 1)
            if epi != "gated":
                residual = torch.randn(rows, sum(sizes), device=dev).to(dt)
                r = r + residual.double()
            total = r.shape[1]
            torch.cuda.synchronize()

            def run(d, n_rows, as_float, blocks=1):
                y = torch.full((16, total), float("nan"), device=dev, dtype=torch.float32 if as_float else dt)
                torch.cuda.synchronize()  # the kernel runs in another stream
                first = 0
                parts = []
                for i, (w, m) in enumerate(zip(ws, sizes)):
                    parts.append((w[0], w[1], w[2], bias[i] if bias else None, m, 0 if gated else first))
                    first += m
                product(d, parts, x, y, k, n_rows, S, norm=norm, residual=residual, gated=gated, activation=kind, y_float=as_float, blocks=blocks, y_stride=total)
                torch.cuda.synchronize()
                return y
            base = torch.cat([run(one, 1, True)[:1]])
            e = err(base, r[:1])
            limit = (3e-6 if f["FORMAT"] == 16 else 5e-5) if norm is None and kind == 0 else 1e-3 if dt == torch.float16 else 6e-3
            if norm is None and kind: limit = 1e-4
            worst[(epi, str(dt)[6:])] = max(worst.get((epi, str(dt)[6:]), 0), e)
            if not e < limit:
                fail("product", name, k, n, epi, e)
            full = run(one, 8, True)[:8]
            if not torch.equal(full[:1], base):
                fail("row 1 of 8 differs", name, k, epi, (full[:1] - base).abs().max().item())
            e = err(full, r[:8])
            if not e < limit:
                fail("product of 8", name, k, n, epi, e)
            for d in others:
                if d["STREAM"] and norm is not None:
                    continue
                for n_rows in {1: (1,), 8: (1, 3, 8), 16: (2, 9, 16)}[d["ROWS"]]:
                    try:
                        y = run(d, n_rows, True, blocks=random.choice((0.05, 0.5, 1, 2)))[:n_rows]
                    except RuntimeError as x_:
                        if "shared memory" in str(x_):
                            continue
                        raise
                    if not torch.equal(y[:8], full[:n_rows]):
                        fail("bits", name, d, k, n, epi, n_rows, (y[:8] - full[:n_rows]).abs().max().item())
                    if n_rows > 8:
                        e = err(y, r[:n_rows])
                        if not e < limit:
                            fail("product of", n_rows, name, d, k, epi, e)
            y = run(one, 2, False)[:2]
            e = err(y, r[:2])
            if not e < (2e-3 if dt == torch.float16 else 1e-2):
                fail("16-bit output", name, e)
    print("products:", {" ".join(k): f"{v:.1e}" for k, v in worst.items()}, flush=True)


def attentions():
    worst = 0
    cases = []
    for bf in (0, 1):
        for hd, group, kv in ((64, 3, 3), (64, 8, 2), (96, 1, 4), (128, 4, 2), (128, 12, 1), (256, 2, 1), (80, 5, 1)):
            cases.append((bf, hd, group, kv))
    if SMALL:
        cases = [cases[0], cases[3], cases[4], cases[9]]
    forms = {}
    for bf, hd, group, kv in cases:
        w = 4 if hd == 256 else 8
        forms[bf, hd] = [dict(HEAD_DIM=hd, BF16=bf, WARPS=w, STAGES=2 if hd < 256 else 1, CLUSTER=1, DEPENDENT=1), dict(HEAD_DIM=hd, BF16=bf, WARPS=w, STAGES=1, CLUSTER=0, DEPENDENT=1), dict(HEAD_DIM=hd, BF16=bf, WARPS=w, STAGES=1, CLUSTER=0, DEPENDENT=0, ARCH=80), dict(HEAD_DIM=hd, BF16=bf, WARPS=w, STAGES=1, CLUSTER=1, DEPENDENT=1, MANY=1), dict(HEAD_DIM=hd, BF16=bf, WARPS=w, STAGES=2 if hd < 128 else 1, CLUSTER=0, DEPENDENT=1, MANY=1), dict(HEAD_DIM=hd, BF16=bf, WARPS=w, STAGES=1, CLUSTER=1, DEPENDENT=1, SPLITS=2)]
    t0 = time.time()
    n = prepare([("attention.cu", d) for v in forms.values() for d in v])
    print(f"compiled {n} forms of attention in {time.time() - t0:.0f} s", flush=True)
    for bf, hd, group, kv in cases:
        dt = DT[bf]
        for trial in range(1 if SMALL else 8):
            R = random.choice((1, 3, 16)) if not SMALL else random.choice((1, 2))
            cap = 1024 if not SMALL else 128
            rotated = random.choice((hd, hd // 2, 0))
            inter, window, cap_, sink, qn = random.random() < 0.5, random.choice((0, 0, 17, 100)), random.choice((0, 0, 20.0)), random.random() < 0.4, random.random() < 0.4
            lens = [random.choice((0, 1, 15, 16, 17, 31, cap // 3, cap - 1, random.randrange(cap))) for _ in range(R)]
            pos = [l + random.choice((0, 2)) for l in lens]
            H = group * kv
            qkv = torch.randn(R, (H + 2 * kv) * hd, device=dev).to(dt)
            kc, vc = (torch.randn(R, kv, cap, hd, device=dev).to(dt) for _ in range(2))
            for r in range(R):
                kc[r, :, lens[r]:] = float("nan")
                vc[r, :, lens[r]:] = float("nan")
            ang = torch.rand(cap + 8, max(rotated // 2, 1), device=dev) * 6.28
            cos, sin = ang.cos().contiguous(), ang.sin().contiguous()
            nw = [(1 + 0.1 * torch.randn(hd, device=dev)).to(dt) for _ in range(2)]
            sinks = torch.randn(H, device=dev) * 2 + 1
            lt, pt = (torch.tensor(v, device=dev, dtype=torch.int32) for v in (lens, pos))
            scale = hd ** -0.5

            def rotate(v, p, w):
                v = v.double()
                if qn:
                    v = v * torch.rsqrt((v * v).mean(-1, keepdim=True) + 1e-5) * w.double()
                if rotated:
                    h = rotated // 2
                    c, s = cos[p].double(), sin[p].double()
                    a, b = (v[..., 0:rotated:2], v[..., 1:rotated:2]) if inter else (v[..., :h], v[..., h:rotated])
                    ra, rb = a * c - b * s, b * c + a * s
                    v = v.clone()
                    if inter:
                        v[..., 0:rotated:2], v[..., 1:rotated:2] = ra, rb
                    else:
                        v[..., :h], v[..., h:rotated] = ra, rb
                return v.to(dt)
            ref, newk = [], []
            for r in range(R):
                q = rotate(qkv[r, :H * hd].view(H, hd), pos[r], nw[0]).double()
                k = rotate(qkv[r, H * hd:(H + kv) * hd].view(kv, hd), pos[r], nw[1])
                v = qkv[r, (H + kv) * hd:].view(kv, hd)
                newk.append(k)
                lo = max(0, lens[r] + 1 - window) if window else 0
                K = torch.cat([kc[r, :, lo:lens[r]], k[:, None]], 1).double().repeat_interleave(group, 0)
                V = torch.cat([vc[r, :, lo:lens[r]], v[:, None]], 1).double().repeat_interleave(group, 0)
                s = torch.einsum("hd,hsd->hs", q, K) * scale
                if cap_:
                    s = cap_ * torch.tanh(s / cap_)
                if sink:
                    s = torch.cat([s, sinks.double()[:, None]], 1)
                p = torch.softmax(s, 1)[:, :K.shape[1]]
                ref.append(torch.einsum("hs,hsd->hd", p, V).flatten())
            ref = torch.stack(ref)
            torch.cuda.synchronize()
            first = None
            for d in forms[bf, hd]:
                for splits in ((2,) if d.get('SPLITS') else (8,) if not d.get('MANY') else (2,) if SMALL else (1, 2, 4, 8)):
                    k2, v2 = kc.clone(), vc.clone()

                    def run(R2, r0=0):
                        out = torch.full((R, H * hd), float("nan"), device=dev, dtype=dt)
                        ws = torch.empty(R * kv * 2 * 8 * (8 * hd + 16), device=dev)
                        cnt = torch.zeros(R * kv * 2, device=dev, dtype=torch.int32)
                        a = AttentionArguments()
                        e = qkv.element_size()
                        base = qkv.data_ptr() + r0 * qkv.shape[1] * e
                        a.q, a.k, a.v = base, base + H * hd * e, base + (H + kv) * hd * e
                        a.out, a.keys, a.values = out.data_ptr() + r0 * H * hd * e, k2.data_ptr() + r0 * kv * cap * hd * e, v2.data_ptr() + r0 * kv * cap * hd * e
                        a.lengths, a.positions = lt.data_ptr() + 4 * r0, pt.data_ptr() + 4 * r0
                        if rotated:
                            a.cosines, a.sines = cos.data_ptr(), sin.data_ptr()
                        if qn:
                            a.q_norm, a.k_norm = nw[0].data_ptr(), nw[1].data_ptr()
                        if sink:
                            a.sinks = sinks.data_ptr()
                        a.workspace, a.counters = ws.data_ptr(), cnt.data_ptr()
                        a.cache_stride = kv * cap * hd
                        a.q_stride = a.k_stride = a.v_stride = qkv.shape[1]
                        a.out_stride = H * hd
                        a.group, a.capacity, a.rotated, a.interleaved, a.window = group, cap, rotated, int(inter), window
                        a.scale, a.soft_cap, a.eps = scale, cap_, 1e-5
                        torch.cuda.synchronize()
                        for _ in range(2):
                            attention(d, a, splits, kv, R2, S)
                        torch.cuda.synchronize()
                        assert not cnt.any()
                        return out
                    out = run(R)
                    what = (d, hd, group, kv, R, lens, rotated, inter, window, cap_, sink, qn, splits)
                    e = ((out.double() - ref).norm() / ref.norm()).item()
                    worst = max(worst, e if not bf else e / 8)
                    if not e < (2e-3 if not bf else 1.5e-2):
                        fail("attention", e, what)
                    for r in range(R):
                        dk = (k2[r, :, lens[r]].double() - newk[r].double()).abs().max().item()
                        if not dk < (0.01 if not bf else 0.07) or not torch.equal(v2[r, :, lens[r]], qkv[r, (H + kv) * hd:].view(kv, hd)):
                            fail("cache", dk, what)
                        if not torch.equal(k2[r, :, :lens[r]], kc[r, :, :lens[r]]) or lens[r] + 1 < cap and not k2[r, :, lens[r] + 1:].isnan().all():
                            fail("cache elsewhere", what)
                    if not d.get('SPLITS'):
                        if first is None:
                            first = out
                        elif not torch.equal(first, out):
                            fail("cluster and workspace differ", what)
                        one = run(1, R - 1)
                        if not torch.equal(one[R - 1], out[R - 1]):
                            fail("a sequence alone differs", what)
    print(f"attention: worst {worst:.1e}", flush=True)


def tokens():
    for bf, flt in ((0, 0), (1, 0), (0, 1)):
        dt = torch.float32 if flt else DT[bf]
        for n in (10, 1000, 32000, 128256, 49155):
            for rows in (1, 5):
                x = torch.randn(rows, n, device=dev).to(dt)
                want = []
                for r in range(rows):
                    kind = random.choice(("plain", "ties", "nan", "inf", "low", "zero"))
                    i, j = sorted(random.sample(range(n), 2))
                    if kind == "ties": x[r, i] = x[r, j] = 9.
                    if kind == "nan": x[r, i] = x[r, j] = float("nan"); x[r, 0] = float("inf") if i else float("nan")
                    if kind == "inf": x[r, j] = float("inf")
                    if kind == "low": x[r] = float("-inf"); x[r, i] = -60000.
                    if kind == "zero": x[r] = -1.; x[r, i] = -0.; x[r, j] = 0.
                    if kind == "nan": want.append((i, 1))
                    elif kind == "inf": want.append((j, 1))
                    elif kind in ("ties", "low", "zero"): want.append((i, 0))
                    else: want.append((int((x[r] == x[r].max()).nonzero()[0]), 0))
                z = lambda m: torch.zeros(m, device=dev, dtype=torch.int32)
                cand, cnt, ids, st, ln, first, hist = torch.zeros(rows, device=dev, dtype=torch.int64), z(rows), z(rows), z(rows), z(rows), z(rows), z(rows * 4).view(rows, 4)
                torch.cuda.synchronize()
                a = ArgmaxArguments()
                a.logits, a.candidates, a.counters, a.ids, a.history, a.lengths, a.status, a.first = (t.data_ptr() for t in (x, cand, cnt, ids, hist, ln, st, first))
                a.n, a.stride, a.is_float, a.history_stride = n, n, flt, 4
                for _ in range(2):
                    argmax(dict(BF16=bf, DEPENDENT=1), a, 32, rows, S)
                torch.cuda.synchronize()
                got = list(zip(ids.tolist(), st.tolist()))
                if got != want or ln.tolist() != [2] * rows or hist[:, :2].tolist() != [[w[0]] * 2 for w in want]:
                    fail("argmax", n, rows, got, want, hist.tolist())
    table = torch.randn(100, 576, device=dev).half()
    ids = torch.tensor([3, 99, 0], device=dev, dtype=torch.int32)
    y = torch.zeros(3, 576, device=dev).half()
    torch.cuda.synchronize()
    embed(dict(BF16=0, DEPENDENT=1), table, ids, y, 576, 3, 100, S)
    torch.cuda.synchronize()
    if not torch.equal(y, table[ids.long()]):
        fail("embed")
    print("argmax and embed done", flush=True)


t0 = time.time()
tokens()
attentions()
products()
print("FAILURES:" if bad else "all right:", bad, f"in {time.time() - t0:.0f} s", flush=True)
sys.exit(bad > 0)
