// Attention of one token a sequence: rotation of queries and keys, write to the cache, softmax over the cache.
//
// Grid (blocks, kv_heads * ceil(group / 8), sequences); blocks of WARPS warps. A block handles up to 8 query heads that
// share a kv head, and of the slots the tiles of 16 that fall to it: tile i of the visible ones goes to warp
// i / SPLITS % WARPS of split i % SPLITS, so few tiles spread over many processors, and cost follows the length, which
// is read from the device. Split s is the work of block s % blocks: SPLITS blocks where there are few sequences, fewer
// where there are many, with the same result bit for bit. Scores are keys (16 slots) times queries (8 heads) on tensor cores, outputs are values
// transposed (16 dims) times probabilities; nothing is computed for heads that do not exist but the padding to 8.
// Each warp keeps a maximum, a sum and an output of its own; these are merged by warp, then by split, in fixed order.
// Splits meet through distributed shared memory (CLUSTER 1) or through a workspace, where the last block merges.
// The order of sums depends on SPLITS and WARPS, and on nothing else.
//
// Macros (besides common.cuh's): HEAD_DIM (multiple of 16), WARPS, STAGES (tiles in flight a warp),
//   SPLITS   1, 2, 4, 8 or 16
//   MANY     0: SPLITS blocks; 1: any power of two up to it
//   CLUSTER  1: the blocks of a head are a cluster (compute_90); 0: workspace and counters
//   TABLES   0: the caches of all sequences are one tensor; 1: each sequence has its own, of a capacity of its own, and
//            `keys` and `values` are arrays that say where (Place[sequences])
#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef STAGES
#define STAGES 1
#endif
#ifndef SPLITS
#define SPLITS 8
#endif
#ifndef MANY
#define MANY 0
#endif
#ifndef CLUSTER
#define CLUSTER 0
#endif
#ifndef TABLES
#define TABLES 0
#endif

// Where the keys or values of a sequence are, [kv_heads, capacity, HEAD_DIM]. Of capacity 0 nothing is written.
struct Place {
    u64 at, capacity;
};

struct AttentionArguments {
    const void *q, *k, *v;         // sequence s at + s * stride (elements); heads one after the other
    void* out;                     // [heads * HEAD_DIM] a sequence
    void *keys, *values;           // sequence s at + s * cache_stride: [kv_heads, capacity, HEAD_DIM]; see TABLES
    const int* lengths;            // slots written so far; the new token takes slot lengths[s]
    const int* positions;          // of the rotation; may be the same array
    const float *cosines, *sines;  // [positions, rotated / 2]; null: nothing is rotated
    const void *q_norm, *k_norm;   // RMS norm over a head before the rotation [HEAD_DIM], or null
    const float* sinks;            // a logit a head in the denominator, or null
    float* workspace;              // CLUSTER 0: [sequences, grid.y, SPLITS, 8 * HEAD_DIM + 16]
    u32* counters;                 // CLUSTER 0: [sequences, grid.y], zero before the first launch and after each
    u64 cache_stride;
    int q_stride, k_stride, v_stride, out_stride;
    int group;                     // query heads a kv head
    int capacity, rotated, interleaved;
    int window;                    // slots seen, the new one included; 0: all
    float scale, soft_cap, eps;    // soft_cap 0: none
};

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;
constexpr int ROW = HEAD_DIM * 2 + 16;  // bytes of a slot in shared memory: an odd number of 16s, so no bank is met twice
constexpr int TILE = 16 * ROW;
constexpr int KEY_STEPS = HEAD_DIM / 16;
constexpr int PAIRS = (HEAD_DIM / 2 + 31) / 32;
constexpr int ROUNDS = (10 + WARPS - 1) / WARPS;  // 8 queries, a key, a value
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head size");
constexpr int WARP_OUT = MANY ? 8 * HEAD_DIM * 4 : 2 * TILE * STAGES;  // bytes between the outputs of warps
static_assert(2 * TILE * STAGES >= 8 * HEAD_DIM * 4, "a warp's output takes the place of its tiles");

#if CLUSTER
DEVICE u32 in_block(u32 a, u32 block) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(block));
    return r;
}
DEVICE void store_in_block(u32 a, float v) { asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(a), "f"(v) : "memory"); }
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32) attention(const __grid_constant__ AttentionArguments a) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ float warp_max[WARPS][8], warp_sum[WARPS][8];
#if CLUSTER
    __shared__ float all_max[SPLITS][8], all_sum[SPLITS][8];
#endif
    allow_next();
#if CLUSTER
    cluster_arrive();  // the blocks of a cluster may write to each other once all have started
#endif
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int block = blockIdx.x, blocks = MANY ? gridDim.x : SPLITS, sequence = blockIdx.z;
    const int blocks_a_head = (a.group + 7) / 8, kv_head = blockIdx.y / blocks_a_head, first_head = blockIdx.y % blocks_a_head * 8;
    const int heads = min(8, a.group - first_head), head0 = kv_head * a.group + first_head;

    // Shared memory: tiles of every warp, queries [8][HEAD_DIM + 8], the new key and value; MANY: the output of every
    // warp, which else takes the place of its tiles; CLUSTER: the block's share of the outputs of every split.
    u8* const tiles = memory + warp * (2 * TILE * STAGES);
    u16* const queries = (u16*)(memory + WARPS * 2 * TILE * STAGES);
    u16* const new_key = queries + 8 * (HEAD_DIM + 8);
    u16* const new_value = new_key + HEAD_DIM;
    u8* const outs = MANY ? (u8*)(new_value + HEAD_DIM) : memory;
    float* const part_out = (float*)((u8*)(new_value + HEAD_DIM) + (MANY ? WARPS * WARP_OUT : 0));

#if CLUSTER
    // outputs of every split that this block finishes
    const int block_bits = 31 - __clz(blocks), share = ((heads * HEAD_DIM + 31) / 32 + blocks - 1) / blocks * 32;
#endif
    const int length = (int)load_4(a.lengths + sequence), position = (int)load_4(a.positions + sequence);
    const int first = a.window > 0 ? max(0, length + 1 - a.window) : 0;
    const int tile0 = first >> 4, count = (length >> 4) - tile0 + 1;
#if TABLES
    const Place keys_at = ((const Place*)a.keys)[sequence], values_at = ((const Place*)a.values)[sequence];
    const int capacity = (int)keys_at.capacity;
    u16* const keys = (u16*)keys_at.at + (u64)kv_head * capacity * HEAD_DIM;
    u16* const values = (u16*)values_at.at + (u64)kv_head * capacity * HEAD_DIM;
#else
    u16* const keys = (u16*)a.keys + sequence * a.cache_stride + (u64)kv_head * a.capacity * HEAD_DIM;
    u16* const values = (u16*)a.values + sequence * a.cache_stride + (u64)kv_head * a.capacity * HEAD_DIM;
#endif

    // The next tile of the warp that is not asked for yet: in one split after the other.
    int fetch_split = block, fetch_tile = warp * SPLITS + block;
    auto fetch = [&](int stage) {
        if (MANY)
            while (fetch_tile >= count && fetch_split + blocks < SPLITS) {
                fetch_split += blocks;
                fetch_tile = warp * SPLITS + fetch_split;
            }
        if (fetch_tile < count) {
            const int slot0 = (tile0 + fetch_tile) * 16;
            const u32 to = shared_address(tiles + stage * 2 * TILE);
#pragma unroll
            for (int i = lane; i < 16 * (HEAD_DIM / 8); i += 32) {
                const int row = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8), slot = slot0 + row;
                const bool there = slot < length;
                const u64 at = there ? (u64)slot * HEAD_DIM + chunk * 8 : 0;
                copy_16(to + row * ROW + chunk * 16, keys + at, there);
                copy_16(to + TILE + row * ROW + chunk * 16, values + at, there);
            }
        }
        copies_end();
        fetch_tile += WARPS * SPLITS;
    };
    // Slots of earlier tokens are older than the kernel before: they are asked for without waiting for it.
#pragma unroll 1
    for (int s = 0; s < STAGES; s++) fetch(s);
    float turn_c[PAIRS], turn_s[PAIRS];
    int first_of[PAIRS], second_of[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int p = lane + i * 32;
        const bool beside = a.interleaved || p >= a.rotated / 2;
        first_of[i] = beside ? 2 * p : p;
        second_of[i] = beside ? 2 * p + 1 : p + a.rotated / 2;
        turn_c[i] = 1.f;
        turn_s[i] = 0.f;
        if (a.cosines && p < a.rotated / 2) {
            turn_c[i] = a.cosines[(u64)position * (a.rotated / 2) + p];
            turn_s[i] = a.sines[(u64)position * (a.rotated / 2) + p];
        }
    }

#if CLUSTER
    cluster_wait();
#endif
    wait_for_previous();
    // A warp takes vectors: queries of the heads, the key, the value. A lane holds the two elements that turn together.
    u16 raw[ROUNDS][PAIRS][2];
#pragma unroll
    for (int n = 0; n < ROUNDS; n++) {
        const int vector = warp + n * WARPS;
        const u16* from = vector < heads ? (const u16*)a.q + (u64)sequence * a.q_stride + (head0 + vector) * HEAD_DIM
                          : vector == heads ? (const u16*)a.k + (u64)sequence * a.k_stride + kv_head * HEAD_DIM
                                            : (const u16*)a.v + (u64)sequence * a.v_stride + kv_head * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            raw[n][i][0] = raw[n][i][1] = 0;
            if (vector <= heads + 1 && lane + i * 32 < HEAD_DIM / 2) {
                raw[n][i][0] = load_2(from + first_of[i]);
                raw[n][i][1] = load_2(from + second_of[i]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < ROUNDS; n++) {
        const int vector = warp + n * WARPS;
        if (vector > heads + 1) break;
        const u16* norm = (const u16*)(vector < heads ? a.q_norm : vector == heads ? a.k_norm : nullptr);
        u16* to = vector < heads ? queries + vector * (HEAD_DIM + 8) : vector == heads ? new_key : new_value;
        float x[PAIRS], y[PAIRS], square = 0.f;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            x[i] = to_float(raw[n][i][0]);
            y[i] = to_float(raw[n][i][1]);
            square += x[i] * x[i] + y[i] * y[i];
        }
        float factor = 1.f;
        if (norm) {
#pragma unroll
            for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
            factor = rsqrtf(square * (1.f / HEAD_DIM) + a.eps);
        }
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            if (lane + i * 32 < HEAD_DIM / 2) {
                const float c = vector <= heads ? turn_c[i] : 1.f, s = vector <= heads ? turn_s[i] : 0.f;
                if (norm) x[i] *= factor * to_float(norm[first_of[i]]), y[i] *= factor * to_float(norm[second_of[i]]);
                to[first_of[i]] = to_half(x[i] * c - y[i] * s);
                to[second_of[i]] = to_half(y[i] * c + x[i] * s);
            }
    }
    __syncthreads();

    u32 query[KEY_STEPS][2];
#pragma unroll
    for (int i = 0; i < KEY_STEPS; i++) {
        const u32 at = shared_address(queries) + min(g, heads - 1) * (HEAD_DIM + 8) * 2 + i * 32 + t * 4;
        query[i][0] = shared_4(at);
        query[i][1] = shared_4(at + 16);
    }
#if !CLUSTER
    const u64 place = (u64)sequence * gridDim.y + blockIdx.y;
    constexpr int RECORD = 8 * HEAD_DIM + 16;
    float* const records = a.workspace + place * SPLITS * RECORD;
#endif
    int stage = 0;
    const int busy_splits = min(SPLITS, count);  // splits with work are the first ones, and so are warps
#pragma unroll 1
    for (int split = block; split < SPLITS; split += blocks) {
        // The lane's heads are 2t and 2t + 1.
        float out[KEY_STEPS][4], top[2] = {LOWEST, LOWEST}, sum[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < KEY_STEPS; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
        for (int tile = warp * SPLITS + split; tile < count; tile += WARPS * SPLITS) {
            copies_wait<STAGES - 1>();
            __syncwarp();
            u8* const key_tile = tiles + stage * 2 * TILE;
            const int slot0 = (tile0 + tile) * 16;
            if (slot0 <= length && length < slot0 + 16) {
                // The new token's slot: into the tile, and by one block into the cache.
#if TABLES
                const bool write = first_head == 0 && length < capacity;
#else
                const bool write = first_head == 0 && length < a.capacity;
#endif
                for (int i = lane; i < HEAD_DIM / 2; i += 32) {
                    const u32 k = ((const u32*)new_key)[i], v = ((const u32*)new_value)[i];
                    ((u32*)(key_tile + (length & 15) * ROW))[i] = k;
                    ((u32*)(key_tile + TILE + (length & 15) * ROW))[i] = v;
                    if (write) {
                        ((u32*)(keys + (u64)length * HEAD_DIM))[i] = k;
                        ((u32*)(values + (u64)length * HEAD_DIM))[i] = v;
                    }
                }
                __syncwarp();
            }
            float score[4] = {0.f, 0.f, 0.f, 0.f};
            const u32 key_at = shared_address(key_tile) + (lane & 15) * ROW + (lane >> 4) * 16;
#pragma unroll
            for (int i = 0; i < KEY_STEPS; i++) {
                u32 k[4];
                load_matrices(k, key_at + i * 32);
                multiply(score, k[0], k[1], k[2], k[3], query[i][0], query[i][1]);
            }
            // score: slots g and g + 8, heads 2t and 2t + 1
            const bool low = slot0 + g >= first && slot0 + g <= length, high = slot0 + g + 8 >= first && slot0 + g + 8 <= length;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float s = score[i] * a.scale;
                if (a.soft_cap > 0.f) s = a.soft_cap * tanhf(s / a.soft_cap);
                score[i] = (i < 2 ? low : high) ? s * LOG2E : LOWEST;
            }
            float shrink[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float m = fmaxf(score[i], score[i + 2]);
                m = fmaxf(m, __shfl_xor_sync(~0u, m, 4));
                m = fmaxf(m, __shfl_xor_sync(~0u, m, 8));
                m = fmaxf(m, __shfl_xor_sync(~0u, m, 16));
                m = fmaxf(m, top[i]);
                shrink[i] = exp2_fast(top[i] - m);
                top[i] = m;
                score[i] = low ? exp2_fast(score[i] - m) : 0.f;
                score[i + 2] = high ? exp2_fast(score[i + 2] - m) : 0.f;
                sum[i] = sum[i] * shrink[i] + (score[i] + score[i + 2]);
            }
            const u32 p0 = transpose(pack(score[0], score[1])), p1 = transpose(pack(score[2], score[3]));
            const u32 value_at = shared_address(key_tile) + TILE + ((lane >> 4) * 8 + (lane & 7)) * ROW + ((lane >> 3) & 1) * 16;
#pragma unroll
            for (int i = 0; i < KEY_STEPS; i++) {
                u32 v[4];
                load_matrices_transposed(v, value_at + i * 32);
                out[i][0] *= shrink[0];
                out[i][1] *= shrink[1];
                out[i][2] *= shrink[0];
                out[i][3] *= shrink[1];
                multiply(out[i], v[0], v[1], v[2], v[3], p0, p1);
            }
            __syncwarp();
            fetch(stage);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        // Merge of warps.
        const int busy_warps = count > split ? min(WARPS, (count - split + SPLITS - 1) / SPLITS) : 0;
        if (warp < busy_warps) {
            if (!MANY) {
                copies_wait<0>();
                __syncwarp();
            }
            float* const mine = (float*)(outs + warp * WARP_OUT);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                sum[i] += __shfl_xor_sync(~0u, sum[i], 4);
                sum[i] += __shfl_xor_sync(~0u, sum[i], 8);
                sum[i] += __shfl_xor_sync(~0u, sum[i], 16);
                if (g == 0) warp_max[warp][2 * t + i] = top[i], warp_sum[warp][2 * t + i] = sum[i];
                if (2 * t + i < heads)
#pragma unroll
                    for (int d = 0; d < KEY_STEPS; d++) {
                        mine[(2 * t + i) * HEAD_DIM + d * 16 + g] = out[d][i];
                        mine[(2 * t + i) * HEAD_DIM + d * 16 + g + 8] = out[d][i + 2];
                    }
            }
        }
        __syncthreads();
        // maximum and sum of head h over the warps, and element e of the output
        auto merge = [&](int h, int e, float& m, float& v, float& s) {
            float each[WARPS];
            m = LOWEST, v = 0.f, s = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                if (w < busy_warps) m = fmaxf(m, each[w] = warp_max[w][h]);
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                if (w < busy_warps) {
                    const float c = exp2_fast(each[w] - m);
                    if (e >= 0) v = fmaf(c, ((const float*)(outs + w * WARP_OUT))[e], v);
                    s = fmaf(c, warp_sum[w][h], s);
                }
        };
        if (busy_warps > 0) {
            float m, v, s;
#if CLUSTER
            // Outputs go to the block that finishes them, in units of 32: unit u to block u % blocks. Maxima and sums go to all.
            for (int i = WARPS * 32 - 1 - threadIdx.x; i < heads * blocks; i += WARPS * 32) {
                const int h = i >> block_bits, to = i & (blocks - 1);
                merge(h, -1, m, v, s);
                store_in_block(in_block(shared_address(&all_max[split][h]), to), m);
                store_in_block(in_block(shared_address(&all_sum[split][h]), to), s);
            }
            for (int e = threadIdx.x; e < heads * HEAD_DIM; e += WARPS * 32) {
                const int unit = e >> 5;
                merge(e / HEAD_DIM, e, m, v, s);
                store_in_block(in_block(shared_address(part_out + split * share + (unit >> block_bits) * 32 + (e & 31)), unit & (blocks - 1)), v);
            }
#else
            float* const record = records + split * RECORD;
            for (int e = threadIdx.x; e < heads * HEAD_DIM; e += WARPS * 32) {
                merge(e / HEAD_DIM, e, m, v, s);
                record[16 + e] = v;
                if (e % HEAD_DIM == 0) record[e / HEAD_DIM] = m, record[8 + e / HEAD_DIM] = s;
            }
#endif
        }
        if (MANY) __syncthreads();  // the warps' outputs are read
    }
    copies_wait<0>();

    auto finish = [&](int e, float m, float v, float s) {
        const int h = e / HEAD_DIM;
        if (a.sinks) s += exp2_fast(a.sinks[head0 + h] * LOG2E - m);
        ((u16*)a.out)[(u64)sequence * a.out_stride + (u64)head0 * HEAD_DIM + e] = to_half(__fdividef(v, s));
    };
#if CLUSTER
    cluster_arrive();
    cluster_wait();
    for (int i = threadIdx.x; i < share; i += WARPS * 32) {
        const int e = (((i >> 5) << block_bits) + block) * 32 + (i & 31);
        if (e >= heads * HEAD_DIM) break;
        const int h = e / HEAD_DIM;
        float m = LOWEST, v = 0.f, s = 0.f;
#pragma unroll 8
        for (int n = 0; n < busy_splits; n++) m = fmaxf(m, all_max[n][h]);
        // a sink above every score must not overflow
        if (a.sinks) m = fmaxf(m, a.sinks[head0 + h] * LOG2E);
#pragma unroll 8
        for (int n = 0; n < busy_splits; n++) {
            const float c = exp2_fast(all_max[n][h] - m);
            v = fmaf(c, part_out[n * share + i], v);
            s = fmaf(c, all_sum[n][h], s);
        }
        finish(e, m, v, s);
    }
#else
    __shared__ bool is_last;
    const int busy_blocks = min(blocks, count);
    if (block >= busy_blocks) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(a.counters + place, 1u) == (u32)busy_blocks - 1;
        if (is_last) a.counters[place] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int e = threadIdx.x; e < heads * HEAD_DIM; e += WARPS * 32) {
        const int h = e / HEAD_DIM;
        float m = LOWEST, v = 0.f, s = 0.f;
        for (int i = 0; i < busy_splits; i++) m = fmaxf(m, __uint_as_float(load_4(records + i * RECORD + h)));
        if (a.sinks) m = fmaxf(m, a.sinks[head0 + h] * LOG2E);
        for (int i = 0; i < busy_splits; i++) {
            const float c = exp2_fast(__uint_as_float(load_4(records + i * RECORD + h)) - m);
            v = fmaf(c, __uint_as_float(load_4(records + i * RECORD + 16 + e)), v);
            s = fmaf(c, __uint_as_float(load_4(records + i * RECORD + 8 + h)), s);
        }
        finish(e, m, v, s);
    }
#endif
}
