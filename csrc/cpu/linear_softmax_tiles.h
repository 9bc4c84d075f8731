// linear_softmax with the products of blocks by tiles of bfloat16 numbers (bf16_tiles.h), for the three types.
//
// Both products take the same instruction: 16 rows of W against 16 hidden states, 32 numbers of them at a time, and 16
// rows of weights e against 16 columns of W, 32 rows of W at a time. For the second one a block of W is copied with the
// numbers of two rows side by side, and e is cut into three parts and transposed, both into whole tiles (1 KiB each).
//
//   type      parts of W and h   passes of W·h   passes of e·W
//   bfloat16  1                  1               3
//   float16   2                  4               5
//   float32   3                  6               6
//
// Products of the second and the third part, or of two third parts, are left out: less than 2^-21 of the whole. Tiles
// make 16 times as many products per cycle as the fused multiply-adds of AVX-512.
#pragma once
#include "bf16_tiles.h"
#include "linear_softmax_splits.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t STEP = 2 * SIDE;             // numbers of a tile's row
constexpr int64_t BLOCK_BYTES = 512 << 10;     // of each copy of a block of W: both fill half of these processors' L2
constexpr int64_t GROUP_TILES = GROUP / SIDE;  // tiles of hidden states

// The tiles C[i][j], i < M and j < N, are 2i + j; the A tiles are 4 and 5, the B tiles 6 and 7.
template <int M, int N> INLINE void clear_sums() {
    clear_tile<0>();
    if (N > 1) clear_tile<1>();
    if (M > 1) clear_tile<2>();
    if (M > 1 && N > 1) clear_tile<3>();
}
template <int M, int N>
INLINE void add_products(const void* a, const void* a2, int64_t a_bytes, const uint32_t* b, const uint32_t* b2) {
    load_tile<4>(a, a_bytes), load_tile<6>(b, 64);
    multiply_tiles<0, 4, 6>();
    if (N > 1) load_tile<7>(b2, 64), multiply_tiles<1, 4, 7>();
    if (M > 1) load_tile<5>(a2, a_bytes), multiply_tiles<2, 5, 6>();
    if (M > 1 && N > 1) multiply_tiles<3, 5, 7>();
}
template <int M, int N> INLINE void store_sums(float* out, int64_t stride) {
    const int64_t bytes = stride * int64_t(sizeof(float));
    store_tile<0>(out, bytes);
    if (N > 1) store_tile<1>(out + SIDE, bytes);
    if (M > 1) store_tile<2>(out + SIDE * stride, bytes);
    if (M > 1 && N > 1) store_tile<3>(out + SIDE * stride + SIDE, bytes);
}

template <class T>
struct TileProducts {
    static constexpr int PARTS = parts_of(T()), E_PARTS = parts_of(float());
    static constexpr int LAST = 2;  // of a product of parts i and j: i + j, beyond which it is left out
    using Thread = HeldTiles;

    const LinearSoftmax& c;
    int64_t depth, block, steps, group_floats, own_floats;
    int64_t row_words, plain_words, paired_words, hidden_words, e_words;  // of a part

    explicit TileProducts(const LinearSoftmax& call) : c(call) {
        depth = (c.width + STEP - 1) / STEP * STEP;
        block = greater(1, smaller(8, BLOCK_BYTES / (2 * PARTS * greater(depth, 1) * STEP))) * STEP;
        steps = depth / STEP;
        row_words = depth / 2;
        plain_words = block * row_words, paired_words = block / 2 * depth;
        hidden_words = steps * GROUP_TILES * TILE_WORDS, e_words = block / STEP * GROUP_TILES * TILE_WORDS;
        group_floats = PARTS * hidden_words;
        own_floats = PARTS * (plain_words + paired_words) + E_PARTS * e_words + 4 * TILE_WORDS;  // the last: `sums`
    }

    // Tiles [part][step][n / 16], a row one pair of k: what W's rows are multiplied with.
    void pack(int64_t step, int64_t first, int64_t rows, float* packed) const {
        const int64_t begin = step * STEP;
        for (int64_t n = 0; n < GROUP; n++) {
            Numbers numbers[2] = {};
            if (n < rows) {
                const T* hidden = at(c.hidden, (first + n) * c.hidden_stride + begin, T());
                numbers[0] = numbers_at(hidden, c.width - begin);
                if (c.width - begin > SIDE) numbers[1] = numbers_at(hidden + SIDE, c.width - begin - SIDE);
            }
            uint32_t* tile = (uint32_t*)packed + (step * GROUP_TILES + n / SIDE) * TILE_WORDS;
            for (int part = 0; part < PARTS; part++) {
                const Words first_part = cut(numbers), row = in_a_row(first_part, cut(numbers + 1));
                put(tile + part * hidden_words + n % SIDE * SIDE, row);
            }
        }
        for (int part = 0; part < PARTS; part++)
            for (int64_t i = 0; i < GROUP_TILES; i++) {
                uint32_t* tile = (uint32_t*)packed + part * hidden_words + (step * GROUP_TILES + i) * TILE_WORDS;
                transpose_tile(tile, tile);
            }
    }

    uint32_t* plain(float* own) const { return (uint32_t*)own; }
    uint32_t* pairs(float* own) const { return plain(own) + PARTS * plain_words; }
    uint32_t* weights(float* own) const { return pairs(own) + PARTS * paired_words; }
    float* sums(float* own) const { return (float*)weights(own) + E_PARTS * e_words; }

    // Whether W's rows are multiplied where they lie.
    bool direct(int64_t count) const { return PARTS == 1 && c.width == depth && count % STEP == 0; }

    // Both copies of a block: its rows in parts, and tiles [part][i / 32][k / 16] with pairs of rows. Incomplete tiles are
    // padded with zeros.
    void copy(int64_t v, int64_t count, float* own) const {
        const int64_t chunk_words = depth / SIDE * TILE_WORDS, whole = (count + STEP - 1) / STEP * STEP;
        for (int64_t i = 0; i < whole; i += 2) {
            const T* row = at(c.weight, (v + smaller(i, count - 1)) * c.weight_stride, T());
            const T* next = at(c.weight, (v + smaller(i + 1, count - 1)) * c.weight_stride, T());
            uint32_t* paired_rows = pairs(own) + i / STEP * chunk_words + i % STEP / 2 * SIDE;
            uint32_t* rows = direct(count) ? nullptr : plain(own) + i * row_words;
            int64_t k = 0;
            if (i + 1 < count)
                for (; k + STEP <= c.width; k += STEP) {
                    uint32_t *tile = paired_rows + k / SIDE * TILE_WORDS, *out = rows ? rows + k / 2 : nullptr;
                    if constexpr (PARTS == 1) {  // bfloat16, as it is
                        const Words a = words_at(row + k), b = words_at(next + k);
                        copy_words(a, b, tile, out);
                    } else {
                        copy_numbers(numbers_at(row + k), numbers_at(row + k + SIDE), numbers_at(next + k),
                                     numbers_at(next + k + SIDE), tile, out);
                    }
                }
            for (; k < depth; k += STEP) {  // rows and columns that are not all there
                const int64_t first = i < count ? c.width - k : 0, second = i + 1 < count ? c.width - k : 0;
                copy_numbers(numbers_at(row + k, first), numbers_at(row + k + SIDE, first - SIDE),
                             numbers_at(next + k, second), numbers_at(next + k + SIDE, second - SIDE),
                             paired_rows + k / SIDE * TILE_WORDS, rows ? rows + k / 2 : nullptr);
            }
        }
    }

    INLINE_MEMBER void copy_words(Words a, Words b, uint32_t* tile, uint32_t* rows) const {
        Words low, high;
        interleave(a, b, &low, &high);
        put(tile, low), put(tile + TILE_WORDS, high);
        if (rows) put(rows, a), put(rows + row_words, b);
    }

    // 32 numbers of two rows in parts.
    INLINE_MEMBER void copy_numbers(Numbers a, Numbers a2, Numbers b, Numbers b2, uint32_t* tile,
                                    uint32_t* rows) const {
        for (int part = 0; part < PARTS; part++, tile += paired_words) {
            const Words a_part = cut(&a), a2_part = cut(&a2), b_part = cut(&b), b2_part = cut(&b2);
            put(tile, paired(a_part, b_part)), put(tile + TILE_WORDS, paired(a2_part, b2_part));
            if (!rows) continue;
            put(rows + part * plain_words, in_a_row(a_part, a2_part));
            put(rows + part * plain_words + row_words, in_a_row(b_part, b2_part));
        }
    }

    template <int M, int N>
    INLINE_MEMBER void multiply_tile(const void* w, int64_t bytes, int64_t part_bytes, const uint32_t* h,
                                     float* z) const {
        clear_sums<M, N>();
        for (int64_t step = 0; step < steps; step++)
            for (int i = 0; i < PARTS; i++)
                for (int j = 0; j < PARTS && i + j <= LAST; j++) {
                    const char* a = (const char*)w + i * part_bytes + step * 64;
                    const uint32_t* b = h + j * hidden_words + step * GROUP_TILES * TILE_WORDS;
                    add_products<M, N>(a, a + SIDE * bytes, bytes, b, b + TILE_WORDS);
                }
        store_sums<M, N>(z, GROUP);
    }

    void multiply(int64_t v, int64_t count, int64_t rows, const float* packed, float* z, float* own) const {
        copy(v, count, own);
        const bool stored = direct(count);
        const char* w = stored ? (const char*)at(c.weight, v * c.weight_stride, T()) : (const char*)plain(own);
        const int64_t bytes = stored ? c.weight_stride * int64_t(sizeof(T)) : row_words * 4;
        const uint32_t* h = (const uint32_t*)packed;
        for (int64_t i = 0; i < count; i += STEP)
            for (int64_t n = 0; n < rows; n += STEP) {
                const uint32_t* tile = h + n / SIDE * TILE_WORDS;
                float* out = z + i * GROUP + n;
                if (rows - n > SIDE) multiply_tile<2, 2>(w + i * bytes, bytes, plain_words * 4, tile, out);
                else multiply_tile<2, 1>(w + i * bytes, bytes, plain_words * 4, tile, out);
            }
    }

    // Tiles [part][n / 16][i / 32] of the weights, a row one n.
    void cut_weights(int64_t count, int64_t rows, const float* e, uint32_t* out) const {
        for (int64_t n = 0; n < rows; n += SIDE)
            for (int64_t i = 0; i < count; i += STEP) {
                uint32_t parts[E_PARTS][TILE_WORDS];
                for (int64_t k = 0; k < SIDE; k++) {
                    const float* from = e + (i + 2 * k) * GROUP + n;
                    Numbers a = {}, b = {};
                    if (i + 2 * k < count) a = numbers_at(from);
                    if (i + 2 * k + 1 < count) b = numbers_at(from + GROUP);
                    for (int part = 0; part < E_PARTS; part++) {
                        const Words first = cut(&a);
                        put(parts[part] + k * SIDE, paired(first, cut(&b)));
                    }
                }
                uint32_t* tile = out + (n / SIDE * (block / STEP) + i / STEP) * TILE_WORDS;
                for (int part = 0; part < E_PARTS; part++) transpose_tile(parts[part], tile + part * e_words);
            }
    }

    template <int M>
    INLINE_MEMBER void add_tile(int64_t chunks, const uint32_t* e, const uint32_t* w, float* sum, int64_t rows,
                                float* states, int64_t state) const {
        const int64_t next = block / STEP * TILE_WORDS;
        const int64_t w_step = depth / SIDE * TILE_WORDS;
        clear_sums<M, 2>();
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int j = 0; j < PARTS; j++)
                for (int i = 0; i < E_PARTS && i + j <= LAST; i++) {
                    const uint32_t *a = e + i * e_words + chunk * TILE_WORDS,
                                   *b = w + j * paired_words + chunk * w_step;
                    add_products<M, 2>(a, a + next, 64, b, b + TILE_WORDS);
                }
        store_sums<M, 2>(sum, STEP);
        for (int64_t n = 0; n < smaller(M * SIDE, rows); n++)
            for (int64_t k = 0; k < STEP; k += W) {
                float* total = states + n * state + k;
                store(total, load(total) + load(sum + n * STEP + k));
            }
    }

    void add_rows(int64_t, int64_t count, int64_t rows, const float* z, float* states, int64_t state,
                  float* own) const {
        const int64_t chunks = (count + STEP - 1) / STEP;
        cut_weights(count, rows, z, weights(own));
        for (int64_t k = 0; k < depth; k += STEP)
            for (int64_t n = 0; n < rows; n += STEP) {
                const uint32_t* e = weights(own) + n / SIDE * (block / STEP) * TILE_WORDS;
                const uint32_t* w = pairs(own) + k / SIDE * TILE_WORDS;
                float* total = states + n * state + k;
                if (rows - n > SIDE) add_tile<2>(chunks, e, w, sums(own), rows - n, total, state);
                else add_tile<1>(chunks, e, w, sums(own), rows - n, total, state);
            }
    }
};

template <class T>
static void linear_softmax_in_tiles(const LinearSoftmax& c) {
    linear_softmax_by<T, TileProducts<T>>(c);
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
