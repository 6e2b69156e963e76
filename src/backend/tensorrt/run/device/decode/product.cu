// Product of few rows with a matrix of fp16, bf16, int8 or int4 weights, norm before and epilogue after.
//
//   y[r, first + n] = residual[r, first + n] + activation(bias[n] + sum_k norm(x)[r, k] * W[n, k])          plain
//   y[r, n]         = residual[r, n] + activation(gate) * up,  gate and up each bias + sum                  gated
//
// A block takes tiles of 8 * TILES outputs, one after the other; its warps share the depth of a tile among them.
// A row of W is read in columns of 64 bytes (32, 64 or 128 weights); warp w takes columns w, w + WARPS, ... of the
// 8 * TILES rows through a ring of its own in shared memory. Copies into the ring need nothing of the kernel before,
// so under dependent launch up to STAGES columns a warp arrive while that kernel still runs.
// Tensor cores multiply: the 16 rows of an instruction are weights (two tiles), its 8 columns rows of x. A row of x
// meets the same instructions in the same order whether it is alone or one of 16, so its result is the same bit for bit.
//
// Codes become 16-bit numbers in one or two integer instructions: a code placed in the mantissa of a power of two is
// that power plus the code. The power is not taken off each weight: the same tensor cores compute, once for all
// outputs, -power * sum of x for each group, which is added to the group's sum. Zero points are taken off in the same way.
//
// Order of a sum: see docs/explanation/decode-kernels.md. It depends on FORMAT, GROUP and WARPS, and not on TILES, STAGES, ROWS, STREAM.
//
// Macros (besides common.cuh's):
//   FORMAT   16: weights of x's type; 8: int8; 4: int4, two a byte, low nibble first. Order [n, k] as ONNX stores it.
//   SIGNED   1: codes are two's complement; 0: unsigned, and without ZEROS 8 (or 128) is subtracted
//   GROUP    codes a scale covers along k: 0 (all of a row), 16, 32, 64, or a multiple of 128; divides k
//   ZEROS    1: zero points, with GROUP only
//   SCALE    type of scales: 0 fp16, 1 bf16, 2 fp32
//   WARPS    warps a block
//   TILES    8-row tiles a block works on at a time, even
//   STAGES   columns in flight a warp
//   ROWS     rows of x at most: 1, 8, 16
//   RESIDENT blocks that must fit a multiprocessor at a time: bounds registers
//   STREAM   0: x lies in shared memory as a whole; 1: it travels with the weights (no norm then)
#include "common.cuh"

#ifndef FORMAT
#define FORMAT 16
#endif
#ifndef SIGNED
#define SIGNED 1
#endif
#ifndef GROUP
#define GROUP 0
#endif
#ifndef ZEROS
#define ZEROS 0
#endif
#ifndef SCALE
#define SCALE BF16
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef TILES
#define TILES 2
#endif
#ifndef STAGES
#define STAGES 8
#endif
#ifndef ROWS
#define ROWS 8
#endif
#ifndef STREAM
#define STREAM 0
#endif
#ifndef RESIDENT
#define RESIDENT 2
#endif

// What one pointer set describes: a matrix [rows, k] and where its outputs go.
struct Part {
    const u8* codes;
    const u8* scales;   // GROUP: see below; else [rows]
    const u8* zeros;    // bytes in the scales' order, offset by 8 (128) if SIGNED
    const void* bias;   // [rows] of x's type, or null
    int rows;
    int first;          // first output column
};
// Scales of groups: [ceil(rows / 8)][columns][8][groups of a row in a column], padded with zeros; where a group is
// longer than a column, [ceil(rows / 8)][k / GROUP][8].

struct ProductArguments {
    Part part[3];       // up to three matrices of the same depth (q, k, v); gated: gate, up
    const void* x;      // [r, k]
    const void* norm;   // weights of the RMS norm [k], or null
    void* y;
    const void* residual;  // or null
    int k, rows;        // rows of x
    int x_stride, y_stride, residual_stride;  // elements
    int tiles;          // sum over parts of ceil(rows / (8 * TILES)); gated: ceil(rows / (4 * TILES))
    int second, third;  // first tiles of the second and third part; more than any tile where there is none
    int gated;
    int activation;     // 0 none, 1 silu, 2 gelu (erf), 3 gelu (tanh), 4 relu, 5 relu squared
    int y_float;        // 1: y is fp32
    float eps;
};

constexpr int DEPTH = FORMAT == 16 ? 32 : FORMAT == 8 ? 64 : 128;  // weights of a row in a column
constexpr int GROUPS = GROUP == 0 ? 0 : GROUP >= DEPTH ? 1 : DEPTH / GROUP;  // scales of a row in a column
constexpr int LONG = GROUP > DEPTH ? GROUP / DEPTH : 1;  // columns a group covers
constexpr int SCALE_BYTES = SCALE == 2 ? 4 : 2;
constexpr int SCALE_BLOCK = 8 * GROUPS * SCALE_BYTES;  // scales of 8 rows in a column
constexpr int SCALE_UNITS = SCALE_BLOCK / 16;
constexpr int CODE_BYTES = TILES * 512;
constexpr int ZERO_OFFSET = CODE_BYTES + TILES * SCALE_BLOCK;
constexpr int X_OFFSET = (ZERO_OFFSET + (ZEROS ? TILES * GROUPS * 8 : 0) + 15) / 16 * 16;
constexpr int R8 = ROWS > 8 ? 2 : 1;
constexpr int STAGE_BYTES = X_OFFSET + (STREAM ? R8 * 8 * DEPTH * 2 : 0);
constexpr int PAIRS = TILES / 2;
constexpr int X_PAD = FORMAT == 16 ? 16 : 64;  // so that rows of x lie in other banks
// x is kept in the order in which a lane meets its 4-bit codes
constexpr bool NIBBLES = FORMAT == 4 && GROUP != 16;
// a power of two is in the codes, to be taken off by groups
constexpr bool OFFSET = FORMAT == 4 || (FORMAT == 8 && (!BF16 || ZEROS));
// Offsets are the same for every tile: the first one keeps them, KEPT numbers a column.
constexpr int KEPT_ROWS = ROWS == 1 ? 1 : R8 * 8, KEPT = OFFSET && GROUP && !STREAM ? GROUPS * KEPT_ROWS * (ZEROS ? 2 : 1) : 0;
static_assert(TILES % 2 == 0, "an instruction takes two tiles");
static_assert(TILES * SCALE_UNITS <= 32 && TILES * GROUPS <= 32, "one unit of scales and zero points a lane");
static_assert(GROUP == 0 || GROUP % DEPTH == 0 || DEPTH % GROUP == 0, "groups and columns nest");
static_assert(!ZEROS || GROUP, "zero points come with groups");

DEVICE float activate(float v, int kind) {
    switch (kind) {
        case 1: return v / (1.f + __expf(-v));
        case 2: return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
        case 3: return 0.5f * v * (1.f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
        case 4: return fmaxf(v, 0.f);
        case 5: { float p = fmaxf(v, 0.f); return p * p; }
        default: return v;
    }
}

// elements 0, 4, 1, 5, 2, 6, 3, 7
DEVICE uint4 nibble_order(uint4 v) {
    return make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
}

DEVICE float scale_of(u32 bits) {
#if SCALE == 2
    return __uint_as_float(bits);
#elif SCALE == 1
    return __uint_as_float(bits << 16);
#else
    float f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(bits));
    return f;
#endif
}
DEVICE float row_scale(const u8* scales, int row) {
    return scale_of(SCALE == 2 ? ((const u32*)scales)[row] : (u32)((const u16*)scales)[row]);
}

// In fp16 a code at bit 0 of the mantissa of 256 counts a quarter, as does one at bit 4 of the mantissa of 16; in bf16 one
// at bit 0 of 128 and one at bit 3 of 16 count 1. A code's sign bit is turned, which adds 8 (128 of 8 bits): HALF.
constexpr float UNIT = FORMAT == 4 && !BF16 ? 0.25f : 1.f;  // what 1 in a code counts; made good at a tile's end
constexpr float HALF = (FORMAT == 8 ? 128.f : 8.f) * UNIT;
#if FORMAT == 4
#if BF16
constexpr u32 MAGIC_A = SIGNED ? 0x43084308u : 0x43004300u, MAGIC_B = SIGNED ? 0x41c041c0u : 0x41804180u;
DEVICE void widen_4(u32 (&w)[4], u32 u) {
    w[0] = and_xor(u, 0x000f000fu, MAGIC_A);
    w[1] = and_xor(u >> 1, 0x00780078u, MAGIC_B);
    w[2] = and_xor(u >> 8, 0x000f000fu, MAGIC_A);
    w[3] = and_xor(u >> 9, 0x00780078u, MAGIC_B);
}
DEVICE void widen_4_short(u32& a, u32& b, u32 u) {
    u |= u << 12;
    a = and_xor(u, 0x000f000fu, MAGIC_A);
    b = and_xor(u >> 8, 0x000f000fu, MAGIC_A);
}
constexpr float POWER_A = 128.f, POWER_B = GROUP == 16 ? 128.f : 16.f;
#else
constexpr u32 MAGIC_A = SIGNED ? 0x5c085c08u : 0x5c005c00u, MAGIC_B = SIGNED ? 0x4c804c80u : 0x4c004c00u;
DEVICE void widen_4(u32 (&w)[4], u32 u) {
    const u32 high = u >> 8;
    w[0] = and_xor(u, 0x000f000fu, MAGIC_A);
    w[1] = and_xor(u, 0x00f000f0u, MAGIC_B);
    w[2] = and_xor(high, 0x000f000fu, MAGIC_A);
    w[3] = and_xor(high, 0x00f000f0u, MAGIC_B);
}
DEVICE void widen_4_short(u32& a, u32& b, u32 u) {
    u |= u << 12;
    a = and_xor(u, 0x000f000fu, MAGIC_A);
    b = and_xor(u >> 8, 0x000f000fu, MAGIC_A);
}
constexpr float POWER_A = 256.f, POWER_B = GROUP == 16 ? 256.f : 16.f;
#endif
#elif FORMAT == 8
#if BF16
// low 7 bits: 128 + v; sign bit: 128 or 256; their difference is exact
DEVICE u32 eight_pair(u32 v) { return subtract(v & 0xff7fff7fu, v & 0xff80ff80u); }
DEVICE void widen_8(u32& a, u32& b, u32 u) {
    if (!SIGNED) u ^= 0x80808080u;
    a = eight_pair(__byte_perm(u, 0x43434343u, 0x4140));
    b = eight_pair(__byte_perm(u, 0x43434343u, 0x4342));
}
// the codes are -128 to 127 already: with zero points of 0 to 255 it is 128 that must be added
constexpr float POWER_A = -128.f, POWER_B = -128.f;
#else
DEVICE void widen_8(u32& a, u32& b, u32 u) {
    if (SIGNED) u ^= 0x80808080u;
    a = __byte_perm(u, 0x64646464u, 0x4140);
    b = __byte_perm(u, 0x64646464u, 0x4342);
}
constexpr float POWER_A = 1024.f, POWER_B = 1024.f;
#endif
#else
constexpr float POWER_A = 0.f, POWER_B = 0.f;
#endif
static_assert(!OFFSET || ZEROS || !(FORMAT == 8 && BF16), "no offset to take off");

// A stage's 64 bytes of a row are kept as 16-byte chunks c ^ turn(row): no two lanes of an access share a bank.
DEVICE int turn(int row) { return (row & 2) | ((row >> 2) & 1); }

DEVICE uint4 x_16(u32 a) {
    const uint4 v = shared_16(a);
    return STREAM && NIBBLES ? nibble_order(v) : v;
}

typedef float Sums[R8][PAIRS][4];

// What is to be added to a group's sums for the codes' power of two (0, 1), and, with zero points, the sum of x (2, 3):
// each for rows 2t and 2t + 1 of x, the same for all outputs.
typedef float Offsets[GROUPS ? GROUPS : 1][R8][4];

// A step is what a group and an instruction or two have in common: 32 weights of a row, 8 a lane; 16 of groups of 16.
constexpr int STEP = GROUP == 16 ? 16 : 32, STEPS = DEPTH / STEP;
constexpr int GROUP_STEPS = GROUP == 0 || GROUP >= DEPTH ? STEPS : GROUP / STEP;

// x of the lane for a step: its 8 (4) elements of row g, as columns of two (one) instructions
DEVICE void x_of_step(u32 (&x)[4], u32 row, int i, u32 x_turn, int t) {
    const u32 at = (i * STEP * 2) ^ (STREAM ? x_turn : 0);
    if (STEP == 16) {
        const uint2 v = shared_8(row + at + t * 8);
        x[0] = v.x, x[1] = v.y;
    } else {
        const uint4 v = x_16(row + at + t * 16);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
}

// Computes the offsets of a column; where one scale covers a row, adds to them.
DEVICE void add_offsets(Offsets& offsets, u32 x0, u32 x1, u32 x_turn, int t) {
    // weights of an instruction that stand for the powers, and those for the sum of x
    constexpr float A = -(POWER_A + (ZEROS ? 0.f : HALF)), B = -(POWER_B + (ZEROS ? 0.f : HALF));
    const u32 minus_a = pack(A, A), minus_b = pack(B, B), one_a = ZEROS ? pack(UNIT, UNIT) : minus_a, one_b = ZEROS ? one_a : minus_b;
    const u32 xs[2] = {x0, x1};
#pragma unroll
    for (int r = 0; r < R8; r++)
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            u32 x[4];
            x_of_step(x, xs[r], i, x_turn, t);
            // steps of a group have sums of their own, so that instructions need not wait for each other
            float step[4];
            float(&to)[4] = GROUP && i % GROUP_STEPS == 0 ? offsets[GROUPS ? i / GROUP_STEPS : 0][r] : step;
            multiply_first(to, minus_a, one_a, minus_b, one_b, x[0], x[1]);
            if (STEP == 32) multiply(to, minus_a, one_a, minus_b, one_b, x[2], x[3]);
            if (!GROUP || i % GROUP_STEPS)
#pragma unroll
                for (int q = 0; q < 4; q++) offsets[GROUPS ? i / GROUP_STEPS : 0][r][q] += step[q];
        }
}

// Scales a group's sums. Lane 4g + t holds outputs g of each tile, rows 2t and 2t + 1 of x.
DEVICE void end_group(Sums& sum, const Sums& part, const Offsets& offsets, u32 stage, int index, int g) {
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        float s[2], z[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 at = stage + CODE_BYTES + (2 * p + i) * SCALE_BLOCK + (g * GROUPS + index) * SCALE_BYTES;
            s[i] = scale_of(SCALE == 2 ? shared_4(at) : shared_2(at));
            z[i] = ZEROS ? (float)shared_1(stage + ZERO_OFFSET + (2 * p + i) * 8 * GROUPS + g * GROUPS + index) : 0.f;
        }
#pragma unroll
        for (int r = 0; r < R8; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (ROWS == 1 && (i & 1)) continue;  // rows of x that are not there
                float v = part[r][p][i];
                if (OFFSET) v += offsets[index][r][i & 1];
                if (ZEROS) v = fmaf(-z[i >> 1], offsets[index][r][2 + (i & 1)], v);
                sum[r][p][i] = fmaf(s[i >> 1], v, sum[r][p][i]);
            }
    }
}

// Adds one column: the stage's codes times x0 (rows 0 to 7 of x) and x1 (rows 8 to 15). FORMAT 16: the lane's row of a
// matrix load; else row g (g + 8) at the column's beginning. `load` is the lane's row of a matrix load of weights.
DEVICE void add_column(Sums& sum, const Offsets& offsets, u32 stage, u32 load, u32 x0, u32 x1, u32 x_turn, int g, int t) {
    const u32 xs[2] = {x0, x1};
#if FORMAT == 16
    u32 x[R8][4];
#pragma unroll
    for (int r = 0; r < R8; r++) load_matrices(x[r], xs[r]);
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        u32 w[4], v[4];
        load_matrices(w, stage + p * 1024 + load);
        load_matrices(v, stage + p * 1024 + (load ^ 32));
#pragma unroll
        for (int r = 0; r < R8; r++) {
            multiply(sum[r][p], w[0], w[1], w[2], w[3], x[r][0], x[r][1]);
            multiply(sum[r][p], v[0], v[1], v[2], v[3], x[r][2], x[r][3]);
        }
    }
#else
    const u32 codes = stage + g * 64;
    const int swap = turn(g);
#if FORMAT == 4 && GROUP != 16
    u32 loaded[TILES][4];  // by step
#pragma unroll
    for (int m = 0; m < TILES; m++) load_matrices(loaded[m], stage + m * 512 + load);
#endif
    Sums part;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const bool begins = GROUP && i % GROUP_STEPS == 0;
        Sums step;  // as with offsets
        u32 x[R8][4];
#pragma unroll
        for (int r = 0; r < R8; r++) x_of_step(x[r], xs[r], i, x_turn, t);
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            u32 w[4], v[4];
            const u32 from = codes + p * 1024;
#if FORMAT == 4 && GROUP == 16
            const u32 place = (((i >> 1) ^ swap) << 4) + (i & 1) * 8 + t * 2;
            widen_4_short(w[0], w[1], shared_2(from + place));
            widen_4_short(v[0], v[1], shared_2(from + 512 + place));
#elif FORMAT == 4
            widen_4(w, loaded[2 * p][i]);
            widen_4(v, loaded[2 * p + 1][i]);
#elif GROUP == 16
            const u32 place = ((i ^ swap) << 4) + t * 4;
            widen_8(w[0], w[1], shared_4(from + place));
            widen_8(v[0], v[1], shared_4(from + 512 + place));
#else
            const u32 place = (((2 * i + (t >> 1)) ^ swap) << 4) + (t & 1) * 8;
            const uint2 c = shared_8(from + place), d = shared_8(from + 512 + place);
            widen_8(w[0], w[1], c.x);
            widen_8(w[2], w[3], c.y);
            widen_8(v[0], v[1], d.x);
            widen_8(v[2], v[3], d.y);
#endif
#pragma unroll
            for (int r = 0; r < R8; r++) {
                float(&to)[4] = begins ? part[r][p] : step[r][p];
                multiply_first(to, w[0], v[0], w[1], v[1], x[r][0], x[r][1]);
                if (STEP == 32) multiply(to, w[2], v[2], w[3], v[3], x[r][2], x[r][3]);
            }
        }
        if (!begins)
#pragma unroll
            for (int r = 0; r < R8; r++)
#pragma unroll
                for (int p = 0; p < PAIRS; p++)
#pragma unroll
                    for (int q = 0; q < 4; q++)
                        if (ROWS > 1 || !(q & 1)) (GROUP ? part : sum)[r][p][q] += step[r][p][q];
        if (GROUP && (i + 1) % GROUP_STEPS == 0) end_group(sum, part, offsets, stage, i / GROUP_STEPS, g);
    }
#endif
}

DEVICE void square_add(float& square, uint4 v) {
    const u32 p[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float l = low_float(p[j]), h = high_float(p[j]);
        square = fmaf(l, l, square);
        square = fmaf(h, h, square);
    }
}
DEVICE float sum_of_warp(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}
DEVICE float norm_factor(const float* squares, float inverse_k, float eps) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += squares[w];
    return rsqrtf(fmaf(total, inverse_k, eps));
}
DEVICE uint4 normalized(uint4 v, uint4 w, float factor) {
    const u32 p[4] = {v.x, v.y, v.z, v.w}, q[4] = {w.x, w.y, w.z, w.w};
    u32 y[4];
#pragma unroll
    for (int j = 0; j < 4; j++) y[j] = pack(low_float(p[j]) * factor * low_float(q[j]), high_float(p[j]) * factor * high_float(q[j]));
    return make_uint4(y[0], y[1], y[2], y[3]);
}
DEVICE uint4 in_order(uint4 v) { return NIBBLES ? nibble_order(v) : v; }

// Brings x into shared memory, normalized if there is a norm. All threads take part in every row and go through it in
// the same order, so a sum of squares is the same for any number of rows.
DEVICE void stage_x(const ProductArguments& a, bool normed, int padded, u32 x_memory, int x_stride, float* squares, u32 norm_weights, float inverse_k) {
    constexpr int THREADS = WARPS * 32;
    const int chunks = a.k / 8, all = padded / 8, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint4 nothing = make_uint4(0, 0, 0, 0);
    if (ROWS == 1 && all <= 4 * THREADS) {
        // the row stays in registers
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = threadIdx.x + i * THREADS;
            v[i] = c < chunks ? load_16((const u16*)a.x + c * 8) : nothing;
        }
        float factor = 1.f;
        if (normed) {
            float square = 0.f;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (threadIdx.x + i * THREADS < chunks) square_add(square, v[i]);
            square = sum_of_warp(square);
            if (lane == 0) squares[warp] = square;
            copies_wait<STAGES>();  // the norm's weights
            __syncthreads();
            factor = norm_factor(squares, inverse_k, a.eps);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = threadIdx.x + i * THREADS;
            if (c >= all) break;
            if (normed && c < chunks) v[i] = normalized(v[i], shared_16(norm_weights + c * 16), factor);
            store_shared_16(x_memory + c * 16, in_order(v[i]));
        }
        __syncthreads();
        return;
    }
    constexpr int N = ROWS == 1 ? 1 : 8, C = ROWS == 1 ? 4 : 1;  // loads in flight a thread
    for (int r0 = 0; r0 < a.rows; r0 += N) {
        float square[N];
#pragma unroll
        for (int r = 0; r < N; r++) square[r] = 0.f;
        for (int c0 = threadIdx.x; c0 < all; c0 += C * THREADS) {
            uint4 v[N][C];
#pragma unroll
            for (int r = 0; r < N; r++)
#pragma unroll
                for (int i = 0; i < C; i++) {
                    const int c = c0 + i * THREADS;
                    v[r][i] = r0 + r < a.rows && c < chunks ? load_16((const u16*)a.x + (u64)(u32)(r0 + r) * (u32)a.x_stride + c * 8) : nothing;
                }
#pragma unroll
            for (int r = 0; r < N; r++)
#pragma unroll
                for (int i = 0; i < C; i++) {
                    const int c = c0 + i * THREADS;
                    if (r0 + r >= a.rows || c >= all) continue;
                    if (normed) square_add(square[r], v[r][i]);
                    store_shared_16(x_memory + (r0 + r) * x_stride + c * 16, normed ? v[r][i] : in_order(v[r][i]));
                }
        }
        if (normed)
#pragma unroll
            for (int r = 0; r < N; r++) {
                if (r0 + r >= a.rows) continue;
                square[r] = sum_of_warp(square[r]);
                if (lane == 0) squares[(r0 + r) * WARPS + warp] = square[r];
            }
    }
    if (normed) {
        copies_wait<STAGES>();  // the norm's weights
        __syncthreads();
        for (int r = 0; r < a.rows; r++) {
            const float factor = norm_factor(squares + r * WARPS, inverse_k, a.eps);
            for (int c = threadIdx.x; c < chunks; c += THREADS) {
                const u32 at = x_memory + r * x_stride + c * 16;
                store_shared_16(at, in_order(normalized(shared_16(at), shared_16(norm_weights + c * 16), factor)));
            }
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) product(const __grid_constant__ ProductArguments a) {
    extern __shared__ __align__(128) u8 memory[];
    allow_next();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row_bytes = a.k / 8 * (FORMAT == 16 ? 16 : FORMAT);
    const int columns = (row_bytes + 63) >> 6, padded = columns * DEPTH;
    const bool normed = !STREAM && a.norm != nullptr;

    // Shared memory: rings, sums of warps (twice), offsets of the warps' columns, sums of squares, norm weights, x.
    const u32 ring = shared_address(memory) + warp * STAGES * STAGE_BYTES;
    float* const sums = (float*)(memory + WARPS * STAGES * STAGE_BYTES);
    const int sums_size = WARPS * TILES * 8 * a.rows;
    const int my_columns = (columns + WARPS - 1) / WARPS;
    float* const kept = sums + 2 * sums_size + warp * my_columns * KEPT;
    float* const squares = sums + 2 * sums_size + (WARPS * my_columns * KEPT + 3) / 4 * 4;
    u8* const norm_weights = (u8*)(squares + (normed ? (a.rows * WARPS + 3) / 4 * 4 : 0));
    const int x_stride = (padded * 2 + 127) / 128 * 128 + X_PAD;
    const u32 x_memory = shared_address(norm_weights) + (normed ? padded * 2 : 0);

    // Part and first row of a tile.
    auto locate = [&](int tile, int& part, int& row) {
        part = (tile >= a.second) + (tile >= a.third);
        row = (tile - (part == 2 ? a.third : part ? a.second : 0)) * (a.gated ? TILES / 2 : TILES) * 8;
    };
    // What is copied next: the column at byte `feed_at` of the rows of tile `feed_tile`.
    int feed_tile = warp < columns ? blockIdx.x : a.tiles, feed_at = warp * 64;
    const u8* feed_codes[TILES];
    const u8* feed_scales = nullptr;
    const u8* feed_zeros = nullptr;
    const int last_chunk = row_bytes - t * 16;
    auto feed_from = [&](int tile) {
        int part, row;
        locate(tile, part, row);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const Part& p = a.part[a.gated ? m & 1 : part];
            // rows past the end repeat the last one; their sums are not stored
            feed_codes[m] = p.codes + (u64)(u32)min(row + (a.gated ? m >> 1 : m) * 8 + g, p.rows - 1) * (u32)row_bytes + warp * 64 + t * 16;
        }
        if (GROUP) {
            const int blocks = LONG > 1 ? a.k / (GROUP ? GROUP : 1) : columns;
            const int m = min(lane / (SCALE_UNITS ? SCALE_UNITS : 1), TILES - 1);
            const Part& p = a.part[a.gated ? m & 1 : part];
            const int r = min(row + (a.gated ? m >> 1 : m) * 8, p.rows - 1) >> 3;
            feed_scales = p.scales + (u64)(u32)r * (u32)(blocks * SCALE_BLOCK) + lane % (SCALE_UNITS ? SCALE_UNITS : 1) * 16;
            if (ZEROS) {
                const int n = min(lane / (GROUPS ? GROUPS : 1), TILES - 1);
                const Part& q = a.part[a.gated ? n & 1 : part];
                const int b = min(row + (a.gated ? n >> 1 : n) * 8, q.rows - 1) >> 3;
                feed_zeros = q.zeros + (u64)(u32)b * (u32)(blocks * 8 * GROUPS) + lane % (GROUPS ? GROUPS : 1) * 8;
            }
        }
    };
    const u64 once = used_once();
    const u32 my_chunk = g * 64 + ((t ^ turn(g)) << 4);
    auto feed = [&](u32 stage) {
        if (feed_tile >= a.tiles) return;
        const bool there = feed_at < last_chunk;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            copy_once_16(stage + m * 512 + my_chunk, feed_codes[m], there, once);
            feed_codes[m] += WARPS * 64;
        }
        if (GROUP) {
            const int column = feed_at / (64 * LONG);
            if (lane < TILES * SCALE_UNITS) copy_16(stage + CODE_BYTES + lane * 16, feed_scales + (u64)(u32)column * SCALE_BLOCK, true);
            if (ZEROS && lane < TILES * GROUPS) copy_small<8>(stage + ZERO_OFFSET + lane * 8, feed_zeros + (u64)(u32)column * 8 * GROUPS);
        }
        feed_at += WARPS * 64;
        if (feed_at >= row_bytes) {
            feed_at = warp * 64;
            feed_tile += gridDim.x;
            if (feed_tile < a.tiles) feed_from(feed_tile);
        }
    };
    auto feed_x = [&](u32 stage, int column) {
        if (STREAM) {
            constexpr int CHUNKS = DEPTH / 8;  // of a row in a column
#pragma unroll
            for (int i = lane; i < R8 * 8 * CHUNKS; i += 32) {
                const int row = i / CHUNKS, chunk = i % CHUNKS, k = column * DEPTH + chunk * 8;
                if (row < a.rows)
                    copy_16(stage + X_OFFSET + row * DEPTH * 2 + (FORMAT == 16 ? (chunk ^ turn(row)) << 4 : (chunk * 16) ^ ((row & 1) * 64)),
                            (const u16*)a.x + (u64)row * a.x_stride + (k < a.k ? k : 0), k < a.k);
            }
        }
    };

    if (normed)
        for (int c = threadIdx.x; c < a.k / 8; c += WARPS * 32) copy_16(shared_address(norm_weights) + c * 16, (const uint4*)a.norm + c, true);
    if (!STREAM) copies_end();
    if (feed_tile < a.tiles) feed_from(feed_tile);
#pragma unroll 1
    for (int s = 0; s < STAGES; s++) {
        feed(ring + s * STAGE_BYTES);
        if (!STREAM) copies_end();
    }

    // A matrix load takes 8 rows of 16 bytes, addressed by 8 lanes each. FORMAT 16: two chunks of two tiles; 4: four of one.
    const int load_row = lane & 7, load_chunk = FORMAT == 16 ? lane >> 4 : lane >> 3;
    const u32 load = (FORMAT == 16 ? lane >> 3 & 1 : 0) * 512 + load_row * 64 + ((load_chunk ^ turn(load_row)) << 4);
    const int row0 = min(FORMAT == 16 ? load_row : g, a.rows - 1), row1 = min((FORMAT == 16 ? load_row : g) + 8, a.rows - 1);
    const u32 x_row0 = STREAM ? X_OFFSET + row0 * DEPTH * 2 + (FORMAT == 16 ? ((lane >> 3) ^ turn(row0)) << 4 : 0) : x_memory + row0 * x_stride + (FORMAT == 16 ? lane >> 3 << 4 : 0);
    const u32 x_row1 = STREAM ? X_OFFSET + row1 * DEPTH * 2 + (FORMAT == 16 ? ((lane >> 3) ^ turn(row1)) << 4 : 0) : x_memory + row1 * x_stride + (FORMAT == 16 ? lane >> 3 << 4 : 0);
    const u32 x_turn = DEPTH > 32 ? (row0 & 1) * 64 : 0;  // 64-byte halves of odd rows are exchanged
    const float inverse_k = 1.f / (float)a.k;
    u32 slot = ring;
    int finisher = 0;
    float* buffer = sums;
    const int outputs_wide = a.gated ? TILES * 4 : TILES * 8, outputs_shift = 31 - __clz(outputs_wide);
    const int first_output = ROWS > 1 ? threadIdx.x : lane;
    // What finishing a tile takes and does not come from the kernel before. Of one row a warp finishes it, another one
    // each time; of several all threads do.
    int part, tile_row, rows_left, first_column, outputs;
    u16 bias[2];
    u32 scale[2];
    auto open_tile = [&](int tile) {
        locate(tile, part, tile_row);
        const Part& p = a.part[part];
        rows_left = p.rows - tile_row;
        first_column = p.first + tile_row;
        outputs = ROWS > 1 || warp == finisher ? outputs_wide * a.rows : 0;
        finisher = finisher + 1 == WARPS ? 0 : finisher + 1;
        bias[0] = bias[1] = 0;
        scale[0] = scale[1] = 0;
        const int n = first_output & (outputs_wide - 1);
        if (first_output < outputs && n < rows_left)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const Part& q = a.part[part + i];
                if (i && !a.gated) break;
                if (q.bias) bias[i] = load_2((const u16*)q.bias + tile_row + n);
                if (FORMAT != 16 && !GROUP) scale[i] = SCALE == 2 ? load_4((const u32*)q.scales + tile_row + n) : load_2((const u16*)q.scales + tile_row + n);
            }
    };
    open_tile(blockIdx.x);
    // Arguments that are read late are brought into the constant cache.
    asm volatile("" ::"l"(a.x), "l"(a.y), "l"(a.residual), "r"(a.x_stride), "r"(a.y_stride), "r"(a.residual_stride), "r"(a.activation), "r"(a.y_float), "r"(__float_as_int(a.eps)));

    wait_for_previous();
    if (STREAM) {
        int column = warp, tile = blockIdx.x;
#pragma unroll 1
        for (int s = 0; s < STAGES; s++) {
            if (column < columns && tile < a.tiles) {
                feed_x(ring + s * STAGE_BYTES, column);
                column += WARPS;
                if (column >= columns) column = warp, tile += gridDim.x;
            }
            copies_end();
        }
    } else {
        stage_x(a, normed, padded, x_memory, x_stride, squares, shared_address(norm_weights), inverse_k);
    }

    Offsets offsets;
#pragma unroll
    for (int r = 0; r < R8; r++) offsets[0][r][0] = offsets[0][r][1] = offsets[0][r][2] = offsets[0][r][3] = 0.f;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        const bool first = tile == blockIdx.x;
        u16 residual = 0;
        if (a.residual && first_output < outputs && (first_output & (outputs_wide - 1)) < rows_left)
            residual = load_2((const u16*)a.residual + (u64)(u32)(first_output >> outputs_shift) * (u32)a.residual_stride + first_column + (first_output & (outputs_wide - 1)));

        Sums sum;
#pragma unroll
        for (int r = 0; r < R8; r++) {
#pragma unroll
            for (int q = 0; q < PAIRS; q++) sum[r][q][0] = sum[r][q][1] = sum[r][q][2] = sum[r][q][3] = 0.f;
            if (OFFSET && !GROUP && STREAM) offsets[0][r][0] = offsets[0][r][1] = offsets[0][r][2] = offsets[0][r][3] = 0.f;
        }
        float* keep = kept;
        for (int column = warp; column < columns; column += WARPS) {
            copies_wait<STAGES - 1>();
            __syncwarp();
            const u32 at = STREAM ? slot : column * DEPTH * 2;
            if (OFFSET && (first || STREAM)) {
                add_offsets(offsets, x_row0 + at, x_row1 + at, x_turn, t);
                if (KEPT && g == 0 && (ROWS > 1 || t == 0))
#pragma unroll
                    for (int i = 0; i < GROUPS; i++)
#pragma unroll
                        for (int r = 0; r < R8; r++)
#pragma unroll
                            for (int z = 0; z <= ZEROS; z++) {
                                float* const to = keep + ((i * R8 + r) * (ZEROS + 1) + z) * (KEPT_ROWS / R8) + (ROWS > 1 ? 2 * t : 0);
                                to[0] = offsets[i][r][2 * z];
                                if (ROWS > 1) to[1] = offsets[i][r][2 * z + 1];
                            }
            } else if (KEPT) {
#pragma unroll
                for (int i = 0; i < GROUPS; i++)
#pragma unroll
                    for (int r = 0; r < R8; r++)
#pragma unroll
                        for (int z = 0; z <= ZEROS; z++) {
                            const float* const from = keep + ((i * R8 + r) * (ZEROS + 1) + z) * (KEPT_ROWS / R8) + (ROWS > 1 ? 2 * t : 0);
                            offsets[i][r][2 * z] = from[0];
                            if (ROWS > 1) offsets[i][r][2 * z + 1] = from[1];
                        }
            }
            keep += KEPT;
            add_column(sum, offsets, slot, load, x_row0 + at, x_row1 + at, x_turn, g, t);
            __syncwarp();
            const bool more = feed_tile < a.tiles;
            const int fed = feed_at / 64;
            feed(slot);
            if (STREAM && more) feed_x(slot, fed);
            copies_end();
            slot = slot == ring + (STAGES - 1) * STAGE_BYTES ? ring : slot + STAGE_BYTES;
        }

        float* const mine = buffer + warp * TILES * 8 * a.rows;
#pragma unroll
        for (int r = 0; r < R8; r++)
#pragma unroll
            for (int q = 0; q < PAIRS; q++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = r * 8 + 2 * t + (i & 1);
                    float v = sum[r][q][i];
                    if (OFFSET && !GROUP) v += offsets[0][r][i & 1];
                    v *= 1.f / UNIT;
                    if (row < a.rows) mine[((2 * q + (i >> 1)) * a.rows + row) * 8 + g] = v;
                }
        __syncthreads();  // the buffer written before is read by now: two are enough
        for (int o = first_output; o < outputs; o += ROWS > 1 ? WARPS * 32 : 32) {
            const int n = o & (outputs_wide - 1), r = o >> outputs_shift;
            if (n >= rows_left) continue;
            const bool early = o == first_output;
            float v[2] = {0.f, 0.f};
#pragma unroll 1
            for (int i = 0; i <= a.gated; i++) {
                const Part& q = a.part[part + i];
                const int m = a.gated ? (n >> 3 << 1) + i : n >> 3;
                const float* from = buffer + (m * a.rows + r) * 8 + (n & 7);
                float total = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += from[w * TILES * 8 * a.rows];
                if (FORMAT != 16 && !GROUP) total *= early ? scale_of(i ? scale[1] : scale[0]) : row_scale(q.scales, tile_row + n);
                if (q.bias) total += to_float(early ? (i ? bias[1] : bias[0]) : ((const u16*)q.bias)[tile_row + n]);
                v[1] = total;
                if (i == 0) v[0] = activate(total, a.activation);
            }
            float y = a.gated ? v[0] * v[1] : v[0];
            const int at = first_column + n;
            if (a.residual) y += to_float(early ? residual : load_2((const u16*)a.residual + (u64)(u32)r * (u32)a.residual_stride + at));
            if (a.y_float) ((float*)a.y)[(u64)(u32)r * (u32)a.y_stride + at] = y;
            else ((u16*)a.y)[(u64)(u32)r * (u32)a.y_stride + at] = to_half(y);
        }
        if (tile + (int)gridDim.x < a.tiles) open_tile(tile + gridDim.x);
        buffer = buffer == sums ? sums + sums_size : sums;
    }
    copies_wait<0>();
}
