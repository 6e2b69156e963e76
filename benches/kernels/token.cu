// Steps around the layers of a token: the embedding's row, and the most probable token.
#include "common.cuh"

#ifndef BLOCK
#define BLOCK 256
#endif

// Row ids[r] of table [vocabulary, width] becomes row r of y. Grid (blocks, rows).
//
// Starts a chain: it waits before it lets the next kernel go, so kernels after it may read lengths and positions,
// which the argmax of the token before writes, without waiting themselves.
extern "C" __global__ void __launch_bounds__(BLOCK) embed(const void* table, const int* ids, void* y, int width, int y_stride, int vocabulary) {
    wait_for_previous();
    allow_next();
    const int id = min(max(*(volatile const int*)(ids + blockIdx.y), 0), vocabulary - 1);
    const uint4* from = (const uint4*)((const u16*)table + (u64)id * width);
    uint4* to = (uint4*)((u16*)y + (u64)blockIdx.y * y_stride);
    for (int i = blockIdx.x * BLOCK + threadIdx.x; i < width / 8; i += gridDim.x * BLOCK) to[i] = from[i];
}

// Index of the largest of n logits a row, the lowest of equals; -0 and 0 are equal. If any logit is NaN or plus
// infinity, the status of the row is 1 and the index that of the first such one (NaN before infinity).
// Grid (blocks, rows). The last block of a row reads the candidates; their order does not matter.
struct ArgmaxArguments {
    const void* logits;    // [rows, stride] of x's type or fp32
    u64* candidates;       // [rows]
    u32* counters;         // [rows]; zero before the first launch and after each, like the candidates
    int* ids;              // the next token of each row, or null
    int* history;          // [rows, history_stride]: ids by step, or null
    int* lengths;          // incremented, if present
    int* positions;        // incremented, if present and another array
    int* status;
    const int* first;      // history goes to index lengths[r] - first[r]
    int n, stride, is_float, history_stride;
};

DEVICE u64 key_of(float v, int index) {
    v += 0.f;  // -0 becomes 0
    u32 bits = __float_as_uint(v);
    bits = v != v ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | (0xffffffffu - (u32)index);
}

extern "C" __global__ void __launch_bounds__(BLOCK) argmax(const __grid_constant__ ArgmaxArguments a) {
    __shared__ u64 best_of[BLOCK / 32];
    allow_next();
    wait_for_previous();
    const int row = blockIdx.y, each = ((a.n + gridDim.x - 1) / gridDim.x + 7) / 8 * 8;
    const int begin = blockIdx.x * each, end = min(begin + each, a.n);
    u64 best = 0;
    auto see = [&](float v, int i) {
        const u64 k = key_of(v, i);
        best = k > best ? k : best;
    };
    if (a.is_float) {
        const float* x = (const float*)a.logits + (u64)row * a.stride;
        for (int i = begin + threadIdx.x; i < end; i += BLOCK) see(__uint_as_float(load_4(x + i)), i);
    } else {
        const u16* x = (const u16*)a.logits + (u64)row * a.stride;
        // rows whose length is not a multiple of 8 are not aligned to 16 bytes
        const bool aligned = (a.stride & 7) == 0;
        for (int i = begin + threadIdx.x * 8; i < end; i += BLOCK * 8) {
            if (aligned && i + 8 <= end) {
                const uint4 v = load_16(x + i);
                const u32 p[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int j = 0; j < 4; j++) see(low_float(p[j]), i + 2 * j), see(high_float(p[j]), i + 2 * j + 1);
            } else {
                for (int j = i; j < min(i + 8, end); j++) see(to_float(load_2(x + j)), j);
            }
        }
    }
    auto larger = [](u64 x, u64 y) { return x > y ? x : y; };
#pragma unroll
    for (int o = 16; o; o >>= 1) best = larger(best, __shfl_xor_sync(~0u, best, o));
    if ((threadIdx.x & 31) == 0) best_of[threadIdx.x >> 5] = best;
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < BLOCK / 32; w++) best = larger(best, best_of[w]);
    atomicMax(a.candidates + row, best);
    __threadfence();
    if (atomicAdd(a.counters + row, 1u) != gridDim.x - 1) return;
    __threadfence();
    best = atomicExch(a.candidates + row, 0ull);
    a.counters[row] = 0;
    const int index = (int)(0xffffffffu - (u32)best);
    if (a.ids) a.ids[row] = index;
    if (a.status) a.status[row] = (u32)(best >> 32) >= 0xff800000u;  // plus infinity is 0x7f800000 | sign
    if (a.history && a.lengths) a.history[row * a.history_stride + a.lengths[row] - a.first[row]] = index;
    if (a.lengths) a.lengths[row] += 1;
    if (a.positions && a.positions != a.lengths) a.positions[row] += 1;
}
