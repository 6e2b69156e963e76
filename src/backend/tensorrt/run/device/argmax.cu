// The largest of n logits and the lowest id that has it, for each row of `logits` [gridDim.y, n]. The blocks of a row meet in
// its `state`, which must be zero before the first run and is left zero; the last of them writes the row's `result` = {id, 1 if
// there is no answer}: a NaN, an infinity above, nothing but infinities below.
//
// Compiled to argmax.ptx by scripts/gpu/compile_kernels.py; the driver makes machine code of that.
struct State {
    unsigned long long best;
    unsigned int bad;
    unsigned int done;
};

extern "C" __global__ void argmax(const float* logits, int n, State* state, int* result) {
    const unsigned int infinity = 0x7f800000u;
    logits += (size_t)blockIdx.y * n;
    state += blockIdx.y;
    result += 2 * blockIdx.y;
    unsigned long long best = 0;
    unsigned int bad = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        // The sum makes +0 of -0, which is equal to it.
        unsigned int bits = __float_as_uint(logits[i] + 0.0f);
        bad |= bits == infinity || (bits & 0x7fffffffu) > infinity;
        // Unsigned numbers in the order of the floats, and among equals the lowest id the largest.
        unsigned int key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        unsigned long long mine = (unsigned long long)key << 32 | (0xffffffffu - (unsigned int)i);
        best = mine > best ? mine : best;
    }
    __shared__ unsigned long long bests[32];
    __shared__ unsigned int bads[32];
    for (int step = 16; step > 0; step /= 2) {
        unsigned long long other = __shfl_xor_sync(0xffffffffu, best, step);
        best = other > best ? other : best;
        bad |= __shfl_xor_sync(0xffffffffu, bad, step);
    }
    int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
        bests[warp] = best;
        bads[warp] = bad;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < blockDim.x / 32; i++) {
        best = bests[i] > best ? bests[i] : best;
        bad |= bads[i];
    }
    atomicMax(&state->best, best);
    if (bad) atomicOr(&state->bad, 1u);
    __threadfence();
    if (atomicAdd(&state->done, 1u) != gridDim.x - 1) return;
    best = atomicExch(&state->best, 0ull);
    bad = atomicExch(&state->bad, 0u);
    state->done = 0;
    // 0x007fffff is the key of minus infinity.
    result[0] = (int)(0xffffffffu - (unsigned int)best);
    result[1] = bad || (unsigned int)(best >> 32) <= 0x007fffffu;
}
