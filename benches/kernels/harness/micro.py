import torch
from kernels import *
stream = torch.cuda.Stream(); S = stream.cuda_stream
x = [torch.ones(4096, device="cuda", dtype=torch.float16) for _ in range(2)]
cnt = torch.zeros(4096, device="cuda", dtype=torch.int32)
torch.cuda.synchronize()
prepare([("micro.cu", dict(MODE=m, DEPENDENT=d)) for m in (0, 1, 2) for d in (0, 1)])
for n in (576, 2048, 4096):
    for grid in (60, 132, 264):
        for mode, dep in ((0, 0), (0, 1), (2, 1), (1, 1)):
            k = Kernel("micro.cu", "chain", MODE=mode, DEPENDENT=dep)
            N = 200
            def run():
                cnt.zero_()
                for i in range(N):
                    k.launch((grid, 1, 1), 256, 0, S, [P(x[i & 1].data_ptr()), P(x[i & 1 ^ 1].data_ptr()), P(cnt.data_ptr() + 4 * i), P(cnt.data_ptr() + 4 * (i - 1) if i else 0), I(n)])
            with torch.cuda.stream(stream):
                run(); stream.synchronize()
                g = torch.cuda.CUDAGraph()
                with torch.cuda.graph(g, stream=stream, capture_error_mode="thread_local"): run()
                ts = []
                for _ in range(12):
                    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    a.record(stream); g.replay(); b.record(stream); stream.synchronize(); ts.append(a.elapsed_time(b))
            print(f"chain n={n} grid={grid} mode={mode} dependent={dep}: {sorted(ts)[6] / N * 1e3:.2f} us a kernel", flush=True)
