// Products of tiles of bfloat16 numbers: TDPBF16PS of AMX_BF16, 16 × 16 sums of 32 products in one instruction.
//
//   C[m][n] += Σ_k A[m][2k]·B[k][2n] + Σ_k A[m][2k + 1]·B[k][2n + 1]
//
// A tile is 16 rows of 64 bytes: of A 32 consecutive numbers, of B 16 pairs of numbers that stand above each other, of C
// 16 float32 sums. The even and the odd products are summed apart in float32, from 0, and then added to C, each addition
// rounded to nearest. Numbers below 2^-126 count as 0, in the arguments and in the sums.
//
// A number of more bits than bfloat16's 8 is taken as the sum of several: `parts_of`. They are cut off, not rounded, so
// that none rounds to infinity; two hold 16 bits and three 24. What is below 2^-126 of them is lost.
//
// Without ACTSCALE_AVX512 it is the same in plain code, for tests on processors without it.
#pragma once
#include "simd.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t SIDE = 16;                 // rows of a tile, and its sums per row
constexpr int64_t TILE_WORDS = SIDE * SIDE;  // of 32 bits: a sum, or a pair of bfloat16 numbers

#if defined(ACTSCALE_AVX512)

// All eight tiles at full size. A thread holds this while it multiplies: state that is not released costs time at every
// switch between threads.
struct HeldTiles {
    HeldTiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        asm volatile("ldtilecfg %0" : : "m"(shape));
    }
    ~HeldTiles() { asm volatile("tilerelease"); }
    HeldTiles(const HeldTiles&) = delete;
};

// Not the compiler's own functions: in GCC 12 these do not say that they read memory, and earlier stores may move below
// them.
template <int TILE_ID> INLINE void load_tile(const void* p, int64_t bytes_per_row) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(bytes_per_row), "i"(TILE_ID) : "memory");
}
template <int TILE_ID> INLINE void store_tile(void* p, int64_t bytes_per_row) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(bytes_per_row), "i"(TILE_ID) : "memory");
}
template <int TILE_ID> INLINE void clear_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(TILE_ID)); }
template <int C, int A, int B> INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// rows[i][j] becomes rows[j][i], in memory that may be the same.
INLINE void transpose_tile(const uint32_t* in, uint32_t* out) {
    __m512i a[16], b[16];
    UNROLL_LOOPS
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * SIDE);
    UNROLL_LOOPS
    for (int i = 0; i < 16; i += 2) {  // pairs of rows, in each quarter of a register
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL_LOOPS
    for (int i = 0; i < 16; i += 4) {  // quarters [4q + j] of rows i to i + 3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL_LOOPS
    for (int j = 0; j < 4; j++) {  // the quarters of four rows to one register each
        const __m512i low = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
        _mm512_storeu_si512(out + j * SIDE, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(out + (j + 8) * SIDE, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(out + (j + 4) * SIDE, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(out + (j + 12) * SIDE, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

#else

struct Tile {
    uint32_t words[SIDE][SIDE];
};
static thread_local Tile tiles[8];

struct HeldTiles {
    HeldTiles() {}
    ~HeldTiles() { memset(tiles, 0xff, sizeof tiles); }  // NaN: nothing is left for the next user
    HeldTiles(const HeldTiles&) = delete;
};

template <int TILE_ID> INLINE void load_tile(const void* p, int64_t bytes_per_row) {
    for (int i = 0; i < SIDE; i++) memcpy(tiles[TILE_ID].words[i], (const char*)p + i * bytes_per_row, 64);
}
template <int TILE_ID> INLINE void store_tile(void* p, int64_t bytes_per_row) {
    for (int i = 0; i < SIDE; i++) memcpy((char*)p + i * bytes_per_row, tiles[TILE_ID].words[i], 64);
}
template <int TILE_ID> INLINE void clear_tile() { memset(&tiles[TILE_ID], 0, sizeof(Tile)); }

INLINE uint32_t cut(uint32_t bits) { return bits & 0xffff0000; }
INLINE float flushed(float v) { return v > -FLT_MIN && v < FLT_MIN ? 0.0f : v; }
INLINE float first_of(uint32_t pair) { return flushed(bits_to_float(pair << 16)); }
INLINE float second_of(uint32_t pair) { return flushed(bits_to_float(cut(pair))); }

template <int C, int A, int B> INLINE void multiply_tiles() {
    for (int m = 0; m < SIDE; m++) {
        float even[SIDE] = {}, odd[SIDE] = {};
        for (int k = 0; k < SIDE; k++) {
            const uint32_t a = tiles[A].words[m][k];
            for (int n = 0; n < SIDE; n++) {
                const uint32_t b = tiles[B].words[k][n];
                even[n] = flushed(fmaf(first_of(a), first_of(b), even[n]));
                odd[n] = flushed(fmaf(second_of(a), second_of(b), odd[n]));
            }
        }
        for (int n = 0; n < SIDE; n++) {
            const float sum = flushed(bits_to_float(tiles[C].words[m][n])) + flushed(even[n] + odd[n]);
            tiles[C].words[m][n] = float_to_bits(flushed(sum));
        }
    }
}

INLINE void transpose_tile(const uint32_t* in, uint32_t* out) {
    uint32_t turned[TILE_WORDS];
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) turned[j * SIDE + i] = in[i * SIDE + j];
    memcpy(out, turned, sizeof turned);
}

#endif

// How many bfloat16 numbers hold one of this type.
constexpr int parts_of(bf16) { return 1; }
constexpr int parts_of(half) { return 2; }
constexpr int parts_of(float) { return 3; }

typedef float Numbers __attribute__((vector_size(64)));   // 16 of a row
typedef uint32_t Words __attribute__((vector_size(64)));  // their bits, or 16 pairs

INLINE Words words_at(const void* p) {
    Words words;
    memcpy(&words, p, sizeof words);
    return words;
}
template <class T> INLINE Numbers numbers_at(const T* p) {
    float numbers[SIDE];
    for (int i = 0; i < SIDE; i += W) store(numbers + i, load(p + i));
    Numbers all;
    memcpy(&all, numbers, sizeof all);
    return all;
}
// The first `count`, and 0 for the others.
template <class T> INLINE Numbers numbers_at(const T* p, int64_t count) {
    if (count >= SIDE) return numbers_at(p);
    Numbers some = {};
    for (int i = 0; i < count; i++) some[i] = widen(p[i]);
    return some;
}
INLINE void put(uint32_t* out, Words words) { memcpy(out, &words, sizeof words); }

// The first part of each number, which keeps the rest. Products of an infinite number in parts are NaN.
INLINE Words cut(Numbers* numbers) {
    const Words part = (Words)*numbers & 0xffff0000;
    *numbers -= (Numbers)part;
    return part;
}
INLINE Words paired(Words first, Words second) { return first >> 16 | second; }

#if defined(ACTSCALE_AVX512)
INLINE Words in_a_row(Words first, Words second) {  // the parts of 32 numbers as 32 numbers of two bytes
    const __m512i odd = _mm512_add_epi16(
        _mm512_set1_epi16(1), _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28,
                                               26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0));
    return (Words)_mm512_permutex2var_epi16((__m512i)first, odd, (__m512i)second);
}
// Pairs of the first and of the last 16 of two rows of 32 numbers.
INLINE void interleave(Words first, Words second, Words* low, Words* high) {
    const __m512i from = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                          37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i later = _mm512_add_epi16(from, _mm512_set1_epi16(16));
    *low = (Words)_mm512_permutex2var_epi16((__m512i)first, from, (__m512i)second);
    *high = (Words)_mm512_permutex2var_epi16((__m512i)first, later, (__m512i)second);
}
#else
INLINE Words in_a_row(Words first, Words second) {
    Words row;
    for (int i = 0; i < SIDE; i++) {
        const Words& from = i < SIDE / 2 ? first : second;
        row[i] = from[2 * i % SIDE] >> 16 | cut(from[2 * i % SIDE + 1]);
    }
    return row;
}
INLINE void interleave(Words first, Words second, Words* low, Words* high) {
    for (int i = 0; i < SIDE; i++) {
        Words& out = i < SIDE / 2 ? *low : *high;
        out[2 * i % SIDE] = (first[i] & 0xffff) | second[i] << 16;
        out[2 * i % SIDE + 1] = first[i] >> 16 | cut(second[i]);
    }
}
#endif

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
