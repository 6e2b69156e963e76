"""Compiles, loads and launches the decode kernels: NVRTC and the CUDA driver through ctypes, memory from torch."""
import ctypes, glob, hashlib, os, sys
from concurrent.futures import ProcessPoolExecutor
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
SRC = os.environ.get("KERNELS_SOURCE", os.path.join(HERE, "../../../src/backend/tensorrt/run/device/decode"))
CACHE = os.environ.get("KERNELS_CACHE", "/tmp/kernels-cache")
SMS = 132
PTX = None  # a folder of PTX made elsewhere, by the names of cubins


def source(file):
    """Of the crate's kernels, or of those that only the harness runs."""
    return next(path for path in (os.path.join(folder, file) for folder in (SRC, os.path.join(HERE, ".."), HERE)) if os.path.exists(path))


def find_nvrtc():
    for base in sys.path:
        for pattern in ("nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.1*"):
            for f in glob.glob(os.path.join(base, pattern)):
                return f
    return "/usr/local/cuda/lib64/libnvrtc.so"


def compile_one(job):
    file, defines, path = job
    lib = ctypes.CDLL(find_nvrtc())
    text = open(source(file), "rb").read()
    prog = ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(prog), text, file.encode(), 0, None, None)
    defines = dict(defines)
    arch = defines.pop("ARCH", 90)
    options = [f"--gpu-architecture={'sm' if arch == 90 else 'compute'}_{arch}", "--std=c++17", "-I" + SRC, "-lineinfo"] + [f"-D{k}={v}" for k, v in defines.items()]
    options = [o.encode() for o in options]
    rc = lib.nvrtcCompileProgram(prog, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if rc:
        lib.nvrtcGetProgramLogSize(prog, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(prog, log)
        return f"{file} {defines}: {log.value.decode()}"
    kind = "CUBIN" if arch == 90 else "PTX"  # PTX of an older target: the driver makes machine code of it
    getattr(lib, f"nvrtcGet{kind}Size")(prog, ctypes.byref(size))
    out = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{kind}")(prog, out)
    with open(path + ".part", "wb") as f:
        f.write(out.raw)
    os.rename(path + ".part", path)
    return None


def cubin_path(file, defines):
    h = hashlib.sha1()
    for f in sorted({file, "common.cuh"}):
        h.update(open(source(f), "rb").read())
    h.update(repr(sorted(defines.items())).encode())
    return os.path.join(CACHE, h.hexdigest()[:20] + ".cubin")


def prepare(jobs):
    """jobs: (file, defines); compiles what is missing, 16 at a time."""
    os.makedirs(CACHE, exist_ok=True)
    todo = {}
    for file, defines in jobs:
        p = cubin_path(file, defines)
        if not os.path.exists(p):
            todo[p] = (file, tuple(sorted(defines.items())), p)
    if todo:
        with ProcessPoolExecutor(16) as pool:
            for e in pool.map(compile_one, todo.values()):
                if e:
                    print("COMPILE", e[:1500], flush=True)
    return len(todo)


cuda = ctypes.CDLL("libcuda.so.1")


def ok(rc, what=""):
    if rc:
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(rc, ctypes.byref(name))
        raise RuntimeError(f"{what}: {name.value}")


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint) for n in ("gx", "gy", "gz", "bx", "by", "bz", "shared")] + [
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint)]


class Kernel:
    loaded = {}

    def __new__(cls, file, name, **defines):
        key = (file, name, tuple(sorted(defines.items())))
        if key in cls.loaded:
            return cls.loaded[key]
        self = super().__new__(cls)
        module = self.module = ctypes.c_void_p()
        path = PTX and os.path.join(PTX, os.path.basename(cubin_path(file, defines)).replace(".cubin", ".ptx"))
        self.from_ptx = bool(path and os.path.exists(path))
        if not self.from_ptx:
            prepare([(file, defines)])
            path = cubin_path(file, defines)
        self.image = open(path, "rb").read() + b"\0"
        torch.cuda.current_stream()
        ok(cuda.cuModuleLoadData(ctypes.byref(module), self.image), "load")
        self.function = ctypes.c_void_p()
        ok(cuda.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()), name)
        self.limit = 0
        self.defines = defines
        self.regs = self.attribute(4)
        cls.loaded[key] = self
        return self

    def attribute(self, n):
        v = ctypes.c_int()
        ok(cuda.cuFuncGetAttribute(ctypes.byref(v), n, self.function))
        return v.value

    def allow(self, shared, cluster):
        if shared > self.limit:
            if shared > 227 * 1024:
                raise RuntimeError(f"shared memory {shared}")
            ok(cuda.cuFuncSetAttribute(self.function, 8, shared), "shared memory")
            self.limit = shared
        if cluster > 8:
            ok(cuda.cuFuncSetAttribute(self.function, 14, 1), "cluster size")

    def launch(self, grid, block, shared, stream, arguments, cluster=0):
        """arguments: ctypes values in order"""
        self.allow(shared, cluster)
        attributes = (Attribute * 2)()
        n = 0
        if self.defines.get("DEPENDENT"):
            attributes[n].id = 6
            attributes[n].value[0] = 1
            n += 1
        if cluster:
            attributes[n].id = 4
            attributes[n].value[0], attributes[n].value[1], attributes[n].value[2] = cluster, 1, 1
            n += 1
        c = Config(*grid, block, 1, 1, shared, stream, attributes, n)
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(a) for a in arguments])
        ok(cuda.cuLaunchKernelEx(ctypes.byref(c), self.function, pointers, None), "launch")


P = ctypes.c_void_p
I = ctypes.c_int


class Part(ctypes.Structure):
    _fields_ = [("codes", P), ("scales", P), ("zeros", P), ("bias", P), ("rows", I), ("first", I)]


class ProductArguments(ctypes.Structure):
    _fields_ = [("part", Part * 3), ("x", P), ("norm", P), ("y", P), ("residual", P)] + [
        (n, I) for n in ("k", "rows", "x_stride", "y_stride", "residual_stride", "tiles", "second", "third", "gated", "activation", "y_float")] + [("eps", ctypes.c_float)]


class AttentionArguments(ctypes.Structure):
    _fields_ = [(n, P) for n in ("q", "k", "v", "out", "keys", "values", "lengths", "positions", "cosines", "sines", "q_norm", "k_norm", "sinks", "workspace", "counters")] + [
        ("cache_stride", ctypes.c_ulonglong)] + [(n, I) for n in ("q_stride", "k_stride", "v_stride", "out_stride", "group", "capacity", "rotated", "interleaved", "window")] + [
        (n, ctypes.c_float) for n in ("scale", "soft_cap", "eps")]


class ArgmaxArguments(ctypes.Structure):
    _fields_ = [(n, P) for n in ("logits", "candidates", "counters", "ids", "history", "lengths", "positions", "status", "first")] + [
        (n, I) for n in ("n", "stride", "is_float", "history_stride")]


def ptr(t):
    return t if isinstance(t, int) else (t.data_ptr() if t is not None else 0)


DEPTH = {16: 32, 8: 64, 4: 128}


def layout(d):
    """Weights of a row in a column, scales of a row in a column, bytes of a scale."""
    depth, group = DEPTH[d["FORMAT"]], d.get("GROUP", 0)
    return depth, 0 if not group else 1 if group >= depth else depth // group, 4 if d.get("SCALE", d.get("BF16", 0)) == 2 else 2


def product_shared(d, k, rows, normed):
    """Bytes of dynamic shared memory; the formula of product.cu."""
    f, t, w, s = d["FORMAT"], d["TILES"], d["WARPS"], d["STAGES"]
    depth, groups, sb = layout(d)
    stage = t * 512 + t * 8 * groups * sb + (t * groups * 8 if d.get("ZEROS") else 0)
    stage = (stage + 15) // 16 * 16
    if d.get("STREAM"):
        stage += (2 if d["ROWS"] > 8 else 1) * 8 * depth * 2
    columns = (k * f // 8 + 63) // 64
    padded = columns * depth
    size = w * s * stage + 2 * w * t * 8 * rows * 4
    if groups and not d.get("STREAM") and (f == 4 or not d.get("BF16") or d.get("ZEROS")):
        r = d["ROWS"]
        size += w * ((columns + w - 1) // w) * groups * (1 if r == 1 else 8 if r <= 8 else 16) * (2 if d.get("ZEROS") else 1) * 4
        size = (size + 15) // 16 * 16
    if normed:
        size += (rows * w + 3) // 4 * 16 + padded * 2
    if not d.get("STREAM"):
        size += rows * ((padded * 2 + 127) // 128 * 128 + (16 if f == 16 else 64))
    return size


def product(d, parts, x, y, k, rows, stream, norm=None, residual=None, gated=False, activation=0, y_float=False, eps=1e-5, blocks=1,
            x_stride=None, y_stride=None, residual_stride=None):
    """parts: (codes, scales, zeros, bias, rows, first)"""
    a = ProductArguments()
    t = d["TILES"]
    for i, p in enumerate(parts):
        a.part[i] = Part(*[ptr(v) for v in p[:4]], p[4], p[5])
    a.x, a.norm, a.y, a.residual = ptr(x), ptr(norm), ptr(y), ptr(residual)
    a.k, a.rows, a.gated, a.activation, a.y_float, a.eps = k, rows, int(gated), activation, int(y_float), eps
    total = parts[0][4] if gated else sum(p[4] for p in parts)
    a.x_stride, a.y_stride = x_stride or k, y_stride or total
    a.residual_stride = residual_stride or a.y_stride
    up = lambda n, m: (n + m - 1) // m
    each = [up(p[4], 8 * t) for p in parts]
    a.tiles = up(parts[0][4], 4 * t) if gated else sum(each)
    a.second = each[0] if len(parts) > 1 and not gated else 1 << 30
    a.third = each[0] + each[1] if len(parts) > 2 else 1 << 30
    kernel = Kernel("product.cu", "product", **d)
    kernel.launch((min(a.tiles, int(SMS * blocks)), 1, 1), d["WARPS"] * 32, product_shared(d, k, rows, norm is not None), stream, [a])


def attention_shared(d, blocks):
    hd, w = d["HEAD_DIM"], d["WARPS"]
    share = ((8 * hd + 31) // 32 + blocks - 1) // blocks * 32
    size = w * 2 * 16 * (hd * 2 + 16) * d["STAGES"] + 8 * (hd + 8) * 2 + 2 * hd * 2
    return size + (w * 8 * hd * 4 if d.get("MANY") else 0) + (d.get("SPLITS", 8) * share * 4 if d.get("CLUSTER") else 0)


def attention(d, a, blocks, kv_heads, sequences, stream):
    assert d.get("MANY") or blocks == d.get("SPLITS", 8)
    kernel = Kernel("attention.cu", "attention", **d)
    kernel.launch((blocks, kv_heads * ((a.group + 7) // 8), sequences), d["WARPS"] * 32, attention_shared(d, blocks), stream, [a], blocks if d.get("CLUSTER") else 0)


def embed(d, table, ids, y, width, rows, vocabulary, stream):
    kernel = Kernel("token.cu", "embed", **d)
    kernel.launch((1, rows, 1), 256, 0, stream, [P(ptr(table)), P(ptr(ids)), P(ptr(y)), I(width), I(width), I(vocabulary)])


def argmax(d, a, blocks, rows, stream):
    kernel = Kernel("token.cu", "argmax", **d)
    kernel.launch((blocks, rows, 1), 256, 0, stream, [a])
